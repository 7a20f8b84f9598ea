"""Where the parts of a model lie that is called as it is, and is spread by accelerate over devices, host and disk.

accelerate wraps the forwards of modules: what a module is given comes to its device, and weights that have no device of
their own (offloaded ones: on the meta device) come for as long as their module runs. Owns which maps fit a model, how
random weights are spread, and what the rest of the engine asks of a model that was spread so.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

import psutil  # accelerate's own
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from engine.probe import named_tensors
from polytrace.device_maps import DeviceMap, num_gpus
from polytrace.errors import UserError
from polytrace.grammar import nearest

_OF_HOST = 0.9  # of its free memory, for weights


def check_parts(device_map: DeviceMap, meta: nn.Module) -> None:
    """UserError when a mapping does not fit the model, which may be without weights: a part that is none, one that is
    left out, a lone tensor where nothing brings it.
    """
    if isinstance(device_map, str):
        return
    name, modules = type(meta).__name__, {path for path, _ in meta.named_modules()}
    tensors = meta.state_dict()
    for path in device_map:
        if path not in modules and path not in tensors:
            raise UserError(f"the device map places {path}, which {name} does not have{nearest(path, sorted(modules))}")
    is_on_gpus = bool(num_gpus(device_map))
    for path in device_map.keys() - modules:
        if device_map[path] == "disk" or (is_on_gpus and device_map[path] == "cpu"):
            raise UserError(
                f"the device map puts {path} on {device_map[path]}: it is a tensor beside modules, which nobody brings "
                f"to where it is used; put it on {'a GPU' if is_on_gpus else 'cpu'}"
            )
    left = [path for path in tensors if not any(one in device_map for one in _ways_to(path))]
    if left:
        told = ", ".join(left[:3]) + (f" and {len(left) - 3} more" if len(left) > 3 else "")
        raise UserError(f"the device map leaves out {told} of {name}: place all of its parts")
    known: dict[int, str] = {}
    for path, tensor in meta.named_parameters(remove_duplicate=False):
        other = known.setdefault(id(tensor), path)
        places = {_place_of(path, device_map), _place_of(other, device_map)}
        if len(places) > 1 and "disk" in places:  # a library finds what is on the disk under one name
            told = f"the device map puts one of {other} and {path} on disk"
            raise UserError(f"{told}, and they are one tensor: put both there, or none")


def check_gpus(device_map: DeviceMap, there: int) -> None:
    """UserError when a mapping names a GPU that is not there."""
    wanted = num_gpus(device_map) or 0
    if wanted > there:
        told = f"the device map names GPU {wanted - 1}, and there are {there} GPUs here"
        raise UserError(f'{told}: place its parts on fewer, and on "cpu" and "disk"')


def on_host(device_map: DeviceMap) -> dict[str, Any]:
    """What a library is told beside a name where no GPU is to be used, though it may see some."""
    if not isinstance(device_map, str):
        return {}
    return {"max_memory": {"cpu": int(_OF_HOST * psutil.virtual_memory().available)}}


def spread(
    model: nn.Module,
    device_map: DeviceMap,
    offload_folder: str | None = None,
    max_memory: Mapping[str, int] | None = None,
) -> nn.Module:
    """Spreads a model that lies in the host's memory, as a library spreads what it reads with the same keywords."""
    from accelerate import dispatch_model, infer_auto_device_map  # seconds, for what few ask for
    from accelerate.utils import get_balanced_memory

    places, most = device_map, max_memory
    if isinstance(places, str):
        kept = getattr(model, "_no_split_modules", None)
        if places != "sequential":
            is_low = places == "balanced_low_0"
            most = get_balanced_memory(model, most, no_split_module_classes=kept, low_zero=is_low)
        places = infer_auto_device_map(model, most, no_split_module_classes=kept)
    if places.get("") == "disk":  # accelerate writes parts of a model to a disk, by their names
        named = {path: "disk" for path, _ in model.named_children()}
        places = named | {path: "cpu" for path in model.state_dict() if "." not in path}
    made: nn.Module = dispatch_model(model, dict(places), offload_dir=offload_folder)
    return made


@contextmanager
def quiet_accelerate() -> Iterator[None]:
    """It warns of tensors beside modules in a device map, and of weights that are not there: both are meant."""
    logger = logging.getLogger("accelerate.big_modeling")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The following device_map keys do not match any submodules")
            yield
    finally:
        logger.setLevel(level)


def told_places(model: nn.Module) -> str:
    """Where the weights of a model lie that was spread, for people; nothing of others."""
    places: Mapping[str, Any] = getattr(model, "hf_device_map", {})
    if len(places) < 2 and "disk" not in places.values():
        return ""
    sizes: dict[str, int] = {}
    for path, tensor in model.named_parameters():
        place = _place_of(path, places)
        told = f"GPU {place}" if isinstance(place, int) else str(place)
        sizes[told] = sizes.get(told, 0) + tensor.nbytes
    return ": " + ", ".join(f"{size / 1e6:,.1f} on {place}" for place, size in sorted(sizes.items()))


def home_of(model: nn.Module) -> torch.device:
    """Where its calls begin: what they are given and what requests work out lies there."""
    for hook in _hooks_of(model):
        if hook.execution_device is not None:
            return _device(hook.execution_device)
    devices = (tensor.device for _, tensor in named_tensors(model) if not tensor.is_meta)
    return next(devices, torch.device("cpu"))


def gpus_of(model: nn.Module) -> list[torch.device]:
    """Every GPU that it runs on."""
    devices = {home_of(model), *(tensor.device for _, tensor in named_tensors(model))}
    for module in model.modules():
        devices |= {_device(hook.execution_device) for hook in _hooks_of(module) if hook.execution_device is not None}
    return sorted((one for one in devices if one.type == "cuda"), key=lambda one: one.index or 0)


def offloaded_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Those whose own weights come only while they run."""
    for path, module in model.named_modules():
        if any(map(_offloads, _hooks_of(module))):
            yield path, module


def offloaded_weight(model: nn.Module, path: str) -> Tensor | None:
    """A parameter that is not on any device, from where it is kept; None where nobody keeps it."""
    owner, _, name = path.rpartition(".")
    for hook in filter(_offloads, _hooks_of(model.get_submodule(owner))):
        if hook.weights_map is not None:
            with suppress(KeyError):
                found: Tensor = hook.weights_map[name]
                return found
    return None


def let_go(model: nn.Module) -> None:
    """Weights of modules that a call has left before their end are not there any more, as behind a whole call."""
    if not hasattr(model, "_hf_hook"):
        return
    for _, module in offloaded_modules(model):
        if any(not tensor.is_meta for tensor in module.parameters(recurse=False)):
            for hook in filter(_offloads, _hooks_of(module)):
                hook.post_forward(module, None)


@contextmanager
def weights_from_outside(model: nn.Module, keep: Callable[[Tensor], None]) -> Iterator[None]:
    """Inside, offloaded weights are read where no mode of torch looks: libraries that read files do not under one.
    `keep` hears of those that have come for a module.
    """
    hooks = [
        hook for _, module in offloaded_modules(model) for hook in _hooks_of(module) if hook.weights_map is not None
    ]
    maps = [hook.weights_map for hook in hooks]

    def come(hook: Any, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        given = type(hook).pre_forward(hook, module, *args, **kwargs)
        for tensor in (*module.parameters(), *module.buffers()):
            keep(tensor)
        return given

    for hook, own in zip(hooks, maps, strict=True):
        hook.weights_map, hook.pre_forward = _Outside(own, keep), partial(come, hook)
    try:
        yield
    finally:
        for hook, own in zip(hooks, maps, strict=True):
            hook.weights_map = own
            del hook.pre_forward


class _Outside(Mapping[str, Tensor]):
    """Offloaded weights by their names."""

    def __init__(self, weights: Mapping[str, Tensor], keep: Callable[[Tensor], None]) -> None:
        self._weights, self._keep = weights, keep

    def __getitem__(self, name: str) -> Tensor:
        with _disable_current_modes(), torch._C.DisableTorchFunction():
            found = self._weights[name]
            self._keep(found)
            return found

    def __contains__(self, name: object) -> bool:
        return name in self._weights

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)


def _place_of(path: str, device_map: Mapping[str, Any]) -> Any:
    return next((device_map[way] for way in _ways_to(path) if way in device_map), "cpu")


def _hooks_of(module: nn.Module) -> Iterator[Any]:
    """accelerate's, that bring things to devices."""
    hook = getattr(module, "_hf_hook", None)
    for one in getattr(hook, "hooks", (hook,)):
        if hasattr(one, "execution_device") and hasattr(one, "offload"):
            yield one


def _offloads(hook: Any) -> bool:
    return bool(hook.offload)


def _device(given: Any) -> torch.device:
    return torch.device("cuda", given) if isinstance(given, int) else torch.device(given)


def _ways_to(path: str) -> Iterator[str]:
    """A tensor and all that it is in."""
    parts = path.split(".")
    return (".".join(parts[:length]) for length in range(len(parts) + 1))
