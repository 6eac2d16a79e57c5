"""Economy: a pack with coins, transfers and a shop."""
