<%!
import textwrap


def docstring(message):
    text = " ".join(message.split()).rstrip(".").replace("\\", "\\\\").replace('"', '\\"')
    return "\n".join(textwrap.wrap(f"{text or 'A revision'}.", 110, break_on_hyphens=False))
%>\
"""${message | docstring}"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
${imports if imports else ""}

revision = ${repr(up_revision)}
down_revision = ${repr(down_revision)}
branch_labels = ${repr(branch_labels)}
depends_on = ${repr(depends_on)}


def upgrade() -> None:
    ${upgrades if upgrades else "pass"}


def downgrade() -> None:
    ${downgrades if downgrades else "pass"}
