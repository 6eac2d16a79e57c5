"""What the bot is made of, below the cogs: settings, database, mirror, service."""
