"""The messages between the API's process and the engine's, and the API's half of the connection."""
