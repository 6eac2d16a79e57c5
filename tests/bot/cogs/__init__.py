"""Cogs that are wrong on purpose, and one that may change its command."""
