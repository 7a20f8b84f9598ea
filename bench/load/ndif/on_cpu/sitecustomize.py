"""Lets NDIF 0.1.2 run where there is no GPU. Python imports this by itself from the PYTHONPATH of the peer's processes.

NDIF places models on CUDA devices alone. Here one "device" of 8 GiB is told of, whose calls do nothing, and the model
goes to the CPU. Nothing that runs a request is changed. Two more differences of released versions are bridged: NDIF
0.1.2 passes a keyword that nnsight 0.8.1 does not know yet, and a model is named by the hub, which is not asked here.
"""

import importlib.abc
import importlib.util
import os
import sys
from collections.abc import Callable, Mapping
from typing import Any

SIZE = 8 << 30
REVISION = "0" * 40


def cuda(module: Any) -> None:
    class Properties:
        total_memory = SIZE
        name = "cpu"

    module.device_count = lambda: 1
    module.mem_get_info = lambda device=None: (SIZE, SIZE)
    module.get_device_properties = lambda device=None: Properties
    for name in ("memory_allocated", "max_memory_allocated", "max_memory_reserved"):
        setattr(module, name, lambda device=None: 0)
    for name in (
        "synchronize",
        "set_device",
        "set_per_process_memory_fraction",
        "empty_cache",
        "reset_peak_memory_stats",
    ):
        setattr(module, name, lambda *args, **kwargs: None)  # each its own: torch tells them apart


def placement(module: Any) -> None:
    module.verify_device_placement = lambda *args, **kwargs: None


def loading(module: Any) -> None:
    load = module.HuggingFaceModel.from_model_key

    def from_model_key(key: str, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("device") == 0:
            kwargs["device"] = "cpu"
        return load(key, *args, **kwargs)

    module.HuggingFaceModel.from_model_key = staticmethod(from_model_key)
    placement(module)


def hub(module: Any) -> None:
    class Info:
        sha = REVISION
        pipeline_tag = "text-generation"
        safetensors = None

        def __init__(self, name: str) -> None:
            self.id = self.modelId = name
            self.siblings: list[Any] = []
            self.tags: list[str] = []

    module.HfApi.model_info = lambda self, repo_id, **kwargs: Info(repo_id)


def checkpoints(module: Any) -> None:
    def bridged(method: Any) -> Any:
        return classmethod(lambda cls, *args, trust_remote_code=False, **kwargs: method.__func__(cls, *args, **kwargs))

    for name in ("describe_checkpoint", "max_tp_size"):
        setattr(module.Remotable, name, bridged(getattr(module.Remotable, name)))


AFTER_IMPORT: Mapping[str, Callable[[Any], None]] = {
    "torch.cuda": cuda,
    "huggingface_hub.hf_api": hub,
    "nnsight.modeling.mixins.remotable": checkpoints,
    "ndif.services.ray.deployments.modeling.util": placement,
    "ndif.services.ray.deployments.modeling.base": loading,
}


class Finder(importlib.abc.MetaPathFinder):
    """Finds what others find, and changes it when it is there."""

    def __init__(self) -> None:
        self.looking: set[str] = set()

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        if name not in AFTER_IMPORT or name in self.looking:
            return None
        self.looking.add(name)
        try:
            spec = importlib.util.find_spec(name)
        finally:
            self.looking.discard(name)
        if spec is None or spec.loader is None:
            return None
        spec.loader = Loader(spec.loader, AFTER_IMPORT[name])
        return spec


class Loader(importlib.abc.Loader):
    def __init__(self, loader: Any, change: Callable[[Any], None]) -> None:
        self.loader = loader
        self.change = change

    def create_module(self, spec: Any) -> Any:
        return self.loader.create_module(spec)

    def exec_module(self, module: Any) -> None:
        self.loader.exec_module(module)
        self.change(module)


if os.environ.get("NDIF_ON_CPU") == "1":
    sys.meta_path.insert(0, Finder())
