"""The stages of `train.py`, one a module."""
