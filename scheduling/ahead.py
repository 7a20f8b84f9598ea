"""The part of a generation's prompts that nobody reads or writes: it may run ahead, in as many passes as it takes.

Owns how far each prompt's cache is before the first step runs, and what a pass of some rows would do next. A later pass
forks from the cache as from any trunk, and so has the bits that it would have with all rows in one. What somebody reads
or writes, and all behind that, waits for the first step's own pass, and so do images, which come with their request.
Programs of several waves run in these alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from polytrace.images import num_before_images
from scheduling.caches import Cache, Caches, SequenceId, drawing_cones
from scheduling.forest import Placed, Stored, grow
from scheduling.plan import NOWHERE, PAGE, Cone, Edit, Program, TrunkId
from scheduling.prefixes import Prefixes, untouched
from scheduling.trunks import token_layers_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Stretch:
    """Positions of a prompt that a pass runs ahead."""

    cache: Cache
    placed: Placed  # all up to its stop
    start: int  # those before are in the cache


@dataclass(slots=True, kw_only=True)
class _Prompt:
    """A prompt on its way into a cache that begins with it."""

    sequence: SequenceId  # the first that has it
    cache: Cache
    tokens: tuple[int, ...]
    cone: Cone
    domain: object  # with whom it shares rows
    limit: int  # positions that may run ahead
    done: int = 0  # positions that are in the cache, or on their way
    found: int = 0  # that a prefix has
    kept: Stored | None = None  # that it goes on from


class Ahead:
    """One generation's prompts."""

    def __init__(self, program: Program, caches: Caches, num_layers: int) -> None:
        self._program = program
        self._num_layers = num_layers
        self._prompts: list[_Prompt] = []
        self.spared = 0  # rows x layers, thanks to prefixes
        self._has_begun = False
        cones = drawing_cones(program) if len(program.waves) == 1 else {}
        for (invoke, place), own in caches.own.items():
            if invoke not in cones:
                continue
            sequence = invoke, place
            cache = caches.shared.get(sequence, own)
            if cache.begin:
                continue  # another sequence's prompt is its own
            tokens, cone = program.invokes[invoke].sequences[place], cones[invoke][place]
            most = cache.most if cache is not own else len(tokens)
            domain = program.sharing_domain or ("alone", program.request, sequence)
            limit = 0 if cone.skips else min(untouched(tokens, cone), most, num_before_images(tokens))
            self._prompts.append(
                _Prompt(sequence=sequence, cache=cache, tokens=tokens, cone=cone, domain=domain, limit=limit)
            )
        self._by_sequence = {prompt.sequence: prompt for prompt in self._prompts}

    def look(self, prefixes: Prefixes) -> None:
        """Finds what earlier requests have left, until the first pass goes; that one must find it still there."""
        if self._has_begun:
            return
        for prompt in self._prompts:
            prompt.found, prompt.kept = 0, None
            found = prefixes.find(prompt.domain, prompt.tokens, prompt.cone)
            if found is not None and not prompt.cone.skips:
                prefix, prompt.found = found
                prompt.kept = self._kept(prefix.trunk, prompt.tokens[: prompt.found], prefix.edits, prompt.domain)

    @property
    def num_spared(self) -> int:
        """Rows that need not run any more."""
        return sum(self._reached(prompt) for prompt in self._prompts)

    @property
    def num_left(self) -> int:
        """Rows that may run ahead."""
        return sum(max(0, prompt.limit - self._reached(prompt)) for prompt in self._prompts)

    def kept(self) -> Iterator[Stored]:
        """What the next pass forks from."""
        for prompt in self._prompts:
            if prompt.kept is not None:
                yield prompt.kept

    def domain(self, sequence: SequenceId) -> object:
        """Of a prompt's rows, None when they have none of their own."""
        prompt = self._by_sequence.get(sequence)
        return None if prompt is None else prompt.domain

    def done(self, sequence: SequenceId) -> int:
        """Positions that a sequence's cache has."""
        prompt = self._by_sequence.get(sequence)
        return 0 if prompt is None else prompt.done

    def next(self, num_rows: int) -> tuple[Stretch, ...]:
        """What a pass of so many rows runs; whole pages, as far as it goes on behind."""
        found = []
        for prompt in self._prompts:
            start = self._reached(prompt)
            stop = min(prompt.limit, start + num_rows)
            if stop < prompt.limit:
                stop = max(start, stop // PAGE * PAGE)
            if stop > start:
                placed = Placed(tokens=prompt.tokens[:stop], cone=self._plain(stop), domain=prompt.domain)
                found.append(Stretch(cache=prompt.cache, placed=placed, start=prompt.done))
                num_rows -= stop - start
        return tuple(found)

    def went(self, stretches: tuple[Stretch, ...]) -> None:
        """They are on their way, or all of the program is: passes that follow find them in the caches."""
        if not self._has_begun and any(prompt.found for prompt in self._prompts):
            self.spared = self._spared()
        self._has_begun = True
        for stretch in stretches:
            prompt = next(prompt for prompt in self._prompts if prompt.cache is stretch.cache)
            prompt.done = len(stretch.placed.tokens)
            prompt.kept = self._kept(prompt.cache.trunk, stretch.placed.tokens, (), prompt.domain)

    @staticmethod
    def _reached(prompt: _Prompt) -> int:
        return max(prompt.done, prompt.found)

    def _plain(self, stop: int) -> Cone:
        """All rows up to a position, for their keys and values."""
        nowhere = (NOWHERE,) * self._num_layers
        return Cone(edits=(), needs=(stop,) * self._num_layers, head=(), inside=(*nowhere, NOWHERE), behind=nowhere)

    def _kept(self, trunk: TrunkId, tokens: tuple[int, ...], edits: tuple[Edit, ...], domain: object) -> Stored:
        nowhere = (NOWHERE,) * self._num_layers
        stops = (len(tokens),) * self._num_layers
        return Stored(trunk=trunk, tokens=tokens, edits=edits, domain=domain, stops=stops, outputs=nowhere)

    def _spared(self) -> int:
        """What prefixes spare of the rows that the request would run alone."""
        (wave,) = self._program.waves
        placed = [
            Placed(tokens=tokens, cone=cone, domain=self._program.sharing_domain)
            for invoke, cones in zip(wave.invokes, wave.cones, strict=True)
            for tokens, cone in zip(self._program.invokes[invoke].sequences, cones, strict=True)
        ]
        forest = grow(placed, self._num_layers, list(self.kept()))
        return wave.rows.token_layers - token_layers_of(forest)
