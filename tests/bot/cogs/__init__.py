"""Cogs for tests: some fail on purpose, one changes its command, one asks for confirmation."""
