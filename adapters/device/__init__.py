"""What concerns the processor or the device, and is shared by the LoRA kernels and the base model."""
