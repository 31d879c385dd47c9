"""
Drafts from the text itself: what followed its last tokens where they stood before (prompt lookup,
https://github.com/apoorvumang/prompt-lookup-decoding).
"""

# Tokens that must have stood before, the most first.
NGRAMS = (3, 2)


def continuation(ids: list[int], longest: int) -> list[int]:
    """Up to `longest` tokens that followed the latest earlier place of the longest of the last n-grams; maybe none."""
    for size in NGRAMS:
        last = ids[-size:]
        for start in range(len(ids) - size - 1, -1, -1):
            if ids[start] == last[0] and ids[start : start + size] == last:
                return ids[start + size : start + size + longest]
    return []
