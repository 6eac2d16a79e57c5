"""The schema: tables and views, nothing that runs. Merge, staging, COPY lists and migrations derive from it."""

from models.base import DISCORD_EPOCH_MS, Base, Erase, Part, mirrored_tables, part_of
from models.guilds import Channel, Guild, Role, Thread
from models.history import Change, SyncRun, UserChange
from models.ops import AdminAction, CommandTree, Lease, Suppression
from models.people import Member, User

__all__ = [
    "DISCORD_EPOCH_MS",
    "AdminAction",
    "Base",
    "Change",
    "Channel",
    "CommandTree",
    "Erase",
    "Guild",
    "Lease",
    "Member",
    "Part",
    "Role",
    "Suppression",
    "SyncRun",
    "Thread",
    "User",
    "UserChange",
    "mirrored_tables",
    "part_of",
]
