"""A loop of many invokes in one trace does for each invoke what is new in it, and no more."""

from __future__ import annotations

from typing import Any

import pytest

from polytrace.graph import Constant, Op, Read, Ref, Write
from polytrace.model import Model
from polytrace.prompts import PromptBook
from tests.polytrace.conftest import LAYERS, describe_llama

np = pytest.importorskip("numpy")
torch = pytest.importorskip("torch")


class CountingTokenizer:
    def __init__(self) -> None:
        self.texts: list[str] = []

    def encode(self, text: str) -> Any:
        self.texts.append(text)
        return type("Encoding", (), {"ids": [len(word) for word in text.split()]})


def test_equal_prompts_are_worked_out_once_and_are_one_object() -> None:
    tokenizer = CountingTokenizer()
    book = PromptBook(describe_llama(), lambda: tokenizer)
    first = book.invoke("the Eiffel Tower")
    for again in ("the Eiffel Tower", [3, 6, 5], (3, 6, 5), [[3, 6, 5]], np.array([3, 6, 5])):
        assert book.invoke(again) is first
    assert tokenizer.texts == ["the Eiffel Tower"]
    assert book.invoke(["the Eiffel Tower", "the Eiffel Tower"]) is not first
    assert book.invoke([3, 6, 6]) is not first


@pytest.mark.parametrize("prompts", [[1.0, 2.0], [True, True], [[1], [1.0]]])
def test_what_equals_ids_is_not_taken_for_them(prompts: Any) -> None:
    book = PromptBook(describe_llama(), lambda: None)
    for known in ([1, 2], [1, 1], [[1], [1]]):
        book.invoke(known)
    if prompts == [True, True]:
        assert book.invoke(prompts).sequences == ((1, 1),)  # as torch takes it
    else:
        with pytest.raises(Exception, match="a token id is an integer"):
            book.invoke(prompts)


def test_a_sweep_keeps_every_write_and_save(model: Model) -> None:
    with model.trace(run=False) as tracer:
        with tracer.invoke([1, 2, 3]):
            clean = [layer.output[0] for layer in model.model.layers]
            unused = clean[0] * 2
        for number in range(3 * LAYERS):
            with tracer.invoke([4, 5, 6]):
                layer, position = divmod(number, 3)
                model.model.layers[layer].output[0][:, position] = clean[layer][:, position]
                model.lm_head.output[:, -1].save()
    assert unused is not None and tracer.request is not None
    nodes = tracer.request.graph.nodes
    assert len(nodes) == LAYERS + 7 * 3 * LAYERS  # and nothing of what nobody uses
    for node, write in enumerate(nodes):
        if isinstance(write, Write):
            setitem = nodes[write.value.node]
            assert isinstance(setitem, Op) and isinstance(setitem.args[0], Ref) and isinstance(setitem.args[2], Ref)
            own, taken = nodes[setitem.args[0].node], nodes[setitem.args[2].node]
            assert write.value.node == node - 1
            assert isinstance(own, Read) and (own.site, own.invoke) == (write.site, write.invoke)
            assert isinstance(taken, Op) and taken.args[1] == setitem.args[1] and isinstance(taken.args[0], Ref)
            source = nodes[taken.args[0].node]
            assert isinstance(source, Read) and (source.site, source.invoke) == (write.site, 0)


@pytest.mark.parametrize("make", [lambda: torch.ones(600_000), lambda: np.ones(600_000, np.float32)])
def test_a_vector_of_every_invoke_is_sent_once(model: Model, make: Any) -> None:
    vector = make()
    with model.trace(run=False) as tracer:
        for _ in range(4):
            with tracer.invoke([1, 2]):
                (model.lm_head.output.sum() + vector).save()
        vector[0] = 2.0
        with tracer.invoke([1, 2]):
            (model.lm_head.output.sum() + vector).save()
    assert tracer.request is not None
    assert len(tracer.request.constants) == 2
    assert sum(isinstance(node, Constant) for node in tracer.request.graph.nodes) == 2


def test_a_tensor_is_looked_at_once_until_it_changes(model: Model) -> None:
    class Watched(torch.Tensor):  # type: ignore[misc,name-defined]
        looks = 0

        def detach(self) -> Any:
            Watched.looks += 1
            return super().detach().as_subclass(torch.Tensor)

    vector = torch.ones(3).as_subclass(Watched)
    with model.trace(run=False) as tracer:
        for _ in range(50):
            with tracer.invoke([1, 2]):
                tracer.recording.operand(vector, "a.py:1")
        assert Watched.looks == 1
        vector.add_(1)
        tracer.recording.operand(vector, "a.py:1")
        assert Watched.looks == 2
        with tracer.invoke([1]):
            model.lm_head.output.save()


def test_shapes_of_called_modules_are_asked_once_for_prompts_of_one_length(model: Model, backend: Any) -> None:
    with model.trace(run=False) as tracer:
        for number in range(20):
            with tracer.invoke([1, 2, number]):
                vector = torch.full((8,), float(number))
                normed = model.model.norm(model.model.layers[1].output[0] + vector)
                assert normed.shape == (1, 3, 32)  # what the fake service says of everything
                normed.save()
        assert len(backend.validated) == 1
        (asked,) = backend.validated
        assert len(asked.invokes) == 1 and len(asked.constants) == 1
        with tracer.invoke([1, 2]):
            model.model.norm(model.model.layers[1].output[0] + vector).shape  # noqa: B018
    assert len(backend.validated) == 2


def test_a_part_from_another_invoke_does_not_change_whose_rows_a_value_has(model: Model) -> None:
    with model.trace(run=False) as tracer:
        with tracer.invoke([1, 2, 3]):
            other = model.model.layers[0].output[0]
        with tracer.invoke([[4, 5, 6], [7, 8]]):
            mixed = model.model.layers[0].output[0] * 2
            mixed[:1] = other[:1]
            picked = mixed.at(0).save()
            assert (model.model.layers[1].output[0] * tracer.mask[..., None]).at(1).shape == (2, 8)
    assert tracer.request is not None and picked is not None
    getitem = tracer.request.graph.nodes[-2]
    assert isinstance(getitem, Op) and getitem.args[1] == ([0, 1], [0, 1])
