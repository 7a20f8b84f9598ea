"""One program for both: TransformerLens's calls, run by TransformerLens and by polytrace, each result by its name.

As a command it is TransformerLens's side: `python -m peers.habits FOLDER OUT ...` takes the weights that transformers
saved in each FOLDER through TransformerLens's own conversion, without processing and with its default processing.
"""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch

TOKENS = torch.tensor([[5, 17, 3, 42, 8, 61, 2], [9, 4, 4, 71, 30, 1, 12]])
ONE = TOKENS[:1]
RIGHT, WRONG = torch.tensor([7, 11]), torch.tensor([20, 3])
NUM_LAYERS, NUM_HEADS, WIDTH = 3, 4, 32
DIRECTION = torch.linspace(-1, 1, WIDTH)
DIRECTIONS = torch.stack([DIRECTION, DIRECTION.flip(0) ** 2], 1)

# hooked one at a time: their values times 1.5 (of pairs, where a row has to stay one, 0.5)
HOOKED = (
    *("hook_embed", "blocks.0.hook_resid_pre", "blocks.1.ln1.hook_scale", "blocks.1.ln1.hook_normalized"),
    *("blocks.1.attn.hook_q", "blocks.1.attn.hook_k", "blocks.1.attn.hook_v", "blocks.1.attn.hook_z"),
    *("blocks.1.attn.hook_attn_scores", "blocks.1.attn.hook_pattern", "blocks.1.attn.hook_result"),
    *("blocks.1.hook_attn_out", "blocks.1.hook_resid_mid", "blocks.1.ln2.hook_scale", "blocks.1.ln2.hook_normalized"),
    *("blocks.1.mlp.hook_pre", "blocks.1.mlp.hook_post", "blocks.1.hook_mlp_out", "blocks.1.hook_resid_post"),
    *("ln_final.hook_scale", "ln_final.hook_normalized"),
)
NAMES = (
    *(("k", 6, "a"), ("pre", 2), ("embed",), ("normalized", 27, "ln2"), ("k6",), ("scale4ln1",), ("pre5",)),
    *(("resid_post", 3), ("pattern", 0, "attn"), ("attn", 1), ("attn_scores", 2), ("scale",), ("normalized",)),
    *(("blocks.3.attn.hook_z",), ("hook_embed",), ("mlp_post", 1), ("value", 0), ("rot_q", 0), ("mlp_out", 1, "b")),
)


def run(model: Any, *, fold_ln: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Results by name: tensors, or texts. `fold_ln`: what logit attributions are given beside."""
    model.set_use_attn_result(True)
    logits, cache = model.run_with_cache(TOKENS)
    yield "logits", logits
    for name in list(cache.keys()):
        if not name.startswith("unembed."):
            yield f"cache {name}", cache[name]
    _, unembed = model.run_with_cache(TOKENS, names_filter=["unembed.hook_in", "unembed.hook_out"])
    yield "cache unembed.hook_in", unembed["unembed.hook_in"]
    yield "cache unembed.hook_out", unembed["unembed.hook_out"]
    yield from _runs(model)
    yield from _mapping(model, cache)
    yield from _residual(cache)
    yield from _heads_and_neurons(cache)
    yield from _attributions(model, cache, fold_ln)
    yield from _hooks(model)
    yield from _weights(model)


def _runs(model: Any) -> Iterator[tuple[str, Any]]:
    yield "loss", model(TOKENS, return_type="loss")
    yield "loss per token", model(TOKENS, return_type="loss", loss_per_token=True)
    logits, loss = model(TOKENS, return_type="both")
    yield "both, logits", logits
    yield "both, loss", loss
    for stop in (0, 1, -1):
        yield f"stopped at layer {stop}", model(TOKENS, stop_at_layer=stop)
    residual, cache = model.run_with_cache(TOKENS, stop_at_layer=2)
    yield "stopped with a cache", residual
    yield "keys of a run that stopped", " ".join(cache.keys())
    _, cache = model.run_with_cache(TOKENS, names_filter="blocks.1.attn.hook_z")
    yield "keys of a name", " ".join(cache.keys())
    _, cache = model.run_with_cache(TOKENS, names_filter=["blocks.2.hook_resid_post", "blocks.0.hook_resid_pre"])
    yield "keys of names", " ".join(cache.keys())
    _, cache = model.run_with_cache(TOKENS, names_filter=lambda name: name.endswith("hook_pattern"))
    yield "keys of a function", " ".join(cache.keys())
    names = ["blocks.1.hook_resid_mid", "blocks.1.attn.hook_z", "blocks.1.attn.hook_pattern", "blocks.1.mlp.hook_post"]
    for label, places in (("an int", -1), ("a slice", (1, 5, 2)), ("a list", [0, 3])):
        _, cache = model.run_with_cache(TOKENS, names_filter=names, pos_slice=places)
        for name in names:
            yield f"{name} at {label}", cache[name]
    loss, cache = model.run_with_cache(ONE, return_type="loss", remove_batch_dim=True, names_filter=names)
    yield "loss of a cached run", loss
    for name in names:
        yield f"{name} without batch", cache[name]


def _mapping(model: Any, cache: Any) -> Iterator[tuple[str, Any]]:
    yield "by tuple", cache["resid_post", 1]
    yield "by tuple with a part", cache["pattern", 0, "attn"]
    yield "by negative layer", cache["z", -1]
    yield "by scale of a norm", cache["scale", 1, "ln2"]
    yield "by short name", cache["normalized"]
    yield "by full name", cache["blocks.1.hook_attn_out"]
    yield "number of entries", str(len([name for name in cache if not name.startswith("unembed.")]))
    _, one = model.run_with_cache(ONE)
    one = one.remove_batch_dim()
    yield "batch removed", one["resid_mid", 1]
    yield "batch removed, accumulated", one.accumulated_resid(apply_ln=True)
    yield "batch removed, heads", one.stack_head_results(pos_slice=-1)
    yield "one of the batch", cache.apply_slice_to_batch_dim(1)["pattern", 1]
    yield "some of the batch", cache.apply_slice_to_batch_dim([1, 0])["mlp_out", 2]


def _labelled(name: str, both: Any) -> Iterator[tuple[str, Any]]:
    yield name, both[0]
    yield f"{name}, labels", " ".join(both[1])


def _residual(cache: Any) -> Iterator[tuple[str, Any]]:
    accumulated: dict[str, dict[str, Any]] = {
        "accumulated": {},
        "accumulated to a layer": {"layer": 2},
        "accumulated, with mid": {"incl_mid": True},
        "accumulated to an mlp": {"layer": 1, "mlp_input": True},
        "accumulated, normed": {"apply_ln": True},
        "accumulated, normed, last position": {"apply_ln": True, "pos_slice": -1},
        "accumulated, normed for a layer": {"layer": 1, "apply_ln": True},
        "accumulated, normed for an mlp": {"layer": 1, "apply_ln": True, "mlp_input": True},
        "accumulated at positions": {"pos_slice": (1, 4)},
    }
    for name, how in accumulated.items():
        yield from _labelled(name, cache.accumulated_resid(return_labels=True, **how))
    decomposed: dict[str, dict[str, Any]] = {
        "decomposed": {},
        "decomposed to a layer": {"layer": 2},
        "decomposed to an mlp": {"layer": 1, "mlp_input": True},
        "decomposed, attention": {"mode": "attn"},
        "decomposed, mlps": {"mode": "mlp", "incl_embeds": False},
        "decomposed, normed": {"apply_ln": True},
        "decomposed, normed for an mlp": {"layer": 2, "mlp_input": True, "apply_ln": True},
        "decomposed, normed, last position": {"apply_ln": True, "pos_slice": -1},
    }
    for name, how in decomposed.items():
        yield from _labelled(name, cache.decompose_resid(return_labels=True, **how))
    yield "stacked z", cache.stack_activation("z")
    yield "stacked patterns to a layer", cache.stack_activation("pattern", 2)
    yield "stacked scales", cache.stack_activation("scale", -1, "ln1")


def _heads_and_neurons(cache: Any) -> Iterator[tuple[str, Any]]:
    heads: dict[str, dict[str, Any]] = {
        "heads": {},
        "heads to a layer": {"layer": 2},
        "heads and the rest": {"incl_remainder": True},
        "heads, normed": {"apply_ln": True},
        "heads at a position": {"pos_slice": -1, "incl_remainder": True, "apply_ln": True},
    }
    for name, how in heads.items():
        yield from _labelled(name, cache.stack_head_results(return_labels=True, **how))
    yield "neurons of a layer", cache.get_neuron_results(1)
    yield "some neurons", cache.get_neuron_results(1, neuron_slice=[3, 5], pos_slice=-1)
    yield "neurons along a direction", cache.get_neuron_results(0, project_output_onto=DIRECTION)
    yield "neurons along directions", cache.get_neuron_results(0, project_output_onto=DIRECTIONS)
    neurons: dict[str, dict[str, Any]] = {
        "neurons": {},
        "neurons and the rest": {"incl_remainder": True, "pos_slice": -1},
        "neurons, normed": {"apply_ln": True, "neuron_slice": (0, 9)},
        "neurons, projected": {"project_output_onto": DIRECTION, "incl_remainder": True},
        "neurons, normed and projected": {"project_output_onto": DIRECTIONS, "apply_ln": True, "incl_remainder": True},
    }
    for name, how in neurons.items():
        yield from _labelled(name, cache.stack_neuron_results(2, return_labels=True, **how))
    full: dict[str, dict[str, Any]] = {
        "full": {"pos_slice": -1},
        "full to a layer": {"layer": 1, "pos_slice": -1},
        "full with whole mlps": {"expand_neurons": False},
        "full, normed": {"apply_ln": True, "pos_slice": -1},
        "full to an mlp": {"layer": 1, "mlp_input": True, "pos_slice": (2, 4)},
        "full, projected": {"project_output_onto": DIRECTION},
        "full, normed and projected": {"project_output_onto": DIRECTIONS, "apply_ln": True, "pos_slice": -1},
    }
    for name, how in full.items():
        yield from _labelled(name, cache.get_full_resid_decomposition(return_labels=True, **how))


def _attributions(model: Any, cache: Any, fold_ln: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    stack = cache.decompose_resid()
    last = cache.decompose_resid(pos_slice=-1)
    heads = cache.stack_head_results(pos_slice=-1)
    yield "a token's direction", model.tokens_to_residual_directions(7, **fold_ln)
    yield "tokens' directions", model.tokens_to_residual_directions(RIGHT, **fold_ln)
    yield "directions of rows", model.tokens_to_residual_directions(TOKENS, **fold_ln)
    yield "attributions to a token", cache.logit_attrs(stack, 7, **fold_ln)
    yield "attributions to each token", cache.logit_attrs(stack, TOKENS, **fold_ln)
    yield "attributions to a difference", cache.logit_attrs(stack, 7, 20, **fold_ln)
    yield "attributions of last positions", cache.logit_attrs(last, RIGHT, WRONG, pos_slice=-1, **fold_ln)
    yield "attributions of heads", cache.logit_attrs(heads, RIGHT, WRONG, pos_slice=-1, **fold_ln)
    yield (
        "attributions of one of the batch",
        cache.logit_attrs(stack, 7, batch_slice=1, **fold_ln),
    )
    yield "normed for the head", cache.apply_ln_to_stack(last, pos_slice=-1)
    yield "normed for a layer", cache.apply_ln_to_stack(stack, 2)
    yield "normed for an mlp", cache.apply_ln_to_stack(stack, 1, mlp_input=True)
    yield "normed anew", cache.apply_ln_to_stack(stack, recompute_ln=True)


def _hooks(model: Any) -> Iterator[tuple[str, Any]]:
    def scaled(value: Any, hook: Any) -> Any:
        return value * (0.5 if hook.name.endswith("hook_pattern") else 1.5)

    for name in HOOKED:
        yield f"hooked {name}", model.run_with_hooks(TOKENS, fwd_hooks=[(name, scaled)])

    def without_head(value: Any, hook: Any) -> Any:
        value[:, :, hook.layer()] = 0.0
        return value

    def last_changed(value: Any, hook: Any) -> None:
        value[:, -1] += 1.0

    def put_aside(value: Any, hook: Any) -> None:
        hook.ctx["seen"] = value[:, 2]

    def put_back(value: Any, hook: Any) -> Any:
        value[:, -1] = model.hook_dict["blocks.0.hook_resid_post"].ctx["seen"]
        return value

    yield "heads ablated", model.run_with_hooks(TOKENS, fwd_hooks=[("blocks.1.attn.hook_z", without_head)])
    yield (
        "by a function of names",
        model.run_with_hooks(TOKENS, fwd_hooks=[(lambda name: name.endswith("attn.hook_z"), without_head)]),
    )
    yield (
        "in place",
        model.run_with_hooks(
            TOKENS, fwd_hooks=[("blocks.1.hook_resid_mid", last_changed)], return_type="loss", loss_per_token=True
        ),
    )
    for name in ("ln2.hook_normalized", "ln1.hook_scale", "hook_attn_out", "mlp.hook_post"):
        yield f"in place at {name}", model.run_with_hooks(TOKENS, fwd_hooks=[(f"blocks.1.{name}", last_changed)])
    model.reset_hooks(clear_contexts=True)
    yield (
        "through a context",
        model.run_with_hooks(
            TOKENS, fwd_hooks=[("blocks.0.hook_resid_post", put_aside), ("blocks.2.hook_resid_pre", put_back)]
        ),
    )
    model.reset_hooks(clear_contexts=True)
    both = [("blocks.1.hook_mlp_out", scaled), ("blocks.1.hook_mlp_out", last_changed), ("hook_embed", scaled)]
    yield "several at one place", model.run_with_hooks(TOKENS, fwd_hooks=both)
    with model.hooks(fwd_hooks=both):
        _, cache = model.run_with_cache(TOKENS)
    for name in ("hook_embed", "blocks.0.hook_resid_pre", "blocks.1.hook_mlp_out", "blocks.2.hook_resid_post"):
        yield f"cached under hooks, {name}", cache[name]
    with model.hooks(fwd_hooks=[("blocks.1.ln1.hook_scale", scaled)]):
        _, cache = model.run_with_cache(TOKENS, names_filter=lambda name: name.startswith("blocks.1."))
    for name in ("ln1.hook_scale", "ln1.hook_normalized", "attn.hook_q"):
        yield f"cached under a changed scale, {name}", cache[f"blocks.1.{name}"]
    model.add_hook("blocks.1.attn.hook_pattern", scaled)
    yield "added", model(TOKENS)
    model.reset_hooks()
    yield "reset", model(TOKENS)


def _weights(model: Any) -> Iterator[tuple[str, Any]]:
    for name in ("W_E", "W_U", "b_U", "W_Q", "W_K", "W_V", "W_O", "b_Q", "b_K", "b_V", "b_O"):
        yield name, getattr(model, name)
    for name in ("W_in", "W_out", "b_in", "b_out"):
        yield name, getattr(model, name)
    if model.cfg.gated_mlp:
        yield "W_gate", model.W_gate
    if model.cfg.positional_embedding_type == "standard":
        yield "W_pos", model.W_pos
    yield "one block's W_Q", model.blocks[1].attn.W_Q
    yield "one block's W_out", model.blocks[1].mlp.W_out
    yield "one norm's weight", model.blocks[1].ln2.w
    yield "the final norm's weight", model.ln_final.w
    yield "OV", model.OV.AB
    yield "QK of a head", model.QK[1, 2].AB
    yield "a block's OV along a direction", model.blocks[1].attn.OV @ DIRECTION
    yield "singular values of OV", model.OV.S
    yield "norms of QK", model.QK.norm()
    yield "eigenvalues of OV", model.OV.eigenvalues.sum(-1).real  # their order is nobody's
    yield "OV of OV", (model.OV[0, 1] @ model.OV[1, 2]).AB
    yield "transposed", model.QK.T.AB
    for layer, mlp_input in ((0, False), (2, False), (1, True), (NUM_LAYERS, False)):
        yield f"accumulated bias {layer} {mlp_input}", model.accumulated_bias(layer, mlp_input)
    yield "accumulated bias without mlps", model.accumulated_bias(2, include_mlp_biases=False)
    yield "labels of heads", " ".join(model.all_head_labels())
    told = {name: getattr(model.cfg, name) for name in ("n_layers", "n_heads", "d_model", "d_head", "d_mlp", "d_vocab")}
    told |= {name: getattr(model.cfg, name) for name in ("n_ctx", "normalization_type", "n_key_value_heads")}
    yield "cfg", json.dumps(told)


PROCESSED = (
    *("hook_embed", "hook_pos_embed", "blocks.1.hook_resid_pre", "blocks.1.ln1.hook_scale"),
    *("blocks.1.ln1.hook_normalized", "blocks.1.attn.hook_q", "blocks.1.attn.hook_v", "blocks.1.attn.hook_pattern"),
    *("blocks.1.attn.hook_z", "blocks.1.hook_attn_out", "blocks.1.mlp.hook_post", "blocks.1.hook_mlp_out"),
    *("blocks.2.hook_resid_post", "ln_final.hook_scale", "ln_final.hook_normalized"),
)


def processed(model: Any) -> Iterator[tuple[str, Any]]:
    """Of a model with TransformerLens's default processing: what the documentation of polytrace has formulas for."""
    logits, cache = model.run_with_cache(TOKENS)
    yield "logits", logits
    for name in PROCESSED:
        if name in cache.cache_dict:
            yield name, cache[name]
    yield "result", cache.stack_head_results(2)
    yield "W_U", model.W_U
    yield "b_U", model.b_U
    yield "W_Q", model.W_Q[1]
    yield "b_Q", model.b_Q[1]
    yield "W_O", model.W_O[1]
    yield "b_O", model.b_O[1]
    yield "W_in", model.W_in[1]
    yield "W_out", model.W_out[1]
    yield "W_E", model.W_E
    stack = cache.decompose_resid(pos_slice=-1)
    yield "attributions", cache.logit_attrs(stack, RIGHT, pos_slice=-1)
    yield "attributions to a difference", cache.logit_attrs(stack, RIGHT, WRONG, pos_slice=-1)


def names(get_act_name: Callable[..., str]) -> Iterator[tuple[str, str]]:
    """What short names mean."""
    for given in NAMES:
        yield f"name {given}", get_act_name(*given)


def _hooked_transformers(folder: str) -> tuple[Any, Any]:
    """TransformerLens's model of saved weights: without processing, and as `from_pretrained` makes it by default."""
    from transformer_lens import HookedTransformer, HookedTransformerConfig
    from transformer_lens.pretrained.weight_conversions import convert_gpt2_weights, convert_llama_weights
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_pretrained(folder).eval()
    own = plain.config
    common: dict[str, Any] = {
        "n_layers": own.num_hidden_layers,
        "d_model": own.hidden_size,
        "n_heads": own.num_attention_heads,
        "d_head": own.hidden_size // own.num_attention_heads,
        "d_vocab": own.vocab_size,
        "n_ctx": own.max_position_embeddings,
        "original_architecture": own.architectures[0],
        "device": "cpu",
    }
    if own.model_type == "gpt2":
        config = HookedTransformerConfig(
            **common,
            d_mlp=4 * own.n_embd,
            act_fn="gelu_new",
            normalization_type="LN",
            eps=own.layer_norm_epsilon,
        )
        convert = convert_gpt2_weights
    else:
        config = HookedTransformerConfig(
            **common,
            d_mlp=own.intermediate_size,
            act_fn="silu",
            normalization_type="RMS",
            eps=own.rms_norm_eps,
            gated_mlp=True,
            final_rms=True,
            positional_embedding_type="rotary",
            rotary_dim=own.hidden_size // own.num_attention_heads,
            rotary_adjacent_pairs=False,
            rotary_base=own.rope_parameters["rope_theta"],
            n_key_value_heads=None if own.num_key_value_heads == own.num_attention_heads else own.num_key_value_heads,
        )
        convert = convert_llama_weights
    made = []
    for is_processed in (False, True):
        model = HookedTransformer(copy.deepcopy(config), move_to_device=False)  # processing changes its own
        weights = {name: weight.detach().clone() for name, weight in convert(plain, config).items()}
        model.load_and_process_state_dict(
            weights,
            fold_ln=is_processed,
            center_writing_weights=is_processed,
            center_unembed=is_processed,
            fold_value_biases=is_processed,
        )
        made.append(model.eval())
    return made[0], made[1]


if __name__ == "__main__":
    from safetensors.torch import save_file
    from transformer_lens.utils import get_act_name

    torch.set_grad_enabled(False)
    for folder, out in zip(sys.argv[1::2], sys.argv[2::2], strict=True):
        tensors: dict[str, torch.Tensor] = {}
        texts: dict[str, str] = dict(names(get_act_name))
        plain, folded = _hooked_transformers(folder)
        for name, result in run(plain, fold_ln={}):
            (texts if isinstance(result, str) else tensors)[name] = result
        tensors |= {f"processed {name}": value for name, value in processed(folded)}
        save_file({name: value.contiguous().clone() for name, value in tensors.items()}, out, metadata=texts)
