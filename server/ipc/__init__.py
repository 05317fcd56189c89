"""The messages between the API process and the engine process, and the API side of the connection."""
