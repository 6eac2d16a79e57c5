"""What operators and developers do: back up, migrate, look after, examine, import."""
