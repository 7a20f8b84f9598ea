"""Descriptions call the bytes of trunks by their name."""

import json

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"

_DESCRIPTIONS = sa.table("descriptions", sa.column("model", sa.Text), sa.column("description", sa.LargeBinary))


def upgrade() -> None:
    known = op.get_bind().execute(sa.select(_DESCRIPTIONS.c.model, _DESCRIPTIONS.c.description)).all()
    for model, description in known:
        plain = json.loads(description)
        limits = plain.get("limits", {})
        if "kept_bytes" in limits:
            limits["trunk_bytes"] = limits.pop("kept_bytes")
            op.execute(
                sa.update(_DESCRIPTIONS)
                .where(_DESCRIPTIONS.c.model == model)
                .values(description=json.dumps(plain).encode())
            )
