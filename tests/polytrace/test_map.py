"""A body over a dataset gives what a plain loop over Hugging Face gives, however the prompts are cut into requests."""

from __future__ import annotations

import gc
import random
import threading
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small import small_llama
from torch import Tensor

import polytrace
from engine.local import LocalBackend
from polytrace.backend import Backend, Result
from polytrace.errors import CapacityError, GraphError, RunError, TooLargeError
from polytrace.graph import Options, Request
from polytrace.maps.assembly import Member, request_of
from polytrace.maps.bodies import Bodies
from polytrace.model import Model
from polytrace.progress import Hear, Tell, hear_nothing, tell_nobody
from scheduling.policy import PassPolicy

FLOAT32_TOLERANCE = 1e-5  # of max(1, max|plain|)
COMBINED_TOLERANCE = 1e-12  # of max(1, max|plain|): float64, against another order of adding
CONTEXT = 48
PROMPTS = [
    [random.Random(number).randrange(64) for _ in range(random.Random(number).randrange(2, 14))] for number in range(40)
]


class Watched:
    """A backend that counts what runs, and how much of it at once."""

    def __init__(self, inner: Backend) -> None:
        self.inner = inner
        self.requests: list[Request] = []
        self.most_at_once = 0
        self._now = 0
        self._lock = threading.Lock()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def run(self, request: Request, tell: Tell = tell_nobody, hear: Hear = hear_nothing) -> Result:
        with self._lock:
            self._now += 1
            self.most_at_once = max(self.most_at_once, self._now)
            self.requests.append(request)
        try:
            return self.inner.run(request, tell)
        finally:
            with self._lock:
                self._now -= 1


@pytest.fixture(scope="module")
def plain() -> Any:
    return small_llama(num_hidden_layers=3, max_position_embeddings=CONTEXT)


@pytest.fixture(scope="module")
def folder(plain: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("llama")
    plain.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def backend(folder: Path) -> Iterator[LocalBackend]:
    """Passes of 64 rows: 40 prompts make several requests."""
    backend = LocalBackend(str(folder), threads=1, policy=PassPolicy(budget_tokens=64, least_tokens=16))
    yield backend
    backend.close()


@pytest.fixture
def model(backend: LocalBackend) -> Model:
    return Model(Watched(backend))


def requests_of(model: Model) -> list[Request]:
    assert isinstance(model.backend, Watched)
    return model.backend.requests


@pytest.fixture(scope="module")
def hidden(plain: Any) -> list[Tensor]:
    """The second layer's output of each prompt, `[tokens, features]`, by a hook and a loop."""
    seen: list[Tensor] = []
    layer = plain.get_submodule("model.layers.1")
    handle = layer.register_forward_hook(lambda module, args, output: seen.append(output[0].clone()))
    with torch.no_grad():
        for prompt in PROMPTS:
            plain(input_ids=torch.tensor([prompt]), use_cache=False)
    handle.remove()
    return seen


def close(ours: Any, theirs: Any, tolerance: float = FLOAT32_TOLERANCE) -> None:
    ours, theirs = torch.as_tensor(ours), torch.as_tensor(theirs)
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() <= tolerance * max(1.0, float(theirs.abs().max()))


def rows_of(model: Model, name: str, mapping: Any) -> list[Tensor]:
    return [row for part in mapping for row in part.rows(name)]


def test_rows_are_those_of_a_plain_loop_and_of_each_prompt_alone(model: Model, hidden: list[Tensor]) -> None:
    def body() -> Any:
        layer = model.model.layers[1].output[0]
        return {"last": layer[:, -1], "all": layer, "pattern": model.model.layers[0].self_attn.pattern}

    mapping = model.map(PROMPTS, body)
    last, every, patterns, numbers = [], [], [], []
    for part in mapping:
        assert part["last"].shape == (len(part.prompts), 32)
        last += part.rows("last")
        every += part.rows("all")
        patterns += part.rows("pattern")
        numbers += part.numbers
    assert len(requests_of(model)) > 3, "the dataset was cut"
    assert numbers == list(range(40))
    for number, prompt in enumerate(PROMPTS):
        close(every[number], hidden[number])
        close(last[number], hidden[number][-1])
        assert patterns[number].shape == (4, len(prompt), len(prompt))
    for number in (0, 17, 39):
        with model.trace(PROMPTS[number]):
            alone = model.model.layers[1].output[0].save()
            pattern = model.model.layers[0].self_attn.pattern.save()
        assert torch.equal(every[number], alone[0])
        assert torch.equal(last[number], alone[0, -1])
        assert torch.equal(patterns[number], pattern[0])


def combined_body(model: Model) -> Any:
    layer = model.model.layers[1].output[0]
    last = layer[:, -1]
    score = layer.norm(dim=-1)
    return {
        "sum": polytrace.sum(last),
        "mean": polytrace.mean(last),
        "max": polytrace.max(last),
        "min": polytrace.min(last),
        "positive": polytrace.count(last > 0),
        "covariance": polytrace.covariance(last[:, :6]),
        "token mean": polytrace.mean(layer, over="tokens"),
        "token covariance": polytrace.covariance(layer[..., :3], over="tokens", correction=0),
        "best": polytrace.top_k(score, 7),
        "first token": polytrace.top_k(layer[:, 0, 0], 3),
        "large": polytrace.sum((score > 9).sum(-1)),
    }


def test_combined_values_are_numpys_in_float64(model: Model) -> None:
    rows = rows_of(model, "all", model.map(PROMPTS, lambda: {"all": model.model.layers[1].output[0]}))
    exact = [row.double().numpy() for row in rows]
    last = np.stack([row[-1] for row in exact])
    tokens = np.concatenate(exact)
    mapping = model.map(PROMPTS, lambda: combined_body(model))
    results = mapping.run()
    close(results["sum"], last.sum(0), COMBINED_TOLERANCE)
    close(results["mean"], last.mean(0), COMBINED_TOLERANCE)
    assert results["sum"].dtype == results["mean"].dtype == results["covariance"].dtype == torch.float64
    assert np.array_equal(results["max"].numpy(), last.max(0)) and results["max"].dtype == torch.float32
    assert np.array_equal(results["min"].numpy(), last.min(0))
    assert np.array_equal(results["positive"].numpy(), (last > 0).sum(0))
    close(results["covariance"], np.cov(last[:, :6].T), COMBINED_TOLERANCE)
    close(results["token mean"], tokens.mean(0), COMBINED_TOLERANCE)
    close(results["token covariance"], np.cov(tokens[:, :3].T, ddof=0), COMBINED_TOLERANCE)
    scores = [row.norm(dim=-1) for row in rows]
    order = sorted(
        ((-float(score), number, place) for number, own in enumerate(scores) for place, score in enumerate(own))
    )[:7]
    best = results["best"]
    assert [(-float(v), int(p), int(q)) for v, p, (q,) in zip(*best, strict=True)] == order
    assert results["first token"].positions.shape == (3, 0)
    assert results["large"].dtype == torch.int64 and int(results["large"]) == sum(int((s > 9).sum()) for s in scores)


def test_results_do_not_depend_on_the_cut(model: Model, folder: Path) -> None:
    small = model.map(PROMPTS, lambda: combined_body(model)).run()
    with polytrace.load(str(folder), threads=1) as whole:
        large = whole.map(PROMPTS, lambda: combined_body(whole)).run()
    for name in ("sum", "mean", "covariance", "token mean", "token covariance"):
        close(small[name], large[name], COMBINED_TOLERANCE)
    for name in ("max", "min", "positive", "large"):
        assert torch.equal(small[name], large[name])
    for name in ("best", "first token"):
        assert all(torch.equal(one, two) for one, two in zip(small[name], large[name], strict=True))


def test_equal_scores_are_told_by_their_place(model: Model) -> None:
    mapping = model.map([[1, 2, 3]] * 30, lambda: {"best": polytrace.top_k(model.lm_head.output[:, :, 0] * 0, 5)})
    best = mapping.run()["best"]
    assert best.prompts.tolist() == [0, 0, 0, 1, 1] and best.positions[:, 0].tolist() == [0, 1, 2, 0, 1]


def test_an_edit_of_the_body_is_made_for_every_prompt(model: Model, plain: Any) -> None:
    vector = torch.linspace(-2, 2, 32)

    def body() -> Any:
        model.model.layers[0].output[0][:, -1] += vector
        return {"logits": model.lm_head.output[:, -1]}

    def add(module: Any, args: Any, output: Any) -> Any:
        output = output.clone()
        output[:, -1] += vector
        return output

    ours = rows_of(model, "logits", model.map(PROMPTS, body))
    handle = plain.get_submodule("model.layers.0").register_forward_hook(add)
    with torch.no_grad():
        theirs = [plain(input_ids=torch.tensor([prompt])).logits[0, -1] for prompt in PROMPTS]
        handle.remove()
        unchanged = plain(input_ids=torch.tensor([PROMPTS[5]])).logits[0, -1]
    for one, two in zip(ours, theirs, strict=True):
        close(one, two)
    assert (ours[5] - unchanged).abs().max() > 0.1


def test_a_map_of_an_edited_model_starts_from_its_edits(model: Model, hidden: list[Tensor]) -> None:
    second = model.model.layers[1]

    def body() -> Any:
        return {"hidden": second.output[0], "mean": polytrace.mean(second.output[0][:, -1])}

    with model.edit() as edited:
        second.output[0].at(1)[:] = 0.0  # its column follows from the length
    with model.edit() as doubled:
        second.output[0][:] *= 2.0
    for mapping in (edited.map(PROMPTS, body, edits=[doubled]), model.map(PROMPTS, body, edits=[edited, doubled])):
        rows = rows_of(model, "hidden", mapping)
        wanted = [2.0 * plain for plain in hidden]
        for own, plain in zip(rows, wanted, strict=True):
            plain[1] = 0.0
            close(own, plain)
        last = torch.stack([plain[-1] for plain in wanted]).double()
        close(mapping.results["mean"].double(), last.mean(0))
    for prompt, own in zip(PROMPTS[:3], rows, strict=False):
        with edited.trace(prompt, edits=[doubled]):
            alone = second.output[0].save()
        assert torch.equal(own, alone[0])


def test_the_body_is_called_once_or_once_a_length_where_it_asks_for_it(model: Model) -> None:
    calls = []

    def plain_body() -> Any:
        calls.append("plain")
        return {"x": model.model.layers[1].output[0][:, -1] * 2}

    def asking() -> Any:
        calls.append("asking")
        layer = model.model.layers[1].output[0]
        return {"x": layer.view(layer.shape[0], layer.shape[1], 4, 8)[:, layer.shape[1] // 2]}

    model.map(PROMPTS, plain_body).run()
    assert calls == ["plain"]
    rows = rows_of(model, "x", model.map(PROMPTS, asking))
    lengths = {len(prompt) for prompt in PROMPTS}
    assert calls.count("asking") <= len(lengths) + 1  # and one that tells what grows with tokens
    with model.trace(PROMPTS[9]):
        alone = model.model.layers[1].output[0][0:1, len(PROMPTS[9]) // 2].save()
    assert torch.equal(rows[9].reshape(1, 32), alone)


def test_positions_are_counted_in_each_prompt(model: Model, hidden: list[Tensor]) -> None:
    for row, theirs in zip(
        rows_of(model, "x", model.map(PROMPTS, lambda: {"x": model.model.layers[1].output[0].at(-2)})),
        hidden,
        strict=True,
    ):
        close(row, theirs[-2])


def test_a_body_that_mixes_prompts_runs_with_all_of_them_at_once(model: Model) -> None:
    few = PROMPTS[:4]

    def body() -> Any:
        last = model.lm_head.output[:, -1]
        centred = last - last.mean(0)
        return {"centred": centred, "spread": polytrace.max(centred.abs())}

    mapping = model.map(few, body)
    (part,) = mapping
    assert len(requests_of(model)) == 1
    with model.trace(few):
        last = model.lm_head.output[:, -1]
        together = (last - last.mean(0)).save()
    assert torch.equal(part["centred"], together)
    assert torch.equal(mapping.results["spread"], together.abs().amax(0))
    with pytest.raises(ValueError, match="no rows"):
        part.rows("centred")


def test_a_body_that_mixes_more_prompts_than_a_pass_takes_is_refused_with_the_numbers(model: Model) -> None:
    with pytest.raises(GraphError) as caught:
        model.map(PROMPTS, lambda: {"x": model.lm_head.output[:, -1].softmax(0)}).run()
    tokens, number = 0, 0
    while tokens <= 64:
        tokens += len(PROMPTS[number])
        number += 1
    assert f"takes 64 tokens; the first {number} of 40 have {tokens}" in caught.value.message
    assert caught.value.message.startswith("softmax works on several prompts")
    assert str(caught.value.where).startswith("test_map.py:")
    assert not requests_of(model)


def test_prompts_are_taken_as_parts_are_read(model: Model) -> None:
    taken = []

    def endless() -> Iterator[list[int]]:
        number = 0
        while True:
            taken.append(number)
            yield [number % 64] * 8
            number += 1

    in_flight, per_part = 3, 8  # 64 rows a pass
    parts = iter(model.map(endless(), lambda: {"x": model.lm_head.output[:, -1, :2]}, in_flight=in_flight))
    for number in range(4):
        part = next(parts)
        assert part.prompts == range(number * per_part, (number + 1) * per_part)
        assert len(taken) <= (number + 1 + in_flight) * per_part + 1
    assert isinstance(model.backend, Watched) and model.backend.most_at_once <= in_flight
    assert len(model.backend.requests) <= 4 + in_flight
    parts.close()  # type: ignore[attr-defined]


def test_memory_does_not_grow_with_the_dataset(backend: LocalBackend) -> None:
    model = Model(backend)

    def body() -> Any:
        return {"x": model.model.layers[1].output[0][:, -1], "mean": polytrace.mean(model.lm_head.output[:, -1])}

    parts = iter(model.map(([number % 64, 3, 5, 7] for number in range(1200)), body, in_flight=2))
    for _ in range(20):
        next(parts)
    tracemalloc.start()
    try:
        for _ in range(10):
            next(parts)
        gc.collect()
        early = tracemalloc.get_traced_memory()[0]
        assert sum(len(part.prompts) for part in parts) > 600
        gc.collect()
        late = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert late - early < 300_000  # 700 prompts later


def test_a_prompt_that_cannot_be_run_is_named_or_left_out(model: Model) -> None:
    prompts = [[1, 2], [3] * (CONTEXT + 1), [4, 5], [], [6, 999], [7, 8]]
    body = lambda: {"x": model.model.layers[0].output[0][:, -1]}  # noqa: E731
    with pytest.raises(TooLargeError, match="prompt 1 has 49 tokens; this model takes 48"):
        model.map(prompts, body).run()
    mapping = model.map(prompts, body, on_error="skip")
    (part,) = mapping
    assert part.prompts == range(6) and part.numbers == (0, 2, 5) and part["x"].shape == (3, 32)
    assert mapping.skipped.keys() == part.skipped.keys() == {1, 3, 4}
    assert mapping.skipped[4].startswith("prompt 4 has token 999")
    with model.trace([7, 8]):
        alone = model.model.layers[0].output[0][:, -1].save()
    assert torch.equal(part["x"][2:], alone)


def test_a_prompt_that_fails_while_it_runs_is_found_among_its_neighbours(model: Model) -> None:
    prompts = [[number, number] for number in range(1, 9)]
    table = torch.arange(40.0)

    def body() -> Any:  # the token itself as an index: 5 and 7 are beyond the table
        token = model.model.embed_tokens.input[:, -1]
        return {"x": table[token * 6 - (token == 8) * 40], "sum": polytrace.sum(token)}

    with pytest.raises((RunError, GraphError), match="prompt 6: "):
        model.map(prompts, body).run()
    mapping = model.map(prompts, body, on_error="skip")
    rows = rows_of(model, "x", mapping)
    assert list(mapping.skipped) == [6]
    assert [float(row) for row in rows] == [6, 12, 18, 24, 30, 36, 8]
    assert int(mapping.results["sum"]) == 1 + 2 + 3 + 4 + 5 + 6 + 8


def test_only_values_of_one_shape_are_combined(model: Model) -> None:
    body = lambda: {"mean": polytrace.mean(model.model.layers[0].output[0][:, :5, 0])}  # noqa: E731
    long, short = [[number] * 8 for number in range(16)], [[number] for number in range(60)]
    with pytest.raises(GraphError, match=r"'mean': prompts have values of shapes \[5\] and \[1\]"):
        model.map([*long, *short], body).run()


def test_a_size_written_as_a_number_is_refused_with_the_prompt_that_it_does_not_fit(model: Model) -> None:
    body = lambda: {"x": model.model.layers[0].output[0].view(1, 8, 4, 8)}  # noqa: E731
    prompts = [[1] * 8, [2] * 8, [3] * 7, [4] * 8]
    with pytest.raises(GraphError, match="prompt 2: view: ") as caught:
        model.map(prompts, body).run()
    assert str(caught.value.where).startswith("test_map.py:")
    assert len(rows_of(model, "x", model.map(prompts[:2], body))) == 2
    mapping = model.map(prompts, body, on_error="skip")
    assert len(rows_of(model, "x", mapping)) == 3 and list(mapping.skipped) == [2]


def test_what_was_sent_before_a_failure_comes_before_it(model: Model) -> None:
    prompts: list[Any] = [[number] * 8 for number in range(30)]
    prompts[20] = ["no prompt"]
    read = []
    with pytest.raises(GraphError, match="prompt 20"):
        for part in model.map(prompts, lambda: {"x": model.lm_head.output[:, -1, 0]}, in_flight=8):
            read.append(part.prompts)
    assert read == [range(8), range(8, 16)]


def test_a_service_that_is_full_is_asked_again(backend: LocalBackend) -> None:
    class Full(Watched):
        def run(self, request: Request, tell: Tell = tell_nobody, hear: Hear = hear_nothing) -> Result:
            if not self.requests:
                self.requests.append(request)
                raise CapacityError("come again")
            return super().run(request, tell)

    model = Model(Full(backend))
    assert len(list(model.map([[1, 2]], lambda: {"x": model.lm_head.output[:, -1]}))) == 1


def test_random_draws_do_not_depend_on_the_cut(model: Model) -> None:
    def body() -> Any:
        layer = model.model.layers[1].output[0][:, -1]
        return {"x": layer + torch.randn_like(layer)}

    first = rows_of(model, "x", model.map(PROMPTS[:6], body, seed=7))
    again = rows_of(model, "x", model.map(PROMPTS[:4], body, seed=7))
    assert all(torch.equal(one, two) for one, two in zip(first, again, strict=False))
    assert not torch.equal(
        *rows_of(model, "x", model.map([[1, 2], [1, 2]], body)),
    )


def test_a_sweep_gives_its_items_in_parts(model: Model, plain: Any) -> None:
    vectors = torch.randn(3, 32, generator=torch.Generator().manual_seed(3)) * 3
    prompt = PROMPTS[3]
    cells = [(layer, token) for layer in range(3) for token in range(len(prompt))] * 4

    def body(cell: tuple[int, int]) -> Any:
        layer, token = cell
        model.model.layers[layer].output[0][:, token] = vectors[layer][None]
        return {"logits": model.lm_head.output[:, -1], "best": polytrace.top_k(model.lm_head.output[:, -1, 5], 2)}

    mapping = model.map(cells, body, prompts=prompt)
    rows = rows_of(model, "logits", mapping)
    assert len(requests_of(model)) > 1
    for number in (0, 1, len(prompt) + 2, len(cells) - 1):
        layer, token = cells[number]

        def put(module: Any, args: Any, output: Any, layer: int = layer, token: int = token) -> Any:
            output = output.clone()
            output[:, token] = vectors[layer]
            return output

        handle = plain.get_submodule(f"model.layers.{layer}").register_forward_hook(put)
        with torch.no_grad():
            close(rows[number], plain(input_ids=torch.tensor([prompt])).logits[0, -1])
        handle.remove()
    best = torch.stack(rows)[:, 5].sort(descending=True, stable=True)
    assert mapping.results["best"].prompts.tolist() == best.indices[:2].tolist()


def test_a_request_that_takes_several_passes_combines_all_of_its_prompts(backend: LocalBackend, hidden: Any) -> None:
    model = Model(backend)
    bodies = Bodies(model, lambda: {"mean": polytrace.mean(model.model.layers[1].output[0], over="tokens")}, Options())
    members = [Member(number=n, sequence=tuple(p), recorded=bodies.of(tuple(p))) for n, p in enumerate(PROMPTS)]
    result = backend.run(request_of(members, bodies.measured(members[0].sequence), Options()))
    assert len(result.receipt.passes) > 2
    tokens = torch.cat(hidden).double()
    assert int(result.values["mean:count"]) == len(tokens)
    close(result.values["mean:sum"] / len(tokens), tokens.mean(0))


def test_a_file_is_a_dataset_of_its_lines(tmp_path: Path, model: Model) -> None:
    path = tmp_path / "ids.jsonl"
    path.write_text('[1, 2, 3]\n{"input_ids": [4, 5]}\n')
    body = lambda: {"x": model.model.embed_tokens.input}  # noqa: E731
    assert [row.tolist() for row in rows_of(model, "x", model.map(path, body))] == [[1, 2, 3], [4, 5]]
    path.write_text('{"words": 1}\n')
    with pytest.raises(GraphError, match="prompt 0: a row with none of input_ids, text, prompt; it has words"):
        model.map(path, body).run()
    path.write_text("{\n")
    with pytest.raises(GraphError, match=r"ids\.jsonl:1 is not JSON"):
        model.map(path, body).run()
    rows = [{"prompt": [7, 8]}, {"input_ids": [0, 0, 9], "attention_mask": [0, 0, 1]}]
    assert [row.tolist() for row in rows_of(model, "x", model.map(rows, body))] == [[7, 8], [9]]


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (lambda h: h, "returns a dict"),
        (lambda h: {}, "returns a dict"),
        (lambda h: {"a:b": h}, "without ':'"),
        (lambda h: {"x": 3}, "polytrace.mean"),
        (lambda h: {"x": polytrace.mean(h)}, "dimension 1 is tokens"),
        (lambda h: {"x": polytrace.covariance(h[:, -1, 0])}, "one vector a row"),
        (lambda h: {"x": polytrace.mean(h[:, -1, 0], over="tokens")}, "over='tokens' takes"),
        (lambda h: {"x": polytrace.top_k(h[:, 0], 0)}, "how many to keep"),
        (lambda h: {"x": polytrace.mean(3)}, "not a int"),
        (lambda h: {"x": polytrace.mean(h, over="layers")}, "over 'prompts' or over 'tokens'"),
        (lambda h: (h.save(), {"x": h[:, 0]})[1], "return this value under a name"),
        (lambda h: (h.keep("mine"), {"x": h[:, 0]})[1], r"leaves nothing on the service.*'mine'"),
    ],
)
def test_what_a_body_cannot_return_is_refused_with_the_line(model: Model, body: Any, words: str) -> None:
    with pytest.raises(GraphError, match=words) as caught:
        model.map(PROMPTS, lambda: body(model.model.layers[0].output[0])).run()
    assert str(caught.value.where).startswith("test_map.py:")


def test_a_body_neither_reads_a_state_nor_updates_it(model: Model) -> None:
    state, last = model.state("added", torch.ones(32)), model.model.layers[0]
    with pytest.raises(GraphError, match=r"many requests, and the state 'added' may change.*\.fetch\(\)"):
        model.map(PROMPTS, lambda: {"x": last.output[0][:, -1] + state.value}).run()

    def updating() -> Any:
        state.update(state.value * 2)
        return {"x": last.output[0][:, -1]}

    with pytest.raises(GraphError, match=r"leaves nothing on the service.*'added'") as caught:
        model.map(PROMPTS, updating).run()
    assert str(caught.value.where).startswith("test_map.py:")


def test_a_map_runs_once_and_over_many_prompts(model: Model) -> None:
    mapping = model.map([], lambda: {"x": model.lm_head.output})
    assert mapping.run() == {}
    with pytest.raises(GraphError, match="runs once"):
        iter(mapping)
    with pytest.raises(GraphError, match=r"not over a str.*pathlib"):
        model.map("one prompt", dict)
    with pytest.raises(GraphError, match="on_error"):
        model.map(PROMPTS, dict, on_error="ignore")
