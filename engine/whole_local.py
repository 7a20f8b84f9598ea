"""A torch module in this process, called as it is: what `polytrace.load(module)` talks to.

It is described once; the sites of a call are found when somebody first calls with arguments of its structure.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, TypeVar

from torch import Tensor, nn
from transformers import AutoProcessor

from engine.brought import from_raw
from engine.direct import DirectBackend, LocalShards
from engine.module_state import ModuleState
from engine.offload_folder import OffloadFolder
from engine.ops import DTYPE_NAMES
from engine.probe import named_tensors
from engine.shapes import infer
from engine.whole_places import offloaded_modules
from engine.whole_shard import WholeShard
from engine.whole_sites import CallSites, fake_of, modules_of, parameters_of, record
from engine.whole_tapes import CallTapes
from polytrace.description import Limits, ModelDescription, PassLayout, SiteInfo
from polytrace.given import with_given
from polytrace.graph import Given, Inputs, Request
from polytrace.tensors import RawTensor
from scheduling.plan import Program, RequestId
from scheduling.policy import PassPolicy
from scheduling.steps import Facts
from scheduling.whole import described, inputs_of_all, taped
from scheduling.working_out import work_out

T = TypeVar("T")


class WholeBackend(DirectBackend):
    """One module, its shard, and the sites of its calls."""

    def __init__(
        self,
        module: nn.Module,
        *,
        name: str,
        source: str | None = None,
        merges: bool = False,
        folder: OffloadFolder | None = None,
    ) -> None:
        """`source`: where its tokenizer and processor are, if there are any; `merges` as of its shard; `folder`: of
        weights that lie on disk.
        """
        description = describe(module, name, tape_bytes=_ALL_THERE_IS)
        self._folder = folder
        self._sites = CallSites(module)
        self._tapes = CallTapes(self._sites, description.offloaded)
        self.shard = WholeShard(module, description, merges=merges, is_fixed=False)
        self._is_known_source = source is not None
        self._processor: Any = None  # until somebody asks
        meta = fake_of(module, _on_meta)
        policy = PassPolicy(merges_calls=merges)
        super().__init__(source or name, LocalShards(self.shard), description, meta, policy)  # type: ignore[arg-type]

    def sites_of(self, inputs: Inputs, constants: Mapping[str, RawTensor]) -> tuple[SiteInfo, ...]:
        """What a call visits with these arguments, whose tensors are among the constants."""
        return self._sites.of(inputs, constants, partial(self._really, constants=constants))

    def _really(self, inputs: Inputs, constants: Mapping[str, RawTensor]) -> tuple[SiteInfo, ...]:
        """The same, by calling the model."""
        return self._on_model(inputs, record, constants=constants)

    def _on_model(
        self, inputs: Inputs, run: Callable[[nn.Module, Inputs], T], *, constants: Mapping[str, RawTensor]
    ) -> T:
        """What `run` makes of the model, whose buffers and random numbers are then as they were."""
        device = self.shard.context.device

        def real(given: Given) -> Tensor:
            return from_raw(constants[given.name]).to(device, copy=True)  # models change their arguments

        before = ModuleState(self.shard.model)
        try:
            return run(self.shard.model, with_given(inputs, real))
        finally:
            before.put()

    def tokenizer_json(self) -> bytes | None:
        return super().tokenizer_json() if self._is_known_source else None

    def weight_behind(self, tensor: Any) -> str | None:
        """The weight that a tensor with a gradient is or was computed from."""
        paths = {id(weight): path for path, weight in self.shard.model.named_parameters()}
        found = (paths[id(one)] for one in leaves_behind(tensor) if id(one) in paths)
        return next(found, None)

    def processor(self) -> Any:
        """transformers' own, for images, sound or text; None where the model came without one."""
        if self._processor is None and self._is_known_source:
            try:
                self._processor = AutoProcessor.from_pretrained(self.source)
            except (OSError, ValueError, ImportError):
                return None
        return self._processor

    def close(self) -> None:
        self.shard.stop()
        if self._folder is not None:
            self._folder.close()

    def _program_of(self, request_id: RequestId, request: Request) -> tuple[Program, Facts]:
        of_invokes = [self.sites_of(one, request.constants) for one in inputs_of_all(request)]
        own = described(self.description, of_invokes)
        program, facts = work_out(request_id, request, own, lambda whole: infer(own, whole, self._meta))
        really = partial(self._on_model, constants=request.constants)
        return taped(program, self._tapes.num_bytes(program, of_invokes, really), own.limits), facts


def leaves_behind(tensor: Tensor) -> Iterator[Tensor]:
    """Tensors that autograd gathers gradients at, for one that requires them."""
    if tensor.grad_fn is None:
        yield tensor
        return
    pending, seen = [tensor.grad_fn], set()
    while pending:
        node = pending.pop()
        if node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            yield node.variable
        pending += [before for before, _ in node.next_functions if before is not None]


def describe(module: nn.Module, name: str, *, tape_bytes: int) -> ModelDescription:
    """What is known of a module before it is called. `tape_bytes`: the most that calls keep for gradients at once."""
    modules, parameters = tuple(modules_of(module)), tuple(parameters_of(module))
    floating = [tensor.dtype for _, tensor in named_tensors(module) if tensor.is_floating_point()]
    dtype = DTYPE_NAMES.get(floating[0], "float32") if floating else "float32"
    return ModelDescription(
        name=name,
        class_name=type(module).__name__,
        dtype=dtype,
        vocab_size=0,
        hidden_size=0,
        num_layers=0,
        layers=_NO_LAYERS,
        stages=1,
        ranks=1,
        fingerprint=hashlib.sha256(repr((modules, parameters)).encode()).hexdigest()[:16],
        config=_config_of(module),
        modules=modules,
        sites=(),
        parameters=parameters,
        limits=Limits(max_sequence_tokens=1, tape_bytes=tape_bytes),
        key_value_bytes=0,
        hidden_bytes=0,
        row_multiple=1,
        has_kept_rows=False,
        has_forks=False,
        layout=PassLayout.WHOLE,
        offloaded=tuple([path for path, _ in offloaded_modules(module)]),
    )


def _config_of(module: nn.Module) -> dict[str, Any]:
    """The configuration that a module of transformers or diffusers has, as JSON."""
    config: Any = getattr(module, "config", None)
    plain = config.to_dict() if hasattr(config, "to_dict") else dict(config) if isinstance(config, Mapping) else {}
    made: dict[str, Any] = json.loads(json.dumps(plain, default=str))
    return made


_ALL_THERE_IS = 1 << 62  # who calls in this process has its memory
_NO_LAYERS = "."  # no module has a dot for its name


def _on_meta(tensor: Tensor) -> Tensor:
    return tensor.detach().to("meta")
