"""Reconciling guilds: complete listings compared with the tables."""
