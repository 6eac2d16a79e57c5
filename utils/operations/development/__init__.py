"""For developers: a filled database, and new cogs."""
