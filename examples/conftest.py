"""Tests get Guildbook's fixture `bot`: the real bot with the packs of this directory, on a simulated Discord."""

pytest_plugins = ["testing.plugin"]
