"""The cogs of the pack."""
