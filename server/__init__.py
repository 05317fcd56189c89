"""Loraplex: turns requests into tokens. Knows HTTP, sequences, the KV cache and the model."""

__version__ = "0.1.0"
