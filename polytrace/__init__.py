"""polytrace: many traces, one forward pass."""
