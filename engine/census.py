"""What each shard of a model would hold and do, from its configuration alone: no weights, no devices.

Built on the meta device from the same pieces that loading uses (`engine.windows`, `engine.splits`), so that a plan
for sixteen GPUs says what sixteen shards would really load. Ranks of one stage hold slices of equal size: a stage's
share is that of each of its ranks.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

from transformers import PreTrainedModel

from engine.quantised import told_quantisation
from engine.splits import SUMMING, Part, Split, is_of_heads, plan_splits
from engine.windows import Layout, find_layout, split_layers, token_flops
from polytrace.errors import ServiceError


class Kind(Enum):
    """Where in the model a parameter belongs."""

    EMBEDDING = "embedding"  # runs before the first layer
    LAYER = "layers"
    HEAD = "head"  # runs after the last layer: the final norm, the head


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """One parameter as each rank of a stage holds it."""

    path: str
    kind: Kind
    shape: tuple[int, ...]
    num_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StageShare:
    """What each rank of one stage holds, and does for one row of a pass."""

    layers: range
    held: tuple[Held, ...]
    flops: int  # of its weights, the head's included
    summed_features: int  # features of all outputs that the ranks add up

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights."""
        return sum(held.num_bytes for held in self.held)

    def bytes_by_kind(self) -> Mapping[Kind, int]:
        """Bytes of weights, by kind."""
        return {kind: sum(held.num_bytes for held in self.held if held.kind is kind) for kind in Kind}


class Census:
    """A model's parameters, counted once; any split of it is arithmetic from there."""

    def __init__(self, model: PreTrainedModel) -> None:
        """`model` is the whole model on the meta device (`engine.loading.meta_model`)."""
        config: Any = model.config
        text = config.get_text_config(decoder=True)
        self.model = model
        self.layout: Layout = find_layout(model)
        self.num_layers = self.layout.num_layers
        self.hidden_size: int = text.hidden_size
        self.vocab_size: int = text.vocab_size
        self.itemsize = next(model.parameters()).element_size()
        self.dtype = str(model.dtype).removeprefix("torch.")
        self.quantisation = told_quantisation(config)  # for people
        self.num_heads: int = text.num_attention_heads
        self.num_kv_heads: int = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
        self.head_dim: int = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        self.num_parameters = sum(parameter.numel() for parameter in model.parameters())
        self.widest = max(  # features of the widest activation inside a layer
            (max(p.shape) for path, p in model.named_parameters() if self._kind(path) is Kind.LAYER), default=0
        )
        self.head_flops = sum(  # of one row
            token_flops(module, config) for root in self.layout.after for module in model.get_submodule(root).modules()
        )
        self._splits: dict[int, tuple[Split, ...]] = {}

    def splits(self, ranks: int) -> tuple[Split, ...]:
        """What is split over so many ranks. ServiceError, with the allowed numbers, when it cannot be."""
        if ranks not in self._splits:
            self._splits[ranks] = plan_splits(self.model, ranks)
        return self._splits[ranks]

    def heads(self, ranks: int) -> tuple[int, int]:
        """Query heads and key/value heads that each rank has: all of them where attention is not split."""
        if not any(is_of_heads(split) for split in self.splits(ranks)):
            return self.num_heads, self.num_kv_heads
        return self.num_heads // ranks, max(1, self.num_kv_heads // ranks)

    def shares(self, stages: int, ranks: int) -> tuple[StageShare, ...]:
        """What each stage holds. ServiceError when the model cannot be split so."""
        held: list[list[Held]] = [[] for _ in range(stages)]
        for stage, parameter in self._placed(stages, ranks):
            held[stage].append(parameter)
        flops = [0] * stages
        summed = [0] * stages
        split_modules = {split.module: split for split in self.splits(ranks)}
        for path, module in self.model.named_modules():
            stage = self.layout.home(path, stages)
            own = token_flops(module, self.model.config)
            split = split_modules.get(path)
            flops[stage] += own if split is None else own * split.part.copies // ranks
            if split is not None and split.style in SUMMING:
                summed[stage] += self.hidden_size
        return tuple(
            StageShare(
                layers=layers,
                held=tuple(held[stage]),
                flops=flops[stage],
                summed_features=summed[stage],
            )
            for stage, layers in enumerate(split_layers(self.layout.shares, stages))
        )

    def check(self, stages: int, ranks: int) -> None:
        """ServiceError unless the shards together hold every parameter exactly once, but for known copies."""
        parts = self._parts(ranks)
        tied: Mapping[str, str] = self.model.all_tied_weights_keys
        absent = dict(self.model.named_parameters(remove_duplicate=False))
        for stage, share in enumerate(self.shares(stages, ranks)):
            for held in share.held:
                part = parts.get(held.path)
                slices = 1 if part is None else ranks // part.copies
                whole = absent.pop(held.path, None)
                if whole is None or math.prod(held.shape) * slices != whole.numel():
                    raise ServiceError(f"{stages} x {ranks} shards: {held.path} on stage {stage} is twice or in part")
        left = sorted(set(absent) - set(tied))  # a tied one may be its source, on one stage with it
        if left:
            raise ServiceError(f"{stages} x {ranks} shards would hold {', '.join(left[:3])} nowhere")

    def _parts(self, ranks: int) -> Mapping[str, Part | None]:
        """Parameter -> how it lies over the ranks."""
        return {f"{split.module}.{name}": part for split in self.splits(ranks) for name, part in split.parts.items()}

    def _placed(self, stages: int, ranks: int) -> Iterator[tuple[int, Held]]:
        parts = self._parts(ranks)
        tied: Mapping[str, str] = self.model.all_tied_weights_keys
        for path, parameter in self.model.named_parameters(remove_duplicate=False):
            stage = self.layout.home(path, stages)
            source = tied.get(path)
            if source is not None and self.layout.home(source, stages) == stage:
                continue  # one tensor with its source; on two stages, both have it
            shape = list(parameter.shape)
            part = parts.get(path)
            if part is not None:
                shape[part.dim] = part.held(ranks)
            yield (
                stage,
                Held(
                    path=path,
                    kind=self._kind(path),
                    shape=tuple(shape),
                    num_bytes=math.prod(shape) * parameter.element_size(),
                ),
            )

    def _kind(self, path: str) -> Kind:
        if self.layout.layer_of(path) is not None:
            return Kind.LAYER
        return Kind.HEAD if self.layout.is_after(path) else Kind.EMBEDDING
