"""TransformerLens's `cfg`: sizes and kinds of a model by its names."""

from __future__ import annotations

from dataclasses import dataclass

from polytrace.description import Leaf
from polytrace.methods.transformer_lens.hook_table import HookTable
from polytrace.model import Model


@dataclass(frozen=True, slots=True, kw_only=True)
class HookedConfig:
    """Of one model. `normalization_type` has no "Pre": nothing is folded."""

    model_name: str
    original_architecture: str
    n_layers: int
    n_heads: int
    n_key_value_heads: int | None  # None where each head has its own, as in TransformerLens
    d_model: int
    d_head: int
    d_mlp: int | None  # None where no neurons have names (experts)
    d_vocab: int
    n_ctx: int
    dtype: str
    normalization_type: str | None  # "LN" or "RMS"
    positional_embedding_type: str  # "standard": learned ones, "rotary", or "none" that is known
    parallel_attn_mlp: bool
    gated_mlp: bool
    default_prepend_bos: bool
    attn_only: bool = False

    @property
    def d_vocab_out(self) -> int:
        return self.d_vocab


def config_of(model: Model, table: HookTable, default_prepend_bos: bool) -> HookedConfig:
    """From the description, and from what is known of norms."""
    description, block = model.description, table.blocks[0]
    heads, size = _leaf(model, block.attention, "z").tail
    groups = _leaf(model, block.attention, "v").tail[0]
    names = model._index.layer_weights.get(block.path, {})
    out = model._index.parameters[names["W_out"]] if "W_out" in names else None
    norm = description.standard.get("ln_final")
    facts = None if norm is None else table.facts.norms[model._index.modules[norm].class_name]
    return HookedConfig(
        model_name=description.name,
        original_architecture=description.class_name,
        n_layers=description.num_layers,
        n_heads=heads,
        n_key_value_heads=None if groups == heads else groups,
        d_model=description.hidden_size,
        d_head=size,
        d_mlp=None if out is None else out.shape[0],
        d_vocab=description.vocab_size,
        n_ctx=description.limits.max_sequence_tokens,
        dtype=description.dtype,
        normalization_type=None if facts is None else "LN" if facts.is_centring else "RMS",
        positional_embedding_type="standard"
        if "W_pos" in model._index.parameters
        else "rotary"
        if table.is_rotary
        else "none",
        parallel_attn_mlp=block.is_parallel,
        gated_mlp="W_gate" in names,
        default_prepend_bos=default_prepend_bos,
    )


def _leaf(model: Model, module: str, port: str) -> Leaf:
    return next(iter(model._index.ports[module, port].leaves.values()))[1]
