"""Readers for PEFT's files: config, tensors and tokenizer files of an adapter, before validation."""
