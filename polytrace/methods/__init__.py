"""The field's methods, each one call on any model, in one process or over HTTP, built on traces alone.

A method is called by a verb, or by the name that the field has for it. It takes the model, prompts, what is particular
to it, then `layers` and `positions` (`polytrace.methods.places`). What is read or changed of a layer is `of`, how that
is done is `method`, what comes back is `top_k` or `tokens`, and one place alone is a `position`. Arrays have named
dimensions (xarray): prompt, layer, head, position, factor, rank, token, ...
"""

from polytrace.methods.ablation import ablate
from polytrace.methods.attribution import Attribution, Decomposition, decompose_residual, logit_attribution
from polytrace.methods.attribution_patching import attribution_patching
from polytrace.methods.batteries import Battery, Prompt, run_battery
from polytrace.methods.causal_tracing import trace_causes
from polytrace.methods.collecting import Activations, collect_activations
from polytrace.methods.directions import Vectors, activation_addition, contrastive_vectors
from polytrace.methods.edges import edge_attribution_patching
from polytrace.methods.function_vectors import FunctionVector, Task, few_shot_task, function_vector, head_effects
from polytrace.methods.gates import Gate
from polytrace.methods.integrated import Integrated, integrated_gradients
from polytrace.methods.knockout import knock_out_attention
from polytrace.methods.learning import Learnt, learn_steering_vector
from polytrace.methods.lenses import Reading, logit_lens, token_directions
from polytrace.methods.metrics import Metric, divergence, log_probability, logit, logit_difference, loss, probability
from polytrace.methods.object_lens import object_attention_lens
from polytrace.methods.patching import patch_activations, patch_heads
from polytrace.methods.patchscopes import Scope, Target, patchscope, repeat_target
from polytrace.methods.path_patching import patch_paths
from polytrace.methods.plots import data_frame, heat_map, line_plot, top_k_table
from polytrace.methods.rotations import Rotation, interchange, learn_rotation
from polytrace.methods.saes import (
    Examples,
    Features,
    LayerPoint,
    SparseAutoencoder,
    ablate_features,
    load_sae,
    sae_features,
    sae_quality,
    splice_sae,
    steer_features,
    top_activations,
)
from polytrace.methods.saliency import gradient_x_input, saliency
from polytrace.methods.steering import Steered, ablate_direction, steer, steering_edit
from polytrace.methods.sweeps import Sweep
from polytrace.methods.targets import collisions, target_sets, target_tokens
from polytrace.methods.transformer_lens import ActivationCache, HookedModel
from polytrace.methods.tuned import TunedLens, tuned_lens
from polytrace.methods.tuning import lens_divergence, train_tuned_lens
from polytrace.methods.unembedding import prepare_unembedding, unembed

__all__ = [
    "ActivationCache",
    "Activations",
    "Attribution",
    "Battery",
    "Decomposition",
    "Examples",
    "Features",
    "FunctionVector",
    "Gate",
    "HookedModel",
    "Integrated",
    "LayerPoint",
    "Learnt",
    "Metric",
    "Prompt",
    "Reading",
    "Rotation",
    "Scope",
    "SparseAutoencoder",
    "Steered",
    "Sweep",
    "Target",
    "Task",
    "TunedLens",
    "Vectors",
    "ablate",
    "ablate_direction",
    "ablate_features",
    "activation_addition",
    "attribution_patching",
    "collect_activations",
    "collisions",
    "contrastive_vectors",
    "data_frame",
    "decompose_residual",
    "divergence",
    "edge_attribution_patching",
    "few_shot_task",
    "function_vector",
    "gradient_x_input",
    "head_effects",
    "heat_map",
    "integrated_gradients",
    "interchange",
    "knock_out_attention",
    "learn_rotation",
    "learn_steering_vector",
    "lens_divergence",
    "line_plot",
    "load_sae",
    "log_probability",
    "logit",
    "logit_attribution",
    "logit_difference",
    "logit_lens",
    "loss",
    "object_attention_lens",
    "patch_activations",
    "patch_heads",
    "patch_paths",
    "patchscope",
    "prepare_unembedding",
    "probability",
    "repeat_target",
    "run_battery",
    "sae_features",
    "sae_quality",
    "saliency",
    "splice_sae",
    "steer",
    "steer_features",
    "steering_edit",
    "target_sets",
    "target_tokens",
    "token_directions",
    "top_activations",
    "top_k_table",
    "trace_causes",
    "train_tuned_lens",
    "tuned_lens",
    "unembed",
]
