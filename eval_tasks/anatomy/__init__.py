"""What fitted proto-tokens carry: studies on texts and their `(e, m)`, each to figures, rows and a picture."""
