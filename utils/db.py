"""What `bot.db` is: the database as cogs use it, and the types that its methods take and return."""

from utils.database.access import Database
from utils.database.statements import PreparedStatement
from utils.database.transactions import Transaction

__all__ = ["Database", "PreparedStatement", "Transaction"]
