"""The field's methods, each one call on any model, in one process or over HTTP, built on traces alone."""
