"""Repositories: typed access to the rows of one table each, through SQLAlchemy sessions."""

from utils.repositories.base import Page, Repository, SessionFactory
from utils.repositories.channels import ChannelRepository, RoleRepository, ThreadRepository
from utils.repositories.guilds import GuildRepository, GuildStatistics, GuildTotals
from utils.repositories.people import MemberRepository, MemberStatsRepository, UserRepository, UserTotals

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
    "SessionFactory",
    "ThreadRepository",
    "UserRepository",
    "UserTotals",
]
