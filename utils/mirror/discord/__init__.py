"""The mirror's connection to discord.py.

docs/explanation/architecture.md lists the private parts of discord.py that it uses, with the tests that fail when an
upgrade changes them.
"""
