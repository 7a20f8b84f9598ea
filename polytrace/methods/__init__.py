"""The field's methods, each one call on any model, in one process or over HTTP, built on traces alone."""

from polytrace.methods.lenses import logit_lens as logit_lens
from polytrace.methods.lenses import token_directions as token_directions
from polytrace.methods.unembedding import prepare_unembedding as prepare_unembedding
from polytrace.methods.unembedding import unembed as unembed
