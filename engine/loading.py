"""From a folder or a hub id to one shard's model: its stage's layers, its rank's slices, nothing else read.

Together with `engine.parallel` this is the only file that knows transformers' private surface. Weights are taken in by
transformers' own loader (renamings, merged experts, slices of DTensor placeholders); what it may see is decided here:
it gets a state dict of tensors that are not read yet, of the files that hold weights of this shard, and a run-time
subclass of the model's class puts the stubs in and applies the tensor-parallel plan on the meta device, before anything
is read. It takes one after the other, so a shard holds its own slices and what one of them is made of.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch.distributed.tensor import DTensor
from transformers import AutoConfig, PreTrainedModel
from transformers.distributed.configuration_utils import DistributedConfig
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
)

from engine.checkpoint import Needs, check_weights, checkpoint_dtype, lazy_state
from engine.drawing import random_state
from engine.experts import use_padded_experts
from engine.folders import no_folder
from engine.imaged import imaged_class
from engine.links import Links
from engine.offload import offload
from engine.parallel import install_splits, place_splits
from engine.quantised import check_quantisation, quantisation_of, widened
from engine.reading import Reader, Report
from engine.shipped import known_source
from engine.splits import Split, plan_splits
from engine.windows import Layout, Window, find_layout, keep_window
from polytrace.device_maps import DeviceMap
from polytrace.errors import ServiceError


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardConfig:
    """One shard of a deployment: which model, which part of it, where."""

    source: str  # a folder, a hub id (HF_HUB_OFFLINE is respected), or a model whose configuration ships
    dtype: str = "auto"  # "auto": the configuration's, else the checkpoint's; or a torch name such as "bfloat16"
    stage: int = 0
    stages: int = 1
    rank: int = 0
    ranks: int = 1
    device: str = "cpu"
    threads: int | None = None  # torch threads of this process; None leaves torch's choice
    kv_bytes: int = 4 << 30  # budget of the key/value store
    constant_bytes: int = 4 << 30  # budget of contents that stay on the device, see `engine.constants`
    random_weights_seed: int | None = None  # read no weights: draw them, the same ones on every shard
    offload_bytes: int = 0  # of the weights to keep in the host's memory, see `engine.offload`
    whole: bool = True  # whether a model that is no language model is called as it is, see `engine.imaged`
    device_map: DeviceMap | None = None  # how a model that is called as it is is spread; None: all of it is on `device`
    merges_calls: bool = False  # of such a model: several are one where that is exact, see `engine.whole_merging`


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedModel:
    """A shard's model, in eval mode, on its device, without gradients."""

    model: PreTrainedModel
    window: Window
    layout: Layout
    splits: tuple[Split, ...]  # how its parameters lie over the ranks; none where there is one
    weight_bytes: int  # of this shard
    read_bytes: int  # of files
    seconds: float  # the load took
    files: tuple[str, ...] = ()  # that hold weights of this shard


def meta_model(source: str, dtype: str = "auto") -> PreTrainedModel:
    """The whole unsharded model on the meta device, in eval mode: for probing and shapes."""
    config, kind = _config_and_class(source)
    config.dtype = resolve_dtype(source, dtype)
    with torch.device("meta"):
        model: PreTrainedModel = kind._from_config(config, dtype=config.dtype).eval().requires_grad_(False)
    _prepare(model)
    return model


def resolve_dtype(source: str, dtype: str) -> torch.dtype:
    """The dtype that "auto" means for a model, or the named one."""
    if dtype == "auto":
        config, _ = _config_and_class(source)
        found: Any = getattr(config, "dtype", None) or getattr(config.get_text_config(decoder=True), "dtype", None)
        if found is None:
            found = checkpoint_dtype(source)
        resolved: torch.dtype = getattr(torch, found) if isinstance(found, str) else found
        return resolved
    return resolve_dtype_of(dtype)


def resolve_dtype_of(dtype: str) -> torch.dtype:
    """The dtype of a name other than "auto"."""
    named = getattr(torch, dtype, None)
    if not isinstance(named, torch.dtype) or not named.is_floating_point:
        raise ServiceError(f"dtype {dtype!r} is not one of auto, float32, bfloat16, float16, float64")
    return named


def check_source(source: str, dtype: str, *, random_weights: bool) -> None:
    """ServiceError when there is no such model, or none of its weights and they are not to be drawn; reads neither."""
    meta_model(source, dtype)
    if not random_weights:
        check_quantisation(_config_and_class(source)[0])
        check_weights(source)


def check_split(source: str, dtype: str, *, stages: int, ranks: int) -> None:
    """ServiceError with the way out when the model cannot be served so; reads a configuration and no weights."""
    whole = meta_model(source, dtype)
    find_layout(whole).window(stages - 1, stages)
    plan_splits(whole, ranks)


def load_model(config: ShardConfig, links: Links, report: Report = lambda _: None) -> LoadedModel:
    """Read this shard's part of the model; waits for no other shard."""
    start = time.perf_counter()
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    whole = meta_model(config.source, config.dtype)
    layout = find_layout(whole)
    window = layout.window(config.stage, config.stages)
    every_key = set(whole.state_dict())
    keep_window(whole, window, layout)
    owned_keys = set(whole.state_dict())
    tied: dict[str, str] = {
        t: s for t, s in whole.all_tied_weights_keys.items() if t in owned_keys and s not in owned_keys
    }
    if config.random_weights_seed is None:
        check_quantisation(whole.config)
    report(f"layers {window.first}-{window.stop - 1} of {window.num_layers}: {len(owned_keys)} weights")

    with Reader(report) as reader, ExitStack() as files:
        state: dict[str, Any]
        if config.random_weights_seed is None:
            needs = Needs(window=window, dropped=every_key - owned_keys - set(tied.values()))
            read = dict(lazy_state(config.source, needs, files, reader, report))
            state = widened(whole.config, read, resolve_dtype(config.source, config.dtype))
        else:
            state = random_state(whole, config.random_weights_seed, reader)
        for target, source in tied.items():
            # The embedding is on the first stage, the head tied to it on the last: both read the same tensor.
            found = state.get(source) or next((v for k, v in state.items() if source.endswith(f".{k}")), None)
            if found is None:  # of a checkpoint that names the parts of its path otherwise
                own = ".".join(source.split(".")[-2:])
                ends = [value for key, value in state.items() if key.endswith(f".{own}")]
                found = ends[0] if len(ends) == 1 else None
            if target not in state and found is not None:
                state[target] = found
        model, splits = _from_state(config, state, window, layout, links, reader)
    install_splits(model, splits, links)
    _prepare(model)
    if config.offload_bytes:
        kept = offload(model, layout.layers, config.offload_bytes, torch.device(config.device))
        report(f"{kept / 1e6:,.1f} MB of the weights stay in the host's memory")

    model.eval().requires_grad_(False)
    weight_bytes = sum(t.nbytes for t in {id(t): t for t in model.parameters()}.values())
    seconds = time.perf_counter() - start
    rate = reader.read_bytes / seconds
    report(f"loaded {weight_bytes / 1e6:,.1f} MB in {seconds:.1f} s, {rate / 1e6:,.0f} MB/s")
    return LoadedModel(
        model=model,
        window=window,
        layout=layout,
        splits=splits,
        weight_bytes=weight_bytes,
        read_bytes=reader.read_bytes,
        seconds=seconds,
        files=tuple(dict.fromkeys(reader.paths)),
    )


def _from_state(
    config: ShardConfig, state: dict[str, Any], window: Window, layout: Layout, links: Links, reader: Reader
) -> tuple[PreTrainedModel, tuple[Split, ...]]:
    """Let transformers load `state` into a run-time subclass that is cut to size before weights are read."""
    model_config, kind = _config_and_class(config.source)
    if quantisation_of(model_config):
        del model_config.quantization_config  # what the loader gets is not quantised any more
    applied: list[tuple[Split, ...]] = []

    class Windowed(kind):  # type: ignore[misc, valid-type]
        @classmethod
        def prepare_distribute_model(cls, distributed_config: Any, device_map: Any = None) -> tuple[Any, Any, Any]:
            return distributed_config, device_map, None

        @classmethod
        def maybe_distribute_model(cls, model: Any, distributed_config: Any, mesh_manager: Any) -> Any:
            keep_window(model, window, layout)
            if window.stages > 1:
                owned = dict(model.named_parameters(remove_duplicate=False))
                tied = model.all_tied_weights_keys
                model.all_tied_weights_keys = {t: s for t, s in tied.items() if t in owned and s in owned}
            applied.append(plan_splits(model, config.ranks))
            place_splits(model, applied[0], links, torch.device(_first_device(config)).type)
            reader.total_bytes = int(sum(_num_bytes(tensor) for tensor in state.values()) * _local_share(model))
            return model

    Windowed.__name__ = Windowed.__qualname__ = kind.__name__
    Windowed.__module__ = kind.__module__
    dtype = resolve_dtype(config.source, config.dtype)
    with quiet_transformers(), _one_at_a_time():
        model, info = Windowed.from_pretrained(
            None,
            config=model_config,
            state_dict=state,
            dtype=dtype,
            device_map={"": _first_device(config)},
            distributed_config=DistributedConfig(),
            output_loading_info=True,
        )
    missing = sorted(info["missing_keys"])
    if missing or info["mismatched_keys"]:
        raise ServiceError(
            f"the checkpoint of {config.source} does not fit {kind.__name__}: "
            f"missing {missing[:5]}, of another shape {sorted(map(str, info['mismatched_keys']))[:5]}"
        )
    if not applied:
        raise ServiceError(f"transformers {transformers.__version__} loaded {kind.__name__} without calling our hook")
    if hasattr(model.config, "distributed_config"):
        del model.config.distributed_config
    return model, applied[0]


def _first_device(config: ShardConfig) -> str:
    """Where weights are read to."""
    return "cpu" if config.offload_bytes else config.device


def _prepare(model: PreTrainedModel) -> None:
    """What every model here has in common, with weights or without."""
    use_padded_experts(model)
    models: list[Any] = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    for each in models:  # the warning reads token ids, which meta tensors do not have; and rows are padded knowingly
        each.warn_if_padding_and_no_attention_mask = _never_warn


def _never_warn(input_ids: Any, attention_mask: Any) -> None:
    pass


def _unreadable(source: str, error: Exception) -> str:
    """Why there is no model, with the nearest folders where a folder was meant."""
    return no_folder(source) or f"cannot read a model configuration from {source}: {error}"


def _config_and_class(source: str) -> tuple[Any, Any]:
    try:
        config = AutoConfig.from_pretrained(source)
    except (OSError, ValueError) as error:
        if known_source(source) == source:
            raise ServiceError(_unreadable(source, error)) from error
        config = AutoConfig.from_pretrained(known_source(source))
    if _is_seq_to_seq(config):
        return config, MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING[type(config)]
    if (kind := imaged_class(config)) is not None:
        return config, kind
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ServiceError(f"{source} is a {config.model_type} model, which transformers has no language model for")
    return config, MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]


def _is_seq_to_seq(config: Any) -> bool:
    """Whether a model has an encoder and a decoder. Some families have a decoder alone as well: the checkpoint says."""
    if type(config) not in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING:
        return False
    kind: Any = MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING[type(config)]
    return type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING or kind.__name__ in (config.architectures or ())


def _num_bytes(tensor: Any) -> int:
    found: int = tensor.nbytes if isinstance(tensor, torch.Tensor) else tensor.num_bytes
    return found


def _local_share(model: PreTrainedModel) -> float:
    """The part of the stage's weights that is this rank's."""
    parameters = list(model.parameters())
    local = sum(p.to_local().numel() if isinstance(p, DTensor) else p.numel() for p in parameters)
    return local / max(1, sum(p.numel() for p in parameters))


@contextmanager
def _one_at_a_time() -> Iterator[None]:
    """transformers reads a weight when it comes to it, not ahead in threads; `engine.reading` has its own."""
    name = "HF_DEACTIVATE_ASYNC_LOAD"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """No progress bars and no reports of the keys that other shards own."""
    logger = logging.getLogger("transformers")
    level = logger.level
    bars = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
        if bars:
            transformers.utils.logging.enable_progress_bar()
