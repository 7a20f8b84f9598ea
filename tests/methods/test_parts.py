"""Paths, causes, ablations and knockouts: every cell equals plain runs, by the definitions that the methods state."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from patched_by_hand import KINDS, OTHERS, Edits, PlainModel, placed
from small import FLOAT32_TOLERANCE, loaded
from torch import Tensor

from polytrace import functions
from polytrace.errors import GraphError
from polytrace.methods import ablate, knock_out_attention, logit_difference, patch_paths, trace_causes

CLEAN, CORRUPT = [3, 17, 42, 5, 9, 30, 11], [3, 25, 42, 8, 9, 30, 11]
PROMPTS = [CLEAN, [8, 25, 1, 60, 2], CORRUPT, [50, 6, 25, 33, 12]]
METRIC = logit_difference(7, 21)
Both = tuple[Any, PlainModel]


@pytest.fixture(scope="module", params=KINDS)
def both(request: pytest.FixtureRequest, patched: Callable[[str], Both]) -> Both:
    return patched(request.param)


@pytest.fixture(scope="module")
def llama(patched: Callable[[str], Both]) -> Both:
    return patched("llama")


def lead(logits: Tensor) -> float:
    return float(logits[-1, 7] - logits[-1, 21])


def agree(ours: Any, theirs: Any, *, spread: float = 0.005) -> None:
    """Within float32's tolerance of what plain runs gave, which are not all alike."""
    wanted = np.array(theirs, dtype=float)
    assert ours.shape == wanted.shape, (ours.shape, wanted.shape)
    assert abs(ours - wanted).max() <= 5 * FLOAT32_TOLERANCE * max(1.0, float(abs(wanted).max()))
    assert abs(wanted).max() > spread, "the edits matter"


def put(index: Any, other: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda value: placed(value, index, other[index])


# paths


def sent(plain: PlainModel, senders: list[tuple[int, Any]], until: int, at: Any, *, is_frozen: bool) -> Edits:
    """Step 1 of the definition: the senders as in the corrupt run, what is between them and a layer as in the clean."""
    kept, other = plain.run(CLEAN)[1], plain.run(CORRUPT)[1]
    first = min(layer for layer, _ in senders)
    edits: dict[tuple[str, int], Callable[[Tensor], Tensor]] = {}
    for number in range(first, until):
        heads = [head for layer, head in senders if layer == number and head != "mlp"]
        if number > first or heads:

            def change(value: Tensor, number: int = number, heads: list[int] = heads) -> Tensor:
                if number > first:
                    value[0, at] = kept["z", number][0, at]
                for head in heads:
                    value[0, at, head] = other["z", number][0, at, head]
                return value

            edits["z", number] = change
        if (number, "mlp") in senders:
            edits["mlp", number] = put((0, at), other["mlp", number])
        elif is_frozen:
            edits["mlp", number] = put((0, at), kept["mlp", number])
    return edits


@pytest.mark.parametrize("mlps", ["recomputed", "frozen"])
@pytest.mark.parametrize("positions", [None, -1])
def test_a_path_to_the_logits_goes_through_no_other_head(both: Both, mlps: str, positions: int | None) -> None:
    model, plain = both
    at = slice(None) if positions is None else [-1]
    clean = lead(plain.run(CLEAN)[0])
    found = patch_paths(model, CLEAN, CORRUPT, METRIC, layers=[1, 2], positions=positions, mlps=mlps)
    theirs = [
        [
            lead(plain.run(CLEAN, sent(plain, [(n, head)], 4, at, is_frozen=mlps == "frozen"))[0]) - clean
            for head in range(4)
        ]
        for n in (1, 2)
    ]
    assert found.effect.dims == ("layer", "head")
    agree(found.effect.values, theirs)
    assert len(found.receipt.passes) == 1 and found.receipt.token_layers < 0.6 * found.receipt.token_layers_alone


POINTS = {"q": "q_rot", "k": "k_rot", "v": "v", "mlp": "mlp_in"}


@pytest.mark.parametrize("receiver", [(2, 1, "q"), (2, 1, "k"), (3, "v"), (3, "mlp"), (1, "mlp")])
@pytest.mark.parametrize("mlps", ["recomputed", "frozen"])
def test_a_path_to_a_receiver_changes_what_it_takes_and_nothing_else(
    both: Both, receiver: tuple[Any, ...], mlps: str
) -> None:
    check_paths_to(*both, receiver, mlps)


@pytest.mark.parametrize("kind", OTHERS)
def test_paths_are_the_same_where_layers_are_built_otherwise(kind: str, tmp_path: Path) -> None:
    plain = PlainModel(kind)
    with loaded(plain.model, tmp_path) as model:
        check_paths_to(model, plain, (3, "mlp"), "frozen")
        check_paths_to(model, plain, (3, 1, "v"), "recomputed")


def check_paths_to(model: Any, plain: PlainModel, receiver: tuple[Any, ...], mlps: str) -> None:
    layer, taken = receiver[0], receiver[-1]
    clean = lead(plain.run(CLEAN)[0])
    until = layer + 1 if taken == "mlp" else layer
    index = (0, slice(None), receiver[1]) if len(receiver) == 3 else (0, slice(None))

    def effect(senders: list[tuple[int, Any]]) -> float:
        edits = dict(sent(plain, senders, until, slice(None), is_frozen=mlps == "frozen"))
        if taken == "mlp":
            edits.pop(("mlp", layer), None)  # it is the receiver: what it gives does not matter here
        given = plain.run(CLEAN, edits)[1][POINTS[taken], layer]
        return lead(plain.run(CLEAN, {(POINTS[taken], layer): put(index, given)})[0]) - clean

    found = patch_paths(model, CLEAN, CORRUPT, METRIC, receivers=[receiver], layers=[0, 1, 3], mlps=mlps)
    reach = layer if taken == "mlp" else layer - 1
    theirs = [[effect([(n, head)]) if n <= reach else 0.0 for head in range(4)] for n in (0, 1, 3)]
    agree(found.effect.values, theirs, spread=1e-3)
    if layer == 3:
        found = patch_paths(model, CLEAN, CORRUPT, METRIC, receivers=[receiver], senders="mlps", mlps=mlps)
        assert found.effect.dims == ("layer",)
        agree(found.effect.values, [effect([(n, "mlp")]) if n < 3 else 0.0 for n in range(4)], spread=1e-3)
        together = [(0, 2), (1, 1), (1, "mlp")]
        found = patch_paths(model, CLEAN, CORRUPT, METRIC, receivers=[receiver], senders=together, mlps=mlps)
        agree(found.effect.values, effect(together), spread=1e-3)


def test_queries_of_all_later_heads_receive_together(llama: Both) -> None:
    model, plain = llama
    given = plain.run(CLEAN, sent(plain, [(0, 2)], 4, [-1], is_frozen=True))[1]
    edits = {("q_rot", n): put((0, [-1]), given["q_rot", n]) for n in range(1, 4)}
    found = patch_paths(model, CLEAN, CORRUPT, METRIC, senders=[(0, 2)], receivers="q", positions=-1, mlps="frozen")
    agree(found.effect.values, lead(plain.run(CLEAN, edits)[0]) - lead(plain.run(CLEAN)[0]), spread=1e-4)


# causes


def test_a_blurred_subject_and_states_put_back_are_plain_runs(both: Both) -> None:
    model, plain = both
    samples, subject = 3, [1, 2]
    with model.trace(CLEAN, seed=5):
        noise = functions.randn(samples, len(subject), 32).save()
    clean_logits, kept = plain.run(CLEAN)
    noise = noise * 2.0 * kept["embed", 0].std()
    found = trace_causes(
        model, CLEAN, subject, METRIC, samples=samples, noise=2.0, seed=5, window=3, layers=[0, 2, 3], positions=[2, -1]
    )

    def average(kind: str, layers: range, place: int) -> float:
        leads = []
        for sample in range(samples):
            edits: dict[tuple[str, int], Any] = {
                ("embed", 0): lambda v, s=sample: placed(v, (0, subject), v[0, subject] + noise[s])
            }
            for layer in layers:
                edits[kind, layer] = put((0, place), kept[kind, layer])
            leads.append(lead(plain.run(CLEAN, edits)[0]))
        return sum(leads) / samples

    theirs = [
        [
            [
                average(kind, range(n, n + 1) if kind == "resid_post" else range(max(0, n - 1), min(4, n + 2)), p)
                for p in (2, 6)
            ]
            for n in (0, 2, 3)
        ]
        for kind in ("resid_post", "mlp", "attention")
    ]
    assert found.effect.dims == ("restored", "layer", "position")
    assert found.effect.restored.values.tolist() == ["resid_post", "mlp", "attention"]
    agree(found.effect.values, theirs)
    assert found.corrupt is not None
    agree(np.array([float(found.clean), float(found.corrupt)]), [lead(clean_logits), average("mlp", range(0), 0)])
    assert found.receipt.token_layers < 0.6 * found.receipt.token_layers_alone


def test_causes_in_several_prompts_are_those_of_each(llama: Both) -> None:
    model, _ = llama
    where: dict[str, Any] = {"samples": 2, "spread": 0.3, "restore": "mlp", "window": 2, "layers": [1]}
    subjects = [[1, 2], [0]]
    both_at_once = trace_causes(model, PROMPTS[:2], subjects, METRIC, **where)
    assert both_at_once.effect.dims == ("prompt", "restored", "layer", "position")
    for prompt, subject, found in zip(PROMPTS[:2], subjects, both_at_once.effect.values, strict=True):
        alone = trace_causes(model, prompt, subject, METRIC, **where)
        assert np.isnan(found[0, 0, : 7 - len(prompt)]).all()
        if len(subject) == 2:  # the same numbers are drawn for a subject as long as the longest
            assert abs(found[0, 0, 7 - len(prompt) :] - alone.effect.values[0, 0]).max() <= 1e-5


# ablation


def means(plain: PlainModel, point: str, layer: int, over: str, prompts: list[list[int]], own: list[int]) -> Tensor:
    seen = [plain.run(ids)[1] for ids in (prompts if over != "tokens" else [own])]
    rows = [
        one["resid_post", layer] - one["resid_pre", layer] if point == "added" else one[point, layer] for one in seen
    ]
    return torch.stack(rows).mean(0)[0] if over == "prompts" else torch.cat(rows, 1).mean(1, keepdim=True)[0]


@pytest.mark.parametrize("of", ["head", "neuron", "attention", "mlp", "layer"])
@pytest.mark.parametrize(
    ("by", "over", "has_reference"),
    [
        ("zero", "all", False),
        ("mean", "all", False),
        ("mean", "all", True),
        ("mean", "tokens", False),
        ("mean", "prompts", False),
        ("resample", "all", True),
    ],
)
def test_each_part_replaced_is_a_plain_run_without_it(
    both: Both, of: str, by: str, over: str, has_reference: bool
) -> None:
    model, plain = both
    point = {"head": "z", "neuron": "mlp_post", "layer": "added"}.get(of, of)
    prompts = [CLEAN, CORRUPT] if over == "prompts" else PROMPTS[:2]
    reference = None if not has_reference else PROMPTS[2:]
    positions, units = (None if of == "head" else [1, -1]), [0, 3] if of in ("head", "neuron") else None
    found = ablate(
        model,
        prompts,
        METRIC,
        of=of,
        method=by,
        over=over,
        reference=reference,
        layers=[1, 2],
        units=units,
        positions=positions,
    )

    def effect(ids: list[int], number: int, layer: int, unit: int | None) -> float:
        at = slice(None) if positions is None else [1, len(ids) - 1]
        if by == "zero":
            said = torch.zeros(1)
        elif by == "mean":
            said = means(plain, point, layer, over, reference or prompts, ids)
        else:
            assert reference is not None
            seen = plain.run(reference[number])[1]
            said = (seen["resid_post", layer] - seen["resid_pre", layer] if point == "added" else seen[point, layer])[0]

        before = plain.run(ids)[1]["resid_pre", layer][0]

        def told(value: Tensor) -> Tensor:
            whole = said.expand(value.shape[1:]) if by == "zero" else said.expand(value.shape[1], *said.shape[1:])
            index = (at,) if unit is None else (at, unit)
            whole = whole + before if of == "layer" else whole
            return placed(value, (0, *index), whole[index])

        name = "resid_post" if of == "layer" else point
        return lead(plain.run(ids, {(name, layer): told})[0]) - lead(plain.run(ids)[0])

    theirs = [
        [
            effect(ids, number, layer, None) if units is None else [effect(ids, number, layer, unit) for unit in units]
            for layer in (1, 2)
        ]
        for number, ids in enumerate(prompts)
    ]
    assert found.effect.dims == ("prompt", "layer", *([of] if units else []))
    agree(found.effect.values, theirs, spread=1e-4)


def test_resampling_takes_another_prompt_of_the_same_length(llama: Both) -> None:
    model, plain = llama
    found = ablate(model, [CLEAN, CORRUPT], METRIC, of="mlp", method="resample", layers=0)
    theirs = []
    for ids, other in ((CLEAN, CORRUPT), (CORRUPT, CLEAN)):
        given = plain.run(other)[1]["mlp", 0]
        theirs.append([lead(plain.run(ids, {("mlp", 0): lambda v, g=given: g})[0]) - lead(plain.run(ids)[0])])
    agree(found.effect.values, theirs)
    with pytest.raises(GraphError, match="prompt 1 is the only one of 5 tokens"):
        ablate(model, PROMPTS[:2], METRIC, method="resample")


# knockout


@pytest.mark.parametrize("heads", [None, [1, 3]])
def test_a_knockout_is_a_plain_run_with_scores_of_minus_infinity(both: Both, heads: list[int] | None) -> None:
    model, plain = both
    rng = random.Random(0)
    for prompts in ([CLEAN, CORRUPT], PROMPTS[:2]):
        queries: Any = -1 if prompts[1] is CORRUPT else [[2, 6], [4]]
        keys = [sorted(rng.sample(range(4), 2)) for _ in prompts]
        found = knock_out_attention(model, prompts, queries, keys, METRIC, window=2, heads=heads)
        theirs = []
        for number, ids in enumerate(prompts):
            asking = [len(ids) - 1] if queries == -1 else queries[number]

            def block(scores: Tensor, asking: list[int] = asking, own: list[int] = keys[number]) -> Tensor:
                for query in asking:
                    for head in heads or range(4):
                        scores[0, head, query, own] = -torch.inf
                return scores

            clean = lead(plain.run(ids)[0])
            theirs.append(
                [
                    lead(plain.run(ids, {("scores", n): block for n in range(max(0, m - 1), m + 1)})[0]) - clean
                    for m in range(4)
                ]
            )
        agree(found.effect.values, theirs)


def test_mistakes_are_told_with_the_numbers(llama: Both) -> None:
    model, _ = llama
    with pytest.raises(GraphError, match=r"query 1 of prompt 0 would see no key at all.*test_parts"):
        knock_out_attention(model, CLEAN, 1, [0, 1, 2], METRIC)
    with pytest.raises(GraphError, match="mlps are 'recomputed' or 'frozen', not 'free'"):
        patch_paths(model, CLEAN, CORRUPT, METRIC, mlps="free")
    with pytest.raises(GraphError, match=r"receivers are 'logits'.*not \(2, 1, 'mlp'\)"):
        patch_paths(model, CLEAN, CORRUPT, METRIC, receivers=[(2, 1, "mlp")])
    with pytest.raises(GraphError, match="there is no head 7; there are heads 0-3"):
        patch_paths(model, CLEAN, CORRUPT, METRIC, senders=[(2, 7)])
    with pytest.raises(GraphError, match="pair 0 has 7 tokens in the clean prompt and 5 in the corrupt one"):
        patch_paths(model, CLEAN, PROMPTS[1], METRIC)
    with pytest.raises(GraphError, match="prompts of 5, 7 tokens have no mean at each position"):
        ablate(model, PROMPTS[:2], METRIC, over="prompts")
    with pytest.raises(GraphError, match="there is no position 7 in this prompt"):
        trace_causes(model, CLEAN, 7, METRIC)
