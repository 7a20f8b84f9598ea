"""One block's weights by TransformerLens's names: `model.blocks[3].attn.W_Q`, `.mlp.W_out`, `.ln1.w`; and the norms."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Any

from polytrace.methods.transformer_lens.factored import FactoredMatrix
from polytrace.modules import Module

if TYPE_CHECKING:
    from torch import Tensor

    from polytrace.methods.transformer_lens.weights import Weights

_ATTENTION = ("W_Q", "W_K", "W_V", "W_O", "b_Q", "b_K", "b_V", "b_O")
_MLP = ("W_in", "W_gate", "W_out", "b_in", "b_out")


class BlockWeights:
    """One block's."""

    def __init__(self, hooked: Weights, layer: int) -> None:
        block = hooked.hook_table.blocks[layer]
        self.attn = AttentionWeights(hooked, layer)
        self.mlp = PartWeights(hooked, layer, _MLP)
        for name in ("ln1", "ln2", "ln1_post", "ln2_post"):
            path = getattr(block, name)
            if path is not None:
                setattr(self, name, NormWeights(hooked, path))

    ln1: NormWeights
    ln2: NormWeights
    ln1_post: NormWeights
    ln2_post: NormWeights


class PartWeights:
    """Those of attention or of the MLP, by name."""

    def __init__(self, hooked: Weights, layer: int, names: tuple[str, ...]) -> None:
        self._hooked, self._layer, self._names = hooked, layer, names

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name not in self._names:
            raise AttributeError(name)
        return self._hooked.weight(self._layer, name)

    def __dir__(self) -> list[str]:
        return list(self._names)


class AttentionWeights(PartWeights):
    """Those of attention, and its circuits."""

    def __init__(self, hooked: Weights, layer: int) -> None:
        super().__init__(hooked, layer, _ATTENTION)

    @property
    def OV(self) -> FactoredMatrix:
        return FactoredMatrix(self.W_V, self.W_O)

    @property
    def QK(self) -> FactoredMatrix:
        return FactoredMatrix(self.W_Q, self.W_K.transpose(-2, -1))


class NormWeights:
    """A norm: its weight and bias as it applies them (Gemma stores them less 1), float32, and itself."""

    def __init__(self, hooked: Weights, path: str) -> None:
        self._hooked, self._path = hooked, path

    @cached_property
    def _both(self) -> tuple[Tensor, Tensor]:
        facts, module = self._hooked.norm_facts(self._path), self._module

        def both() -> Any:
            import torch

            return torch.stack(facts.weight_and_bias(module))

        weight, bias = self._hooked.fetched({"both": both})["both"]
        return weight, bias

    @property
    def w(self) -> Tensor:
        return self._both[0]

    @property
    def b(self) -> Tensor:
        return self._both[1]

    def __call__(self, residual: Tensor) -> Tensor:
        """What the norm makes of any residual, worked out here."""
        facts = self._hooked.norm_facts(self._path)
        made = facts.centred(residual) / facts.scale_of(residual) * self.w + self.b
        return made.to(residual.dtype)  # type: ignore[no-any-return]

    @property
    def _module(self) -> Module:
        return self._hooked.model.get_submodule(self._path)
