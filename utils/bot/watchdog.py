"""The watchdog: names the cog and the line that block the event loop.

While the loop is blocked, no command is answered, and no timer of the loop can say so. A thread looks at the loop's
stack when its heart-beat is late.
"""

from __future__ import annotations

import asyncio
import linecache
import logging
import sys
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from utils.bot import positions
from utils.bot.registrations import is_within
from utils.logs import RateLimit
from utils.service import metrics

_log = logging.getLogger(__name__)

#: Seconds for which the loop may be blocked.
THRESHOLD = 0.2
#: Seconds between two beats of the loop, and between two looks at a blocked one.
INTERVAL = 0.05
#: Seconds after which a block that lasts is logged before it ends.
LONG_BLOCK = 2.0
#: Blocks that are logged within a minute, and of one line.
LINES_PER_MINUTE, LINES_PER_PLACE = 20, 3


@dataclass(frozen=True, slots=True)
class Block:
    """What blocked the loop."""

    #: The module of the cog, or of other code if no cog was running.
    module: str
    #: "path:line in function".
    place: str
    #: The line's source; "" if it cannot be read.
    source: str
    #: Whether the module is a cog's.
    is_cog: bool


class Watchdog:
    """Watches the running event loop from `start` to `stop`.

    `modules` returns the modules of the cogs; it is called in the watching thread. Times are in seconds.
    """

    def __init__(
        self,
        modules: Callable[[], Iterable[str]],
        *,
        threshold: float = THRESHOLD,
        interval: float = INTERVAL,
        long_block: float = LONG_BLOCK,
    ) -> None:
        self.threshold: float = threshold
        self.interval: float = interval
        self.long_block: float = long_block
        self._modules = modules
        self._logged = RateLimit(LINES_PER_MINUTE, 60.0, per_key=LINES_PER_PLACE)
        self._beat = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None
        self._loop_thread = 0

    def start(self) -> None:
        """Begin to watch the running loop."""
        if self._thread is not None:
            return
        self._stopping.clear()
        self._loop_thread = threading.get_ident()
        loop = asyncio.get_running_loop()
        self._tick(loop)
        self._thread = threading.Thread(target=self._watch, name="loop watchdog", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Stop watching."""
        self._stopping.set()
        self._thread = None
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _tick(self, loop: asyncio.AbstractEventLoop) -> None:
        self._beat = time.perf_counter()
        self._timer = loop.call_later(self.interval, self._tick, loop)

    def _watch(self) -> None:
        stopping = self._stopping
        found: Block | None = None
        beat_then, began, was_logged = 0.0, 0.0, False
        looked, pause = time.perf_counter(), self.interval
        while not stopping.wait(pause):
            beat, now = self._beat, time.perf_counter()
            was_starved, looked = now - looked > pause + self.threshold / 2, now
            if found is not None and beat != beat_then:
                if not was_logged and beat - began >= self.threshold / 2:
                    self._report(found, beat - began)
                found = None
            # While the loop beats, look only when its last beat would be overdue: a look takes the interpreter's lock.
            overdue_in = beat + self.interval + self.threshold - now
            pause = max(self.interval, overdue_in)
            if overdue_in > 0:
                continue
            if found is None:
                if was_starved:  # the whole process was suspended
                    continue
                found, beat_then, began, was_logged = self._find(), beat, beat + self.interval, False
            elif (other := self._find()) is not None and other.is_cog and other.module != found.module:
                # Several callbacks, one after the other, before the loop could beat.
                if not was_logged and now - began >= self.threshold / 2:
                    self._report(found, now - began)
                found, began, was_logged = other, now, False
            elif now - began >= self.long_block and not was_logged:
                self._report(found, now - began, is_over=False)
                was_logged = True

    def _find(self) -> Block | None:
        frames = positions.running_frames(sys._current_frames().get(self._loop_thread))
        try:
            modules = list(self._modules())
        except RuntimeError:  # a cog is being loaded in the other thread
            modules = []
        cog = positions.innermost(
            frames, lambda frame: any(is_within(frame.f_globals.get("__name__"), it) for it in modules)
        )
        frame = (
            cog or positions.innermost(frames, positions.is_foreign_code) or positions.innermost(frames, lambda _: True)
        )
        if frame is None:
            return None
        module = str(frame.f_globals.get("__name__", "?"))
        source = linecache.getline(frame.f_code.co_filename, frame.f_lineno, frame.f_globals).strip()
        return Block(module, positions.describe_frame(frame), source, cog is not None)

    def _report(self, block: Block, seconds: float, *, is_over: bool = True) -> None:
        metrics.loop_blocks.labels(block.module).inc()
        if not self._logged.admits(block.place):
            return
        fields = {"seconds": round(seconds, 2), "module_name": block.module}
        if unlogged := self._logged.take_refused():
            fields["blocks_not_logged"] = unlogged
        _log.warning(
            "the event loop %s blocked for %.2f s by %s at %s: %s",
            "was" if is_over else "has been", seconds, block.module, block.place, block.source,
            extra=fields,
        )  # fmt: skip
