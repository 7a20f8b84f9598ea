"""Forks of trunks: of those there are keys, values and some outputs of layers, and nothing else may be looked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import count

from hypothesis import given, settings
from hypothesis import strategies as st

from polytrace.description import Limits
from scheduling.checks import table_of
from scheduling.forest import Forest, Placed, Stored, grow
from scheduling.plan import NOWHERE, Edit, Program, RequestId, Segment
from scheduling.trunks import extended
from tests.scheduling.forests import LAYERS, placed, variants
from tests.scheduling.tiny import HIDDEN, VOCAB, Recorder, tiny_llama

US = "us"
EVERYTHING = (NOWHERE,) * LAYERS


def kept(sequence: Placed, number: int, stops: tuple[int, ...], outputs: tuple[int, ...]) -> Stored:
    return Stored(
        trunk=(RequestId("r"), number),
        tokens=sequence.tokens,
        edits=sequence.cone.edits,
        domain=sequence.domain,
        stops=stops,
        outputs=outputs,
    )


def grow_over(sequences: Sequence[Placed], trunks: Sequence[Placed]) -> Forest:
    """The forest over trunks that have just what it needs of them."""
    everything = [kept(one, number, EVERYTHING, (0,) * LAYERS) for number, one in enumerate(trunks)]
    used = grow(sequences, LAYERS, everything).used
    return grow(
        sequences,
        LAYERS,
        [kept(one, number, *use) for number, (one, use) in enumerate(zip(trunks, used, strict=True))],
    )


def owner(forest: Forest, place: int, level: int, position: int) -> Segment:
    segment = forest.segments[forest.places[place]]
    while position < segment.starts[level]:
        assert segment.parent is not None
        segment = forest.segments[segment.parent]
    return segment


@st.composite
def reading(draw: st.DrawFn) -> list[Placed]:
    """Sequences that also say what they read."""
    found = []
    for one in draw(variants()):
        cone = one.cone
        first = st.one_of(st.just(NOWHERE), st.integers(0, len(one.tokens) - 1))
        inside, behind = ([draw(first) for _ in range(LAYERS)] for _ in range(2))
        needs = [
            max(need, min(len(one.tokens), 1 + min(a, b)) if min(a, b) < NOWHERE else 0)
            for need, a, b in zip(cone.needs, inside, behind, strict=True)
        ]
        needs = [max(needs[level:]) for level in range(LAYERS)]
        cone = replace(
            cone, needs=tuple(needs), inside=(*inside, min(cone.head, default=NOWHERE)), behind=tuple(behind)
        )
        found.append(replace(one, cone=cone))
    return found


@settings(max_examples=300, deadline=None)
@given(reading(), st.data())
def test_forks_find_with_a_trunk_what_it_has_and_have_all_else_themselves(
    sequences: list[Placed], data: st.DataObject
) -> None:
    trunks = data.draw(st.lists(st.sampled_from(sequences), min_size=1, max_size=3, unique_by=id))
    forest = grow_over(sequences, trunks)
    edits = {(RequestId("r"), number): one.cone.edits for number, one in enumerate(trunks)}
    for place, sequence in enumerate(sequences):
        cone = sequence.cone
        for level, stop in enumerate(cone.needs):
            for position in range(stop):
                there = owner(forest, place, level, position)
                assert position < there.stops[level]
                if there.trunk is None:
                    continue
                assert position < cone.inside[level], "what is read inside a layer runs"
                if position >= cone.behind[level]:
                    assert position >= there.outputs[level]
                assert there.tokens[: position + 1] == sequence.tokens[: position + 1]
                differing = set(edits[there.trunk]) ^ set(cone.edits)
                assert not [edit for edit in differing if edit.level <= level and edit.position <= position]
        for position in cone.head:
            assert owner(forest, place, LAYERS, position).trunk is None, "the head runs here"
        for level in range(1, LAYERS + 1):
            for position in range(cone.needs[level]) if level < LAYERS else cone.head:
                before = owner(forest, place, level - 1, position)
                if before.trunk is not None and owner(forest, place, level, position).trunk is None:
                    assert before.outputs[level - 1] <= position < before.stops[level - 1], "where it is born from"
    without = grow(sequences, LAYERS)
    assert sum(forest.layer_rows) <= sum(without.layer_rows) or any(
        first < NOWHERE for one in sequences for first in one.cone.inside
    )


def test_a_sweep_over_a_trunk_costs_its_forks() -> None:
    base = placed(range(6), needs=(6, 6, 6), head=[5], domain=US)
    forks = [
        placed(range(6), [Edit(level, position, b"p")], (6, 6, 6), [5], US, inside=(NOWHERE,) * 3 + (5,))
        for level in range(1, 3)
        for position in range(6)
    ]
    forest = grow_over(forks, [base])
    assert forest.layer_rows == (0, 21, 42)
    ((stops, outputs),) = forest.used
    assert stops == (6, 6, 5), "the last token's keys in the last layer are every fork's own"
    assert outputs == (0, 0, NOWHERE), "forks are born behind the first two layers"


def test_a_sequence_that_only_reads_the_head_again_runs_no_layer() -> None:
    same = placed(range(4), needs=(4, 4, 4), head=[2, 3], domain=US, inside=(NOWHERE,) * 3 + (2,))
    forest = grow_over([same], [same])
    assert forest.layer_rows == (0, 0, 0)
    assert forest.segments[forest.places[0]].head == (2, 3)
    assert forest.used[0][1][-1] == 2


def test_a_trunk_that_nobody_forks_from_is_no_segment() -> None:
    forest = grow_over([placed([7, 8], domain=US)], [placed([1, 2], domain=US)])
    assert [segment.trunk for segment in forest.segments] == [None]


def sweep(pass_tokens: int, num_layers: int = 4, tokens: int = 6) -> Program:
    """Each layer x position of one prompt, patched with another's; and the prompt without a patch."""
    limits = Limits(max_sequence_tokens=64, pass_tokens=pass_tokens)
    changed = [tuple(range(1, tokens + 1))]
    prompts = [[tuple(range(tokens))], *[changed] * (1 + num_layers * tokens)]
    recorder = Recorder(tiny_llama(num_layers, limits=limits), *prompts)

    def save_last(invoke: int) -> None:
        logits = recorder.read("lm_head", invoke=invoke)
        recorder.save(recorder.index(logits, slice(None), -1, shape=(1, VOCAB)))

    save_last(1)
    numbers = count(2)
    for layer in range(num_layers):
        site = f"model.layers.{layer}"
        clean = recorder.read(site)
        for position in range(tokens):
            invoke = next(numbers)
            patch = recorder.index(clean, slice(None), position, shape=(1, HIDDEN))
            here = recorder.read(site, invoke=invoke)
            patched = recorder.op("setitem", here, (slice(None), position), patch)
            recorder.write(site, patched, invoke=invoke, in_place=True)
            save_last(invoke)
    return recorder.work_out()


def test_the_parts_of_a_sweep_fork_from_one_trunk() -> None:
    whole, split = sweep(1000), sweep(24)
    assert len(whole.waves) == 1 and not whole.trunks
    assert len(split.waves) > 4
    assert {trunk.wave for trunk in split.trunks} == {0}
    kept_layers = sum(wave.rows.token_layers for wave in split.waves)
    anew = sum(wave.rows_anew.token_layers for wave in split.waves)
    assert whole.waves[0].rows.token_layers <= kept_layers < anew
    assert all(wave.rows.widest <= wave.rows_anew.widest for wave in split.waves[1:])
    assert split.trunk_bytes > 0


def test_bytes_of_trunks_are_those_of_the_stage_that_keeps_most() -> None:
    program = sweep(24)
    description = tiny_llama(4, stages=2)
    levels = table_of(description).levels
    by_stage = [0, 0]
    for trunk in program.trunks:
        for layer, stage in enumerate(levels.stages):
            by_stage[stage] += trunk.stops[layer] + max(0, trunk.stops[layer] - trunk.outputs[layer])
    assert (description.key_value_bytes, description.hidden_bytes) == (1, 1) and HIDDEN > 1
    assert program.trunk_bytes == max(by_stage) > 0


def test_a_kept_sequence_needs_what_later_waves_need_of_it() -> None:
    program = sweep(24)
    wave = program.waves[0]
    for trunk in program.trunks:
        cone = wave.cones[wave.invokes.index(trunk.invoke)][trunk.sequence]
        longer = extended(cone, trunk)
        assert all(a >= b for a, b in zip(longer.needs, trunk.stops, strict=True))
        assert list(longer.needs) == sorted(longer.needs, reverse=True)
