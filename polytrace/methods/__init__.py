"""The field's methods, each one call on any model, in one process or over HTTP, built on traces alone."""

from polytrace.methods.transformer_lens import ActivationCache, HookedModel

__all__ = [
    "ActivationCache",
    "HookedModel",
]
