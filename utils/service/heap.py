"""Garbage collector settings that keep it from blocking the event loop."""

from __future__ import annotations

import gc

#: Thresholds of `gc.set_threshold`. Full collections go over modules that live as long as the process, and are the
#: longest stalls while members arrive: `make bench` shows the longest (benchmarks/results/foundation.md). The middle
#: generation stays small, because members that enter discord.py's cache meanwhile make its collections long.
THRESHOLDS = (5_000, 10, 500)


def freeze_heap() -> None:
    """Exempt everything allocated so far from collection. Call it once, before connecting."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(*THRESHOLDS)
