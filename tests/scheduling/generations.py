"""Generations for the tiny model's table, and shards that keep tokens where real ones keep keys and values.

A sequence's next token is a function of all before it, which these shards find as real ones do: by segments, their
parents and caches. So a row that is not where the plan says, or another's, gives another token.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from hashlib import blake2b

from polytrace.description import Leaf, Limits, ModelDescription, Rows, SiteInfo, index_sites
from polytrace.errors import PolytraceError
from polytrace.graph import (
    Constant,
    Generation,
    Graph,
    Invoke,
    Node,
    NodeId,
    Op,
    Options,
    Port,
    Read,
    Ref,
    Request,
    Sharing,
    Site,
    Write,
)
from polytrace.tensors import RawTensor, num_bytes
from scheduling.plan import NO_ROWS, Drawn, Plan, Program, RequestId, ShardResult, TrunkId, ValueFacts
from scheduling.working_out import work_out
from tests.scheduling.pipeline import answer_of
from tests.scheduling.tiny import HIDDEN, VOCAB, tiny_llama

Tokens = tuple[int, ...]


def generating_llama(stages: int = 1, *, trunk_bytes: int = 1 << 30) -> ModelDescription:
    """The tiny model with logits to draw from; a position takes `num_layers` bytes of a cache."""
    limits = Limits(max_sequence_tokens=4096, trunk_bytes=trunk_bytes)
    description = tiny_llama(stages=stages, limits=limits)
    token = SiteInfo(
        module="",
        port=Port.TOKEN,
        visit=0,
        order=len(description.sites),
        stage=stages - 1,
        structure="tensor",
        rows=Rows.KEPT,
        leaves=(Leaf(selector=(), tail=(), dtype="int64"),),
    )
    return replace(description, sites=(*description.sites, token))


def generation(
    description: ModelDescription,
    name: str,
    *prompts: Tokens,
    new: int = 8,
    sharing: Sharing = Sharing.TENANT,
    nodes: Sequence[Node] = (),
) -> Program:
    request = Request(
        graph=Graph(nodes=tuple(nodes)),
        invokes=(Invoke(sequences=prompts, generation=Generation(max_new_tokens=new)),),
        constants={"vector": RawTensor(dtype="float32", shape=(HIDDEN,), data=memoryview(bytes(4 * HIDDEN)))},
        options=Options(sharing=sharing),
    )
    sites = index_sites(description)

    def infer(step: Request) -> tuple[ValueFacts | None, ...]:
        found: list[ValueFacts | None] = []
        for node in step.graph.nodes:
            known: ValueFacts | None = None
            if isinstance(node, Read):
                invoke, leaf = step.invokes[node.invoke], sites[node.site][1]
                known = _facts((len(invoke.sequences), invoke.longest, *leaf.tail), leaf.dtype)
            elif isinstance(node, Constant):
                known = _facts((HIDDEN,), "float32")
            elif isinstance(node, Op):
                first = node.args[0]
                assert isinstance(first, Ref)
                known = found[first.node]
            found.append(known)
        return tuple(found)

    return work_out(RequestId(name), request, description, infer)[0]


def _facts(shape: Tokens, dtype: str) -> ValueFacts:
    return ValueFacts(shape=shape, dtype=dtype, num_bytes=num_bytes(dtype, shape))


def steering(layer: int, num_steps: int) -> tuple[Node, ...]:
    """Adds a vector to a layer's output, all of it, at so many steps."""
    site = Site(module=f"model.layers.{layer}", port=Port.OUTPUT)
    return (
        Constant(name="vector", where="c"),
        Read(site=site, invoke=0, where="r", num_steps=num_steps),
        Op(name="add", args=(Ref(NodeId(1)), Ref(NodeId(0))), where="o"),
        Write(site=site, invoke=0, value=Ref(NodeId(2)), in_place=False, where="w", num_steps=num_steps),
    )


def next_token(tokens: Iterable[int]) -> int:
    return blake2b(repr(list(tokens)).encode(), digest_size=2).digest()[0] % VOCAB


def expected(prompt: Tokens, new: int = 8) -> Tokens:
    """What a sequence goes on with."""
    tokens = list(prompt)
    for _ in range(new):
        tokens.append(next_token(tokens))
    return tuple(tokens[len(prompt) :])


class _Cache:
    def __init__(self, begin: int, capacity: int) -> None:
        self.begin, self.capacity = begin, capacity
        self.tokens: dict[int, int] = {}


class DrawingShards:
    """Runs plans when they are submitted, and answers them in their order, when so many are in flight."""

    def __init__(self, description: ModelDescription, depth: int = 1) -> None:
        self.description, self.depth = description, depth
        self.plans: list[Plan] = []
        self.caches: dict[TrunkId, _Cache] = {}
        self.most_held = 0  # bytes
        self._flying: list[tuple[Plan, tuple[ShardResult, ...]]] = []

    @property
    def held(self) -> int:
        per_position = self.description.key_value_bytes * self.description.num_layers // self.description.stages
        return sum(cache.capacity for cache in self.caches.values()) * per_position

    def have_room(self) -> bool:
        return len(self._flying) < self.depth

    def submit(self, plan: Plan) -> None:
        self.plans.append(plan)
        self._flying.append((plan, self.run(plan)))

    def finished(self) -> Iterator[tuple[Plan, tuple[ShardResult, ...] | PolytraceError]]:
        if self._flying:
            yield self._flying.pop(0)

    def reset(self) -> None:
        self.caches.clear()

    def run(self, plan: Plan) -> tuple[ShardResult, ...]:
        for owner in plan.ended:
            for trunk in [trunk for trunk in self.caches if trunk[0] == owner]:
                del self.caches[trunk]
        for grow in plan.grows:
            old = self.caches.get(grow.trunk)
            assert old is None or old.begin == grow.begin
            if old is None or old.capacity < grow.capacity:
                moved = self.caches[grow.trunk] = _Cache(grow.begin, grow.capacity)
                self.most_held = max(self.most_held, self.held + self._bytes(old))
                moved.tokens.update({} if old is None else old.tokens)
            cache = self.caches[grow.trunk]
            assert grow.stop - grow.begin <= cache.capacity, "rows have room"
            tokens = self._tokens(plan, grow.segment, grow.stop)
            for position in range(grow.start, grow.stop):
                assert position not in cache.tokens or cache.tokens[position] == tokens[position]
                cache.tokens[position] = tokens[position]
        drawn: dict[RequestId, list[Drawn]] = {}
        for view in plan.views:
            if view.is_drawing:
                begins = view.begins or (0,) * len(view.lengths)
                parts = zip(view.segments, begins, view.lengths, strict=True)
                found = tuple(
                    NO_ROWS if segment == NO_ROWS else next_token(self._tokens(plan, segment, begin + length))
                    for segment, begin, length in parts
                )
                request = plan.members[view.member].program.request
                drawn.setdefault(request, []).append(Drawn(invoke=view.invoke, tokens=found))
        return tuple(self._answer(plan, stage, drawn) for stage in range(self.description.stages))

    def _bytes(self, cache: _Cache | None) -> int:
        layers = self.description.num_layers // self.description.stages
        return 0 if cache is None else cache.capacity * self.description.key_value_bytes * layers

    def _tokens(self, plan: Plan, segment: int, stop: int) -> list[int]:
        """All tokens before a position, from wherever the plan says that they are."""
        found: dict[int, int] = {}
        place: int | None = segment
        end = stop
        while end:
            assert place is not None, "a root begins at position 0"
            one = plan.segments[place]
            start = one.starts[0]
            if start < end:
                if one.trunk is None:
                    own = dict(zip(range(start, one.stops[0]), one.tokens, strict=True))
                else:
                    assert min(one.stops) >= end
                    own = self.caches[one.trunk].tokens
                found.update({position: own[position] for position in range(start, end)})
                end = start
            place = one.parent
        return [found[position] for position in range(stop)]

    def _answer(self, plan: Plan, stage: int, drawn: dict[RequestId, list[Drawn]]) -> ShardResult:
        is_last = stage == self.description.stages - 1
        told = {request: tuple(own) for request, own in drawn.items()} if is_last else {}
        return replace(answer_of(plan, stage), seconds=1.0, busy_seconds=1.0, drawn=told)
