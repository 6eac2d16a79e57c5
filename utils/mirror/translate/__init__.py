"""Translates Discord's payloads into rows and events, without I/O."""
