"""A model in this process, loaded or taken as it is: what `polytrace.load` talks to.

Owns which backend a source gets: `LocalBackend` serves a language model with one shard, `engine.whole_local` calls any
other as it is. How requests come to the shard is `engine.direct`'s.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from engine.direct import DirectBackend, LocalShards
from engine.image_gate import check_images
from engine.links import Solo
from engine.loading import ShardConfig, meta_model
from engine.offload_folder import OffloadFolder
from engine.reading import Reading
from engine.shard import Shard
from engine.whole_loading import load_whole, whole_class
from engine.whole_local import WholeBackend
from polytrace.device_maps import DeviceMap
from polytrace.errors import GraphError
from polytrace.lines import user_line
from polytrace.progress import Tell, tell_nobody
from scheduling.policy import PassPolicy


class LocalBackend(DirectBackend):
    """A model in this process."""

    def __init__(
        self,
        source: str,
        *,
        dtype: str = "auto",
        name: str | None = None,
        threads: int | None = None,
        device: str | None = None,
        policy: PassPolicy | None = None,
        random_weights: int | None = None,
        offload_gib: float = 0.0,
        tell: Tell = tell_nobody,
    ) -> None:
        """`random_weights`: a seed, to read none. `offload_gib`: of the weights to keep in the host's memory.
        `tell` hears how many bytes of the weights are there, of how many.
        """
        config = ShardConfig(
            source=source,
            dtype=dtype,
            threads=threads,
            device=checked_device(device),
            random_weights_seed=random_weights,
            offload_bytes=int(offload_gib * (1 << 30)),
        )
        self.shard = Shard(config, Solo())
        self.shard.start(lambda told: tell(told.read_bytes, told.total_bytes) if isinstance(told, Reading) else None)
        description = self.shard.describe(name or source, [self.shard.gate()])
        policy = policy or PassPolicy()
        description = replace(description, limits=replace(description.limits, pass_tokens=policy.budget_tokens))
        self.shard.open(description)
        super().__init__(source, LocalShards(self.shard), description, meta_model(source, dtype), policy)
        if description.images is not None:
            check_images(self, self.shard.loaded.model, description.images)

    def close(self) -> None:
        self.shard.stop()


def module_backend(module: Any, *, name: str | None, merges_calls: bool = False) -> WholeBackend:
    """A torch module as it is. Raises GraphError for anything else, and where TorchScript runs in it."""
    if not isinstance(module, nn.Module):
        told = "polytrace.load takes a folder, a hub id or a torch.nn.Module"
        raise GraphError(f"{told}, not something of type {type(module).__name__}", where=user_line())
    for path, part in module.named_modules():
        if isinstance(part, torch.jit.ScriptModule):
            told = f"{path or 'the module'} is a {type(part).__name__} of TorchScript, which has no hooks of Python's"
            raise GraphError(f"{told}: load the module that it was made of", where=user_line())
    return WholeBackend(module, name=name or type(module).__name__, merges=merges_calls)


def source_backend(
    source: str,
    *,
    dtype: str,
    name: str | None,
    threads: int | None,
    device: str | None,
    device_map: DeviceMap | None,
    random_weights: int | None,
    merges_calls: bool = False,
) -> WholeBackend | None:
    """A model of a folder or hub that is called as it is; None of one that is served as a language model. Raises as
    `engine.whole_loading.load_whole`, and GraphError for a device that is not there.
    """
    kind = whole_class(source)
    if kind is None:
        return None
    if isinstance(device_map, str) and device not in (None, "cpu", "cuda"):
        told = f"device is {device}, and device_map={device_map!r} takes the GPUs that there are"
        raise GraphError(f"{told}: give one of them", where=user_line())
    config = ShardConfig(
        source=source,
        dtype=dtype,
        threads=threads,
        device=checked_device(device),
        random_weights_seed=random_weights,
        device_map=device_map,
    )
    folder = OffloadFolder()
    model = load_whole(config, kind, folder)
    return WholeBackend(model, name=name or source, source=source, merges=merges_calls, folder=folder)


def checked_device(device: str | None) -> str:
    """Where a model is to run; by default the GPU when there is one. GraphError for a device that is not there."""
    num_gpus = torch.cuda.device_count()
    if device is None:
        return "cuda" if num_gpus else "cpu"
    try:
        wanted = torch.device(device)
        there = torch.get_device_module(wanted).device_count()
    except (RuntimeError, TypeError, AttributeError):  # nothing that torch knows, or that runs anything
        there = None
    if there is None or (wanted.index or 0) >= there:
        told = "no device" if there is None else "not there"
        way = '"cpu"' + (f' or "cuda:N" with N below {num_gpus}' if num_gpus else "")
        here = f"this machine has {num_gpus} GPU{'' if num_gpus == 1 else 's'}"
        raise GraphError(f"device {str(device)!r} is {told}: {here}; write {way}", where=user_line())
    return str(wanted)
