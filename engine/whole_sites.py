"""The sites of one call of a model as it is: every side of every module that the call visits, tensor by tensor.

Owns the forward that finds them, on fake tensors: no weights, no memory, the structure of the arguments alone
(`polytrace.given`). The model's own attributes are not touched: a twin runs, whose weights are fake.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from engine.arguments import Arguments, Selector
from engine.leaves import first_argument
from engine.ops import DTYPE_NAMES, TORCH_DTYPES
from engine.probe import named_tensors
from engine.recorder import memory_of
from polytrace.description import Leaf, ModuleInfo, ParameterInfo, Rows, SiteInfo
from polytrace.errors import GraphError, TooLargeError
from polytrace.given import form_of, with_given
from polytrace.graph import DType, Given, Inputs, Port

_DEPTH = 4  # keys of a selector at most, as on the wire
_MAX_SITES = 100_000  # of one call
_HELD = "it is a parameter of the model itself: write `site = value`"
_OVERLAPS = "several of its elements are one in memory: write `site = value`"


class CallSites:
    """Finds the sites of calls of one model, each structure of arguments once."""

    def __init__(self, model: nn.Module) -> None:
        self._mode = FakeTensorMode()
        self._twin = twin_of(model, self._mode.from_tensor)
        self._known: dict[str, tuple[SiteInfo, ...]] = {}

    def of(self, structure: Inputs) -> tuple[SiteInfo, ...]:
        """The sites of a call, in their order; the same object each time. Raises GraphError where it does not run."""
        key = repr(structure)
        if key not in self._known:
            with self._mode:
                called = with_given(structure, _fake)
                self._known[key] = record(self._twin, called)
        return self._known[key]


def twin_of(model: nn.Module, make: Callable[[Tensor], Tensor]) -> nn.Module:
    """A copy of a model with other tensors for its parameters and buffers; tied ones stay one."""
    tensors = {id(tensor): tensor for _, tensor in named_tensors(model)}
    memo: dict[int, Any] = {}
    for key, tensor in tensors.items():
        made = make(tensor)
        is_parameter = isinstance(tensor, nn.Parameter) and not isinstance(made, nn.Parameter)
        memo[key] = nn.Parameter(made, requires_grad=tensor.requires_grad) if is_parameter else made
    twin: nn.Module = copy.deepcopy(model, memo)
    return twin


def record(model: nn.Module, called: Inputs) -> tuple[SiteInfo, ...]:
    """One forward, and every side of every module as it fired."""
    recorder = _Recorder(model)
    handles = [handle for path, module in model.named_modules() for handle in recorder.hooks(path, module)]
    try:
        with torch.no_grad():
            model(*called.args, **plain(called.kwargs))
    except (GraphError, TooLargeError):
        raise
    except Exception as error:  # whatever code of the model raises
        raise GraphError(f"{type(model).__name__} does not take these arguments: {told(error)}") from error
    finally:
        for handle in handles:
            handle.remove()
    return tuple(recorder.sites)


def plain(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword arguments as Python's call takes them."""
    return {str(name): value for name, value in kwargs.items()}


def told(error: BaseException) -> str:
    """The first line of what a model raised, with its kind."""
    first = str(error).strip().split("\n", 1)[0][:500]
    return f"{type(error).__name__}: {first}" if first else type(error).__name__


def argument_of(value: Any) -> Any:
    """An argument that is no tensor, as torch has it."""
    return TORCH_DTYPES[value.name] if isinstance(value, DType) else value


class _Recorder:
    """The hooks of one such forward."""

    def __init__(self, model: nn.Module) -> None:
        self.sites: list[SiteInfo] = []
        self._visits: dict[tuple[str, Port], int] = {}
        self._held = {memory_of(tensor) for _, tensor in named_tensors(model) if tensor.layout is torch.strided}

    def hooks(self, path: str, module: nn.Module) -> Iterator[Any]:
        def before(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            arguments = Arguments(args, kwargs)
            self._note(path, Port.INPUT, *leaves_of(first_argument(args, kwargs)), arguments.keyword)
            self._note(path, Port.INPUTS, "arguments", arguments.others())

        def after(_module: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
            self._note(path, Port.OUTPUT, *leaves_of(output))

        yield module.register_forward_pre_hook(before, with_kwargs=True)
        yield module.register_forward_hook(after)

    def _note(
        self, path: str, port: Port, structure: str, leaves: Mapping[Selector, Tensor], keyword: str | None = None
    ) -> None:
        visit = self._visits.get((path, port), 0)
        self._visits[path, port] = visit + 1
        if not leaves:
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
                keyword=keyword,
            )
        )

    def _leaf(self, selector: Selector, tensor: Tensor) -> Leaf:
        dtype = DTYPE_NAMES.get(tensor.dtype)
        refusal = None
        if dtype is None or tensor.layout is not torch.strided:
            refusal = f"it is of {str(tensor.dtype).removeprefix('torch.')} in the layout {tensor.layout}"
        in_place = None
        if refusal is None and memory_of(tensor) in self._held:
            in_place = _HELD
        elif refusal is None and any(n > 1 and s == 0 for n, s in zip(tensor.shape, tensor.stride(), strict=True)):
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


def leaves_of(value: Any) -> tuple[str, dict[Selector, Tensor]]:
    """The structure of what a module takes or gives, and the tensors in it, four levels deep."""
    if isinstance(value, Tensor):
        return "tensor", {(): value}
    leaves = dict(_members(value, ()))
    if isinstance(value, Mapping):
        return "dict", leaves
    return ("list" if isinstance(value, list) else "tuple") if isinstance(value, (tuple, list)) else "other", leaves


def _members(value: Any, way: Selector) -> Iterator[tuple[Selector, Tensor]]:
    if isinstance(value, Tensor):
        yield way, value
    elif len(way) < _DEPTH and isinstance(value, Mapping):
        for key, member in value.items():
            if isinstance(key, (str, int)):
                yield from _members(member, (*way, key))
    elif len(way) < _DEPTH and isinstance(value, (tuple, list)):
        for place, member in enumerate(value):
            yield from _members(member, (*way, place))


def _fake(given: Given) -> Tensor:
    dtype, shape = form_of(given)
    return torch.empty(shape, dtype=TORCH_DTYPES[dtype])


def modules_of(model: nn.Module) -> Iterator[ModuleInfo]:
    """The tree. A module is called on values as the model itself calls it: with one tensor or with none."""
    for path, module in model.named_modules():
        is_list = isinstance(module, nn.ModuleList)
        yield ModuleInfo(
            path=path,
            class_name=type(module).__name__,
            is_list=is_list,
            is_decoder_layer=False,
            first_stage=0,
            call_refusal="it is a list of modules" if is_list else None,
        )


def parameters_of(model: nn.Module) -> Iterator[ParameterInfo]:
    """Parameters and buffers by every path they have."""
    for path, tensor in named_tensors(model):
        if tensor.dtype in DTYPE_NAMES and tensor.layout is torch.strided:
            dtype = DTYPE_NAMES[tensor.dtype]
            yield ParameterInfo(path=path, shape=tuple(tensor.shape), dtype=dtype, stage=0, sharded_dim=None)
