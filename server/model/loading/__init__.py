"""Loading of the base model from a folder, a hub id or a GGUF file, and the checks that it is served exactly."""
