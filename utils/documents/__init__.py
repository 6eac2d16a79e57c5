"""Documents (typed settings and small stores for cogs, in one table) and member preferences."""

from utils.documents.documents import Documents

__all__ = ["Documents"]
