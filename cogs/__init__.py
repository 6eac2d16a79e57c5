"""What Discord sees: listeners and slash commands, one file a concern."""
