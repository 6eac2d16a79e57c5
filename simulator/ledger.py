"""The ledger: what the world has told that no listing shows afterwards, messages and comings and goings."""

from __future__ import annotations

from typing import Any, NamedTuple


class ToldMessage(NamedTuple):
    """A message that was told: its id, guild and author."""

    id: int
    guild_id: int
    user_id: int


class ToldMove(NamedTuple):
    """Somebody joined, left, was banned or unbanned."""

    guild_id: int
    user_id: int
    #: join, leave, ban or unban.
    kind: str
    #: Of a join, when, in microseconds of Unix time.
    joined_us: int | None = None


class Ledger:
    """Lists what was told, in order; for whoever wants to know whether it was all written down, and once."""

    def __init__(self) -> None:
        self.messages: list[ToldMessage] = []
        self.moves: list[ToldMove] = []

    def sizes(self) -> tuple[int, int]:
        """Give how many messages and how many moves were told."""
        return len(self.messages), len(self.moves)

    def since(self, messages: int = 0, moves: int = 0) -> dict[str, list[list[Any]]]:
        """List what was told after so many messages and moves, as plain lists."""
        return {"messages": [[*it] for it in self.messages[messages:]], "moves": [[*it] for it in self.moves[moves:]]}

    def message(self, id: int, guild_id: int, user_id: int) -> None:
        """Note a message."""
        self.messages.append(ToldMessage(id, guild_id, user_id))

    def move(self, guild_id: int, user_id: int, kind: str, joined_us: int | None = None) -> None:
        """Note that somebody came or went."""
        self.moves.append(ToldMove(guild_id, user_id, kind, joined_us))
