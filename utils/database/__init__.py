"""The way to PostgreSQL: where it is, the pool, the embedded server, partitions."""

from utils.database.pool import Connection, Pool
from utils.database.target import ConnectTarget

__all__ = ["ConnectTarget", "Connection", "Pool"]
