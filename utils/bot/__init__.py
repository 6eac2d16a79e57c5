"""The bot: discord.py's client with the database and the mirror on it, its process, and its cogs."""
