"""Weights by TransformerLens's names: of one block, or of all stacked. They are the model's own: nothing is folded.

Each comes when it is first asked for and is kept. What is only needed in a product is multiplied where the model is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any

from polytrace.errors import GraphError
from polytrace.lines import user_line
from polytrace.methods.transformer_lens.block_weights import BlockWeights, NormWeights
from polytrace.methods.transformer_lens.factored import FactoredMatrix
from polytrace.model import Model
from polytrace.tracing import open_trace

if TYPE_CHECKING:
    from torch import Tensor

    from polytrace.methods.transformer_lens.config import HookedConfig
    from polytrace.methods.transformer_lens.facts import Facts, NormFacts
    from polytrace.methods.transformer_lens.hook_table import HookTable

_BY_HEAD = {name: f"{name}_by_head" for name in ("W_K", "W_V", "b_K", "b_V")}  # one for each query head


def refuse_inside(told: str) -> None:
    """Raises GraphError in the block of a trace or session, whose values have no data yet."""
    if open_trace() is not None:
        raise GraphError(f"{told} before the block begins", where=user_line())


class Stacked:
    """`model.W_Q`: a weight of all blocks, `[layers, ...]`."""

    def __init__(self, shape: str) -> None:
        self.__doc__ = f"`[{shape}]`"

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, hooked: Any, owner: type) -> Any:
        import torch

        if hooked is None:
            return self
        return torch.stack(hooked.weights_of(self.name))


class Weights:
    """The part of `HookedModel` that is about weights."""

    model: Model
    cfg: HookedConfig
    hook_table: HookTable
    facts: Facts
    _kept: dict[Any, Any]

    W_Q = Stacked("layers, heads, d_model, d_head")
    W_K = Stacked("layers, heads, d_model, d_head")
    W_V = Stacked("layers, heads, d_model, d_head")
    W_O = Stacked("layers, heads, d_head, d_model")
    b_Q = Stacked("layers, heads, d_head")
    b_K = Stacked("layers, heads, d_head")
    b_V = Stacked("layers, heads, d_head")
    b_O = Stacked("layers, d_model")
    W_in = Stacked("layers, d_model, d_mlp")
    W_out = Stacked("layers, d_mlp, d_model")
    b_in = Stacked("layers, d_mlp")
    b_out = Stacked("layers, d_model")

    @property
    def W_gate(self) -> Tensor | None:
        """`[layers, d_model, d_mlp]`; None where MLPs have no gate."""
        import torch

        return torch.stack(self.weights_of("W_gate")) if self.cfg.gated_mlp else None

    @property
    def W_E(self) -> Tensor:
        """`[d_vocab, d_model]`"""
        return self._of_model("W_E")

    @property
    def W_U(self) -> Tensor:
        """`[d_model, d_vocab]`: the head's own weight, the final norm's weight is not in it."""
        return self._of_model("W_U")

    @property
    def b_U(self) -> Tensor:
        """`[d_vocab]`; zeros where the head has no bias."""
        import torch

        return self._of_model("b_U") if "b_U" in self.model._index.parameters else torch.zeros(self.cfg.d_vocab)

    @property
    def W_pos(self) -> Tensor:
        """`[n_ctx, d_model]`, of learned positions."""
        return self._of_model("W_pos")

    @property
    def OV(self) -> FactoredMatrix:
        """`[layers, heads, d_model, d_model]`: `W_V @ W_O`."""
        return FactoredMatrix(self.W_V, self.W_O)

    @property
    def QK(self) -> FactoredMatrix:
        """`[layers, heads, d_model, d_model]`: `W_Q @ W_K.T`."""
        return FactoredMatrix(self.W_Q, self.W_K.transpose(-2, -1))

    @cached_property
    def blocks(self) -> tuple[BlockWeights, ...]:
        """`blocks[3].attn.W_Q`, `blocks[3].mlp.W_out`, `blocks[3].ln1.w`."""
        return tuple(BlockWeights(self, layer) for layer in range(self.cfg.n_layers))

    @cached_property
    def ln_final(self) -> NormWeights:
        """The final norm: `ln_final.w`, `ln_final.b`, and `ln_final(residual)`."""
        return NormWeights(self, self.model.description.standard["ln_final"])

    def unembed(self, residual: Tensor) -> Tensor:
        """`residual @ W_U + b_U`, where the model is: `[..., d_vocab]` of `[..., d_model]`, behind the final norm."""
        made = self.fetched({"logits": lambda: self.model.lm_head(residual.to(self.dtype))})
        return made["logits"]  # type: ignore[no-any-return]

    def tokens_to_residual_directions(self, tokens: Any, *, fold_ln: bool = True) -> Tensor:
        """What the residual, behind its division by the final norm's scale, is multiplied with for a token's logit.

        A token (an id or a text), or ids `[...]`: `[..., d_model]`, float32. It is the token's column of `W_U` times
        the final norm's weight, as TransformerLens has it by its default (`fold_ln`; `center_unembed` is not done: take
        differences of tokens). `fold_ln=False`: the column alone, as it has in a model without processing.
        """
        import torch

        ids = self._token_ids(tokens)
        final = self.model.ln_final

        def directions() -> Any:
            columns = self.model.W_U[:, ids.flatten().tolist()].float().T
            if not fold_ln:
                return columns
            return columns * self.norm_facts(final._path).weight_and_bias(final)[0]

        key = ("directions", tuple(ids.flatten().tolist()), fold_ln)
        if key not in self._kept:
            self._kept[key] = self.fetched({"directions": directions})["directions"]
        return torch.as_tensor(self._kept[key]).reshape(*ids.shape, -1)

    def accumulated_bias(self, layer: int, mlp_input: bool = False, include_mlp_biases: bool = True) -> Tensor:
        """`[d_model]`: what `b_O` and `b_out` of the blocks before have added; with `mlp_input` this block's `b_O`."""
        import torch

        total = torch.zeros(self.cfg.d_model)
        for own in self.weights_of("b_O", layer + mlp_input):
            total = total + own
        for own in self.weights_of("b_out", layer) if include_mlp_biases else ():
            total = total + own
        return total

    def all_head_labels(self) -> list[str]:
        """`["L0H0", ...]`"""
        return [f"L{layer}H{head}" for layer in range(self.cfg.n_layers) for head in range(self.cfg.n_heads)]

    @property
    def dtype(self) -> Any:
        """torch's, of the served weights."""
        import torch

        return getattr(torch, self.cfg.dtype)

    def weights_of(self, name: str, layers: int | None = None) -> list[Tensor]:
        """One weight of the first `layers` blocks, by default of all: those that are not here yet in one request."""
        numbers = range(self.cfg.n_layers if layers is None else layers)
        missing = [number for number in numbers if (number, name) not in self._kept]
        zeros = {number: zero for number in missing if (zero := self._zeros(number, name)) is not None}
        wanted = {(number, name): self._reading(number, name) for number in missing if number not in zeros}
        self._kept |= self.fetched(wanted) | {(number, name): zero for number, zero in zeros.items()}
        return [self._kept[number, name] for number in numbers]

    def weight(self, layer: int, name: str) -> Tensor:
        """One weight of one block."""
        if (layer, name) not in self._kept:
            zero = self._zeros(layer, name)
            made = {(layer, name): zero} if zero is not None else None
            self._kept |= made or self.fetched({(layer, name): self._reading(layer, name)})
        return self._kept[layer, name]  # type: ignore[no-any-return]

    def norm_facts(self, path: str) -> NormFacts:
        """How a norm works."""
        return self.facts.norms[self.model._index.modules[path].class_name]

    def fetched(self, wanted: Mapping[Any, Callable[[], Any]]) -> dict[Any, Any]:
        """What functions of an open trace give, in one request without prompts."""
        if not wanted:
            return {}
        refuse_inside("a weight is brought by a request of its own: ask for it")
        with self.model.base.trace():
            found = {key: make().save() for key, make in wanted.items()}
        return dict(found)

    def _reading(self, layer: int, name: str) -> Callable[[], Any]:
        module, own = self.model.layers[layer], _BY_HEAD.get(name, name)
        names = self._names(layer)
        if own not in names:
            has = ", ".join(sorted(name for name in names if not name.endswith("_by_head")))
            raise GraphError(f"block {layer} has no {name}; it has {has}", where=user_line())
        return lambda: getattr(module, own)

    def _names(self, layer: int) -> Mapping[str, str]:
        """Of a block's named weights, their paths."""
        return self.model._index.layer_weights.get(self.hook_table.blocks[layer].path, {})

    def _zeros(self, layer: int, name: str) -> Tensor | None:
        """Of a bias that the model does not have; None of what it has."""
        import torch

        names = self._names(layer)
        if _BY_HEAD.get(name, name) in names or not name.startswith("b_"):
            return None
        weight = "W" + name.removeprefix("b")
        of = names.get(_BY_HEAD.get(weight, weight))
        if of is None:
            raise GraphError(f"block {layer} has no {name}, nor {weight}", where=user_line())
        shape = self.model._index.parameters[of].shape
        is_of_heads = name in ("b_Q", "b_K", "b_V")
        return torch.zeros(*((shape[0], shape[-1]) if is_of_heads else (shape[-1],)), dtype=self.dtype)

    def _of_model(self, name: str) -> Tensor:
        if name not in self.model._index.parameters:
            raise GraphError(f"this model has no {name}", where=user_line())
        if name not in self._kept:
            self._kept |= self.fetched({name: lambda: getattr(self.model, name)})
        return self._kept[name]  # type: ignore[no-any-return]

    def _token_ids(self, tokens: Any) -> Tensor:
        import torch

        if isinstance(tokens, str):
            tokens = self.to_single_token(tokens)  # type: ignore[attr-defined]
        elif isinstance(tokens, (list, tuple)) and tokens and all(isinstance(one, str) for one in tokens):
            tokens = [self.to_single_token(one) for one in tokens]  # type: ignore[attr-defined]
        return torch.as_tensor(tokens)
