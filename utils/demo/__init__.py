"""The demo: runs the real bot against a simulated Discord and verifies every row of its tables."""
