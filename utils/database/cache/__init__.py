"""The query cache: results of SELECTs, kept until one of their tables is written, here or in another process."""

from utils.database.cache.channel import Channel
from utils.database.cache.statements import Statement
from utils.database.cache.store import QueryCache

__all__ = ["Channel", "QueryCache", "Statement"]
