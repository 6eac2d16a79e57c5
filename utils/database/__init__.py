"""The way to PostgreSQL: where it is, the pool, the embedded server, partitions."""

from utils.database.pool import Connection, Database
from utils.database.target import ConnectTarget

__all__ = ["ConnectTarget", "Connection", "Database"]
