"""Importing JSON files of other bots into the database, and exporting documents and tables."""
