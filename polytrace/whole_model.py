"""A model that is called as it is, on the client: any torch module, with the arguments of its own forward.

    with model.trace(pixel_values=image) as tracer:
        hidden = model.vit.encoder.layer[3].output.save()

Every tensor that a module takes or returns is there, whole, as the module has it: there are no prompts, no rows of
tokens and no names beyond the module's own. What can be read and written follows from the arguments: the module tree is
known when the model is, its sites when a call begins.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NoReturn, Protocol

from polytrace.backend import Backend
from polytrace.calling import Calling
from polytrace.certificate import ValueShape
from polytrace.description import SiteInfo
from polytrace.errors import GraphError, TooLargeError
from polytrace.given import given_names
from polytrace.graph import Inputs, Invoke, Node, Options, Port, Read, Request, Site
from polytrace.inputs import inputs_table
from polytrace.invoke_block import InvokeBlock
from polytrace.lines import user_line
from polytrace.model import Model, options_of
from polytrace.modules import Module
from polytrace.scanning import Checking
from polytrace.standard import StandardModel
from polytrace.storage import is_recorded
from polytrace.tensors import RawTensor
from polytrace.tracebacks import edge
from polytrace.tracing import Tracer, open_trace
from polytrace.tree import PortTable, Table, refuses_ints

_MAX_TABLES = 256  # of calls of one model that are kept


class CallBackend(Backend, Protocol):
    """What such a model talks to."""

    def sites_of(self, inputs: Inputs, constants: Mapping[str, RawTensor]) -> tuple[SiteInfo, ...]:
        """What a call visits with these arguments, in its order: the same object where it is the same."""

    def processor(self) -> Any:
        """transformers' processor of the model, in this process; None where there is none."""

    def weight_behind(self, tensor: Any) -> str | None:
        """The weight of the model, in this process, that a tensor of the user's is or was computed from."""


class WholeModel(Model):
    """The root module."""

    backend: CallBackend

    def __init__(self, backend: CallBackend, rename: Mapping[str, str | Sequence[str]] | None = None) -> None:
        super().__init__(backend, rename)
        self.__dict__.update(_known=OrderedDict())

    @edge
    def trace(
        self,
        *args: Any,
        seed: int | None = None,
        run: bool = True,
        peek: bool = False,
        validate: bool = False,
        **kwargs: Any,
    ) -> CallTracer:
        """A block whose code is recorded, then run on `forward(*args, **kwargs)`; saved values become tensors.

        Arguments are tensors, arrays, numbers, texts, dtypes, devices, slices, ranges, and tuples, lists and dicts of
        these. Without any, `tracer.invoke(*args, **kwargs)` gives several calls, between which values may flow. `seed`
        (of the trace's own random operations, not of the model's dropout), `run`, `peek` and `validate` are as of
        `Model.trace`; a forward that has arguments of these names is called by `tracer.invoke`.
        """
        given = (args, kwargs) if args or kwargs else None
        tracer = CallTracer(self, given, options_of(seed, None), run, is_peeking=peek)
        tracer.checking = Checking.VALIDATE if validate else Checking.NONE
        return tracer

    def scan(self, *args: Any, seed: int = 0, **kwargs: Any) -> CallTracer:
        """A trace of which nothing runs: all that is recorded is checked. As `Model.scan`."""
        tracer = self.trace(*args, seed=seed, run=False, **kwargs)
        tracer.checking = Checking.SCAN
        return tracer

    @property
    def processor(self) -> Any:
        """What transformers makes arguments of images, sound and text with, where the model came with it.

        `model.trace(**model.processor(images=image, return_tensors="pt"))`. Raises GraphError elsewhere.
        """
        found = self.backend.processor()
        if found is None:
            told = "came without a processor, or is served elsewhere: call with tensors or arrays"
            raise GraphError(f"{self.description.name} {told}", where=user_line())
        return found

    def session(self, **_others: Any) -> NoReturn:
        """Refused."""
        raise self._refusal("a session", "write one trace after the other, or one trace with several tracer.invoke")

    def edit(self, *_args: Any, **_others: Any) -> NoReturn:
        """Refused."""
        raise self._refusal("model.edit", "what a call visits follows from its arguments: write the edit in each trace")

    def edited(self, *_args: Any, **_others: Any) -> NoReturn:
        """Refused."""
        raise self._refusal("model.edited", "write the edit in each trace")

    def generate(self, *_args: Any, **_others: Any) -> NoReturn:
        """Refused."""
        raise self._refusal("model.generate", "write a trace for each step")

    def stream(self, *_args: Any, **_others: Any) -> NoReturn:
        """Refused."""
        raise self._refusal("model.stream", "write a trace for each step")

    def map(self, *_args: Any, **_others: Any) -> NoReturn:
        """Refused."""
        raise self._refusal("model.map", "write a trace for each part of the data")

    def support(self) -> NoReturn:
        """Refused."""
        raise self._refusal("model.support", "names that every decoder has are not looked for: print(model)")

    def source_of(self, path: str) -> NoReturn:
        """Refused."""
        raise self._refusal("module.source", f"read what {path or 'the model'} and the modules in it take and give")

    def table_of(self, inputs: Inputs, constants: Mapping[str, RawTensor]) -> Table:
        """What dotted paths lead to in a call with these arguments."""
        sites = self.backend.sites_of(inputs, constants)
        known: OrderedDict[int, tuple[Any, Table]] = self.__dict__["_known"]
        if id(sites) not in known:
            known[id(sites)] = (sites, _with_sites(self.__dict__["_index"], sites))
            if len(known) > _MAX_TABLES:
                known.popitem(last=False)
        return known[id(sites)][1]

    @property
    def _index(self) -> Table:  # type: ignore[override]
        """That of the call whose block this is; outside of one, the tree alone."""
        tracer = open_trace()
        own = tracer.own_table if isinstance(tracer, CallTracer) and tracer.model is self else None
        tree: Table = self.__dict__["_index"]
        return tree if own is None else own

    def _check_called(self, used: str) -> None:
        tracer = self._tracer("", used)
        if isinstance(tracer, CallTracer) and tracer.own_table is None:
            tracer.invoke_index(used)

    def __dir__(self) -> list[str]:
        own = self._table.children.get("", ())
        return [name for name in super().__dir__() if name not in _STANDARD or name in own]

    def __repr__(self) -> str:
        return Module.__repr__(self)

    def _refusal(self, what: str, instead: str) -> GraphError:
        told = f"{self.description.class_name} is called as it is, and {what} is not there for such models"
        return GraphError(f"{told}: {instead}", where=user_line())


def _nothing(model: WholeModel) -> NoReturn:
    raise AttributeError  # Python asks `Module.__getattr__` then: a module of that name, or none


_STANDARD = frozenset(name for name in vars(StandardModel) if not name.startswith("_"))  # names that every decoder has
for _name in sorted(_STANDARD):
    setattr(WholeModel, _name, property(_nothing))


class CallTracer(Tracer):
    """`with model.trace(x)`: each invoke is one call of the model."""

    model: WholeModel

    def __init__(self, model: WholeModel, given: Any, options: Options, is_run: bool, *, is_peeking: bool) -> None:
        """`given`: positional and keyword arguments, or None."""
        self._tables: list[Table] = []  # of each invoke
        super().__init__(model, given, options, is_run, is_peeking=is_peeking)

    @edge
    def invoke(self, *args: Any, **kwargs: Any) -> InvokeBlock:
        """`with tracer.invoke(*args, **kwargs)`: one of several calls, between which values may flow."""
        self._check_open()
        if self._has_own_prompts:
            told = "this trace has its arguments: write model.trace() without any to invoke several calls"
            raise GraphError(told, where=user_line())
        return InvokeBlock(self, self._add_invoke((args, kwargs)))

    def invoke_index(self, what: object) -> int:
        """As `Tracer.invoke_index`."""
        self._check_open()
        if self._invoke is None:
            raise GraphError(
                f"{what} belongs to a call: give its arguments to model.trace(...), "
                "or use it inside `with tracer.invoke(...):`",
                where=user_line(),
            )
        return self._invoke

    @property
    def own_table(self) -> Table | None:
        """The table of the invoke whose block this is."""
        return None if self._invoke is None else self._tables[self._invoke]

    @property
    def lengths(self) -> tuple[int, ...]:
        raise self._no_prompts("lengths")

    @property
    def tokens(self) -> tuple[tuple[str, ...], ...]:
        raise self._no_prompts("tokens")

    @property
    def mask(self) -> Any:
        raise self._no_prompts("mask")

    def move_on(self, module: str | None, count: int) -> None:
        """Refused: calls of one module are `module.visits`."""
        told = f"next() is of generations: write {module or 'model'}.visits[1].output for what its second call returns"
        raise GraphError(told, where=user_line())

    def lengths_of(self, invoke: int) -> tuple[int, ...]:
        return (1,)

    def num_columns(self, site: Site) -> int | None:
        return 1

    def row_dim(self, site: Site) -> int:
        return 1

    def leaf_shape(self, node: Node, *, is_late: bool = False) -> ValueShape | None:
        if isinstance(node, Read):
            leaf = self._tables[node.invoke].leaves[node.site]
            return ValueShape(shape=leaf.tail, dtype=leaf.dtype)
        return super().leaf_shape(node, is_late=is_late)

    def _add_invoke(self, prompts: Any, chat: Mapping[str, Any] | None = None, pixel_values: Any = None) -> int:
        args, kwargs = prompts
        calling = Calling(self.recording, user_line(), self._hint_at_processor)
        inputs = calling.inputs(args, kwargs)
        try:
            self._tables.append(self.model.table_of(inputs, self.recording.constants.tensors))
        except (GraphError, TooLargeError) as error:
            error.where = error.where or user_line()
            raise
        self._invokes.append(Invoke(sequences=((0,),), inputs=inputs))
        index = len(self._invokes) - 1
        for selector, value in calling.written:
            self._begin_with(index, selector, value)
        return index

    def _hint_at_processor(self) -> str:
        has_one = self.model.backend.processor() is not None
        return "; `model.processor(...)` makes these of images, sound and text" if has_one else ""

    def _begin_with(self, invoke: int, selector: tuple[int | str, ...], value: Any) -> None:
        """A value is written to the argument that it is before anything of the call runs."""
        arguments = inputs_table(self._tables[invoke], "")
        if arguments is None or selector not in arguments.leaves:
            kind = "a value of a trace" if is_recorded(value) else "a tensor with requires_grad=True"
            told = f"{kind} cannot be an argument that lies so deep: give it in a tuple or dict less"
            raise GraphError(told if is_recorded(value) else f"{told}, or its .detach()", where=user_line())
        site, _ = arguments.leaves[selector]
        self.recording.write_edge(site, invoke, value)

    def _request_of(self, nodes: tuple[Node, ...]) -> Request:
        for leaf in self.recording.gradients.leaves:
            if (path := self.model.backend.weight_behind(leaf.tensor)) is not None:
                told = f"this tensor is, or comes from, {path} of the model, which has no gradient here"
                where = self.recording.nodes[leaf.nodes[0]].where
                raise GraphError(f"{told}: use its .detach(), or model.{path}", where=where)
        request = super()._request_of(nodes)
        every = self.recording.constants.tensors
        own = {name: every[name] for invoke in self._invokes for name in given_names(invoke.inputs)}
        return replace(request, constants={**request.constants, **own})

    def _no_prompts(self, what: str) -> GraphError:
        told = f"tracer.{what} is of prompts, and {self.model.description.class_name} is called with arguments"
        return GraphError(told, where=user_line())


def _with_sites(tree: Table, sites: Sequence[SiteInfo]) -> Table:
    """The table of a call: the tree with its sites."""
    visits: dict[tuple[str, str], dict[int, PortTable]] = {}
    for info in sites:
        leaves = {
            leaf.selector: (Site(module=info.module, port=info.port, selector=leaf.selector, visit=info.visit), leaf)
            for leaf in info.leaves
        }
        port = PortTable(
            info=info,
            is_layer_output=False,
            leaves=leaves,
            refuses_ints=refuses_ints(info, tree.modules[info.module]),
            is_call=info.port is Port.INPUTS,
        )
        visits.setdefault((info.module, info.port.value), {})[info.visit] = port
    every = [port for own in visits.values() for port in own.values()]
    return replace(
        tree,
        ports={key: own[0] for key, own in visits.items() if 0 in own and own[0].leaves},
        leaves={site: leaf for port in every for site, leaf in port.leaves.values()},
        visits=visits,
    )
