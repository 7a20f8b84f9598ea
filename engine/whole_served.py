"""A model that is called as it is, as a deployment's one shard: what `engine.shard.Shard` is for language models."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from engine.checkpoint import weight_paths
from engine.fetching import fetch_all
from engine.image_proofs import sees_images
from engine.links import Links
from engine.loading import ShardConfig
from engine.offload_folder import OffloadFolder
from engine.reading import Report
from engine.reports import GateReport
from engine.shard import Shard
from engine.whole_loading import load_whole, whole_class
from engine.whole_local import describe
from engine.whole_places import gpus_of, told_places
from engine.whole_shard import WholeShard
from polytrace.description import ModelDescription
from polytrace.device_maps import DeviceMap
from polytrace.errors import ServiceError, UserError
from scheduling.plan import Plan, ShardResult

_TAPE_BYTES = 4 << 30  # for gradients, at once; of the fullest GPU half of what the weights leave


class WholeServed:
    """The process that holds the model. Construction is cheap; `start` loads weights."""

    def __init__(self, config: ShardConfig, links: Links, kind: Any) -> None:
        self.config = config
        self.links = links
        self._kind = kind
        self._folder = OffloadFolder()
        self._shard: WholeShard | None = None

    def start(self, report: Report) -> None:
        """Reads the weights, as the model's library does."""
        config = self.config
        check_whole(
            config.source,
            self._kind,
            stages=config.stages,
            ranks=config.ranks,
            offload_bytes=config.offload_bytes,
        )
        fetch_all(config.source, report)
        self._model: nn.Module = load_whole(self.config, self._kind, self._folder)
        report(f"loaded {sum(p.nbytes for p in self._model.parameters()) / 1e6:,.1f} MB{told_places(self._model)}")

    @property
    def files(self) -> tuple[str, ...]:
        """Those that its weights were read from."""
        return tuple(weight_paths(self.config.source))

    def gate(self, is_first: bool = True) -> GateReport:
        """There is nothing to prove before a call comes: what may be one call is tried then."""
        return GateReport(
            stage=0,
            rank=0,
            leaves=(),
            sharded={},
            packed={},
            row_multiple=1,
            key_value_bytes=0,
            has_forks=False,
            has_exact_rows=True,
            notes=(),
            can_generate=False,
        )

    def describe(self, name: str, reports: Iterable[GateReport]) -> ModelDescription:
        """The deployment's description."""
        free = min((torch.cuda.mem_get_info(gpu)[0] for gpu in gpus_of(self._model)), default=0)
        return describe(self._model, name, tape_bytes=max(_TAPE_BYTES, free // 2))

    def open(self, description: ModelDescription) -> None:
        """Takes the deployment's description; plans can run from now on."""
        config = self.config
        self._shard = WholeShard(
            self._model, description, constant_bytes=config.constant_bytes, merges=config.merges_calls
        )

    def run(self, plan: Plan) -> ShardResult:
        """Runs a pass."""
        assert self._shard is not None, "the deployment is open"
        return self._shard.run(plan)

    def leave(self) -> None:
        """Leaves the world; the model stays, requests are forgotten."""
        self.links.close()
        if self._shard is not None:
            self._shard.forget()

    def stop(self) -> None:
        """Leaves the deployment."""
        if self._shard is not None:
            self._shard.stop()
        self.links.close()
        self._folder.close()


def new_shard(config: ShardConfig, links: Links) -> Shard | WholeServed:
    """The shard that a source needs."""
    kind = whole_class(config.source) if config.whole else None
    return Shard(config, links) if kind is None else WholeServed(config, links, kind)


def check_whole(source: str, kind: Any, *, stages: int, ranks: int, offload_bytes: int = 0) -> None:
    """ServiceError with the way out when the model cannot be served so."""
    if stages > 1 or ranks > 1:
        told = f"{source} is a {kind.__name__}, which is called as it is, on one shard"
        way = " (or whole=false: as the language model in it)" if sees_images(source) else ""
        raise ServiceError(f"{told}; use stages=1 and ranks=1{way}")
    if offload_bytes:
        told = (
            f"{source} is a {kind.__name__}, which a device map spreads over host and disk, and offload_bytes does not"
        )
        raise ServiceError(f'{told}: use device_map, "auto" or a place for each part')


def check_unmapped(source: str, device_map: DeviceMap | None) -> None:
    """UserError with the way out for a device map of a language model."""
    if device_map is not None:
        way = "spread it with stages, ranks and offload_bytes"
        raise UserError(f"{source} is served as a language model, for which no device map is: {way}")
