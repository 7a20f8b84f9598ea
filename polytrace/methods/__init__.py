"""The field's methods, each one call on any model, in one process or over HTTP, built on traces alone."""

from polytrace.methods.plots import frame, heat_map, lines, top_k_table

__all__ = ["frame", "heat_map", "lines", "top_k_table"]
