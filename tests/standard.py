"""Standard names written out by hand over plain Hugging Face: where each is in every tiny family, read and edited."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from families import FAMILIES
from points import attending
from torch import Tensor, nn
from transformers import PreTrainedModel

LAYER = 1
EMBEDDINGS = {"gpt2": "transformer.wte", "gpt_neox": "gpt_neox.embed_in", "opt": "model.decoder.embed_tokens"}
MLPS = {"opt": ("fc1", "fc2")}  # who takes and gives, where no module is around both
NAMES = (
    "token_embeddings",
    "layers_input",
    "attentions_input",
    "attention_probabilities",
    "attentions_output",
    "mlps_input",
    "mlps_output",
    "layers_output",
    "logits",
)
OF_LAYERS = tuple(name for name in NAMES if name not in ("token_embeddings", "logits"))
Change = Callable[[Tensor], Tensor]


def change(value: Any) -> Any:
    """Another value, by the last token's (or query's) row: of patterns only weights that the row has."""
    changed = value.clone()
    changed[..., -1, :] = value[..., -1, :] * -3.0
    return changed


def change_in_place(value: Any) -> None:
    value[..., -1, :] *= -3.0


def places(family: str) -> dict[str, tuple[str, str]]:
    """Module and side of every name but `attention_probabilities`, at one layer."""
    layer = f"{FAMILIES[family].layers}.{LAYER}"
    attention = f"{layer}.{FAMILIES[family].attention}"
    first, last = (f"{layer}.{name}" for name in MLPS.get(family, ("mlp", "mlp")))
    return {
        "token_embeddings": (EMBEDDINGS.get(family, "model.embed_tokens"), "output"),
        "layers_input": (layer, "input"),
        "attentions_input": (attention, "input"),
        "attentions_output": (attention, "output"),
        "mlps_input": (first, "input"),
        "mlps_output": (last, "output"),
        "layers_output": (layer, "output"),
        "logits": ("", "output"),
    }


def by_hand(
    plain: PreTrainedModel, family: str, prompt: list[int], edit: str | None, *, is_in_place: bool = False
) -> dict[str, Tensor]:
    """Every name's value, one edited: handed on by its module as another, or changed in place."""
    seen: dict[str, Tensor] = {}

    def look(name: str, tensor: Tensor) -> Tensor:
        flat = tensor.ndim == 2  # OPT's MLP takes its rows without sequences
        value = tensor[None] if flat else tensor
        if name == edit and is_in_place:
            change_in_place(value)
        elif name == edit:
            value = change(value)
        seen[name] = value.clone()
        return value[0] if flat else value

    def taking(name: str) -> Callable[..., Any]:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if args:
                return (look(name, args[0]), *args[1:]), kwargs
            return args, kwargs | {"hidden_states": look(name, kwargs["hidden_states"])}

        return hook

    def giving(name: str) -> Callable[..., Any]:
        def hook(_module: nn.Module, _args: Any, out: Any) -> Any:
            if name == "logits":
                out.logits = look(name, out.logits)
                return out
            return (look(name, out[0]), *out[1:]) if isinstance(out, tuple) else look(name, out)

        return hook

    attention = plain.get_submodule(places(family)["attentions_input"][0])

    def at(module: nn.Module, point: str, value: Tensor) -> Tensor:
        return look("attention_probabilities", value) if (module, point) == (attention, "pattern") else value

    with ExitStack() as stack, torch.no_grad():
        stack.enter_context(attending(plain, at))
        for name, (path, side) in places(family).items():
            module = plain.get_submodule(path)
            if side == "input":
                handle = module.register_forward_pre_hook(taking(name), with_kwargs=True)
            else:
                handle = module.register_forward_hook(giving(name))
            stack.callback(handle.remove)
        plain(input_ids=torch.tensor([prompt]), use_cache=False)
    return seen
