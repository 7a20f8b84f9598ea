"""The field's methods, each one call on any model, in one process or over HTTP, built on traces alone."""

from polytrace.methods.attribution import Attribution, Decomposition, decompose, logit_attribution
from polytrace.methods.collecting import Activations, collect
from polytrace.methods.directions import Vectors, activation_addition, contrastive_vectors
from polytrace.methods.function_vectors import FunctionVector, Task, few_shot_task, function_vector, head_effects
from polytrace.methods.gates import Gate
from polytrace.methods.plots import frame, heat_map, lines, top_k_table
from polytrace.methods.steering import Steered, ablate_direction, steer, steering_edit

__all__ = [
    "Activations",
    "Attribution",
    "Decomposition",
    "FunctionVector",
    "Gate",
    "Steered",
    "Task",
    "Vectors",
    "ablate_direction",
    "activation_addition",
    "collect",
    "contrastive_vectors",
    "decompose",
    "few_shot_task",
    "frame",
    "function_vector",
    "head_effects",
    "heat_map",
    "lines",
    "logit_attribution",
    "steer",
    "steering_edit",
    "top_k_table",
]
