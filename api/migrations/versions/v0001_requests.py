"""Requests, contents, deployments and edits: what a store had before its database had versions."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None

_SEQ = sa.BigInteger().with_variant(sa.Integer, "sqlite")  # which counts up by itself only as an INTEGER


def upgrade() -> None:
    op.create_table(
        "requests",
        sa.Column("seq", _SEQ, primary_key=True, autoincrement=True),
        sa.Column("id", sa.Text, nullable=False, unique=True),
        sa.Column("model", sa.Text, nullable=False),
        sa.Column("owner", sa.Text, nullable=False, server_default="default"),
        sa.Column("state", sa.Text, nullable=False),
        sa.Column("created", sa.Double, nullable=False),
        sa.Column("started", sa.Double),
        sa.Column("finished", sa.Double),
        sa.Column("work", sa.BigInteger, nullable=False),
        sa.Column("attempts", sa.Integer, nullable=False, server_default="0"),
        sa.Column("cancelled", sa.Integer, nullable=False, server_default="0"),
        sa.Column("passes_done", sa.Integer, nullable=False, server_default="0"),
        sa.Column("passes", sa.Integer, nullable=False, server_default="0"),
        sa.Column("logs", sa.Text, nullable=False, server_default="[]"),
        sa.Column("error", sa.Text),
        sqlite_autoincrement=True,
    )
    is_open = sa.text("state IN ('queued', 'running')")
    op.create_index(
        "requests_open", "requests", ["model", "state", "seq"], sqlite_where=is_open, postgresql_where=is_open
    )
    op.create_table(
        "facts", sa.Column("id", sa.Text, primary_key=True), sa.Column("json", sa.LargeBinary, nullable=False)
    )
    op.create_table(
        "contents",
        sa.Column("owner", sa.Text, primary_key=True),
        sa.Column("digest", sa.Text, primary_key=True),
        sa.Column("bytes", sa.BigInteger, nullable=False),
        sa.Column("used", sa.Double, nullable=False),
        sa.Column("is_uploaded", sa.Integer, nullable=False),
    )
    op.create_table(
        "kept",
        sa.Column("owner", sa.Text, primary_key=True),
        sa.Column("is_state", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("name", sa.Text, primary_key=True),
        sa.Column("dtype", sa.Text, nullable=False),
        sa.Column("shape", sa.Text, nullable=False),
        sa.Column("digest", sa.Text, nullable=False),
        sa.Column("version", sa.Integer, nullable=False),
        sa.Column("request", sa.Text),
        sa.Column("expires", sa.Double),
    )
    op.create_index("kept_digest", "kept", ["owner", "digest"])
    op.create_table(
        "uses",
        sa.Column("id", sa.Text, nullable=False),
        sa.Column("seq", sa.BigInteger),
        sa.Column("owner", sa.Text, nullable=False),
        sa.Column("state", sa.Text),
        sa.Column("is_update", sa.Integer, nullable=False, server_default="0"),
        sa.Column("digest", sa.Text),
    )
    op.create_index("uses_id", "uses", ["id"])
    for column, columns in {"state": ["owner", "state", "seq"], "digest": ["owner", "digest"]}.items():
        where = sa.text(f"{column} IS NOT NULL")
        op.create_index(f"uses_{column}", "uses", columns, sqlite_where=where, postgresql_where=where)
    op.create_table(
        "room",
        sa.Column("part", sa.Text, primary_key=True),
        sa.Column("id", sa.Text, nullable=False),
        sa.Column("owner", sa.Text, nullable=False),
        sa.Column("bytes", sa.BigInteger, nullable=False),
    )
    op.create_index("room_id", "room", ["id"])
    op.create_table(
        "deployments",
        sa.Column("model", sa.Text, primary_key=True),
        sa.Column("state", sa.Text, nullable=False),
        sa.Column("progress", sa.Text, nullable=False),
        sa.Column("updated", sa.Double, nullable=False),
        sa.Column("spec", sa.Text),
        sa.Column("mode", sa.Text, nullable=False, server_default="serving"),
        sa.Column("revision", sa.Integer, nullable=False, server_default="1"),
        sa.Column("replicas", sa.Text, nullable=False, server_default="[]"),
        sa.Column("source", sa.Text),
        sa.Column("dtype", sa.Text),
        sa.Column("description", sa.LargeBinary),
        sa.Column("tokenizer", sa.LargeBinary),
    )
    op.create_table(
        "edits",
        sa.Column("model", sa.Text, primary_key=True),
        sa.Column("owner", sa.Text, primary_key=True),
        sa.Column("name", sa.Text, primary_key=True),
        sa.Column("version", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("is_shared", sa.Integer, nullable=False),
        sa.Column("created", sa.Double, nullable=False),
        sa.Column("num_bytes", sa.BigInteger, nullable=False),
        sa.Column("body", sa.LargeBinary),  # without one: deleted
    )
