"""Scratch tables, schemas and databases, in which a backup is loaded and counted before anything relies on it."""
