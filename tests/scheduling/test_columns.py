"""Reads and writes of some columns only: indexings still mean what they meant, and writes change what they say."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polytrace.description import Limits
from polytrace.graph import Constant, Node, NodeId, Op, Operand, Read, Ref, Save, Site, Write
from scheduling.checks import resolve, table_of
from scheduling.columns import Columns, Part, find_columns
from scheduling.placement import find_live
from scheduling.plan import Program
from tests.scheduling.tiny import HIDDEN, VOCAB, Recorder, tiny_llama

TINY = tiny_llama()
PROMPTS = [[1, 2, 3, 4, 5], [6, 7, 8, 9, 10]]
ALL = slice(None)
HEAD, LAYER = "lm_head", "model.layers.1"
BOTH = range(2)


def columns_of(recorder: Recorder) -> Columns:
    """What the planner finds, before any other step."""
    request = recorder.request
    resolved = resolve(request, table_of(recorder.description))
    return find_columns(request, resolved, find_live(request.graph, resolved), tuple(recorder.facts))


class Model:
    """What the sites of a recorder's model hold, and the values of nodes that ran on views of them."""

    def __init__(self, recorder: Recorder, narrowed: Mapping[NodeId, tuple[int, ...]] | None = None) -> None:
        self.recorder = recorder
        self.narrowed = narrowed or {}
        self.contents: dict[tuple[Site, int], Any] = {}
        self.values: dict[int, Any] = {}
        self.changes: dict[int, tuple[Any, Any]] = {}  # writes -> their site before and behind them

    def content(self, site: Site, invoke: int) -> Any:
        """`[sequences, longest, *tail]`, zero where there is no token."""
        if (site, invoke) not in self.contents:
            shape = self.recorder.view(site, invoke)
            drawn = np.random.default_rng([invoke, len(site.module)]).integers(1, 99, shape).astype(np.float32)
            self.contents[site, invoke] = np.where(self.real(invoke)[..., None], drawn, 0)
        return self.contents[site, invoke]

    def real(self, invoke: int) -> Any:
        """`[sequences, longest]` where there is a token."""
        prompts = self.recorder.invokes[invoke]
        return np.arange(prompts.longest) >= np.array([[prompts.longest - len(s)] for s in prompts.sequences])

    def run(self, number: int, node: Node) -> None:
        columns = list(self.narrowed.get(NodeId(number), ()))
        if isinstance(node, Read):
            view = self.content(node.site, node.invoke)
            self.values[number] = view[:, columns] if columns else view
        elif isinstance(node, Constant):
            raw = self.recorder.constants[node.name]
            kind = np.int64 if raw.dtype == "int64" else np.float32
            self.values[number] = np.frombuffer(raw.data, kind).reshape(raw.shape)
        elif isinstance(node, Op):
            self.values[number] = evaluate(node, self.values)
        elif isinstance(node, Save):
            self.values[number] = self.values[node.value.node]
        elif isinstance(node, Write):
            before = self.content(node.site, node.invoke)
            after = before.copy()
            after[:, columns or ALL] = self.values[node.value.node]
            self.contents[node.site, node.invoke] = np.where(self.real(node.invoke)[..., None], after, 0)
            self.changes[number] = before, self.contents[node.site, node.invoke]


def evaluate(node: Op, values: dict[int, Any]) -> Any:
    args = tuple(resolved(arg, values) for arg in node.args)
    if node.name == "getitem":
        return args[0][args[1]]
    if node.name in ("mul", "add"):
        return args[0] * args[1] if node.name == "mul" else args[0] + args[1]
    assert node.name in ("setitem", "set_view")
    changed = args[0].copy()
    if node.name == "setitem":
        changed[args[1]] = args[2]
        return changed
    view = changed
    for name, (first, *rest), _ in args[1]:
        view = view[first] if name == "getitem" else np.swapaxes(view, first, *rest)
    assert np.shares_memory(view, changed) or not view.size
    view[...] = args[2]
    return changed


def resolved(operand: Operand, values: dict[int, Any]) -> Any:
    if isinstance(operand, Ref):
        return values[operand.node]
    return tuple(resolved(part, values) for part in operand) if isinstance(operand, tuple) else operand


class Numbers(Recorder):
    """A recorder that runs each node at once, and so knows shapes."""

    def __init__(self, *invokes: list[list[int]]) -> None:
        super().__init__(TINY, *invokes)
        self.model = Model(self)

    def made(self, name: str, *args: Operand) -> Ref:
        """An operation, of the shape that it has."""
        shape = evaluate(Op(name=name, args=args, where=""), self.model.values).shape
        return self.op(name, *args, shape=shape)

    def _add(self, node: Node, shape: tuple[int, ...] | None, dtype: str = "float32") -> Ref:
        added = super()._add(node, shape, dtype)
        self.model.run(added.node, node)
        return added


def check(recorder: Numbers) -> Columns:
    """The rewritten graph computes what the graph computes, and writes change only what they are said to."""
    recorder.save(recorder.constant((1,)))
    found = columns_of(recorder)
    plain, narrow = recorder.model, Model(recorder, found.narrowed)
    request = recorder.request
    live = find_live(request.graph, resolve(request, table_of(TINY)))
    for number, node in enumerate(found.graph.nodes):
        if live[number]:
            narrow.run(number, node)
            known = found.facts[number]
            assert known is None or known.shape == narrow.values[number].shape
            if isinstance(node, Save):
                np.testing.assert_array_equal(narrow.values[number], plain.values[number], strict=True)
    for key, content in narrow.contents.items():
        np.testing.assert_array_equal(content, plain.contents[key])
    for write, parts in parts_of(found).items():
        before, after = plain.changes[write]
        touched = np.zeros(before.shape[:2], bool)
        for part in parts:
            rows = ALL if part.sequences is None else list(part.sequences)
            touched[rows, :] |= np.isin(np.arange(before.shape[1]), part.columns)
        np.testing.assert_array_equal(before[~touched], after[~touched])
    return found


def parts_of(found: Columns) -> dict[NodeId, tuple[Part, ...]]:
    """The cells that each write changes."""
    return {write: change.parts for write, change in found.changed.items()}


def kept_for(*indices: Any) -> tuple[Program, tuple[int, ...]]:
    """The program that reads the logits once an index, and the columns it keeps."""
    r = Numbers(PROMPTS)
    for index in indices:
        r.save(r.made("getitem", r.read(HEAD), index))
    check(r)
    program = r.work_out()
    return program, program.waves[0].kept[0]


# Reads


@pytest.mark.parametrize(
    ("index", "columns"),
    [
        ((ALL, -1), (4,)),
        ((ALL, slice(1, 3)), (1, 2)),
        ((0, -2), (3,)),
        ((0, [0, -1], 7), (0, 4)),
        ((Ellipsis, 2, ALL), (2,)),
        ((Ellipsis, ALL), (0, 1, 2, 3, 4)),
        ((ALL, slice(None, None, 2)), (0, 1, 2, 3, 4)),
        ((ALL, slice(1, 4, 2)), (1, 2, 3)),
        ((None, ALL, -1), (4,)),
        ((ALL, None, -1), (4,)),
        ((ALL, slice(3, 3)), (4,)),
        ((ALL, slice(2, 1)), (4,)),
        ((ALL, slice(-99, 2)), (0, 1)),
        ((ALL, slice(3, 99)), (3, 4)),
        ((ALL, [2, 2, 1]), (1, 2)),
        (([0, 1], [2, 3]), (2, 3)),
        (1, (0, 1, 2, 3, 4)),
        ((ALL, ALL, 3), (0, 1, 2, 3, 4)),
        ([0, 1], (0, 1, 2, 3, 4)),
    ],
)
def test_an_indexing_keeps_the_columns_it_names(index: Any, columns: tuple[int, ...]) -> None:
    assert kept_for(index)[1] == columns


COLUMN = st.one_of(
    st.integers(-5, 4),
    st.lists(st.integers(-5, 4), min_size=1, max_size=3),
    st.slices(5).filter(lambda cut: cut.step is None or cut.step > 0),
)


@given(st.lists(st.tuples(st.sampled_from([0, -1, ALL, slice(0, 1)]), COLUMN), min_size=1, max_size=4))
def test_every_indexing_means_on_kept_columns_what_it_meant_on_all(indices: list[Any]) -> None:
    program, kept = kept_for(*indices)
    assert set(kept) >= {column for columns in program.narrowed.values() for column in columns}


def test_every_read_gives_its_own_columns_and_the_head_runs_on_all_of_them() -> None:
    program, kept = kept_for((ALL, 1), (ALL, slice(3, 5)))
    assert list(program.narrowed.values()) == [(1,), (3, 4)] and kept == (1, 3, 4)


def test_one_read_gives_the_columns_of_all_its_indexings() -> None:
    r = Numbers(PROMPTS)
    logits = r.read(HEAD)
    for index in ((ALL, 3), (0, slice(0, 2))):
        r.save(r.made("getitem", logits, index))
    assert check(r).narrowed == {logits.node: (0, 1, 3)}


def test_a_chain_of_indexings_keeps_what_its_end_names() -> None:
    r = Numbers(PROMPTS)
    logits = r.read(HEAD)
    first = r.made("getitem", logits, 0)
    last = r.made("getitem", first, -1)
    r.save(last)
    check(r)
    program = r.work_out()
    assert program.waves[0].kept == ((4,),)
    assert program.facts[logits.node].shape == (2, 1, VOCAB)  # type: ignore[union-attr]
    assert program.facts[first.node].shape == (1, VOCAB)  # type: ignore[union-attr]
    certified = [shape and shape.shape for shape in r.certify().nodes[:4]]
    assert certified == [(2, 5, VOCAB), (5, VOCAB), (VOCAB,), None]


def test_a_chain_through_new_and_taken_dimensions_keeps_the_column() -> None:
    r = Numbers(PROMPTS)
    logits = r.read(HEAD)
    r.save(r.made("getitem", r.made("getitem", logits, (None, ALL, ALL, slice(0, 9))), (0, 1, [3, 1])))
    assert check(r).narrowed == {logits.node: (1, 3)}


def test_a_constant_names_columns_as_a_list_does() -> None:
    r = Numbers(PROMPTS)
    logits = r.read(HEAD)
    r.save(r.made("getitem", logits, (ALL, r.places(1, -1, 1))))
    assert check(r).narrowed == {logits.node: (1, 4)}


def test_constants_that_are_paired_name_their_columns() -> None:
    r = Numbers(PROMPTS)
    logits = r.read(HEAD)
    r.save(r.made("getitem", logits, (r.places(0, 1), r.places(2, 4), r.places(5, 6))))
    assert check(r).narrowed == {logits.node: (2, 4)}


def test_a_constant_of_numbers_names_no_column() -> None:
    r = Recorder(TINY, PROMPTS)
    r.save(r.index(r.read(HEAD), ALL, r.constant((2,)), shape=(2, 2, VOCAB)))
    assert not columns_of(r).narrowed


def test_a_place_beyond_the_view_is_left_to_the_run() -> None:
    r = Recorder(TINY, PROMPTS)
    r.save(r.index(r.read(HEAD), ALL, 7, shape=(2, VOCAB)))
    found = columns_of(r)
    assert not found.narrowed and found.graph == r.request.graph


def test_a_column_that_is_known_only_in_the_run_keeps_every_column() -> None:
    r = Recorder(TINY, PROMPTS)
    position = r.op("argmax", r.read("model.embed_tokens"), shape=(), dtype="int64")
    r.save(r.index(r.read(HEAD), ALL, position, shape=(2, VOCAB)))
    r.save(r.index(r.read(LAYER), ALL, slice(position, None), shape=(2, 1, HIDDEN)))
    assert r.work_out().waves[0].kept == ((0, 1, 2, 3, 4),)
    assert not columns_of(r).narrowed


def test_a_static_column_beside_a_token_known_in_the_run_is_kept_alone() -> None:
    r = Recorder(TINY, PROMPTS)
    token = r.op("argmax", r.read("model.embed_tokens"), shape=(2,), dtype="int64")
    r.save(r.index(r.read(HEAD), ALL, -1, token, shape=(2, 2)))
    assert r.work_out().waves[0].kept == ((4,),)


@pytest.mark.parametrize("use", ["op", "save", "write elsewhere", "write to another invoke", "keyword", "operand"])
def test_any_other_use_keeps_every_column(use: str) -> None:
    r = Recorder(TINY, PROMPTS, PROMPTS)
    hidden = r.read(LAYER)
    r.save(r.index(hidden, ALL, -1, shape=(2, HIDDEN)))
    if use == "op":
        r.save(r.op("softmax", hidden, -1))
    elif use == "save":
        r.save(hidden)
    elif use == "write elsewhere":
        r.write("model.layers.2", hidden)
    elif use == "write to another invoke":
        r.write(LAYER, hidden, invoke=1)
    elif use == "keyword":
        r.save(r._add(Op(name="add", args=(1.0,), kwargs={"other": hidden}, where="a.py:9"), (2, 5, HIDDEN)))
    else:
        other = r.read(LAYER, invoke=1)
        r.save(r.op("setitem", other, (ALL, slice(0, 5)), hidden))
    found = columns_of(r)
    assert hidden.node not in found.narrowed
    assert found.graph.nodes[hidden.node + 1] == r.nodes[hidden.node + 1]


def test_a_use_that_nobody_needs_keeps_nothing_more() -> None:
    r = Recorder(TINY, PROMPTS)
    logits = r.read(HEAD)
    r.op("softmax", logits, -1)
    r.save(r.index(logits, ALL, -1, shape=(2, VOCAB)))
    assert r.work_out().waves[0].kept == ((4,),)


def test_nothing_is_kept_for_a_prompt_whose_head_nobody_reads() -> None:
    r = Recorder(TINY, PROMPTS, PROMPTS)
    r.save(r.read("model.layers.3", invoke=0))
    r.save(r.index(r.read(HEAD, invoke=1), ALL, -1, shape=(2, VOCAB)))
    assert r.work_out().waves[0].kept == ((), (4,))


def test_each_wave_keeps_its_own_columns() -> None:
    r = Recorder(TINY, PROMPTS, PROMPTS)
    row = r.index(r.read(HEAD, invoke=0), ALL, 1, shape=(2, VOCAB))
    r.save(r.read("model.layers.0", invoke=0))
    r.write("model.layers.0", r.op("matmul", row, shape=(2, 5, HIDDEN)), invoke=1)
    r.save(r.index(r.read(HEAD, invoke=1), ALL, -1, shape=(2, VOCAB)))
    assert [wave.kept for wave in r.work_out().waves] == [((1,),), ((4,),)]


def test_an_index_on_itself_keeps_every_column() -> None:
    r = Recorder(TINY, PROMPTS)
    tokens = r.read(HEAD)
    index: tuple[Operand, ...] = (ALL, -1, Ref(tokens.node))
    r.save(r.index(tokens, *index, shape=(2, 2, 5, VOCAB)))
    assert r.work_out().waves[0].kept == ((0, 1, 2, 3, 4),)


# Writes


def edited(r: Numbers, base: Ref, index: Operand, factor: float = 2.0) -> Ref:
    """`base[index] *= factor`, as a client records it."""
    return r.made("setitem", base, index, r.made("mul", r.made("getitem", base, index), factor))


def test_in_place_code_on_a_token_reads_and_writes_that_token() -> None:
    r = Numbers(PROMPTS)
    hidden = r.read(LAYER)
    changed = edited(r, hidden, (ALL, -1))
    write = r.write(LAYER, changed, in_place=True)
    found = check(r)
    assert found.narrowed == {hidden.node: (4,), write.node: (4,)}
    assert parts_of(found) == {write.node: (Part(BOTH, (4,)),)}
    assert found.facts[changed.node].shape == (2, 1, HIDDEN)  # type: ignore[union-attr]


def test_several_edits_of_one_value_are_one_chain() -> None:
    r = Numbers(PROMPTS)
    hidden = r.read(LAYER)
    first = edited(r, hidden, (ALL, 1))
    one = r.write(LAYER, first, in_place=True)
    second = edited(r, first, (0, slice(2, 4)))
    two = r.write(LAYER, second, in_place=True)
    r.save(r.made("getitem", second, (ALL, 2)))
    found = check(r)
    assert found.narrowed == dict.fromkeys((hidden.node, one.node, two.node), (1, 2, 3))
    assert parts_of(found) == {one.node: (Part(BOTH, (1,)),), two.node: (Part(frozenset((0,)), (2, 3)),)}


def test_an_earlier_snapshot_of_an_edited_value_is_narrow_too() -> None:
    r = Numbers(PROMPTS)
    hidden = r.read(LAYER)
    r.write(LAYER, edited(r, hidden, (ALL, 1)), in_place=True)
    r.save(r.made("getitem", hidden, (ALL, slice(0, 2))))
    assert check(r).narrowed[NodeId(hidden.node)] == (0, 1)


def test_two_values_made_in_place_of_one_are_not_narrow() -> None:
    r = Numbers(PROMPTS)
    hidden = r.read(LAYER)
    r.write(LAYER, edited(r, hidden, (ALL, 1)))
    write = r.write(LAYER, edited(r, hidden, (ALL, 2)))
    found = check(r)
    assert not found.narrowed
    assert write.node not in found.changed, "it undoes the first"


def test_edits_of_separate_reads_are_separate() -> None:
    r = Numbers(PROMPTS)
    first = r.read(LAYER)
    one = r.write(LAYER, edited(r, first, (ALL, 1)), in_place=True)
    second = r.read(LAYER)
    two = r.write(LAYER, edited(r, second, (ALL, 3)), in_place=True)
    found = check(r)
    assert found.narrowed == {first.node: (1,), one.node: (1,), second.node: (3,), two.node: (3,)}
    assert parts_of(found) == {one.node: (Part(BOTH, (1,)),), two.node: (Part(BOTH, (3,)),)}


def test_a_stale_value_written_back_undoes_what_was_between() -> None:
    r = Numbers(PROMPTS)
    stale, fresh = r.read(LAYER), r.read(LAYER)
    r.write(LAYER, edited(r, fresh, (ALL, 1)))
    back = r.write(LAYER, edited(r, stale, (ALL, 3)))
    found = check(r)
    assert back.node not in found.changed and back.node not in found.narrowed


def test_a_value_assigned_between_a_read_and_its_way_back_is_undone() -> None:
    r = Numbers(PROMPTS)
    value = r.constant((2, 5, HIDDEN), 3.0)
    hidden = r.read(LAYER)
    r.write(LAYER, value)
    back = r.write(LAYER, edited(r, hidden, (ALL, 3)))
    found = check(r)
    assert back.node not in found.changed and not found.narrowed


def test_a_read_written_back_changes_nothing() -> None:
    r = Numbers(PROMPTS)
    write = r.write(LAYER, r.read(LAYER))
    assert parts_of(check(r)) == {write.node: ()}


def test_a_write_that_reads_nothing_may_change_any_cell() -> None:
    r = Numbers(PROMPTS)
    r.write(LAYER, r.constant((2, 5, HIDDEN)))
    found = check(r)
    assert not found.changed and not found.narrowed


def test_a_value_from_elsewhere_may_change_any_cell() -> None:
    r = Numbers(PROMPTS)
    other = r.read("model.layers.2")
    r.write(LAYER, r.made("setitem", other, (ALL, -1), 0.0))
    found = check(r)
    assert not found.changed and not found.narrowed


def test_an_edit_of_some_dimensions_may_change_any_column() -> None:
    r = Numbers(PROMPTS)
    r.write(LAYER, edited(r, r.read(LAYER), (ALL, ALL, slice(0, 2))), in_place=True)
    found = check(r)
    assert not found.changed and not found.narrowed


def test_a_write_of_named_sequences_changes_only_these() -> None:
    r = Numbers([[1, 2, 3], [4, 5]])
    write = r.write(LAYER, edited(r, r.read(LAYER), (1, -1)), in_place=True)
    paired = r.write("model.layers.2", edited(r, r.read("model.layers.2"), ([0, 1], [0, 2])), in_place=True)
    found = check(r)
    assert parts_of(found) == {
        write.node: (Part(frozenset((1,)), (2,)),),
        paired.node: (Part(frozenset((0, 1)), (0, 2)),),
    }


def test_ragged_prompts_have_their_columns_from_the_left() -> None:
    r = Numbers([[1, 2, 3, 4], [5, 6]])
    hidden = r.read(LAYER)
    write = r.write(LAYER, edited(r, hidden, (ALL, slice(0, 3))), in_place=True)
    assert check(r).narrowed == {hidden.node: (0, 1, 2), write.node: (0, 1, 2)}


def test_in_place_code_on_a_view_of_a_token_is_narrow() -> None:
    r = Numbers(PROMPTS)
    hidden = r.read(LAYER)
    way: Operand = (("getitem", ((ALL, slice(1, 3)),), ()), ("transpose", (0, 1), ()), ("getitem", (0,), ()))
    write = r.write(LAYER, r.made("set_view", hidden, way, 7.0), in_place=True)
    found = check(r)
    assert found.narrowed == {hidden.node: (1, 2), write.node: (1, 2)}
    assert parts_of(found) == {write.node: (Part(BOTH, (1, 2)),)}


def test_in_place_code_on_a_view_that_turns_the_columns_away_is_not_narrow() -> None:
    r = Numbers(PROMPTS)
    way: Operand = (("transpose", (0, 1), ()), ("getitem", (1,), ()))
    r.write(LAYER, r.made("set_view", r.read(LAYER), way, 7.0), in_place=True)
    found = check(r)
    assert not found.changed and not found.narrowed


def test_a_value_used_for_its_own_edit_is_not_narrow() -> None:
    r = Numbers([PROMPTS[0]])
    hidden = r.read(LAYER)
    r.write(LAYER, r.made("setitem", hidden, (ALL, slice(0, 5)), hidden))
    assert not check(r).narrowed


INDEX = st.one_of(
    st.tuples(st.sampled_from([0, 1, ALL, slice(0, 1), slice(1, 2)]), COLUMN.filter(lambda part: part != ALL)),
    st.tuples(st.just(Ellipsis), COLUMN, st.sampled_from([ALL, slice(0, 3), 2])),
    st.sampled_from([0, (ALL, ALL, 1), (None, ALL, 2), slice(1, None), (ALL, None, -1), (ALL, slice(3, 3)), Ellipsis]),
)


@st.composite
def recorded(draw: st.DrawFn) -> Numbers:
    """Reads, in-place code, indexings of all that, and writes back, stale or not."""
    r = Numbers([[1, 2, 3, 4, 5], [6, 7, 8]], PROMPTS)
    views: list[tuple[Ref, str, int]] = []  # whole views, and whose
    parts: list[Ref] = []
    for step in draw(st.lists(st.sampled_from(["read", "get", "edit", "edit", "view", "write", "sum"]), max_size=14)):
        if step == "read" or not views:
            site, invoke = draw(st.sampled_from([(LAYER, 0), (LAYER, 1), ("model.layers.2", 0)]))
            views.append((r.read(site, invoke=invoke), site, invoke))
            continue
        base, site, invoke = draw(st.sampled_from(views[-3:]))
        index = draw(INDEX)
        if step == "get":
            taken = draw(st.sampled_from([base, *parts[-2:]]))
            try:
                parts.append(r.made("getitem", taken, index))
            except IndexError:
                parts.append(r.made("getitem", taken, Ellipsis))
        elif step == "edit":
            part = draw(st.sampled_from([0.0, 5.0, None]))
            made = edited(r, base, index) if part is None else r.made("setitem", base, index, part)
            views.append((made, site, invoke))
        elif step == "view":
            column = draw(st.sampled_from([slice(1, 3), slice(2, None), 4]))
            way = (("getitem", ((ALL, column),), ()), ("transpose", (0, 1), ()))
            views.append((r.made("set_view", base, way, 3.0), site, invoke))
        elif step == "write":
            target = draw(st.sampled_from([site, site, site, "model.layers.2"]))
            r.write(target, base, invoke=invoke, in_place=draw(st.booleans()))
        else:
            parts.append(r.made("add", base, 1.0))
    for part in draw(st.lists(st.sampled_from(parts), max_size=3)) if parts else ():
        r.save(part)
    return r


@settings(max_examples=300)
@given(recorded())
def test_a_rewritten_graph_computes_what_the_graph_computes(recorder: Numbers) -> None:
    check(recorder)


@pytest.mark.parametrize("shape", ["one read each", "one chain", "one prompt each"])
def test_thousands_of_edits_are_found_in_linear_time(shape: str, capsys: pytest.CaptureFixture[str]) -> None:
    count = 4000
    r = Recorder(tiny_llama(num_layers=12, limits=Limits(max_sequence_tokens=count)), *prompts_for(shape, count))
    for number in range(count):
        invoke = number if shape == "one prompt each" else 0
        if number == 0 or shape != "one chain":
            hidden = r.read(LAYER, invoke=invoke)
        hidden = r.op("setitem", hidden, (ALL, -1 - (0 if invoke else number)), 0.0)
        r.write(LAYER, hidden, invoke=invoke, in_place=True)
    r.save(hidden)
    began = time.process_time()
    found = columns_of(r)
    with capsys.disabled():
        print(f"\n{shape}, {len(r.nodes)} nodes: {(time.process_time() - began) * 1e6 / len(r.nodes):.1f} us a node")
    assert len(found.changed) == count


def prompts_for(shape: str, count: int) -> list[list[list[int]]]:
    return [[[1, 2, 3]]] * count if shape == "one prompt each" else [[[1] * count]]
