"""Rows, observations and events that pass through the mirror, and their validation."""
