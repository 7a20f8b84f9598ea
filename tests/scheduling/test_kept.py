"""The head runs on the columns that somebody reads, and indexings still mean what they meant."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from polytrace.graph import Op, Operand, Ref
from scheduling.plan import Program
from tests.scheduling.tiny import HIDDEN, VOCAB, Recorder, tiny_llama

TINY = tiny_llama()
PROMPTS = [[1, 2, 3, 4, 5], [6, 7, 8, 9, 10]]
VIEW = np.arange(2 * 5 * VOCAB).reshape(2, 5, VOCAB)


def full(index: Any) -> Any:
    return VIEW[index]


def kept_for(*indices: Any) -> tuple[Program, tuple[int, ...]]:
    """The program that reads the logits once an index, and the columns it keeps."""
    r = Recorder(TINY, PROMPTS)
    for index in indices:
        parts = index if isinstance(index, tuple) else (index,)
        r.save(r.index(r.read("lm_head"), *parts, shape=full(index).shape))
    program = r.compile()
    return program, program.waves[0].kept[0]


def indexed(program: Program, columns: Sequence[int]) -> list[Any]:
    """What the program's indexings give on the compact view."""
    ops = [node for node in program.graph.nodes if isinstance(node, Op)]
    return [VIEW[:, list(columns)][op.args[1]] for op in ops]  # type: ignore[index]


@pytest.mark.parametrize(
    ("index", "columns"),
    [
        ((slice(None), -1), (4,)),
        ((slice(None), slice(1, 3)), (1, 2)),
        ((0, -2), (3,)),
        ((0, [0, -1], 7), (0, 4)),
        ((Ellipsis, 2, slice(None)), (2,)),
        ((Ellipsis, slice(None)), (0, 1, 2, 3, 4)),
        ((slice(None), slice(None, None, 2)), (0, 1, 2, 3, 4)),
        ((slice(None), slice(1, 4, 2)), (1, 2, 3)),
        ((None, slice(None), -1), (4,)),
        ((slice(None), slice(3, 3)), (4,)),
        (1, (0, 1, 2, 3, 4)),
        ((slice(None), slice(None), 3), (0, 1, 2, 3, 4)),
        ([0, 1], (0, 1, 2, 3, 4)),
    ],
)
def test_an_indexing_keeps_the_columns_it_names(index: Any, columns: tuple[int, ...]) -> None:
    program, kept = kept_for(index)
    assert kept == columns
    np.testing.assert_array_equal(indexed(program, kept)[0], full(index))


@given(
    st.lists(
        st.tuples(
            st.sampled_from([0, -1, slice(None), slice(0, 1)]),
            st.one_of(
                st.integers(-5, 4),
                st.lists(st.integers(-5, 4), min_size=1, max_size=3),
                st.slices(5).filter(lambda cut: cut.step is None or cut.step > 0),
            ),
        ),
        min_size=1,
        max_size=4,
    )
)
def test_every_indexing_means_on_kept_columns_what_it_meant_on_all(indices: list[Any]) -> None:
    program, kept = kept_for(*indices)
    for got, index in zip(indexed(program, kept), indices, strict=True):
        np.testing.assert_array_equal(got, full(index))


def test_a_chain_of_indexings_keeps_what_its_end_names() -> None:
    r = Recorder(TINY, PROMPTS)
    logits = r.read("lm_head")
    first = r.index(logits, 0, shape=(5, VOCAB))
    last = r.index(first, -1, shape=(VOCAB,))
    r.save(last)
    program = r.compile()
    assert program.waves[0].kept == ((4,),)
    assert program.facts[logits.node].shape == (2, 1, VOCAB)  # type: ignore[union-attr]
    assert program.facts[first.node].shape == (1, VOCAB)  # type: ignore[union-attr]
    certified = [shape and shape.shape for shape in r.certify().nodes]
    assert certified == [(2, 5, VOCAB), (5, VOCAB), (VOCAB,), None]


def test_a_column_that_is_known_only_in_the_run_keeps_every_column() -> None:
    r = Recorder(TINY, PROMPTS)
    position = r.op("argmax", r.read("model.embed_tokens"), shape=(), dtype="int64")
    r.save(r.index(r.read("lm_head"), slice(None), position, shape=(2, VOCAB)))
    assert r.compile().waves[0].kept == ((0, 1, 2, 3, 4),)


def test_a_static_column_beside_a_token_known_in_the_run_is_kept_alone() -> None:
    r = Recorder(TINY, PROMPTS)
    token = r.op("argmax", r.read("model.embed_tokens"), shape=(2,), dtype="int64")
    r.save(r.index(r.read("lm_head"), slice(None), -1, token, shape=(2, 2)))
    assert r.compile().waves[0].kept == ((4,),)


@pytest.mark.parametrize("use", ["op", "save", "write"])
def test_any_other_use_keeps_every_column(use: str) -> None:
    r = Recorder(TINY, PROMPTS)
    logits = r.read("lm_head")
    r.save(r.index(logits, slice(None), -1, shape=(2, VOCAB)))
    if use == "op":
        r.save(r.op("softmax", logits, -1))
    elif use == "save":
        r.save(logits)
    else:
        r.write("lm_head", r.constant((2, 5, VOCAB)))
    program = r.compile()
    assert program.waves[0].kept == ((0, 1, 2, 3, 4),)
    assert program.graph == r.request.graph


def test_a_use_that_nobody_needs_keeps_nothing_more() -> None:
    r = Recorder(TINY, PROMPTS)
    logits = r.read("lm_head")
    r.op("softmax", logits, -1)
    r.save(r.index(logits, slice(None), -1, shape=(2, VOCAB)))
    assert r.compile().waves[0].kept == ((4,),)


def test_nothing_is_kept_for_a_prompt_whose_head_nobody_reads() -> None:
    r = Recorder(TINY, PROMPTS, PROMPTS)
    r.save(r.read("model.layers.3", invoke=0))
    r.save(r.index(r.read("lm_head", invoke=1), slice(None), -1, shape=(2, VOCAB)))
    assert r.compile().waves[0].kept == ((), (4,))


def test_each_wave_keeps_its_own_columns() -> None:
    r = Recorder(TINY, PROMPTS)
    logits = r.read("lm_head", invoke=0)
    row = r.index(logits, slice(None), 1, shape=(2, VOCAB))
    hidden = r.op("matmul", row, shape=(2, 5, HIDDEN))
    r2 = r.read("model.layers.0", invoke=0)
    r.save(r2)
    r.invokes = (*r.invokes, r.invokes[0])
    r.write("model.layers.0", hidden, invoke=1)
    r.save(r.index(r.read("lm_head", invoke=1), slice(None), -1, shape=(2, VOCAB)))
    assert [wave.kept for wave in r.compile().waves] == [((1,),), ((4,),)]


def test_a_model_whose_head_takes_no_choice_keeps_every_row_always() -> None:
    r = Recorder(tiny_llama(has_kept_rows=False), PROMPTS)
    r.save(r.read("model.layers.0"))
    assert r.compile().waves[0].kept == ((0, 1, 2, 3, 4),)


def test_an_index_on_itself_keeps_every_column() -> None:
    r = Recorder(TINY, PROMPTS)
    tokens = r.read("lm_head")
    index: tuple[Operand, ...] = (slice(None), -1, Ref(tokens.node))
    r.save(r.index(tokens, *index, shape=(2, 2, 5, VOCAB)))
    assert r.compile().waves[0].kept == ((0, 1, 2, 3, 4),)
