"""Puts backups in the place of what is live, or proves that it could."""
