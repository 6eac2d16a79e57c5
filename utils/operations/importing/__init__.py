"""What bots used to keep in JSON files: read, checked, repaired, brought into the database, and written out again."""
