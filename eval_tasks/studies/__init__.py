"""
What proto-tokens carry and how much. A study is a module here with its `Arguments` and `study(context, arguments)`; a
recipe's key `study` is its name.
"""

STUDIES = ("attention", "capacity", "errors", "imposing", "map", "roles", "stability")
