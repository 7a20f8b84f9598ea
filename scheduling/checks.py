"""Whether a request fits a model, before anything is planned: sites, modules, prompts, tokens, counts.

Owns the messages a user sees when one of these is wrong, with the user's own line. Knows nothing of shapes beyond what
the description says (`engine.shapes` infers them) and nothing of stages or waves.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from difflib import get_close_matches
from functools import cached_property

from polytrace.description import Leaf, ModelDescription, PassLayout, Rows, SiteInfo
from polytrace.errors import ContextError, GraphError, TooLargeError
from polytrace.graph import (
    Backward,
    Call,
    Carried,
    Generation,
    Grad,
    GradWrite,
    Graph,
    Invoke,
    Last,
    Mask,
    Node,
    NodeId,
    Op,
    OpGrad,
    Parameter,
    Port,
    Read,
    Request,
    Save,
    SeedGrad,
    Site,
    SiteGrad,
    Stop,
    Turn,
    Write,
    operands,
)
from polytrace.image_checks import check_image_rows, hint_at_images
from polytrace.images import is_image_row
from polytrace.ops import OPS
from polytrace.sources import Sources
from polytrace.tensors import RawTensor
from scheduling.levels import Levels

CANNOT = "no prompt goes on"  # what the note of a description begins with that says why
_NO_LOGITS = "what it returns has no logits of tokens"


class ModelTable:
    """A description, indexed for looking up what a graph names. `table_of` makes it once."""

    def __init__(self, description: ModelDescription) -> None:
        self.description = description
        self.modules = {module.path: module for module in description.modules}
        self.parameters = {parameter.path: parameter for parameter in description.parameters}
        self.sites = _by_port(description.sites)
        self.of_invokes = [_by_port(sites) for sites in description.of_invokes]  # where each invoke has its own
        self.sources = Sources(description)

    @cached_property
    def tensors(self) -> dict[int, tuple[SiteInfo, Leaf]]:
        """Where each tensor that several leaves are is seen first, by its number."""
        found: dict[int, tuple[SiteInfo, Leaf]] = {}
        for info in sorted(self.description.sites, key=lambda info: info.order):
            for leaf in info.leaves:
                if leaf.tensor is not None:
                    found.setdefault(leaf.tensor, (info, leaf))
        return found

    @cached_property
    def has_encoder(self) -> bool:
        """Whether the decoder has rows of its own."""
        return any(info.rows is Rows.DECODER for info in self.description.sites)

    @cached_property
    def orders(self) -> dict[tuple[str, Port, int], int]:
        """(module, port, visit) -> order."""
        return {(info.module, info.port, info.visit): info.order for info in self.description.sites}

    def order(self, site: Site) -> int:
        """The place of a site in the model's order, those of operations included."""
        known = self.orders.get((site.module, site.port, site.visit))
        if known is not None:
            return known
        found = self.sources.site(site.module, site.port)
        assert found is not None, "the request was checked"
        return found.order

    def has_pads(self, site: Site) -> bool:
        """Whether a view of a site is as wide as the longest prompt."""
        if not self.has_encoder:
            return True
        return any(info.rows is not Rows.DECODER for info in self.sites.get((site.module, site.port), ()))

    @cached_property
    def levels(self) -> Levels:
        """Which level of rows each site belongs to."""
        return Levels(self.description.sites, self.description.layers)

    def site(self, site: Site, verb: str, where: str, invoke: int = 0) -> tuple[SiteInfo, Leaf]:
        """The site's entry and its leaf. Raises GraphError that says what there is instead."""
        sites = self.of_invokes[invoke] if invoke < len(self.of_invokes) else self.sites
        visits = sites.get((site.module, site.port), [])
        if not visits and self.sources.split(site.module) is not None:
            visits = self._operation(site, verb, where)
        found = next((info for info in visits if info.visit == site.visit), None)
        if found is None:
            self._check_module(site.module, verb, where)
            if not visits:
                told = f"graph {verb} {site}, but no forward of this model visits it"
                raise GraphError(told + hint_at_images(site.module, self.description), where=where)
            port = replace(site, visit=0)
            raise GraphError(
                f"graph {verb} visit {site.visit} of {port}; one forward visits it {len(visits)} times, counted from 0",
                where=where,
            )
        for leaf in found.leaves:
            if leaf.selector == site.selector:
                return found, leaf
        port = Site(module=site.module, port=site.port)
        known = ", ".join(str(replace(port, selector=leaf.selector)) for leaf in found.leaves)
        raise GraphError(f"graph {verb} {site}; {port} is a {found.structure} with these tensors: {known}", where=where)

    def _operation(self, site: Site, verb: str, where: str) -> list[SiteInfo]:
        """The one visit of an operation. Raises GraphError where there is none."""
        found = self.sources.site(site.module, site.port)
        if found is None:
            is_known = any(self.sources.site(site.module, port) for port in (Port.INPUTS, Port.OUTPUT))
            why = "has the ports inputs and output" if is_known else self.sources.why_none(site.module)
            told = f"graph {verb} {site}, but {site.module} {why}"
            raise GraphError(told, where=where)
        return [found]

    def call_stage(self, call: Call) -> int:
        """The home stage of a called module. Raises GraphError when it cannot be called."""
        if call.module not in self.modules:
            self._check_module(call.module, "calls", call.where)
        module = self.modules[call.module]
        if module.is_list:
            raise GraphError(f"{call.module} is a list of modules: index it before calling it", where=call.where)
        if module.call_refusal is not None:
            raise GraphError(f"{call.module} cannot be called on a value: {module.call_refusal}", where=call.where)
        return module.first_stage

    def parameter_stage(self, node: Parameter) -> int:
        """The home stage of a parameter. Raises GraphError when there is none of that path."""
        info = self.parameters.get(node.path)
        if info is None:
            self._check_layer(node.path, "reads", node.where)
            close = _nearest(node.path, self.parameters)
            raise GraphError(f"this model has no parameter {node.path}{close}", where=node.where)
        return info.stage

    def _check_module(self, path: str, verb: str, where: str) -> None:
        if path not in self.modules:
            self._check_layer(path, verb, where)
            raise GraphError(f"this model has no module {path}{_nearest(path, self.modules)}", where=where)

    def _check_layer(self, path: str, verb: str, where: str) -> None:
        prefix = self.description.layers + "."
        layer = path.removeprefix(prefix).partition(".")[0]
        last = self.description.num_layers - 1
        if path.startswith(prefix) and layer.isascii() and layer.isdigit() and int(layer[:9]) > last:
            raise GraphError(f"graph {verb} layer {layer}; this model has layers 0-{last}", where=where)


def _by_port(sites: Iterable[SiteInfo]) -> dict[tuple[str, Port], list[SiteInfo]]:
    """Sites by module and port, each port's by visit."""
    found: dict[tuple[str, Port], list[SiteInfo]] = {}
    for info in sites:
        found.setdefault((info.module, info.port), []).append(info)
    return found


def table_of(description: ModelDescription) -> ModelTable:
    """The description's table, made once for each description object; the last few are kept.

    A table holds its description, so the id of one in here cannot be another object's.
    """
    table = _tables.get(id(description))
    if table is None:
        if len(_tables) >= _KEPT_TABLES:
            _tables.pop(next(iter(_tables), 0), None)
        table = _tables[id(description)] = ModelTable(description)
    return table


_KEPT_TABLES = 8
_tables: dict[int, ModelTable] = {}


@dataclass(frozen=True, slots=True, kw_only=True)
class Resolved:
    """A checked graph with its names looked up. Lists are indexed by node id."""

    operands: list[tuple[NodeId, ...]]  # the nodes whose values a node needs, each once
    sites: list[tuple[SiteInfo, Leaf] | None]  # of reads and writes
    homes: list[int]  # home stage of calls and parameters, 0 for the others

    def order(self, node: int) -> int:
        """The place of a read or a write in the model's order."""
        entry = self.sites[node]
        assert entry is not None
        return entry[0].order


def resolve(request: Request, table: ModelTable) -> Resolved:
    """Checks a request against a model and looks its names up. Raises GraphError or TooLargeError."""
    limits = table.description.limits
    if len(request.graph.nodes) > limits.max_nodes:
        raise TooLargeError(f"the graph has {len(request.graph.nodes)} nodes; the limit is {limits.max_nodes}")
    _check_prompts(request, table.description)
    resolved = resolve_nodes(request, table)
    _check_saves(request)
    return resolved


def check_nodes(nodes: tuple[Node, ...], constants: Mapping[str, RawTensor], table: ModelTable) -> None:
    """Checks the names in a graph that has one invoke, whose prompts are not known yet. Raises GraphError."""
    nobody = Invoke(sequences=((0,),))
    resolve_nodes(Request(graph=Graph(nodes=nodes), invokes=(nobody,), constants=constants), table)


def check_steps(nodes: tuple[Node, ...], table: ModelTable) -> None:
    """GraphError where a later step of a generation names what is of the encoder, which runs with the prompt alone."""
    for node in nodes:
        is_later = isinstance(node, (Read, Write)) and node.step + node.num_steps > 1
        is_packed = table.description.layout is PassLayout.PACKED
        if isinstance(node, (Read, Write)) and is_later and node.site.port.is_of_pairs and not is_packed:
            raise GraphError(f"{node.site} is there at step 0 alone in this model", where=node.where)
    named = [node for node in nodes if isinstance(node, (Read, Write))] if table.has_encoder else []
    for node in named:
        is_later = node.step + node.num_steps > 1
        if is_later and _allowed_site(node, table)[0].rows is not Rows.DECODER:
            told = f"{node.site} is of the prompt, which the encoder reads at step 0 alone: name it outside of the loop"
            raise GraphError(told, where=node.where)


def resolve_nodes(request: Request, table: ModelTable) -> Resolved:
    """Looks the names of a graph up. Raises GraphError for one that leads nowhere."""
    nodes = request.graph.nodes
    needed: list[tuple[NodeId, ...]] = []
    homes = [0] * len(nodes)
    sites: list[tuple[SiteInfo, Leaf] | None] = [None] * len(nodes)
    # by the site's id: many nodes name one object
    found: dict[tuple[int, bool, bool, int], tuple[SiteInfo, Leaf]] = {}
    has_value = bytearray(len(nodes))
    for position, node in enumerate(nodes):
        parts = operands(node)
        needed.append(parts if len(parts) < 2 else tuple(dict.fromkeys(parts)))
        backward = node.backward.node if isinstance(node, (Grad, GradWrite)) else None
        for part in parts:
            is_earlier = 0 <= part < position
            if not is_earlier or (not has_value[part] if part != backward else not isinstance(nodes[part], Backward)):
                raise GraphError(f"node {position} uses node {part}, which is no earlier value", where=node.where)
        has_value[position] = True
        if isinstance(node, Op):
            if node.name not in OPS:
                raise GraphError(f"there is no operation {node.name}{_nearest(node.name, OPS)}", where=node.where)
        elif isinstance(node, (Read, Write)):
            own = node.invoke if table.of_invokes else 0
            key = (id(node.site), isinstance(node, Write), isinstance(node, Write) and node.in_place, own)
            entry = found.get(key)
            if entry is None:
                entry = found[key] = _allowed_site(node, table)
            sites[position] = entry
            has_value[position] = not key[1]
            _check_invoke(node.invoke, request, node.where)
            if node.site.port is Port.TOKEN:
                _check_generates(request.invokes[node.invoke], "names the next token", node.where)
        elif isinstance(node, Save):
            has_value[position] = False
        elif isinstance(node, Stop):
            has_value[position] = False
            _check_invoke(node.invoke, request, node.where)
            _check_generates(request.invokes[node.invoke], "stops", node.where)
        elif isinstance(node, (Backward, GradWrite)):
            has_value[position] = False
        elif isinstance(node, (Last, Grad, OpGrad, SeedGrad)):
            continue
        elif isinstance(node, SiteGrad):
            has_value[position] = node.turn in (Turn.TAKE, Turn.LOOK)
        elif isinstance(node, Carried):
            homes[position] = node.stage
        elif isinstance(node, Call):
            homes[position] = table.call_stage(node)
        elif isinstance(node, Parameter):
            homes[position] = table.parameter_stage(node)
        elif isinstance(node, Mask):
            _check_invoke(node.invoke, request, node.where)
        elif node.name not in request.constants:
            raise GraphError(f"the request brings no constant {node.name}", where=node.where)
    return Resolved(operands=needed, sites=sites, homes=homes)


def _allowed_site(node: Read | Write, table: ModelTable) -> tuple[SiteInfo, Leaf]:
    verb = "reads" if isinstance(node, Read) else "writes"
    info, leaf = table.site(node.site, verb, node.where, node.invoke)
    refusal = leaf.read_refusal if isinstance(node, Read) else leaf.write_refusal
    if refusal is None and isinstance(node, Write) and node.in_place:
        refusal = leaf.in_place_refusal
    if refusal is not None:
        done = "read" if isinstance(node, Read) else "written"
        raise GraphError(f"{node.site} cannot be {done}: {refusal}", where=node.where)
    return info, leaf


def _check_invoke(invoke: int, request: Request, where: str) -> None:
    if not 0 <= invoke < len(request.invokes):
        raise GraphError(f"graph names invoke {invoke}; the request has {len(request.invokes)}", where=where)


def _check_generates(invoke: Invoke, verb: str, where: str) -> None:
    if invoke.generation is None:
        told = f"graph {verb} of prompts that do not go on: use model.generate(..., max_new_tokens=...)"
        raise GraphError(told, where=where)


def _check_prompts(request: Request, description: ModelDescription) -> None:
    tokens: dict[int, int] = {}  # of invokes that were looked at, by the object's id: many invokes may be one object
    total = 0
    for index, invoke in enumerate(request.invokes):
        if id(invoke) not in tokens:
            _check_invoke_prompts(index, invoke, description, request.constants)
            tokens[id(invoke)] = invoke.num_tokens
        total += tokens[id(invoke)]
    limit = description.limits.max_request_tokens
    if total > limit:
        raise TooLargeError(f"all prompts have {total} tokens together; the limit is {limit}")


def check_prompt(tokens: tuple[int, ...], description: ModelDescription) -> None:
    """Whether a request's one prompt fits the model. Raises GraphError."""
    _check_invoke_prompts(0, Invoke(sequences=(tokens,)), description, {})


def _check_invoke_prompts(
    index: int, invoke: Invoke, description: ModelDescription, constants: Mapping[str, RawTensor]
) -> None:
    if invoke.inputs is not None and description.images is not None:
        check_image_rows(index, invoke, description, constants)
    elif (invoke.inputs is not None) != (description.layout is PassLayout.WHOLE):
        told = "arguments" if description.layout is PassLayout.WHOLE else "prompts, not with arguments of its forward"
        raise GraphError(f"invoke {index}: {description.class_name} is called with {told} here")
    if description.layout is PassLayout.WHOLE:
        return
    limit = description.limits.max_sequence_tokens
    if not invoke.sequences:
        raise GraphError(f"invoke {index} has no prompt")
    for prompt, sequence in enumerate(invoke.sequences):
        place = f"prompt {prompt} of invoke {index}"
        if not sequence:
            raise GraphError(f"{place} has no tokens")
        if len(sequence) > limit:
            raise ContextError(f"{place} has {len(sequence)} tokens; the model's context takes {limit}")
        if invoke.inputs is not None:
            sequence = tuple([token for token in sequence if not is_image_row(token)]) or (0,)
        if not (min(sequence) >= 0 and max(sequence) < description.vocab_size):
            wrong = next(token for token in sequence if not 0 <= token < description.vocab_size)
            raise GraphError(f"{place} has the token id {wrong}; ids are 0-{description.vocab_size - 1}")
    if invoke.generation is not None:
        _check_room(index, invoke, invoke.generation, description)


def _check_room(index: int, invoke: Invoke, generation: Generation, description: ModelDescription) -> None:
    """Whether the model's context takes what an invoke generates."""
    limit, longest, more = description.limits.max_sequence_tokens, invoke.longest, generation.max_new_tokens
    if more < 1:
        raise GraphError(f"invoke {index} is to have {more} new tokens: at least 1, or generate=False")
    if longest + more - 1 > limit:  # the last token is drawn and does not run
        raise ContextError(
            f"invoke {index} has prompts of {longest} tokens and {more} new ones; the model's context takes {limit}"
        )
    if not any(site.port is Port.TOKEN for site in description.sites):
        why = next((note for note in description.notes if note.startswith(CANNOT)), _NO_LOGITS)
        raise GraphError(f"{description.class_name} does not generate here: {why}")
    wrong = [token for token in generation.eos if not 0 <= token < description.vocab_size]
    if wrong:
        raise GraphError(f"invoke {index} is to end at the token {wrong[0]}; ids are 0-{description.vocab_size - 1}")


def _check_saves(request: Request) -> None:
    names: dict[str, str] = {}
    for node in request.graph.nodes:
        if isinstance(node, Save):
            if node.name in names:
                other = names[node.name]
                raise GraphError(f"two values are saved as {node.name!r}, the other at {other}", where=node.where)
            names[node.name] = node.where
    if not names and all(invoke.generation is None for invoke in request.invokes):
        raise GraphError("nothing is saved: call .save() on the values to get back")


def _nearest(name: str, known: Mapping[str, object]) -> str:
    """The end of a sentence about a name that is not known."""
    close = get_close_matches(name[:200], known, n=3, cutoff=0.5)
    return f"; the nearest are {', '.join(close)}" if close else ""
