"""Upkeep of the database: maintenance, table descriptions and statistics."""
