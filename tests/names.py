"""What named points and weights stand for in each family, written out by hand over the plain model's modules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from families import FAMILIES
from torch import Tensor
from transformers import PreTrainedModel

View = Callable[[Tensor], Tensor]  # of a module's input or output: a view of the same memory
Point = tuple[str, str, View]  # path in a layer, side, view
HEADS, SIZE, HIDDEN = 4, 8, 32
_STREAM = ("resid_pre", "resid_mid", "mlp_pre", "mlp_post", "resid_post")


def _all(value: Tensor) -> Tensor:
    return value


def _heads(value: Tensor) -> Tensor:
    return value.unflatten(-1, (-1, SIZE))


def _fused(start: int, heads: int = HEADS) -> View:
    return lambda value: value[..., SIZE * start : SIZE * (start + heads)].unflatten(-1, (heads, SIZE))


def _mixed(which: int) -> View:
    return lambda value: value.unflatten(-1, (HEADS, 3, SIZE))[..., which, :]


def _points(attention: str, out: str, mid: str | None, act: str, down: str, **qk: Point) -> dict[str, Point]:
    found = {
        "resid_pre": ("", "input", _all),
        "q": (f"{attention}.q_proj", "output", _heads),
        "k": (f"{attention}.k_proj", "output", _heads),
        "mlp_pre": (act, "input", _all),
        "mlp_post": (down, "input", _all),
        "resid_post": ("", "output", _all),
        **qk,
    }
    if mid is not None:
        found["resid_mid"] = (mid, "input", _all)
    return found


_LLAMA = _points("self_attn", "o_proj", "post_attention_layernorm", "mlp.act_fn", "mlp.down_proj")
POINTS: dict[str, dict[str, Point]] = {
    "llama": _LLAMA,
    "qwen3": _LLAMA,
    "mistral": _LLAMA,
    "gemma2": {**_LLAMA, "resid_mid": ("pre_feedforward_layernorm", "input", _all)},
    "mixtral": {name: own for name, own in _LLAMA.items() if not name.startswith("mlp")},
    "gpt2": _points(
        "attn", "c_proj", "ln_2", "mlp.act", "mlp.c_proj",
        q=("attn.c_attn", "output", _fused(0)), k=("attn.c_attn", "output", _fused(4)),
    ),
    "gpt_neox": _points(
        "attention", "dense", None, "mlp.act", "mlp.dense_4h_to_h",
        q=("attention.query_key_value", "output", _mixed(0)), k=("attention.query_key_value", "output", _mixed(1)),
    ),
    "opt": _points("self_attn", "out_proj", "final_layer_norm", "activation_fn", "fc2"),
    "phi": _points("self_attn", "dense", None, "mlp.activation_fn", "mlp.fc2"),
    "phi3": _points(
        "self_attn", "o_proj", "post_attention_layernorm", "mlp.activation_fn", "mlp.down_proj",
        q=("self_attn.qkv_proj", "output", _fused(0)), k=("self_attn.qkv_proj", "output", _fused(4, 2)),
    ),
}  # fmt: skip


def change(name: str, value: Any) -> None:
    """The edit, in place: one head of the last token, or all of it."""
    if name in _STREAM:
        value[:, -1] *= -3.0
    else:
        value[:, -1, 1] *= -3.0


def points_by_hand(
    plain: PreTrainedModel, family: str, layer: int, prompt: list[int], edit: str | None
) -> dict[str, Tensor]:
    """Every point of a layer, `head_out` among them, and the logits; one point edited."""
    place = f"{FAMILIES[family].layers}.{layer}"
    seen: dict[str, Tensor] = {}
    handles = []

    def look(name: str, view: View, value: Any) -> None:
        tensor = value if isinstance(value, Tensor) else value[0]
        tensor = tensor[None] if tensor.ndim == 2 else tensor  # OPT's MLP takes its rows without sequences
        if name == edit:
            change(name, view(tensor))
        seen[name] = view(tensor).clone()

    for name, (path, side, view) in POINTS[family].items():
        module = plain.get_submodule(f"{place}.{path}" if path else place)
        if side == "input":
            handles.append(module.register_forward_pre_hook(lambda _m, args, own=(name, view): look(*own, args[0])))
        else:
            handles.append(module.register_forward_hook(lambda _m, _a, out, own=(name, view): look(*own, out)))

    def heads(module: Any, args: tuple[Tensor, ...]) -> None:
        z = args[0].unflatten(-1, (HEADS, SIZE))
        if edit == "head_out":  # what a head adds is scaled as what it found is
            z[:, -1, 1] *= -3.0
        seen["head_out"] = torch.einsum("sthc,dhc->sthd", z, _out_weight(module).unflatten(1, (HEADS, SIZE)))

    out = plain.get_submodule(f"{place}.{FAMILIES[family].out_projection}")
    handles.append(out.register_forward_pre_hook(heads))
    with torch.no_grad():
        seen["logits"] = plain(input_ids=torch.tensor([prompt]), use_cache=False).logits
    for handle in handles:
        handle.remove()
    return seen


def _out_weight(module: Any) -> Tensor:
    """`[out, in]`, also of GPT-2's."""
    weight: Tensor = module.weight.detach()
    return weight.T if type(module).__name__ == "Conv1D" else weight


def weights_by_hand(plain: PreTrainedModel, family: str, layer: int) -> dict[str, Tensor]:
    """Of a layer: `W_Q`, `W_K` and `W_O` as `[heads, ...]`, `W_out`, and the model's `W_E` and `W_U`."""
    place = f"{FAMILIES[family].layers}.{layer}"
    found: dict[str, Tensor] = {}
    for role in ("q", "k"):
        path, _, view = POINTS[family][role]
        weight = _out_weight(plain.get_submodule(f"{place}.{path}"))
        found[f"W_{role.upper()}"] = view(weight.T).permute(1, 0, 2)
    out = plain.get_submodule(f"{place}.{FAMILIES[family].out_projection}")
    found["W_O"] = _out_weight(out).T.unflatten(0, (HEADS, SIZE))
    if "mlp_post" in POINTS[family]:
        found["W_out"] = _out_weight(plain.get_submodule(f"{place}.{POINTS[family]['mlp_post'][0]}")).T
    found["W_E"] = plain.get_input_embeddings().weight.detach()
    found["W_U"] = plain.get_output_embeddings().weight.detach().T
    return found
