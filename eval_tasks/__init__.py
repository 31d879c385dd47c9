"""Measuring: answers, latency and reports."""
