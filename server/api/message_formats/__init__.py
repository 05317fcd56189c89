"""Formats of function calls and reasoning in the output of chat models, one per file."""
