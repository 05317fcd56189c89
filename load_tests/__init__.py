"""Measurements against other servers and libraries; nothing here is timed in a test."""
