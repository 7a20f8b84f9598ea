"""What does not fit the model is refused at submit, with the user's line and what there is instead."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from polytrace.description import Limits
from polytrace.errors import GraphError, TooLargeError, UserError
from polytrace.graph import Constant, NodeId, Port, Ref, Save
from tests.scheduling.tiny import HIDDEN, Recorder, tiny_llama

TINY = tiny_llama()
SMALL = tiny_llama(limits=Limits(max_sequence_tokens=4, max_request_tokens=6, max_nodes=5))


def refusal(recorder: Recorder) -> UserError:
    with pytest.raises(UserError) as caught:
        recorder.work_out()
    return caught.value


def recorder() -> Recorder:
    return Recorder(TINY, [[1, 2, 3]])


def test_a_layer_beyond_the_last_is_refused_with_the_range() -> None:
    r = recorder()
    r.save(r.read("model.layers.96"))
    error = refusal(r)
    assert str(error) == "graph reads layer 96; this model has layers 0-3 (a.py:0)"
    assert isinstance(error, GraphError) and error.where == "a.py:0"


def test_an_unknown_module_is_refused_with_the_nearest_names() -> None:
    r = recorder()
    r.save(r.read("model.layers.1.self_atn"))
    assert "the nearest are model.layers.1.self_attn" in refusal(r).message


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (lambda r: r.read("model.layers"), "graph reads model.layers.output, but no forward of this model visits it"),
        (lambda r: r.call("model.layers", shape=()), "model.layers is a list of modules: index it before calling it"),
        (lambda r: r.call("model", shape=()), "model cannot be called on a value: it needs every stage"),
        (lambda r: r.call("model.layers.9.mlp", shape=()), "graph calls layer 9; this model has layers 0-3"),
        (lambda r: r.read("lm_head", invoke=3), "graph names invoke 3; the request has 1"),
        (lambda r: r.mask(-1), "graph names invoke -1; the request has 1"),
        (
            lambda r: r.read("model.layers.1.mlp.up_proj"),
            "model.layers.1.mlp.up_proj.output cannot be read: rows are sorted by expert",
        ),
        (lambda r: r.op("exq", shape=()), "there is no operation exq; the nearest are eq, exp, exp2"),
        (lambda r: r.op("exp", Ref(NodeId(7)), shape=()), "node 0 uses node 7, which is no earlier value"),
        (lambda r: r._add(Constant(name="v", where="a.py:0"), (1,)), "the request brings no constant v"),
    ],
)
def test_what_the_model_lacks_is_refused_by_name(record: Callable[[Recorder], Ref], message: str) -> None:
    r = recorder()
    r.save(record(r))
    error = refusal(r)
    assert error.message == message
    assert error.where == "a.py:0"


def test_an_unknown_parameter_is_refused_with_the_nearest_names() -> None:
    r = recorder()
    weight = r.parameter("lm_head.weight")
    r.nodes[0] = type(r.nodes[0])(path="lm_heed.weight", where="a.py:0")  # type: ignore[call-arg]
    r.save(weight)
    assert refusal(r).message.startswith("this model has no parameter lm_heed.weight; the nearest are lm_head.weight")


def test_a_visit_that_does_not_happen_is_refused() -> None:
    r = recorder()
    r.save(r.read("model.layers.0"))
    site = r.nodes[0].site  # type: ignore[union-attr]
    object.__setattr__(site, "visit", 2)
    assert "visit 2 of model.layers.0.output; one forward visits it 1 times" in refusal(r).message


def test_a_selector_that_is_not_there_is_refused_with_those_that_are() -> None:
    r = recorder()
    r.save(r.read("model.layers.0"))
    object.__setattr__(r.nodes[0].site, "selector", (1,))  # type: ignore[union-attr]
    expected = "model.layers.0.output[1]; model.layers.0.output is a tensor with these tensors: model.layers.0.output"
    assert expected in refusal(r).message


@pytest.mark.parametrize("shape", [(1, 3, HIDDEN + 1), (1, 1, HIDDEN), (3, HIDDEN), (1, 3, HIDDEN, 1)])
def test_a_write_has_exactly_the_shape_of_its_site(shape: tuple[int, ...]) -> None:
    r = recorder()
    r.write("model.layers.0", r.constant(shape))
    r.save(r.read("model.layers.1"))
    assert refusal(r).message == f"model.layers.0.output has shape [1, 3, 8], the value written to it {list(shape)}"


def test_a_write_may_have_another_dtype() -> None:
    r = recorder()
    r.write("model.layers.0", r.op("to", r.read("model.layers.0"), dtype="float64"))
    r.save(r.read("model.layers.1", Port.OUTPUT))
    r.work_out()


def test_nothing_saved_is_refused() -> None:
    r = recorder()
    r.read("lm_head")
    assert "nothing is saved" in refusal(r).message


def test_two_saves_of_one_name_are_refused() -> None:
    r = recorder()
    hidden = r.read("model.layers.0")
    r.save(hidden, "h")
    r.save(hidden, "h")
    error = refusal(r)
    assert error.message == "two values are saved as 'h', the other at a.py:1" and error.where == "a.py:2"


def test_the_value_of_a_save_is_no_value() -> None:
    r = recorder()
    saved = r.save(r.read("model.layers.0"))
    r._add(Save(name="again", value=saved, where="a.py:2"), None)
    assert "no earlier value" in refusal(r).message


@pytest.mark.parametrize(
    ("prompts", "kind", "message"),
    [
        ([[1, 2], [1, 2, 3, 4, 5]], TooLargeError, "prompt 1 of invoke 0 has 5 tokens; the model's context takes 4"),
        ([[1, 2], []], GraphError, "prompt 1 of invoke 0 has no tokens"),
        ([], GraphError, "invoke 0 has no prompt"),
        ([[1, 32]], GraphError, "prompt 0 of invoke 0 has the token id 32; ids are 0-31"),
        ([[-1, 3]], GraphError, "prompt 0 of invoke 0 has the token id -1; ids are 0-31"),
        ([[1, 2, 3, 4], [5, 6, 7]], TooLargeError, "all prompts have 7 tokens together; the limit is 6"),
    ],
)
def test_prompts_that_do_not_fit_are_refused(prompts: list[list[int]], kind: type[UserError], message: str) -> None:
    r = Recorder(SMALL, prompts)
    r.nodes = [Save(name="x", value=Ref(NodeId(0)), where="a.py:0")]
    error = refusal(r)
    assert isinstance(error, kind) and error.message == message


def test_a_graph_of_too_many_nodes_is_refused() -> None:
    r = Recorder(SMALL, [[1, 2]])
    for _ in range(6):
        r.read("model.layers.0")
    error = refusal(r)
    assert isinstance(error, TooLargeError) and error.message == "the graph has 6 nodes; the limit is 5"
