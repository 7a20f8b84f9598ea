from __future__ import annotations

import gc
from collections.abc import Iterator
from unittest.mock import Mock

import pytest

from polytrace.collector import _YoungOnly, settle, young_only
from polytrace.model import Model


class Node:
    """Something that refers to itself."""

    def __init__(self) -> None:
        self.itself = self


@pytest.fixture(autouse=True)
def nothing_is_frozen() -> Iterator[None]:
    gc.unfreeze()  # what a process of the service would keep so, where a test was one
    yield
    gc.unfreeze()


def count_nodes() -> int:
    return sum(type(found) is Node for found in gc.get_objects())


def test_what_was_there_before_is_left_alone_and_new_garbage_is_collected() -> None:
    young_only = _YoungOnly()
    gc.collect()  # so that none comes by itself in between
    Node()
    with young_only:
        Node()
        assert count_nodes() == 1  # the frozen one is out of sight
        gc.collect()
        assert count_nodes() == 0
    assert gc.get_freeze_count() == 0
    assert count_nodes() == 1
    gc.collect()
    assert count_nodes() == 0


def test_contexts_overlap_and_the_last_one_ends_it() -> None:
    young_only = _YoungOnly()
    young_only.__enter__()
    young_only.__enter__()
    young_only.__exit__(None, None, None)
    assert gc.get_freeze_count() > 0
    young_only.__exit__(None, None, None)
    assert gc.get_freeze_count() == 0


def test_a_heap_that_others_froze_stays_frozen() -> None:
    young_only = _YoungOnly()
    gc.freeze()
    with young_only:
        pass
    assert gc.get_freeze_count() > 0


def test_a_frozen_heap_is_counted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    young_only, count = _YoungOnly(), Mock(return_value=1_000_000)
    monkeypatch.setattr(gc, "get_freeze_count", count)
    for _ in range(3):
        with young_only:
            pass
    assert count.call_count == 1  # it is a walk over all that is frozen


def test_a_settled_heap_is_left_alone_and_graphs_still_wait_for_the_collector() -> None:
    young_only, usual = _YoungOnly(), gc.get_threshold()
    node = Node()
    settle()
    assert count_nodes() == 0  # out of sight
    with young_only:
        assert gc.get_threshold()[0] > usual[0]
    assert gc.get_threshold() == usual
    assert count_nodes() == 0
    gc.unfreeze()
    assert node.itself is node and count_nodes() == 1


def test_a_trace_gives_the_heap_back_however_it_ends(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(young_only, "_is_ours", True)  # whatever an earlier test of this process froze
    with pytest.raises(ZeroDivisionError), model.trace([1, 2]):
        assert gc.get_freeze_count() > 0
        1 / 0  # noqa: B018
    assert gc.get_freeze_count() == 0
    with model.trace([1, 2]):
        model.lm_head.output.save()
    assert gc.get_freeze_count() == 0
