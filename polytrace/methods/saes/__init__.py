"""Sparse autoencoders (SAEs) in Gemma Scope's and SAELens's files: their features read, changed and spliced in.

An SAE writes an activation as few features of many. Bricken et al., *Towards Monosemanticity* (2023); Cunningham et
al., *Sparse Autoencoders Find Highly Interpretable Features in Language Models* (2023, arXiv:2309.08600). Needs torch
on the client.
"""

from polytrace.methods.saes.autoencoder import SparseAutoencoder
from polytrace.methods.saes.changes import ablate_features, splice_sae, steer_features
from polytrace.methods.saes.examples import Examples, top_activations
from polytrace.methods.saes.features import Features, sae_features
from polytrace.methods.saes.loading import load_sae
from polytrace.methods.saes.places import LayerPoint
from polytrace.methods.saes.quality import sae_quality

__all__ = [
    "Examples",
    "Features",
    "LayerPoint",
    "SparseAutoencoder",
    "ablate_features",
    "load_sae",
    "sae_features",
    "sae_quality",
    "splice_sae",
    "steer_features",
    "top_activations",
]
