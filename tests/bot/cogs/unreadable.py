"""A cog that cannot be imported."""

raise RuntimeError("this cog is broken at its import")
