"""Tests of the packs over the wire."""
