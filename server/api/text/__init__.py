"""Tokenizers and chat templates, including those of adapters."""
