"""Every causal language model class of transformers, tried from a tiny configuration: what docs/families.md says."""
