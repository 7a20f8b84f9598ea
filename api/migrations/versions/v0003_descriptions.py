"""What a deployment serves, which is large, apart from how it is: SQLite reads rows up to the column it wants."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    op.create_table(
        "descriptions",
        sa.Column("model", sa.Text, primary_key=True),
        sa.Column("description", sa.LargeBinary, nullable=False),
        sa.Column("tokenizer", sa.LargeBinary),
    )
    op.execute(
        "INSERT INTO descriptions (model, description, tokenizer) "
        "SELECT model, description, tokenizer FROM deployments WHERE description IS NOT NULL"
    )
    op.drop_column("deployments", "description")
    op.drop_column("deployments", "tokenizer")
