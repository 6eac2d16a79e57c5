"""How values travel: json and jsonb are Python objects, on every connection."""

from __future__ import annotations

from typing import Any

import orjson


async def set_codecs(conn: Any) -> None:
    """Make json and jsonb Python objects (in binary, the only format that COPY takes)."""
    await conn.set_type_codec(
        "jsonb", schema="pg_catalog", format="binary",
        encoder=lambda value: b"\x01" + orjson.dumps(value), decoder=lambda data: orjson.loads(data[1:]),
    )  # fmt: skip
    await conn.set_type_codec(
        "json", schema="pg_catalog", format="binary", encoder=orjson.dumps, decoder=orjson.loads
    )  # fmt: skip
