"""Backups: made, checked, kept, brought back."""
