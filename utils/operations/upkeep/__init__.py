"""Looking after the database: its tables described, measured and maintained."""
