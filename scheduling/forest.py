"""Which rows exist once: the forest of segments for the sequences of one pass.

Two sequences are equal up to the first (level, position) where their tokens or their edits differ. So a sequence
becomes a *fork* of one that it has much in common with: it holds rows only from where they differ, and finds all
others with its parent. Rows end where nobody needs them any more, neither the sequence itself nor one that forks from
it.

Parents are found along a trie of edits within equal tokens, and along the longest common prefix between different
ones. A *trunk* is a parent whose rows an earlier pass left in the store: of those there are keys, values and outputs of
layers, but nothing else of what happens inside a layer. So what reads that has rows of its own from there on. Of a
trunk that is a cache there are keys and values alone: its forks, and theirs, begin at one position at all layers.

Knows nothing of requests, nodes or streams: sequences go in, segments come out.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from operator import le, lt

from scheduling.plan import NOWHERE, Cone, Edit, Segment, TrunkId
from scheduling.rows import rows_by_layer, skipped_by_layer

# What a fork costs besides its rows, in rows a layer: copies of a page of keys and values, and its part of the plan.
_FORK_ROWS = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Placed:
    """One sequence that wants rows."""

    tokens: tuple[int, ...]
    cone: Cone
    domain: object  # rows are shared among sequences of equal domain; None: with nobody


@dataclass(frozen=True, slots=True, kw_only=True)
class Stored:
    """One sequence that has its rows in the store. `stops` and `outputs` as in `plan.Trunk`."""

    trunk: TrunkId
    tokens: tuple[int, ...]
    edits: tuple[Edit, ...]
    domain: object
    stops: tuple[int, ...]
    outputs: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Forest:
    """The segments of a pass, in the order of their rows, and which of them each sequence is."""

    segments: tuple[Segment, ...]
    places: tuple[int, ...]  # per sequence: its segment
    layer_rows: tuple[int, ...]  # rows at each layer
    skipped_rows: tuple[int, ...]  # of these, those that go around it
    used: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]  # per trunk: stops and outputs that its forks need


def grow(sequences: Sequence[Placed], num_layers: int, trunks: Sequence[Stored] = ()) -> Forest:
    """The forest of some sequences, and of trunks that they may fork from; deterministic.

    Segments of trunks that nobody forks from are left out.
    """
    trees = [_Tree(number, one.tokens, one.domain, one.cone, num_layers) for number, one in enumerate(sequences)]
    for number, one in enumerate(trunks, len(trees)):
        trees.append(_Tree(number, one.tokens, one.domain, _nothing(one.edits, num_layers), num_layers, one))
    twins = _find_parents(trees)
    kept = [index for index in range(len(trees)) if twins[index] == index]
    for index, twin in enumerate(twins):
        if twin != index:
            trees[twin].need(trees[index])
    for index in sorted(kept, key=lambda index: -trees[index].depth):
        trees[index].tell_parent()
    kept = [index for index in kept if trees[index].kept is None or any(trees[index].stops)]
    # Neighbours of like geometry can be attended to in one batch, without gathering their rows.
    kept.sort(key=lambda i: (trees[i].root.length, trees[i].root.number, trees[i].starts, trees[i].stops, i))
    rows = {index: row for row, index in enumerate(kept)}
    segments = tuple(trees[index].segment(rows) for index in kept)
    return Forest(
        segments=segments,
        places=tuple(rows[twin] for twin in twins[: len(sequences)]),
        layer_rows=tuple(rows_by_layer(segments, num_layers)),
        skipped_rows=tuple(skipped_by_layer(segments, num_layers)),
        used=tuple((tuple(tree.stops[:num_layers]), tuple(tree.behind)) for tree in trees[len(sequences) :]),
    )


def _nothing(edits: tuple[Edit, ...], num_layers: int) -> Cone:
    """The cone of a trunk: nothing of it is needed but what its forks need."""
    nowhere = (NOWHERE,) * num_layers
    return Cone(edits=edits, needs=(0,) * num_layers, head=(), inside=(*nowhere, NOWHERE), behind=nowhere)


class _Tree:
    """A sequence on its way to becoming a segment."""

    def __init__(
        self,
        number: int,
        tokens: tuple[int, ...],
        domain: object,
        cone: Cone,
        num_layers: int,
        kept: Stored | None = None,
    ) -> None:
        self.number = number
        self.length = len(tokens)
        self.tokens = tokens
        self.domain = domain
        self.edits = cone.edits
        self.kept = kept  # of a trunk
        self.parent: _Tree | None = None
        self.root = self
        self.depth = 0
        self.starts = [0] * (num_layers + 1)
        self.stops = list(cone.needs)
        self.head = set(cone.head)
        self.inside, self.behind = cone.inside, cone.behind
        self.skips = cone.skips  # whoever shares its rows there has the edit that says so, and skips as well

    def join(self, parent: _Tree, common: int) -> None:
        """Becomes a fork of `parent`, whose first `common` tokens are its own, when that saves more than it costs."""
        levels = len(self.stops)
        starts = [common] * (levels + 1)
        for edit in set(self.edits) ^ set(parent.edits):
            for level in range(edit.level, levels + 1):
                if starts[level] <= edit.position:
                    break  # they never grow
                starts[level] = edit.position
        if parent.root.is_cache:
            starts = [min(starts[-1], self._first_read)] * (levels + 1)
        shared = sum(map(min, starts, self.stops))
        own_levels = sum(map(lt, starts, self.stops))
        if shared > _FORK_ROWS * own_levels:
            self.parent, self.starts = parent, starts
            self.root, self.depth = parent.root, parent.depth + 1

    @property
    def is_cache(self) -> bool:
        return self.kept is not None and self.kept.trunk[1] < 0

    @property
    def _first_read(self) -> int:
        return min(*self.inside, *self.behind)

    def need(self, other: _Tree) -> None:
        """A twin needs its rows up to there."""
        self._need(other.stops, other.head)
        if self.root.kept is not None:
            self.inside = tuple(map(min, self.inside, other.inside))
            self.behind = tuple(map(min, self.behind, other.behind))

    def tell_parent(self) -> None:
        """Its parent must have the rows that it has not; called when all its own forks have."""
        if self.parent is None:
            return
        if self.root.kept is not None:
            self._tell_trunk(self.parent)
            if not self.starts[0]:  # it turned out to need nothing of the trunk
                self.parent = None
                return
        self.parent._need(map(min, self.starts, self.stops), (p for p in self.head if p < self.starts[-1]))

    def _tell_trunk(self, parent: _Tree) -> None:
        """What is read of rows that it has not, up to the trunk: of that there are outputs of layers only."""
        if parent is self.root and parent.is_cache:  # a twin may read more than it
            self.starts = [min(self.starts[-1], self._first_read)] * len(self.starts)
        elif parent is self.root:
            first = self.length
            for level, read in enumerate(self.inside):
                first = min(first, read)
                self.starts[level] = min(self.starts[level], first)
        behind = list(self.behind)
        for level, (before, after) in enumerate(pairwise(self.starts)):
            is_needed = after < self.stops[level + 1] if level + 1 < len(self.stops) else bool(self.head)
            if after < before and is_needed:  # rows that are born behind the layer
                behind[level] = min(behind[level], after)
        parent.inside = tuple(map(_not_own, parent.inside, self.inside, self.starts))
        parent.behind = tuple(map(_not_own, parent.behind, behind, self.starts))

    def _need(self, stops: Iterable[int], head: Iterable[int]) -> None:
        self.stops = list(map(max, self.stops, stops))
        self.head.update(head)

    def segment(self, rows: dict[int, int]) -> Segment:
        if self.kept is not None:
            assert all(map(le, self.stops, self.kept.stops)), "a trunk has the rows that were planned for it"
            return Segment(
                parent=None,
                trunk=self.kept.trunk,
                outputs=self.kept.outputs,
                starts=tuple(self.starts),
                stops=self.kept.stops,
                head=(),
                tokens=() if self.is_cache else self.tokens[: self.kept.stops[0]],
            )
        stops = tuple(self.stops)
        return Segment(
            parent=None if self.parent is None else rows[self.parent.number],
            starts=tuple(self.starts),
            stops=stops,
            head=tuple(sorted(p for p in self.head if p >= self.starts[-1])),
            tokens=self.tokens[self.starts[0] : stops[0]] if stops else (),
            skips=self.skips,
        )


def _not_own(known: int, position: int, start: int) -> int:
    """The first position that is read of a parent, when a fork that begins at `start` reads from `position` on."""
    return min(known, position) if position < start else known


class _Node:
    """A place in the trie of edits: sequences of equal tokens that have the same first edits."""

    __slots__ = ("best", "children", "edit", "own", "parent")

    def __init__(self, edit: Edit | None, parent: _Node | None) -> None:
        self.edit = edit
        self.parent = parent
        self.children: dict[Edit, _Node] = {}
        self.own: list[int] = []  # sequences that have these edits and no others
        self.best = -1  # the sequence whose rows stand for the node: its own, else of the child that differs least


def _find_parents(trees: list[_Tree]) -> list[int]:
    """Links trees to parents; returns for each sequence the one whose twin it is, itself for most."""
    twins = list(range(len(trees)))
    groups: dict[object, dict[tuple[int, ...], list[int]]] = {}
    for index, tree in enumerate(trees):
        if tree.domain is not None:
            groups.setdefault(tree.domain, {}).setdefault(tree.tokens, []).append(index)
    for by_tokens in groups.values():
        last: _Tree | None = None
        for tokens in sorted(by_tokens):
            nodes = _trie(by_tokens[tokens], trees)
            _choose(nodes, trees)
            root = trees[nodes[0].best]
            if last is not None and root.kept is None:
                count = common(last.tokens, tokens)
                if count:
                    root.join(_owner(last, count), count)
            last = root
            _link(nodes, trees, twins)
    return twins


def _trie(group: list[int], trees: list[_Tree]) -> list[_Node]:
    """The trie's nodes, each after its parent. Of equal sequences a trunk is the first."""
    nodes = [_Node(None, None)]
    for index in group:
        node = nodes[0]
        for edit in trees[index].edits:
            child = node.children.get(edit)
            if child is None:
                child = node.children[edit] = _Node(edit, node)
                nodes.append(child)
            node = child
        if trees[index].kept is not None:
            node.own.insert(0, index)
        else:
            node.own.append(index)
    return nodes


def _choose(nodes: list[_Node], trees: list[_Tree]) -> None:
    """Chooses, from the leaves up, the sequence that stands for each node. Trunks go first: their rows cost nothing."""
    for node in reversed(nodes):
        below = [child for child in node.children.values() if not node.own or trees[child.best].kept is not None]
        if node.own and (trees[node.own[0]].kept is not None or not below):
            node.best = node.own[0]
        else:
            node.best = max(below, key=lambda child: _rank(child, trees)).best


def _rank(child: _Node, trees: list[_Tree]) -> tuple[bool, int]:
    """Where the sequence that stands differs, all its forks have rows of their own: one that differs least."""
    best = trees[child.best]
    assert child.edit is not None
    return best.kept is not None, -(len(best.stops) + 1 - child.edit.level) * (best.length - child.edit.position)


def _link(nodes: list[_Node], trees: list[_Tree], twins: list[int]) -> None:
    """Forks, from the root down, each node's sequence from its parent node's, and those of a trunk's node from it."""
    for node in nodes:
        best = trees[node.best]
        if node.parent is not None and node.best != node.parent.best and best.kept is None:
            best.join(trees[node.parent.best], best.length)
        own = [index for index in node.own if trees[index].kept is None]
        if own and best.kept is not None:
            trees[own[0]].join(best, trees[own[0]].length)
        for index in own[1:]:
            twins[index] = own[0]


def _owner(tree: _Tree, common: int) -> _Tree:
    """The tree itself, or the nearest that it forks from which has rows of its own among the first `common` ones."""
    while tree.parent is not None and common <= tree.starts[-1]:
        tree = tree.parent
    return tree


def common(a: tuple[int, ...], b: tuple[int, ...]) -> int:
    """Length of the longest common prefix."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
