"""Function vectors beside heads that are exchanged by hooks in plain Hugging Face."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hooked import Both, close
from torch import Tensor

from polytrace.errors import GraphError
from polytrace.methods import Task, few_shot_task, function_vector, head_effects

CLEAN = [[3, 17, 42, 5, 9], [8, 25, 1, 60], [4, 4, 11]]
CORRUPTED = [[13, 7, 2, 51], [28, 5, 31, 6, 60]]
ANSWERS = [7, 30]
TASK = Task(clean=CLEAN, corrupt=CORRUPTED, answers=ANSWERS)
SIZE = 8


@pytest.fixture(scope="module", params=["llama", "gpt2", "gemma2", "gpt_neox"])
def served(request: pytest.FixtureRequest, beside: Callable[[str], Both]) -> Both:
    return beside(request.param)


def means_by_hand(served: Both, layer: int) -> Tensor:
    """`[heads, features]` at the last token."""
    place = (served.names.layer(layer, served.names.out), "input")
    return torch.stack([served.run(ids, [place])[1][place][0, -1] for ids in CLEAN]).mean(0).reshape(4, SIZE)


def effect_by_hand(served: Both, layer: int, head: int, mean: Tensor, score: str) -> Tensor:
    place = (served.names.layer(layer, served.names.out), "input")

    def change(heads: Tensor) -> Tensor:
        heads[0, -1, head * SIZE : (head + 1) * SIZE] = mean
        return heads

    found = []
    for ids, answer in zip(CORRUPTED, ANSWERS, strict=True):
        both_ways = [served.run(ids, changes=changes)[1]["", "output"][0, -1] for changes in ({place: change}, {})]
        told = [one.softmax(-1) if score == "probability" else one.log_softmax(-1) for one in both_ways]
        found.append(told[0][answer] - told[1][answer])
    return torch.stack(found).mean()


@pytest.mark.parametrize("score", ["probability", "log_probability"])
def test_effects_and_vector_are_those_of_exchanged_heads(served: Both, score: str) -> None:
    found = function_vector(served.model, TASK, top_k=3, score=score)
    means = [means_by_hand(served, layer) for layer in range(4)]
    hand = torch.stack(
        [torch.stack([effect_by_hand(served, n, h, means[n][h], score) for h in range(4)]) for n in range(4)]
    )
    close(found.effects, hand, scale=0.1)
    assert float(hand.abs().max()) > (0.0001 if score == "probability" else 0.01)
    best = [divmod(place, 4) for place in hand.flatten().topk(3).indices.tolist()]
    assert list(found.heads) == best
    weights = [served.out_weight(served.names.layer(layer, served.names.out)) for layer in range(4)]
    close(found.vector, sum(means[n][h] @ weights[n][h * SIZE : (h + 1) * SIZE] for n, h in best))
    assert found.receipt.result_bytes < 4000


def test_heads_are_chosen_by_the_effects_over_several_tasks(served: Both) -> None:
    other = Task(clean=CORRUPTED, corrupt=CLEAN, answers=[5, 6, 7])
    alone = [head_effects(served.model, task) for task in (TASK, other)]
    effects = head_effects(served.model, [TASK, other])
    close(effects, torch.tensor((alone[0] + alone[1]).values / 2))
    found = function_vector(served.model, TASK, top_k=2, effects=effects)
    assert found.heads == tuple(divmod(p, 4) for p in torch.tensor(effects.values).flatten().topk(2).indices.tolist())
    weights = [served.out_weight(served.names.layer(layer, served.names.out)) for layer in range(4)]
    mean = {n: means_by_hand(served, n) for n, _ in found.heads}
    close(found.vector, sum(mean[n][h] @ weights[n][h * SIZE : (h + 1) * SIZE] for n, h in found.heads))


def test_a_few_shot_task_has_solved_examples_and_shuffled_ones() -> None:
    pairs = [(f"x{n}", f"y{n}") for n in range(12)]
    task = few_shot_task(pairs, shots=5, prompts=20, seed=3)
    assert len(task.clean) == len(task.corrupt) == len(task.answers) == 20
    asked = dict(pairs)

    def share_right(prompts: list[str]) -> float:
        shown = [example.removeprefix("Q: ").split("\nA: ") for one in prompts for example in one.split("\n\n")[:-1]]
        assert all(len(example) == 2 for example in shown)
        return sum(asked[x] == y for x, y in shown) / len(shown)

    assert share_right(list(task.clean)) == 1.0
    assert 0.0 < share_right(list(task.corrupt)) < 0.5
    for prompt, answer in zip(task.corrupt, task.answers, strict=True):
        *_, last = prompt.split("\n\n")
        question = last.removeprefix("Q: ").removesuffix("\nA:")
        assert answer == f" {asked[question]}" and prompt.count(question + "\n") == 1
    assert task == few_shot_task(pairs, shots=5, prompts=20, seed=3)
    with pytest.raises(GraphError, match="12 shots need at least 13 pairs, and there are 12"):
        few_shot_task(pairs, shots=12)
