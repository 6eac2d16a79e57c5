"""Backups: make, store, verify, restore, drill, prune."""
