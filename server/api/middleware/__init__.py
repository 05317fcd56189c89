"""Middleware of every request: request ids, API keys, body limits and rate limits."""
