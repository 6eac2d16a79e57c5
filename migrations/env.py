"""Alembic's entry point, from its command line and from the bot."""

from alembic import context

from utils.operations.migrations.environment import run_offline, run_online

if context.is_offline_mode():
    run_offline()
else:
    run_online()
