"""One forward of a model without weights, and every port that fired in it.

Owns the hooks of such a forward and the order of what they saw. What two of them say together is `engine.probe`'s.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from engine.arguments import Arguments, Selector
from engine.attention import watching
from engine.encoders import of_decoder
from engine.imaged import copied_embeddings, imaged_class
from engine.leaves import first_argument, port_leaves
from engine.manners import Manner
from engine.operations import watch_operations
from engine.source_sites import SourceNotes
from polytrace.description import PassLayout
from polytrace.errors import ServiceError
from polytrace.graph import Port

_MORE_DECODED = 16  # rows that a decoder has here beyond the encoder's


class LoopError(ServiceError):
    """A forward goes from token to token, so it cannot be told where a sequence begins."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """One port of one module as it fired in a forward."""

    module: str
    port: Port
    visit: int
    structure: str
    leaves: Mapping[Selector, Tensor]
    is_operation: bool = False
    keyword: str | None = None  # see `SiteInfo`


class Recorder:
    """One forward on the meta device with a hook on every port."""

    def __init__(self, model: PreTrainedModel, layers: str, manner: Manner, watched: Iterable[str]) -> None:
        """`watched` are the modules whose calls are told of."""
        self.model = model
        self.layers = layers
        self.manner = manner
        self.modules = dict(model.named_modules())
        self.notes = SourceNotes(self.modules)
        self._watched = {path: self.modules[path] for path in watched if path in self.modules}
        self.events: list[Event] = []
        self.layer_arguments: set[int] = set()  # ids of tensors that reach layers beside the hidden states
        self.layer_storages: set[int] = set()  # the memory of these
        self.single_argument: set[str] = set()  # modules that were called with one tensor and nothing else
        self.attending: set[str] = set()  # modules that attend, or hold one that does
        self.tensors: dict[int, list[int]] = {}  # by id: a number, and of how many leaves it is the tensor
        self.rows = 0
        self.kept = 0
        self.decoded = 0  # of the decoder, where there is an encoder
        self._visits: dict[tuple[str, Port], int] = {}
        self._alive: list[Any] = []  # keeps ids unique
        self._containers: dict[int, tuple[Any, list[int]]] = {}  # given to layers, with the tensors in them at first

    def run(self, rows: int, kept: int, has_kept_rows: bool, has_mask: bool) -> Recorder:
        self.rows, self.kept, self.decoded = rows, kept, rows + _MORE_DECODED
        # before whoever looks at it: it is not the embedding's own
        handles = [copied_embeddings(self.model)] if imaged_class(self.model.config) is not None else []
        handles += [handle for path, module in self.model.named_modules() for handle in self._hook(path, module)]
        ids = torch.zeros(1, rows, dtype=torch.long, device="meta")
        given = of_decoder(self.model, torch.zeros(1, self.decoded, dtype=torch.long, device="meta"))
        if self.manner.layout is PassLayout.PACKED:
            given["position_ids"] = ids
        if has_mask:
            given["attention_mask"] = torch.ones_like(ids)
        if has_kept_rows:
            given["logits_to_keep"] = torch.zeros(kept, dtype=torch.long, device="meta")
        paths = {id(module): path for path, module in self.model.named_modules()}
        try:
            with (
                torch.no_grad(),
                watching(lambda module, port, value: self._record(paths[id(module)], port, value)),
                watch_operations(self._watched, self._record_operation),
            ):
                self.model(input_ids=ids, use_cache=False, **given)
        except (RuntimeError, TypeError, ValueError, NotImplementedError) as error:
            name, reason = type(self.model).__name__, str(error).split("\n")[0]
            raise ServiceError(
                f"{name} cannot be served yet: its forward does not run without data: {reason}"
            ) from error
        finally:
            for handle in handles:
                handle.remove()
        return self

    def number_of(self, tensor: Tensor) -> int | None:
        """What tells a tensor that several leaves are; None where one is."""
        number, count = self.tensors[id(tensor)]
        return number if count > 1 else None

    @property
    def has_side_values(self) -> bool:
        """Whether layers have put tensors into something that later layers are given too."""
        return any(before != [*map(id, tensors_of(value))] for value, before in self._containers.values())

    def _hook(self, path: str, module: nn.Module) -> Iterator[Any]:
        def before(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            arguments = Arguments(args, kwargs)
            self._record(path, Port.INPUT, first_argument(args, kwargs), arguments.keyword)
            if path and arguments.others():  # what the root gets beside token ids is the engine's own
                self._record(path, Port.INPUTS, arguments)
            others = (*args[1:], *kwargs.values()) if args else (*list(kwargs.values())[1:],)
            tensors = [leaf for value in others for leaf in tensors_of(value)]
            if path.rpartition(".")[0] == self.layers:
                self.layer_arguments.update(map(id, tensors))
                self.layer_storages.update(map(memory_of, tensors))
                for value in others:
                    if isinstance(value, (MutableMapping, list)):
                        self._containers.setdefault(id(value), (value, [*map(id, tensors_of(value))]))
            if len(args) == 1 and not kwargs and isinstance(args[0], Tensor):
                self.single_argument.add(path)

        def after(_module: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
            self._record(path, Port.OUTPUT, output)

        if hasattr(module, "is_causal"):
            parts = path.split(".")
            self.attending.update(".".join(parts[:depth]) for depth in range(len(parts) + 1))
        yield module.register_forward_pre_hook(before, with_kwargs=True)
        yield module.register_forward_hook(after)

    def _record_operation(self, path: str, port: Port, value: Any, called: Any) -> None:
        if port is Port.INPUTS:
            self.notes.note(path, called)
        self._record(path, port, value, is_operation=True)

    def _record(
        self, path: str, port: Port, value: Any, keyword: str | None = None, *, is_operation: bool = False
    ) -> None:
        visit = self._visits.get((path, port), 0)
        if self.manner.layout is PassLayout.PACKED and visit > self.rows // 2:
            raise LoopError(f"{type(self.model).__name__} cannot be served in shared passes: {path} loops over tokens")
        self._visits[path, port] = visit + 1
        structure, leaves = port_leaves(value)
        self._alive.append(value)
        for tensor in leaves.values():
            self.tensors.setdefault(id(tensor), [len(self.tensors), 0])[1] += 1
        self.events.append(
            Event(
                module=path,
                port=port,
                visit=visit,
                structure=structure,
                leaves=leaves,
                is_operation=is_operation,
                keyword=keyword,
            )
        )


def memory_of(tensor: Tensor) -> int:
    """What tensors that share memory have in common, without data too."""
    return int(tensor.untyped_storage()._cdata)


def tensors_of(value: Any) -> Iterator[Tensor]:
    """All tensors in lists, tuples and mappings, however deep."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for member in value.values():
            yield from tensors_of(member)
    elif isinstance(value, (tuple, list)):
        for member in value:
            yield from tensors_of(member)
