"""One backup: what belongs to it, its manifest, and how its archive is written and read."""
