"""The one write path: buffer, merge, events, dead letters."""
