"""Moderation: a pack with numbered cases, and bans that expire."""
