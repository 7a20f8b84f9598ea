"""The field's methods, each one call on any model, in one process or over HTTP, built on traces alone."""

from polytrace.methods.batteries import Battery as Battery
from polytrace.methods.batteries import Prompt as Prompt
from polytrace.methods.batteries import run_battery as run_battery
from polytrace.methods.lenses import logit_lens as logit_lens
from polytrace.methods.lenses import token_directions as token_directions
from polytrace.methods.object_lens import object_attention_lens as object_attention_lens
from polytrace.methods.patchscopes import Target as Target
from polytrace.methods.patchscopes import patchscope as patchscope
from polytrace.methods.patchscopes import repeat_target as repeat_target
from polytrace.methods.targets import collisions as collisions
from polytrace.methods.targets import target_sets as target_sets
from polytrace.methods.targets import target_tokens as target_tokens
from polytrace.methods.tuned import TunedLens as TunedLens
from polytrace.methods.tuned import tuned_lens as tuned_lens
from polytrace.methods.tuning import lens_divergence as lens_divergence
from polytrace.methods.tuning import train_tuned_lens as train_tuned_lens
from polytrace.methods.unembedding import prepare_unembedding as prepare_unembedding
from polytrace.methods.unembedding import unembed as unembed
