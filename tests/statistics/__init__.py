"""Figures, growth, and the picture."""
