"""Validation of an adapter: it can be applied exactly, or it is refused with every reason."""
