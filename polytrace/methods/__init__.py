"""The field's methods, each one call on any model, in one process or over HTTP, built on traces alone."""

from polytrace.methods.attribution import Attribution, Decomposition, decompose, logit_attribution
from polytrace.methods.batteries import Battery, Prompt, run_battery
from polytrace.methods.collecting import Activations, collect
from polytrace.methods.directions import Vectors, activation_addition, contrastive_vectors
from polytrace.methods.function_vectors import FunctionVector, Task, few_shot_task, function_vector, head_effects
from polytrace.methods.gates import Gate
from polytrace.methods.lenses import Reading, logit_lens, token_directions
from polytrace.methods.object_lens import object_attention_lens
from polytrace.methods.patchscopes import Scope, Target, patchscope, repeat_target
from polytrace.methods.plots import frame, heat_map, lines, top_k_table
from polytrace.methods.steering import Steered, ablate_direction, steer, steering_edit
from polytrace.methods.targets import collisions, target_sets, target_tokens
from polytrace.methods.tuned import TunedLens, tuned_lens
from polytrace.methods.tuning import lens_divergence, train_tuned_lens
from polytrace.methods.unembedding import prepare_unembedding, unembed

__all__ = [
    "Activations",
    "Attribution",
    "Battery",
    "Decomposition",
    "FunctionVector",
    "Gate",
    "Prompt",
    "Reading",
    "Scope",
    "Steered",
    "Target",
    "Task",
    "TunedLens",
    "Vectors",
    "ablate_direction",
    "activation_addition",
    "collect",
    "collisions",
    "contrastive_vectors",
    "decompose",
    "few_shot_task",
    "frame",
    "function_vector",
    "head_effects",
    "heat_map",
    "lens_divergence",
    "lines",
    "logit_attribution",
    "logit_lens",
    "object_attention_lens",
    "patchscope",
    "prepare_unembedding",
    "repeat_target",
    "run_battery",
    "steer",
    "steering_edit",
    "target_sets",
    "target_tokens",
    "token_directions",
    "top_k_table",
    "train_tuned_lens",
    "tuned_lens",
    "unembed",
]
