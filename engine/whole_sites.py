"""The sites of one call of a model as it is: every side of every module that the call visits, tensor by tensor.

Owns the forward that finds them, on fake tensors: no weights, no memory, and where that suffices the structure of the
arguments alone (`polytrace.given`). The model itself is not touched: a twin runs, whose weights are fake.
"""

from __future__ import annotations

import copy
import inspect
import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from contextvars import ContextVar
from hashlib import blake2b
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter
from transformers import PreTrainedModel

from engine.arguments import Arguments, Selector
from engine.brought import from_raw
from engine.known_integers import KnownIntegers, PlainLists
from engine.leaves import first_argument
from engine.module_state import attribute_tensors, kept_memory, settings_of
from engine.ops import DTYPE_NAMES, TORCH_DTYPES
from engine.probe import layers_of, named_tensors
from engine.recorder import memory_of
from engine.whole_manner import layer_by_layer
from engine.whole_members import leaves_of, members_of, own_tensors
from engine.whole_places import home_of
from polytrace.description import Leaf, ModuleInfo, ParameterInfo, Rows, SiteInfo
from polytrace.errors import GraphError, TooLargeError
from polytrace.given import given_names, structure_of, with_given
from polytrace.graph import Device, DType, Given, Inputs, Port
from polytrace.tensors import RawTensor

T = TypeVar("T")

_MAX_SITES = 100_000  # of one call
_HELD = "it is a parameter of the model itself, or another tensor that it keeps: write `site = value`"
_OVERLAPS = "several of its elements are one in memory: write `site = value`"


class CallSites:
    """Finds the sites of calls of one model, each structure of arguments once.

    Where what a call visits depends on values, integers among its arguments are looked at (which of them is an image,
    how long each sequence is); where that does not suffice, `really` is asked, which runs the model with all of them.
    """

    def __init__(self, model: nn.Module, max_tensor_bytes: int | None = None) -> None:
        """A call with a tensor of more bytes is refused before memory is taken; None: whatever there is room for."""
        self._max_bytes = max_tensor_bytes
        self._turn = threading.RLock()
        self._settings = settings_of(model)
        self._twin = _Twin(model, looks=False)
        self._looking_twin: _Twin | None = None  # made when a call needs it
        self._model = model
        self._known: OrderedDict[Hashable, tuple[SiteInfo, ...]] = OrderedDict()
        self._levels: dict[str, int] = {}  # by structure: how much has to be known of the values, where it is not 0

    def of(
        self,
        inputs: Inputs,
        constants: Mapping[str, RawTensor],
        really: Callable[[Inputs], tuple[SiteInfo, ...]] | None = None,
    ) -> tuple[SiteInfo, ...]:
        """The sites of a call, in their order; the same object each time. Raises GraphError where it does not run."""
        with self._turn:
            self._look_at_settings()
            return self._of(inputs, constants, really)

    def _look_at_settings(self) -> None:
        if (settings := settings_of(self._model)) != self._settings:  # `model.train()`, `model.steps = 8`
            self._settings = settings
            self._twin, self._looking_twin = _Twin(self._model, looks=False), None
            self._known.clear()
            self._levels.clear()

    def _of(
        self,
        inputs: Inputs,
        constants: Mapping[str, RawTensor],
        really: Callable[[Inputs], tuple[SiteInfo, ...]] | None,
    ) -> tuple[SiteInfo, ...]:
        structure = repr(structure_of(inputs, constants))
        for level in range(self._levels.get(structure, 0), 3):
            key = structure, tuple(_content(constants[name], level) for name in given_names(inputs))
            if key in self._known:
                self._known.move_to_end(key)
                return self._known[key]
            try:
                found = self._found(inputs, constants, level, really)
            except GraphError:
                if level == 2 or (level == 1 and really is None):
                    raise
                continue
            self._levels[structure] = level
            self._known[key] = found
            if len(self._known) > _MAX_KNOWN:
                self._known.popitem(last=False)
            return found
        raise AssertionError("the last level has returned or raised")

    def has_looked(self, inputs: Inputs, constants: Mapping[str, RawTensor]) -> bool:
        """Whether what a call of this structure visits depends on values; behind `of`."""
        return self._levels.get(repr(structure_of(inputs, constants)), 0) > 0

    def on_twin(
        self, inputs: Inputs, constants: Mapping[str, RawTensor], run: Callable[[nn.Module, Inputs], T]
    ) -> T | None:
        """What `run` makes of the model without data and the arguments of a call whose sites were found; None where
        these depend on more of its values than is known without data.
        """
        with self._turn:
            level = self._levels.get(repr(structure_of(inputs, constants)), 0)
            twin = (self._twin, self._looking_twin, None)[level]
            return None if twin is None else twin.run(inputs, constants, run)

    def _found(
        self,
        inputs: Inputs,
        constants: Mapping[str, RawTensor],
        level: int,
        really: Callable[[Inputs], tuple[SiteInfo, ...]] | None,
    ) -> tuple[SiteInfo, ...]:
        if level == 0:
            return self._twin.record(inputs, constants, self._max_bytes)
        if level == 1:
            if self._looking_twin is None:
                self._looking_twin = _Twin(self._model, looks=True)
            return self._looking_twin.record(inputs, constants, self._max_bytes)
        assert really is not None, "it was asked whether there is one"
        return really(inputs)


class _Twin:
    """A model with fake weights; `looks`: it knows the integers that it is called with."""

    def __init__(self, model: nn.Module, *, looks: bool) -> None:
        self._looks = looks
        # one device: what lies on several comes together anyway, and what is known of integers is on the host
        self._device = torch.device("cpu") if looks else home_of(model)
        self._mode = FakeTensorMode(allow_non_fake_inputs=True)  # what a model keeps beside parameters and buffers
        self._model = fake_of(model, self._unknown)
        if isinstance(self._model, PreTrainedModel):  # the experts that a token goes to are values, too
            with suppress(ValueError):
                self._model.set_experts_implementation("batched_mm")

    def record(self, inputs: Inputs, constants: Mapping[str, RawTensor], max_bytes: int | None) -> tuple[SiteInfo, ...]:
        return self.run(inputs, constants, lambda model, called: record(model, called, max_bytes))

    def run(self, inputs: Inputs, constants: Mapping[str, RawTensor], run: Callable[[nn.Module, Inputs], T]) -> T:
        """What it makes of the twin and the arguments, whose tensors are fake."""
        known = KnownIntegers(self._mode) if self._looks else None

        def fake(given: Given) -> Tensor:
            raw = constants[given.name]
            dtype = TORCH_DTYPES[raw.dtype]
            if known is None or dtype.is_floating_point or not raw.is_here:
                return self._unknown(torch.empty(raw.shape, dtype=dtype, device="meta"))
            return known.fake(from_raw(raw).clone())  # models change their arguments

        called = with_given(inputs, fake)
        with self._mode, _quiet_torch(), ExitStack() as modes:
            if known is not None:
                modes.enter_context(known)
                modes.enter_context(PlainLists())
            return run(self._model, called)

    def _unknown(self, tensor: Tensor) -> Tensor:
        own = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
        return FakeTensor(self._mode, own, self._device)


_MAX_KNOWN = 256  # calls whose sites are kept


def _content(raw: RawTensor, level: int) -> bytes | None:
    """What of a tensor's values has to be equal for two calls to have the same sites."""
    if level == 0 or (level == 1 and "float" in raw.dtype):
        return None
    if not raw.is_here:
        return (raw.digest or raw.state or "").encode()
    return blake2b(raw.data, digest_size=16).digest()


@contextmanager
def _quiet_torch() -> Iterator[None]:
    """It logs, with its own frames, that an operation does not take its tensors, which the user's error says."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


def fake_of(model: nn.Module, make: Callable[[Tensor], Tensor]) -> nn.Module:
    """A copy of a model with other tensors for its parameters and buffers; tied ones stay one.

    GraphError for a model that has something that cannot be copied.
    """
    tensors = {id(tensor): tensor for _, tensor in named_tensors(model)}
    for tensor in attribute_tensors(model):
        if tensor.is_floating_point() and (tensor.ndim or not tensor.is_leaf):  # a number that is kept stays known
            tensors[id(tensor)] = tensor
    # accelerate's hooks hold the weights that they bring, and are not for the twin
    hooks = (vars(module).get("_hf_hook") for module in model.modules())
    memo: dict[int, Any] = {id(hook): None for hook in hooks if hook is not None}
    for key, tensor in tensors.items():
        made = make(tensor)
        is_parameter = isinstance(tensor, nn.Parameter) and not isinstance(made, nn.Parameter)
        memo[key] = nn.Parameter(made, requires_grad=tensor.requires_grad) if is_parameter else made
    try:
        twin: nn.Module = copy.deepcopy(model, memo)
    except Exception as error:  # whatever a model keeps
        name = type(model).__name__
        raise GraphError(f"{name} cannot be copied, which says what its calls visit: {told(error)}") from error
    modules: Iterator[Any] = twin.modules()
    for module in modules:
        if hasattr(module, "_hf_hook"):
            module.forward = module._old_forward
            del module._hf_hook
    return twin


def record(model: nn.Module, called: Inputs, max_bytes: int | None = None) -> tuple[SiteInfo, ...]:
    """One forward, and every side of every module as it fired. TooLargeError where a tensor has more bytes."""
    recorder = _Recorder(model, max_bytes)
    handles = [handle for path, module in model.named_modules() for handle in recorder.hooks(path, module)]
    token = _recording.set(recorder)
    try:
        with torch.no_grad(), layer_by_layer():
            args, kwargs = arguments_of(called)
            model(*args, **kwargs)
    except (GraphError, TooLargeError):
        raise
    except Exception as error:  # whatever code of the model raises
        if _NO_PAST in str(error):
            raise GraphError(f"{type(model).__name__} {_NOT_GRADED}: {told(error)}") from error
        why = f"{told(error)}{_misnamed(model, called)}"
        raise GraphError(f"{type(model).__name__} does not take these arguments: {why}") from error
    finally:
        _recording.reset(token)
        for handle in handles:
            handle.remove()
    return tuple(recorder.sites)


_NO_PAST = "does not require grad and does not have a grad_fn"  # torch's
_NOT_GRADED = (
    "takes gradients inside its own forward, and a call has them off, as under torch.no_grad(): let the model turn "
    "them on where it needs them (`with torch.enable_grad():`)"
)


def _misnamed(model: nn.Module, called: Inputs) -> str:
    """Which arguments were given and which are taken, where these do not fit by their names and number; else nothing.

    Models of libraries take any keyword, and fail for the lack of another one, far from the call.
    """
    try:
        signature = inspect.signature(model.forward)
    except (TypeError, ValueError):  # a function of torch's own, which has none
        return ""
    named = [name for name, one in signature.parameters.items() if one.kind not in _VARIADIC]
    with suppress(TypeError):
        signature.bind(*called.args, **called.kwargs)
        if not named or called.kwargs.keys() <= set(named):
            return ""
    given = [f"{len(called.args)} without a name"] * bool(called.args) + list(called.kwargs)
    return f"; given: {', '.join(given) or 'nothing'}; forward takes {', '.join(named) or 'nothing'}"


_VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def arguments_of(called: Inputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a call whose tensors are there, as Python's call takes them."""
    return _of_torch(called.args), {name: _of_torch(value) for name, value in called.kwargs.items()}


def _of_torch(value: Any) -> Any:
    """Dtypes and devices as torch has them."""
    if isinstance(value, DType):
        return TORCH_DTYPES[value.name]
    if isinstance(value, Device):
        return torch.device(value.name)
    if isinstance(value, dict):
        return {key: _of_torch(part) for key, part in value.items()}
    return type(value)([_of_torch(part) for part in value]) if isinstance(value, (tuple, list)) else value


def told(error: BaseException) -> str:
    """The first line of what a model raised, with its kind."""
    first = str(error).strip().split("\n", 1)[0][:500]
    return f"{type(error).__name__}: {first}" if first else type(error).__name__


_recording: ContextVar[_Recorder | None] = ContextVar("recording_of_a_call", default=None)


class _Recorder:
    """The hooks of one such forward."""

    def __init__(self, model: nn.Module, max_bytes: int | None) -> None:
        self._max_bytes = max_bytes
        self.sites: list[SiteInfo] = []
        self._visits: dict[tuple[str, Port], int] = {}
        self._held = kept_memory(model)

    def hooks(self, path: str, module: nn.Module) -> Iterator[Any]:
        def before(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if _recording.get() is not self:
                return  # of another thread's call
            arguments = Arguments(args, kwargs)
            self._note(path, Port.INPUT, first_argument(args, kwargs), arguments.keyword)
            self._note(path, Port.INPUTS, arguments)

        def after(_module: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
            if _recording.get() is self:
                self._note(path, Port.OUTPUT, output)

        yield module.register_forward_pre_hook(before, with_kwargs=True)
        yield module.register_forward_hook(after)

    def _note(self, path: str, port: Port, value: Any, keyword: str | None = None) -> None:
        """A side as it fired, also where there is no tensor in it: it counts."""
        visit = self._visits.get((path, port), 0)
        self._visits[path, port] = visit + 1
        is_call = isinstance(value, Arguments)
        structure, leaves = ("arguments", own_tensors(value.others())) if is_call else leaves_of(value)
        if is_call and not leaves:
            return
        if len(self.sites) == _MAX_SITES:
            raise TooLargeError(f"one call visits more than {_MAX_SITES} sites")
        self.sites.append(
            SiteInfo(
                module=path,
                port=port,
                visit=visit,
                order=len(self.sites),
                stage=0,
                structure=structure,
                rows=Rows.ALL,
                leaves=tuple([self._leaf(selector, tensor) for selector, tensor in leaves.items()]),
                members=() if is_call else members_of(value),
                keyword=keyword,
            )
        )

    def _leaf(self, selector: Selector, tensor: Tensor) -> Leaf:
        dtype = DTYPE_NAMES.get(tensor.dtype)
        num_bytes = tensor.numel() * tensor.dtype.itemsize
        if self._max_bytes is not None and num_bytes > self._max_bytes:
            told = f"a call with these arguments makes a tensor of {num_bytes} bytes ({list(tensor.shape)})"
            raise TooLargeError(f"{told}; the limit is {self._max_bytes}")
        refusal = None
        if dtype is None or tensor.layout is not torch.strided:
            refusal = f"it is of {str(tensor.dtype).removeprefix('torch.')} in the layout {tensor.layout}"
        in_place = None
        if refusal is None and memory_of(tensor) in self._held:
            in_place = _HELD
        elif refusal is None and overlaps(tensor):
            in_place = _OVERLAPS
        return Leaf(
            selector=selector,
            tail=tuple(map(int, tensor.shape)),
            dtype=dtype or "float32",
            read_refusal=refusal,
            write_refusal=refusal,
            in_place_refusal=refusal or in_place,
            num_columns=1,
            is_whole=True,
        )


def overlaps(tensor: Tensor) -> bool:
    """Whether elements may be one in memory, as of `expand` and `unfold`: a stride within another's reach."""
    reach = 0
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            if stride <= reach:
                return tensor.numel() > 0
            reach += stride * (size - 1)
    return False


def modules_of(model: nn.Module) -> Iterator[ModuleInfo]:
    """The tree. A module is called on values as the model itself calls it: with one tensor or with none."""
    layers = layers_of(model)
    for path, module in model.named_modules():
        is_list, is_dict = isinstance(module, nn.ModuleList), isinstance(module, nn.ModuleDict)
        yield ModuleInfo(
            path=path,
            class_name=type(module).__name__,
            is_list=is_list,
            is_decoder_layer=False,
            is_layer=path in layers,
            first_stage=0,
            call_refusal="it is a list of modules" if is_list else "it is a dict of modules" if is_dict else None,
            is_dict=is_dict,
        )


def parameters_of(model: nn.Module) -> Iterator[ParameterInfo]:
    """Parameters and buffers by every path they have."""
    for path, tensor in named_tensors(model):
        if isinstance(tensor, (UninitializedParameter, UninitializedBuffer)):
            raise GraphError(f"{path} has no shape yet: call the module once before it is loaded")
        if tensor.dtype in DTYPE_NAMES and tensor.layout is torch.strided:
            dtype = DTYPE_NAMES[tensor.dtype]
            yield ParameterInfo(path=path, shape=tuple(tensor.shape), dtype=dtype, stage=0, sharded_dim=None)
