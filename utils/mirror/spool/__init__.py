"""Events that are accepted but not committed: a queue in memory, and a journal on disk."""
