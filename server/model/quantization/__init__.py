"""Linears of a 4-bit base."""
