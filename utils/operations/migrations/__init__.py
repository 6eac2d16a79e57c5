"""The schema's revisions: applying them, reverting them, and comparing the result with the models."""

from utils.database.ownership import SCRIPTS
from utils.operations.migrations.drift import check_drift
from utils.operations.migrations.environment import DEFAULTS, MigrationOptions
from utils.operations.migrations.history import Actor, AppliedRevision, Pause
from utils.operations.migrations.pack_revisions import PackState, pack_states, prepare_packs, upgrade_packs
from utils.operations.migrations.revisions import Revision, Revisions
from utils.operations.migrations.runner import (
    MigrationResult,
    applied,
    back_up_first,
    current,
    current_heads,
    downgrade,
    find_obstacle,
    find_pause,
    known_revisions,
    offline_sql,
    pause_auto_migrate,
    pending,
    prepare_schema,
    resume_auto_migrate,
    stamp,
    upgrade,
)

__all__ = [
    "DEFAULTS",
    "SCRIPTS",
    "Actor",
    "AppliedRevision",
    "MigrationOptions",
    "MigrationResult",
    "PackState",
    "Pause",
    "Revision",
    "Revisions",
    "applied",
    "back_up_first",
    "check_drift",
    "current",
    "current_heads",
    "downgrade",
    "find_obstacle",
    "find_pause",
    "known_revisions",
    "offline_sql",
    "pack_states",
    "pause_auto_migrate",
    "pending",
    "prepare_packs",
    "prepare_schema",
    "resume_auto_migrate",
    "stamp",
    "upgrade",
    "upgrade_packs",
]
