"""Typed rows for cogs: a repository for each table, over SQLAlchemy's sessions."""

from utils.repositories.base import Conflict, NotFound, Page, Repository, Sessions
from utils.repositories.channels import ChannelRepository, RoleRepository, ThreadRepository
from utils.repositories.guilds import GuildRepository, GuildStatistics, GuildTotals
from utils.repositories.people import MemberRepository, MemberStatsRepository, UserRepository

__all__ = [
    "ChannelRepository",
    "Conflict",
    "GuildRepository",
    "GuildStatistics",
    "GuildTotals",
    "MemberRepository",
    "MemberStatsRepository",
    "NotFound",
    "Page",
    "Repository",
    "RoleRepository",
    "Sessions",
    "ThreadRepository",
    "UserRepository",
]
