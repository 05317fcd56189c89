"""Adapters in a running model: the pool on the device, and the modules that apply it."""
