"""The mirror: translates gateway payloads to rows, and reconciles the tables with complete listings."""

from utils.mirror.mirror import Mirror

__all__ = ["Mirror"]
