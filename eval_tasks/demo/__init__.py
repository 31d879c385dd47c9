"""A page that shows a model at work, beside its own decoder."""
