"""What cogs use beside `bot.db`: the types of its methods, retries, documents, and the preferences of members."""

from utils.cache import CacheStats
from utils.database.access import ConnectionHealth, Database
from utils.database.connections import (
    AcquiredConnection,
    ConnectionTransaction,
    PreparedOnConnection,
    TrackedConnection,
)
from utils.database.cursors import Cursor
from utils.database.named import TransactionSummary
from utils.database.orm import SessionScope
from utils.database.statements import PreparedStatement
from utils.database.transactions import Transaction
from utils.documents import Documents, preferences
from utils.retrying import retrying

__all__ = [
    "AcquiredConnection",
    "CacheStats",
    "ConnectionHealth",
    "ConnectionTransaction",
    "Cursor",
    "Database",
    "Documents",
    "PreparedOnConnection",
    "PreparedStatement",
    "SessionScope",
    "TrackedConnection",
    "Transaction",
    "TransactionSummary",
    "preferences",
    "retrying",
]
