"""The Loraplex server: the HTTP API, the engine process, and the model."""

__version__ = "0.1.0"
