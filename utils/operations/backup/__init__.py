"""Backups: create, store, verify, restore, drill, prune."""
