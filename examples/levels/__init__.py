"""Levels: a pack that gives experience for messages and reactions, with text commands."""
