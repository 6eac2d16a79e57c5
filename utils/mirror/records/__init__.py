"""What the mirror works on: rows, observations and events, and the checks that they can be stored."""
