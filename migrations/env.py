"""Alembic's way in, from its command line and from the bot alike."""

from alembic import context

from utils.operations.migrations.environment import run_offline, run_online

if context.is_offline_mode():
    run_offline()
else:
    run_online()
