"""The field's methods, each one call on any model, in one process or over HTTP, built on traces alone."""

from polytrace.methods.batteries import Battery, Prompt, run_battery
from polytrace.methods.lenses import Reading, logit_lens, token_directions
from polytrace.methods.object_lens import object_attention_lens
from polytrace.methods.patchscopes import Scope, Target, patchscope, repeat_target
from polytrace.methods.targets import collisions, target_sets, target_tokens
from polytrace.methods.tuned import TunedLens, tuned_lens
from polytrace.methods.tuning import lens_divergence, train_tuned_lens
from polytrace.methods.unembedding import prepare_unembedding, unembed

__all__ = [
    "Battery",
    "Prompt",
    "Reading",
    "Scope",
    "Target",
    "TunedLens",
    "collisions",
    "lens_divergence",
    "logit_lens",
    "object_attention_lens",
    "patchscope",
    "prepare_unembedding",
    "repeat_target",
    "run_battery",
    "target_sets",
    "target_tokens",
    "token_directions",
    "train_tuned_lens",
    "tuned_lens",
    "unembed",
]
