"""The control endpoint: controls a simulator from another process over HTTP and JSON."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Mapping, Sequence, Set
from dataclasses import fields, is_dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any

from aiohttp import web

if TYPE_CHECKING:
    from .server import Simulator

_ROWS_PER_WRITE = 2000
_TIME_KEY = "$time"


def encode(value: Any) -> Any:
    """Convert a value to JSON types; datetimes are tagged, dataclasses become dicts."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, datetime):
        return {_TIME_KEY: value.isoformat()}
    if isinstance(value, Mapping):
        return {str(key): encode(item) for key, item in value.items()}
    if isinstance(value, Set):
        return [encode(item) for item in sorted(value)]
    if isinstance(value, Sequence):
        return [encode(item) for item in value]
    if is_dataclass(value):
        content = {f.name: encode(getattr(value, f.name)) for f in fields(value) if not f.name.startswith("_")}
        return content | {
            name: encode(getattr(value, name)) for name in ("final_content", "done") if hasattr(value, name)
        }
    return repr(value)


def decode(value: Any) -> Any:
    """Decode JSON from `encode`, restoring datetimes."""
    if isinstance(value, dict):
        if value.keys() == {_TIME_KEY}:
            return datetime.fromisoformat(value[_TIME_KEY])
        return {key: decode(item) for key, item in value.items()}
    if isinstance(value, list):
        return [decode(item) for item in value]
    return value


class Control:
    """Calls and reads a simulator's attributes by dotted name: `world.join`, `faults.injected`, `random_events`."""

    def __init__(self, simulator: Simulator) -> None:
        self._simulator = simulator
        self._rngs: dict[int, random.Random] = {}
        self._roots: dict[str, Any] = {
            "world": simulator.world,
            "faults": simulator.faults,
            "gateway": simulator.gateway,
            "rules": simulator.rules,
            "interactions": simulator.interactions,
            "request_reconnect": simulator.request_reconnect,
            "traffic": simulator.traffic,
            "run_command": self.run_command,
            "random_events": self.random_events,
        }

    def routes(self) -> list[web.RouteDef]:
        """Return the routes of this class."""
        return [web.post("/control", self._call), web.get("/control/rows/{table}", self._rows)]

    async def random_events(self, events: int, seed: int = 1, seconds: float = 0.0) -> list[str]:
        """Apply random mutations, spread over `seconds`; a seed continues where its last call stopped."""
        rng = self._rngs.setdefault(seed, random.Random(seed))
        descriptions = []
        for number in range(events):
            descriptions.append(self._simulator.world.random_event(rng))
            if seconds or number % 100 == 99:
                await asyncio.sleep(seconds / events)
        return descriptions

    async def run_command(self, name: str, *, timeout: float = 10.0, **where: Any) -> Any:
        """Run a slash command and return its result when it is done."""
        result = await self._simulator.run_command(name, **where)
        return await result.wait_done(timeout)

    async def _call(self, request: web.Request) -> web.Response:
        try:
            call = await request.json()
            target = self._find(str(call["call"]))
            value = target
            if callable(target):
                value = target(*decode(call.get("args", [])), **decode(call.get("kwargs", {})))
            if asyncio.iscoroutine(value):
                value = await value
            return web.json_response({"result": encode(value)})
        except Exception as exc:  # errors are reported to the caller in the other process
            return web.json_response({"error": f"{type(exc).__name__}: {exc}"}, status=400)

    def _find(self, name: str) -> Any:
        head, *rest = name.split(".")
        if head not in self._roots or any(part.startswith("_") for part in rest):
            raise LookupError(f"unknown name {name!r}: names start with {', '.join(self._roots)}")
        found = self._roots[head]
        for part in rest:
            found = getattr(found, part)
        return found

    async def _rows(self, request: web.Request) -> web.StreamResponse:
        guild_id = request.query.get("guild_id")
        rows = self._simulator.world.expected_rows(request.match_info["table"], int(guild_id) if guild_id else None)
        response = web.StreamResponse(headers={"Content-Type": "application/jsonl"})
        await response.prepare(request)
        lines: list[str] = []
        for row in rows:
            lines.append(json.dumps(encode(row)))
            if len(lines) >= _ROWS_PER_WRITE:
                await response.write(("\n".join(lines) + "\n").encode("ascii"))
                lines.clear()
        if lines:
            await response.write(("\n".join(lines) + "\n").encode("ascii"))
        await response.write_eof()
        return response
