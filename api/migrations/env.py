"""What Alembic runs: the scripts, on the connection that `running.upgrade` opened, in its transaction."""

from alembic import context

context.configure(connection=context.config.attributes["connection"])
context.run_migrations()
