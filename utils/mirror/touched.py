"""What live events spoke of while a listing was under way: there the listing is the older observation."""

from __future__ import annotations

from collections.abc import Iterator

from utils.mirror.rows import Entry, Key, Row

Slot = tuple[str, Key]


class Touched:
    """Remembers live observations for as long as one older than them is still to be merged.

    Changed or not: an event that changed nothing leaves no stamp in the table, yet it beats an older page.
    """

    __slots__ = ("_entries", "_open")

    def __init__(self) -> None:
        self._open: set[object] = set()
        #: By table and guild (0 for users), then by key.
        self._entries: dict[tuple[str, int], dict[Key, Entry]] = {}

    def open(self, observation: object) -> None:
        """Start to remember what comes live, for an observation made now."""
        self._open.add(observation)

    def close(self, observation: object) -> None:
        """Forget an observation, and with the last one all that was remembered."""
        self._open.discard(observation)
        if not self._open:
            self._entries.clear()

    def add(self, row: Row, stamp: int) -> None:
        """Note that a live event spoke of a row."""
        if not self._open:
            return
        known = self._entries.setdefault((row.table, _scope(row.table, row.key)), {})
        entry = Entry(row.values, row.appears, stamp)
        earlier = known.get(row.key)
        known[row.key] = entry if earlier is None else earlier.overlaid(entry)

    def since(self, table: str, guild_id: int, stamp: int) -> set[int]:
        """Return the ids (the last part of the key) of a guild's rows touched after `stamp`; guild 0 for users."""
        known = self._entries.get((table, guild_id))
        return {key[-1] for key, entry in known.items() if entry.stamp > stamp} if known else set()

    def again(self, guild_id: int, stamp: int) -> Iterator[tuple[Slot, Entry]]:
        """Yield what a guild's live events after `stamp` said that could not make a row by itself.

        It fell on nothing if the row was not there yet; once the listing has been merged it is, so it is said again.
        """
        for (table, scope), known in self._entries.items():
            if scope == guild_id and table != "users":
                for key, entry in known.items():
                    if entry.stamp > stamp and not entry.appears:
                        yield (table, key), entry


def _scope(table: str, key: Key) -> int:
    return 0 if table == "users" else key[0]
