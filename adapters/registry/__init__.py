"""Adapter names, versions and the store of their files."""
