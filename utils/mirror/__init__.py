"""The mirror: gateway payloads to rows, one write path, reconcile against complete listings."""

from utils.mirror.mirror import Mirror

__all__ = ["Mirror"]
