"""The schema: tables, views and relationships. Merge, staging, COPY lists and migrations derive from it."""

from models.base import DISCORD_EPOCH_MS, Base, Erase, Part, mirrored_tables, part_of
from models.documents import Document
from models.guilds import Channel, Guild, Role, Thread
from models.history import Change, MemberEvent, SyncRun, UserChange
from models.ops import (
    AdminAction,
    CommandTree,
    CountedMessage,
    DeadLetter,
    Lease,
    Migration,
    Position,
    Suppression,
    TableSize,
)
from models.people import Member, MemberPreferences, MemberStats, User

__all__ = [
    "DISCORD_EPOCH_MS",
    "AdminAction",
    "Base",
    "Change",
    "Channel",
    "CommandTree",
    "CountedMessage",
    "DeadLetter",
    "Document",
    "Erase",
    "Guild",
    "Lease",
    "Member",
    "MemberEvent",
    "MemberPreferences",
    "MemberStats",
    "Migration",
    "Part",
    "Position",
    "Role",
    "Suppression",
    "SyncRun",
    "TableSize",
    "Thread",
    "User",
    "UserChange",
    "mirrored_tables",
    "part_of",
]
