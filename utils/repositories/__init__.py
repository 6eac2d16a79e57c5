"""Typed rows for cogs: a repository for each table, over SQLAlchemy's sessions."""

from utils.repositories.base import Page, Repository, Sessions
from utils.repositories.channels import ChannelRepository, RoleRepository, ThreadRepository
from utils.repositories.guilds import GuildRepository, GuildStatistics, GuildTotals
from utils.repositories.people import MemberRepository, MemberStatsRepository, UserRepository

__all__ = [
    "ChannelRepository",
    "GuildRepository",
    "GuildStatistics",
    "GuildTotals",
    "MemberRepository",
    "MemberStatsRepository",
    "Page",
    "Repository",
    "RoleRepository",
    "Sessions",
    "ThreadRepository",
    "UserRepository",
]
