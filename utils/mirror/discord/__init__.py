"""The edge to discord.py: raw gateway payloads in, member requests and listings out."""
