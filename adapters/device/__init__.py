"""Processor and device code shared by the LoRA kernels and the base model."""
