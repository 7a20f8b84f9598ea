"""Bytes of values count while they are needed, by the order of the model's sites and not of the program's lines."""

from __future__ import annotations

from polytrace.graph import NodeId
from scheduling.checks import resolve, table_of
from scheduling.liveness import peak_bytes
from tests.scheduling.tiny import Recorder, tiny_llama

TINY = tiny_llama()


def peak(recorder: Recorder, *sizes: int) -> tuple[int, NodeId]:
    request = recorder.request
    nodes = len(request.graph.nodes)
    return peak_bytes(resolve(request, table_of(TINY)), [*sizes, *[0] * (nodes - len(sizes))])


def test_values_of_different_layers_are_not_there_at_once() -> None:
    r = Recorder(TINY, [[1, 2]])
    for layer in range(3):
        r.save(r.op("mul", r.read(f"model.layers.{layer}"), 2))
    assert peak(r, 10, 1, 0, 20, 2, 0, 10, 1) == (22, 3)


def test_a_value_waits_for_its_last_use_whatever_the_order_of_the_lines() -> None:
    r = Recorder(TINY, [[1, 2]])
    late = r.read("model.layers.3")
    early = r.read("model.layers.0")
    r.save(r.op("add", late, early))
    r.save(r.op("mul", r.read("model.layers.1"), 2))
    assert peak(r, 10, 10, 10) == (30, 0)
    assert peak(r, 10, 10, 0, 0, 25, 0) == (35, 4)  # the early one is still there at layer 1


def test_what_depends_on_no_site_is_there_from_the_beginning() -> None:
    r = Recorder(TINY, [[1, 2]])
    table = r.parameter("lm_head.weight")
    r.save(r.op("add", r.read("model.layers.3"), table))
    assert peak(r, 100, 10, 1) == (111, 1)


def test_a_graph_of_no_bytes_has_a_peak_of_none() -> None:
    r = Recorder(TINY, [[1, 2]])
    r.save(r.read("model.layers.0"))
    assert peak(r)[0] == 0
