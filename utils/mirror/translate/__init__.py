"""Discord's payloads translated into rows. Nothing here does I/O."""
