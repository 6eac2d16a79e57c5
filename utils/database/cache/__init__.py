"""The query cache: results of queries, until a table that they read is written in this or another process."""

from utils.database.cache.analysis import Statement
from utils.database.cache.channel import Channel
from utils.database.cache.store import QueryCache

__all__ = ["Channel", "QueryCache", "Statement"]
