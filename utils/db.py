"""What cogs use beside `bot.db`: the types of its methods, documents, and the preferences of members."""

from utils.database.access import Database
from utils.database.statements import PreparedStatement
from utils.database.transactions import Transaction
from utils.documents import Documents, preferences

__all__ = ["Database", "Documents", "PreparedStatement", "Transaction", "preferences"]
