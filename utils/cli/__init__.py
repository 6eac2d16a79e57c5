"""Guildbook's command lines: what is typed, what is shown, and exit codes."""
