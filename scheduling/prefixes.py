"""Prefixes: caches of generations that have ended, kept for those that begin with the same tokens and edits.

Owns which are kept, within a budget of bytes, and who may go on from one: requests of the same sharing domain, as far
as tokens and edits are equal. Keys and values below a request's first write are what they are for everybody; behind it
they are found by those alone whose writes are equal. Least recently used ones go first.

Traces do not look for prefixes: what is read of them is mostly inside of layers, and of that a cache has nothing.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass

from scheduling.caches import drawing_cones, edits_before
from scheduling.forest import common
from scheduling.generating import Generating
from scheduling.plan import PAGE, Cone, Edit, Program, TrunkId


@dataclass(frozen=True, slots=True, kw_only=True)
class Prefix:
    """One cache, from position 0 on."""

    trunk: TrunkId
    domain: str
    tokens: tuple[int, ...]
    edits: tuple[Edit, ...]
    num_bytes: int

    @property
    def page(self) -> tuple[str, tuple[int, ...]]:
        """What whoever goes on from it has in common with it at least."""
        return self.domain, self.tokens[:PAGE]


class Prefixes:
    """Those that are kept."""

    def __init__(self, budget_bytes: int) -> None:
        self.budget_bytes = budget_bytes
        self.held_bytes = 0
        self._known: OrderedDict[TrunkId, Prefix] = OrderedDict()  # the least recently used first
        self._by_page: dict[object, dict[TrunkId, Prefix]] = {}

    def __len__(self) -> int:
        return len(self._known)

    def find(self, domain: object, tokens: tuple[int, ...], cone: Cone) -> tuple[Prefix, int] | None:
        """The prefix that spares a sequence most positions, and how many; at least a page. It has been used."""
        best: tuple[Prefix, int] | None = None
        for prefix in self._by_page.get((domain, tokens[:PAGE]), {}).values():
            count = _spared(prefix, tokens, cone)
            if count >= PAGE and (best is None or count > best[1]):
                best = prefix, count
        if best is not None:
            self._known.move_to_end(best[0].trunk)
        return best

    def keep(self, prefix: Prefix) -> bool:
        """Keeps one, unless another says as much. The caller has seen to the budget."""
        for other in list(self._by_page.get(prefix.page, {}).values()):
            if other.edits == prefix.edits and other.tokens[: len(prefix.tokens)] == prefix.tokens:
                self._known.move_to_end(other.trunk)
                return False
        self._known[prefix.trunk] = prefix
        self._by_page.setdefault(prefix.page, {})[prefix.trunk] = prefix
        self.held_bytes += prefix.num_bytes
        return True

    def drop(self, prefix: Prefix) -> None:
        del self._known[prefix.trunk]
        own = self._by_page[prefix.page]
        del own[prefix.trunk]
        if not own:
            del self._by_page[prefix.page]
        self.held_bytes -= prefix.num_bytes

    def outdated(self, prefix: Prefix) -> list[Prefix]:
        """Those that say nothing that another one does not."""
        return [
            other
            for other in self._by_page.get(prefix.page, {}).values()
            if other.trunk != prefix.trunk
            and other.edits == prefix.edits
            and prefix.tokens[: len(other.tokens)] == other.tokens
        ]

    @property
    def oldest(self) -> Prefix | None:
        """The least recently used."""
        return next(iter(self._known.values()), None)


def left_by(program: Program, generating: Generating, num_layers: int, position_bytes: int) -> Iterator[Prefix]:
    """What a generation that has ended leaves for others: its prompts, and what came of them where no step wrote."""
    if program.sharing_domain is None or program.chain is None or len(program.waves) != 1:
        return
    is_changed = any(
        edit.level < num_layers
        for part in program.chain.parts
        for wave in part.waves
        for cones in wave.cones
        for cone in cones
        for edit in cone.edits
    )
    cones = drawing_cones(program)
    for sequence, own in generating.caches.own.items():
        cache = generating.caches.shared.get(sequence, own)
        cone, prompt = cones[sequence[0]][sequence[1]], program.invokes[sequence[0]].sequences[sequence[1]]
        if cache.begin or cone.skips:
            continue
        tokens = prompt if is_changed else generating.cached(sequence)
        tokens = tokens if cache is own else prompt[: cache.capacity]
        if len(tokens) >= PAGE:
            yield Prefix(
                trunk=cache.trunk,
                domain=program.sharing_domain,
                tokens=tokens,
                edits=cone.edits if cache is own else edits_before(cone, len(tokens)),
                num_bytes=cache.capacity * position_bytes,
            )


def _spared(prefix: Prefix, tokens: tuple[int, ...], cone: Cone) -> int:
    """Positions of a sequence that need not run: up to where tokens or edits differ or something is read."""
    differing = set(prefix.edits) ^ set(cone.edits)
    first = min([first_read(cone), len(tokens) - 1, *(edit.position for edit in differing)])
    return min(first, common(prefix.tokens, tokens))


def first_read(cone: Cone) -> int:
    """The first position that somebody reads something of."""
    return min(*cone.inside, *cone.behind)


def untouched(tokens: tuple[int, ...], cone: Cone) -> int:
    """Positions at the begin of a sequence that nobody reads or writes, without the last one."""
    return max(0, min([first_read(cone), len(tokens) - 1, *(edit.position for edit in cone.edits)]))
