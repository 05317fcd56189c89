"""Linear layers of a 4-bit base model."""
