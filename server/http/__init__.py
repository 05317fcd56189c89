"""The HTTP server: uvicorn on h11, with bounds on connections, request heads and waiting times."""
