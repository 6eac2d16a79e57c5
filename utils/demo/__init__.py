"""The demo: the real bot on a simulated Discord, and the proof that its tables are right."""
