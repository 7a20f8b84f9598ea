"""Which rows exist once: the forest of segments for the sequences of one pass.

Two sequences are equal up to the first (level, position) where their tokens or their edits differ. So a sequence
becomes a *fork* of one that it has much in common with: it holds rows only from where they differ, and finds all
others with its parent. Rows end where nobody needs them any more, neither the sequence itself nor one that forks from
it.

Parents are found along a trie of edits within equal tokens, and along the longest common prefix between different
ones. Knows nothing of requests, nodes or streams: sequences go in, segments come out.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from operator import lt

from scheduling.plan import Cone, Edit, Segment

# What a fork costs besides its rows, in rows a layer: copies of a page of keys and values, and its part of the plan.
_FORK_ROWS = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Placed:
    """One sequence that wants rows."""

    tokens: tuple[int, ...]
    cone: Cone
    domain: object  # rows are shared among sequences of equal domain; None: with nobody


@dataclass(frozen=True, slots=True, kw_only=True)
class Forest:
    """The segments of a pass, in the order of their rows, and which of them each sequence is."""

    segments: tuple[Segment, ...]
    places: tuple[int, ...]  # per sequence: its segment
    layer_rows: tuple[int, ...]  # rows that run at each layer


def grow(sequences: Sequence[Placed], num_layers: int) -> Forest:
    """The forest of some sequences; deterministic."""
    trees = [_Tree(number, sequence, num_layers) for number, sequence in enumerate(sequences)]
    twins = _find_parents(sequences, trees)
    kept = [index for index in range(len(trees)) if twins[index] == index]
    for index, twin in enumerate(twins):
        if twin != index:
            trees[twin].need(trees[index].stops, trees[index].head)
    for index in sorted(kept, key=lambda index: -trees[index].depth):
        trees[index].tell_parent()
    # Neighbours of like geometry can be attended to in one batch, without gathering their rows.
    kept.sort(key=lambda i: (trees[i].root.length, trees[i].root.number, trees[i].starts, trees[i].stops, i))
    rows = {index: row for row, index in enumerate(kept)}
    segments = tuple(trees[index].segment(rows) for index in kept)
    return Forest(
        segments=segments,
        places=tuple(rows[twin] for twin in twins),
        layer_rows=tuple(
            sum(max(0, segment.stops[level] - segment.starts[level]) for segment in segments)
            for level in range(num_layers)
        ),
    )


class _Tree:
    """A sequence on its way to becoming a segment."""

    def __init__(self, number: int, sequence: Placed, num_layers: int) -> None:
        self.number = number
        self.length = len(sequence.tokens)
        self.tokens = sequence.tokens
        self.edits = sequence.cone.edits
        self.parent: _Tree | None = None
        self.root = self
        self.depth = 0
        self.starts = [0] * (num_layers + 1)
        self.stops = list(sequence.cone.needs)
        self.head = set(sequence.cone.head)

    def join(self, parent: _Tree, common: int) -> None:
        """Becomes a fork of `parent`, whose first `common` tokens are its own, when that saves more than it costs."""
        levels = len(self.stops)
        starts = [common] * (levels + 1)
        for edit in set(self.edits) ^ set(parent.edits):
            for level in range(edit.level, levels + 1):
                if starts[level] <= edit.position:
                    break  # they never grow
                starts[level] = edit.position
        shared = sum(map(min, starts, self.stops))
        own_levels = sum(map(lt, starts, self.stops))
        if shared > _FORK_ROWS * own_levels:
            self.parent, self.starts = parent, starts
            self.root, self.depth = parent.root, parent.depth + 1

    def need(self, stops: Iterable[int], head: Iterable[int]) -> None:
        """Somebody needs its rows up to there."""
        self.stops = list(map(max, self.stops, stops))
        self.head.update(head)

    def tell_parent(self) -> None:
        """Its parent must have the rows that it has not; called when all its own forks have."""
        if self.parent is not None:
            self.parent.need(map(min, self.starts, self.stops), (p for p in self.head if p < self.starts[-1]))

    def segment(self, rows: dict[int, int]) -> Segment:
        stops = tuple(self.stops)
        return Segment(
            parent=None if self.parent is None else rows[self.parent.number],
            starts=tuple(self.starts),
            stops=stops,
            head=tuple(sorted(p for p in self.head if p >= self.starts[-1])),
            tokens=self.tokens[self.starts[0] : stops[0]] if stops else (),
        )


class _Node:
    """A place in the trie of edits: sequences of equal tokens that have the same first edits."""

    __slots__ = ("best", "children", "edit", "own", "parent")

    def __init__(self, edit: Edit | None, parent: _Node | None) -> None:
        self.edit = edit
        self.parent = parent
        self.children: dict[Edit, _Node] = {}
        self.own: list[int] = []  # sequences that have these edits and no others
        self.best = -1  # the sequence whose rows stand for the node: its own, else the child's that differs last


def _find_parents(sequences: Sequence[Placed], trees: list[_Tree]) -> list[int]:
    """Links trees to parents; returns for each sequence the one whose twin it is, itself for most."""
    twins = list(range(len(sequences)))
    groups: dict[object, dict[tuple[int, ...], list[int]]] = {}
    for index, sequence in enumerate(sequences):
        if sequence.domain is not None:
            groups.setdefault(sequence.domain, {}).setdefault(sequence.tokens, []).append(index)
    for by_tokens in groups.values():
        last: _Tree | None = None
        for tokens in sorted(by_tokens):
            nodes = _trie(by_tokens[tokens], sequences)
            _choose(nodes)
            root = trees[nodes[0].best]
            if last is not None:
                common = _common(last.tokens, tokens)
                if common:
                    root.join(_owner(last, common), common)
            last = root
            _link(nodes, trees, twins)
    return twins


def _trie(group: list[int], sequences: Sequence[Placed]) -> list[_Node]:
    """The trie's nodes, each after its parent."""
    nodes = [_Node(None, None)]
    for index in group:
        node = nodes[0]
        for edit in sequences[index].cone.edits:
            child = node.children.get(edit)
            if child is None:
                child = node.children[edit] = _Node(edit, node)
                nodes.append(child)
            node = child
        node.own.append(index)
    return nodes


def _choose(nodes: list[_Node]) -> None:
    """Chooses, from the leaves up, the sequence that stands for each node."""
    for node in reversed(nodes):
        if node.own:
            node.best = node.own[0]
        else:
            last = max(node.children.values(), key=lambda child: (child.edit.level, child.edit.position))  # type: ignore[union-attr]
            node.best = last.best


def _link(nodes: list[_Node], trees: list[_Tree], twins: list[int]) -> None:
    """Forks, from the root down, each node's sequence from its parent node's."""
    for node in nodes:
        if node.parent is not None and node.best != node.parent.best:
            trees[node.best].join(trees[node.parent.best], trees[node.best].length)
        for index in node.own[1:]:
            twins[index] = node.own[0]


def _owner(tree: _Tree, common: int) -> _Tree:
    """The tree itself, or the nearest that it forks from which has rows of its own among the first `common` ones."""
    while tree.parent is not None and common <= tree.starts[-1]:
        tree = tree.parent
    return tree


def _common(a: tuple[int, ...], b: tuple[int, ...]) -> int:
    """Length of the longest common prefix."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
