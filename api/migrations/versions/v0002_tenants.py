"""Tenants, their users and keys; what they used; what operators did; whose a request is and what it cost."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"

_SEQ = sa.BigInteger().with_variant(sa.Integer, "sqlite")
_NOBODY, _LOCAL = "default", "default~default"  # whose everything was, and what `api.identity` calls that caller


def upgrade() -> None:
    op.create_table(
        "tenants",
        sa.Column("name", sa.Text, primary_key=True),
        sa.Column("created", sa.Double, nullable=False),
        sa.Column("disabled", sa.Integer, nullable=False, server_default="0"),
        sa.Column("weight", sa.Double, nullable=False, server_default="1"),
        sa.Column("limits", sa.Text, nullable=False, server_default="{}"),  # JSON of `api.limits.TenantLimits`
        sa.Column("models", sa.Text),  # JSON list of the deployments that it may use; NULL: all
    )
    op.execute("INSERT INTO tenants (name, created) VALUES ('default', 0)")
    op.create_table(
        "users",
        sa.Column("tenant", sa.Text, primary_key=True),
        sa.Column("name", sa.Text, primary_key=True),
        sa.Column("role", sa.Text, nullable=False),
        sa.Column("created", sa.Double, nullable=False),
        sa.Column("disabled", sa.Integer, nullable=False, server_default="0"),
    )
    op.create_table(
        "keys",
        sa.Column("prefix", sa.Text, primary_key=True),  # what a key begins with, to find it by
        sa.Column("hash", sa.LargeBinary, nullable=False),  # of the whole key, which is nowhere
        sa.Column("tenant", sa.Text, nullable=False),
        sa.Column("user_name", sa.Text, nullable=False),
        sa.Column("label", sa.Text, nullable=False, server_default=""),
        sa.Column("created", sa.Double, nullable=False),
        sa.Column("expires", sa.Double),
        sa.Column("revoked", sa.Double),
        sa.Column("last_used", sa.Double),
    )
    op.create_index("keys_of", "keys", ["tenant", "user_name"])
    for column in (
        sa.Column("tenant", sa.Text, nullable=False, server_default="default"),
        sa.Column("user_name", sa.Text, nullable=False, server_default="default"),
        sa.Column("is_interactive", sa.Integer, nullable=False, server_default="1"),
        sa.Column("tokens", sa.BigInteger, nullable=False, server_default="0"),  # of its sequences, as certified
        sa.Column("token_layers", sa.BigInteger, nullable=False, server_default="0"),  # measured, once it has ended
        sa.Column("moved_bytes", sa.BigInteger, nullable=False, server_default="0"),
        sa.Column("result_bytes", sa.BigInteger, nullable=False, server_default="0"),
    ):
        op.add_column("requests", column)
    is_open = sa.text("state IN ('queued', 'running')")
    op.create_index(
        "requests_of_tenants",
        "requests",
        ["model", "tenant", "state", "is_interactive", "seq"],
        sqlite_where=is_open,
        postgresql_where=is_open,
    )
    op.create_index("requests_started", "requests", ["model", "tenant", "started"])
    has_ended = sa.text("finished IS NOT NULL")
    op.create_index(
        "requests_finished",
        "requests",
        ["model", "finished"],
        sqlite_where=has_ended,
        postgresql_where=has_ended,
    )
    op.create_index("requests_of", "requests", ["tenant", "user_name", "created"])
    op.create_index("requests_hold", "requests", ["tenant", "state", "result_bytes", "tokens"])
    op.create_table(
        "idempotency",
        sa.Column("owner", sa.Text, primary_key=True),
        sa.Column("key", sa.Text, primary_key=True),
        sa.Column("request", sa.Text, nullable=False),
        sa.Column("digest", sa.Text, nullable=False),  # of the request's bytes: the same key with others is refused
    )
    op.create_index("idempotency_request", "idempotency", ["request"])
    op.create_table(
        "usage",
        sa.Column("tenant", sa.Text, primary_key=True),
        sa.Column("user_name", sa.Text, primary_key=True),
        sa.Column("model", sa.Text, primary_key=True),
        sa.Column("day", sa.Text, primary_key=True),  # YYYY-MM-DD, UTC
        sa.Column("requests", sa.BigInteger, nullable=False, server_default="0"),
        sa.Column("failed", sa.BigInteger, nullable=False, server_default="0"),
        sa.Column("tokens", sa.BigInteger, nullable=False, server_default="0"),
        sa.Column("token_layers", sa.BigInteger, nullable=False, server_default="0"),
        sa.Column("moved_bytes", sa.BigInteger, nullable=False, server_default="0"),
        sa.Column("result_bytes", sa.BigInteger, nullable=False, server_default="0"),
        sa.Column("run_seconds", sa.Double, nullable=False, server_default="0"),
    )
    op.create_table(
        "shares",
        sa.Column("model", sa.Text, primary_key=True),
        sa.Column("tenant", sa.Text, primary_key=True),
        sa.Column("counter", sa.Double, nullable=False),  # virtual: what it was served, by its weight
    )
    op.create_table(
        "fresh_results",  # small ones, until their files are on the disk (`api.fresh`)
        sa.Column("id", sa.Text, primary_key=True),
        sa.Column("content", sa.LargeBinary, nullable=False),
    )
    op.create_table(
        "audit",
        sa.Column("seq", _SEQ, primary_key=True, autoincrement=True),
        sa.Column("at", sa.Double, nullable=False),
        sa.Column("actor", sa.Text, nullable=False),
        sa.Column("act", sa.Text, nullable=False),
        sa.Column("subject", sa.Text, nullable=False),
        sa.Column("details", sa.Text, nullable=False, server_default="{}"),
        sqlite_autoincrement=True,
    )
    for column in (
        sa.Column("is_pinned", sa.Integer, nullable=False, server_default="0"),
        sa.Column("on_demand", sa.Integer, nullable=False, server_default="0"),
        sa.Column("schedule", sa.Text),
        sa.Column("idle_minutes", sa.Double),
        sa.Column("rests", sa.Text, nullable=False, server_default="cold"),
        sa.Column("last_used", sa.Double),
        sa.Column("heat", sa.Text, nullable=False, server_default="hot"),  # that is wanted: `cluster.config.Heat`
        sa.Column("heat_why", sa.Text, nullable=False, server_default=""),
        sa.Column("heat_since", sa.Double, nullable=False, server_default="0"),
        sa.Column("limits", sa.Text, nullable=False, server_default="{}"),
    ):
        op.add_column("deployments", column)
    op.create_table(
        "starts",  # of deployments, that requests were the cause of
        sa.Column("seq", _SEQ, primary_key=True, autoincrement=True),
        sa.Column("tenant", sa.Text, nullable=False),
        sa.Column("user_name", sa.Text, nullable=False),
        sa.Column("model", sa.Text, nullable=False),
        sa.Column("day", sa.Text, nullable=False),  # YYYY-MM-DD, UTC
        sa.Column("at", sa.Double, nullable=False),
        sqlite_autoincrement=True,
    )
    op.create_index("starts_of", "starts", ["tenant", "day"])
    if not sa.inspect(op.get_bind()).has_table("edits"):  # a store from before edits were kept
        _create_edits()
    for table in ("requests", "contents", "kept", "uses", "room", "edits"):
        owner: sa.ColumnClause[str] = sa.column("owner", sa.Text)
        op.execute(sa.update(sa.table(table, owner)).where(owner == _NOBODY).values(owner=_LOCAL))


def _create_edits() -> None:
    op.create_table(
        "edits",
        sa.Column("model", sa.Text, primary_key=True),
        sa.Column("owner", sa.Text, primary_key=True),
        sa.Column("name", sa.Text, primary_key=True),
        sa.Column("version", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("is_shared", sa.Integer, nullable=False),
        sa.Column("created", sa.Double, nullable=False),
        sa.Column("num_bytes", sa.BigInteger, nullable=False),
        sa.Column("body", sa.LargeBinary),
    )
