"""The process as its host and its peers see it: lease, health, metrics, garbage collection."""
