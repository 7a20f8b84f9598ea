"""The field's methods, each one call on any model, in one process or over HTTP, built on traces alone."""

from polytrace.methods.ablation import ablate
from polytrace.methods.causal_tracing import trace_causes
from polytrace.methods.knockout import knock_out_attention
from polytrace.methods.metrics import (
    Metric,
    divergence,
    log_probability,
    logit,
    logit_difference,
    loss,
    probability,
)
from polytrace.methods.patching import patch_activations, patch_heads
from polytrace.methods.path_patching import patch_paths
from polytrace.methods.plots import frame, heat_map, lines, top_k_table
from polytrace.methods.sweeps import Sweep

__all__ = [
    "Metric",
    "Sweep",
    "ablate",
    "divergence",
    "frame",
    "heat_map",
    "knock_out_attention",
    "lines",
    "log_probability",
    "logit",
    "logit_difference",
    "loss",
    "patch_activations",
    "patch_heads",
    "patch_paths",
    "probability",
    "top_k_table",
    "trace_causes",
]
