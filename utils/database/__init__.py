"""PostgreSQL: targets, the pool, the embedded server, `bot.db` and its query cache, partitions."""

from utils.database.pool import Connection, Pool
from utils.database.target import ConnectTarget

__all__ = ["ConnectTarget", "Connection", "Pool"]
