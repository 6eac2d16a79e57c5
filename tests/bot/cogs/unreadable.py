"""A cog whose import raises."""

raise RuntimeError("import fails")
