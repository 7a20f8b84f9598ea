"""The oracle of patching methods: plain Hugging Face, one prompt at a time, with hooks that show and change points."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from families import FAMILIES, Family, llama_like, model_of
from points import attending
from small import small_gpt2, small_llama
from torch import Tensor

KINDS = ("llama", "gpt2", "gemma2")
OTHERS = ("phi", "opt")  # attention and MLP side by side behind one norm; an MLP without a module of its own
Edits = Mapping[tuple[str, int], Callable[[Tensor], Tensor]]  # point and layer -> what it becomes
Seen = tuple[Tensor, dict[tuple[str, int], Tensor]]


class PlainModel:
    """A tiny model and where its points are."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        own = {"llama": small_llama, "gpt2": small_gpt2}
        self.model: Any = own[kind]() if kind in own else model_of(kind)
        if kind == "gemma2":
            with torch.no_grad():
                for name, weight in self.model.named_parameters():  # so that what heads look at matters
                    weight.mul_(4 if name.endswith(("embed_tokens.weight", "q_proj.weight")) else 1)
        self.family: Family = llama_like(4, 64, 32, 64) if kind == "llama" else FAMILIES[kind]
        self.mlp_in, self.mlp, self.down = {
            "gpt2": ("mlp", "mlp", "mlp.c_proj"),
            "phi": ("mlp", "mlp", "mlp.fc2"),
            "opt": ("fc1", "fc2", "fc2"),
        }.get(kind, ("mlp", "mlp", "mlp.down_proj"))
        self.num_layers, self.num_heads = 4, 4
        self._unedited: dict[tuple[int, ...], Seen] = {}

    def run(self, ids: list[int], edits: Edits | None = None, *, has_gradients: bool = False) -> Seen:
        """Logits `[tokens, vocabulary]` with edits, and every point as it was then, `[1, ...]`.

        With gradients, logits have come from these very tensors. What a prompt gives without edits is worked out once.
        """
        if edits or has_gradients:
            return self._run(ids, edits or {}, has_gradients)
        if tuple(ids) not in self._unedited:
            self._unedited[tuple(ids)] = self._run(ids, {}, False)
        logits, seen = self._unedited[tuple(ids)]
        return logits.clone(), {point: value.clone() for point, value in seen.items()}

    def _run(self, ids: list[int], edits: Edits, has_gradients: bool) -> Seen:
        seen: dict[tuple[str, int], Tensor] = {}
        left = set(edits)

        def at(point: str, layer: int, value: Tensor) -> Tensor:
            whole = value if value.shape[0] == 1 and value.dim() > 2 else value[None]  # OPT's MLPs take tokens alone
            if (point, layer) in edits:
                left.discard((point, layer))
                whole = edits[point, layer](whole.clone())
            seen[point, layer] = whole if has_gradients else whole.clone()
            return whole.reshape(value.shape)

        with ExitStack() as stack, torch.set_grad_enabled(has_gradients):
            for number in range(self.num_layers):
                layer = self.model.get_submodule(f"{self.family.layers}.{number}")
                for path, point, side in (
                    ("", "resid_pre", "in"),
                    ("", "resid_post", "out"),
                    (self.family.attention, "attention", "out"),
                    (self.mlp, "mlp", "out"),
                    (self.mlp_in, "mlp_in", "in"),
                    (self.down, "mlp_post", "in"),
                ):
                    module = layer.get_submodule(path)
                    hook = _before(at, point, number) if side == "in" else _after(at, point, number)
                    add = module.register_forward_pre_hook if side == "in" else module.register_forward_hook
                    stack.callback(add(hook, with_kwargs=True).remove)
            embedding = self.model.get_input_embeddings()
            stack.callback(embedding.register_forward_hook(_after(at, "embed", 0), with_kwargs=True).remove)
            numbers = {
                id(self.model.get_submodule(f"{self.family.layers}.{n}.{self.family.attention}")): n
                for n in range(self.num_layers)
            }
            stack.enter_context(
                attending(self.model, lambda module, point, value: at(point, numbers[id(module)], value))
            )
            logits: Tensor = self.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
        assert not left, f"edits that never fired: {left}"
        return logits, seen


def placed(value: Tensor, index: Any, other: Any) -> Tensor:
    """The value with some of it replaced."""
    value[index] = other
    return value


def _before(at: Callable[[str, int, Tensor], Tensor], point: str, layer: int) -> Any:
    def hook(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args:
            return (at(point, layer, args[0]), *args[1:]), kwargs
        first = next(iter(kwargs))
        return args, {**kwargs, first: at(point, layer, kwargs[first])}

    return hook


def _after(at: Callable[[str, int, Tensor], Tensor], point: str, layer: int) -> Any:
    def hook(_module: Any, _args: Any, _kwargs: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return (at(point, layer, output[0]), *output[1:])
        return at(point, layer, output)

    return hook
