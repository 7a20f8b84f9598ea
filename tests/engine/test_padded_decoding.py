"""Sequences that go on in the padded layout, pass by pass, against Hugging Face's `generate` with hooks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from padded_by_hand import FLOAT32_TOLERANCE, LAYERS, Change, Loaded, assert_close, by_hugging_face
from padded_families import ENCODERS
from padded_steps import REQUEST, generate, prompt_pass, run, step_pass
from torch import Tensor
from transformers import AutoModelForCausalLM
from width import keeping

from engine.head_outputs import HeadOutputs
from engine.points import Pairs
from polytrace.errors import CapacityError
from polytrace.graph import Port

PROMPTS = [[3, 14, 15, 92, 65], [35, 89, 79, 32, 38, 46, 26, 43, 5, 6, 7], [83]]
STEPS = 12


@pytest.fixture(scope="module", params=keeping(sorted(LAYERS), lambda name: name not in ("gptj", "falcon", "mt5")))
def loaded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    return Loaded(request.param, tmp_path_factory.mktemp(request.param))


def looking(change: Change) -> Callable[[Any], Any]:
    """As a visitor of a pass."""
    return lambda value: change(value) if isinstance(value, Tensor) else (change(value[0]), *value[1:])


def noting(seen: list[Tensor]) -> Callable[[Any], Any]:
    """Notes a root's logits, `[rows, V]` by pass."""

    def look(output: Any) -> Any:
        seen.append(output["logits"][0].clone())
        return output

    return look


def last_rows(loaded: Loaded, seen: list[Tensor], sequence: int) -> list[Tensor]:
    """One sequence's logits at each step, when none ends."""
    rows = [1 if loaded.name in ENCODERS else len(prompt) for prompt in PROMPTS]
    first = sum(rows[: sequence + 1]) - 1
    return [seen[0][first], *(step[sequence] for step in seen[1:])]


def test_greedy_tokens_and_logits_are_those_of_generate(loaded: Loaded) -> None:
    seen: list[Tensor] = []
    found = generate(loaded.shard, PROMPTS, STEPS, {("", Port.OUTPUT): noting(seen)})
    for place, prompt in enumerate(PROMPTS):
        tokens, logits = by_hugging_face(loaded, prompt, {}, STEPS)
        assert found[place] == tokens
        assert_close(last_rows(loaded, seen, place), logits)
    assert len({token for own in found for token in own}) >= 3, "they do not say one thing all the time"


def test_steering_at_every_step_is_that_of_hooks(loaded: Loaded) -> None:
    vector = 2.0 * torch.randn(32, generator=torch.Generator().manual_seed(3))

    def steer(hidden: Tensor) -> Tensor:
        return hidden + vector

    def scale(hidden: Tensor) -> Tensor:
        hidden *= 0.5  # for everyone who holds it
        return hidden

    edits = {loaded.place(0): steer, loaded.place(1): scale}
    seen: list[Tensor] = []
    looks = {place: looking(change) for place, change in edits.items()}
    found = generate(loaded.shard, PROMPTS, STEPS, {**looks, ("", Port.OUTPUT): noting(seen)})
    for place, prompt in enumerate(PROMPTS):
        tokens, logits = by_hugging_face(
            loaded, prompt, {module: change for (module, _), change in edits.items()}, STEPS
        )
        assert found[place] == tokens
        assert_close(last_rows(loaded, seen, place), logits)
    assert found != generate(loaded.shard, PROMPTS, STEPS, {}), "the edits matter"


def test_what_runs_beside_a_sequence_changes_no_bit(loaded: Loaded) -> None:
    together: list[Tensor] = []
    tokens = generate(loaded.shard, PROMPTS, STEPS, {("", Port.OUTPUT): noting(together)})
    for place, prompt in enumerate(PROMPTS):
        alone: list[Tensor] = []
        found = generate(loaded.shard, [prompt], STEPS, {("", Port.OUTPUT): noting(alone)})
        assert found[0] == tokens[place]
        ours = last_rows(loaded, together, place)
        assert all(torch.equal(one[-1], other) for one, other in zip(alone, ours, strict=True))
    lengths = {0: 3, 1: STEPS, 2: 7}
    ragged = generate(loaded.shard, PROMPTS, STEPS, {}, forced=lengths)
    assert ragged == [own[: lengths[place]] for place, own in enumerate(tokens)], "others have ended"


def test_caches_are_counted_and_gone_with_their_request(loaded: Loaded) -> None:
    shard, store = loaded.shard, loaded.shard.store
    layers = shard.probe.layout.num_layers
    assert store.held_bytes == 0

    def change(hidden: Tensor) -> Tensor:
        return hidden * 1.5

    looks = {loaded.place(0): looking(change)}
    run(shard, prompt_pass(PROMPTS, layers, keeps=False), looks)
    assert store.held_bytes == 0, "nobody goes on"
    run(shard, prompt_pass(PROMPTS, layers), looks)
    first = store.held_bytes
    assert first > 0
    run(shard, step_pass({0: 5, 2: 6}, {0: len(PROMPTS[0]), 2: len(PROMPTS[2])}, layers), looks)
    assert store.held_bytes >= first if loaded.name == "mamba" else store.held_bytes > first
    budget, store.budget_bytes = store.budget_bytes, first // 2
    try:
        with pytest.raises(CapacityError, match="the store holds"):
            run(shard, prompt_pass([[*range(3, 60)]], layers), looks)
    finally:
        store.budget_bytes = budget
    store.forget(REQUEST)
    assert store.held_bytes == 0


# families that have points inside of attention


@pytest.fixture(scope="module", params=["bloom", "jamba"])  # by their own formula, by the engine's attention
def attending(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    return Loaded(request.param, tmp_path_factory.mktemp(request.param))


def test_patterns_of_steps_have_the_weights_of_all_tokens_before(attending: Loaded) -> None:
    attention = {"bloom": "transformer.h.1.self_attention", "jamba": "model.layers.1.self_attn"}[attending.name]
    seen: list[Tensor] = []

    def look(pairs: Pairs) -> Pairs:
        num_rows = sum(map(len, PROMPTS)) if not seen else len(PROMPTS)
        seen.append(pairs.read(range(num_rows), 32))
        return pairs

    found = generate(attending.shard, PROMPTS, 4, {(attention, Port.PATTERN): look})
    for place, prompt in enumerate(PROMPTS):
        with torch.no_grad():
            eager = AutoModelForCausalLM.from_config(attending.plain.config, attn_implementation="eager").eval()
            eager.load_state_dict(attending.plain.state_dict())
            answer = eager(input_ids=torch.tensor([[*prompt, *found[place][:3]]]), output_attentions=True)
        known = [own for own in answer.attentions if own is not None]
        pattern = known[1 if attending.name == "bloom" else 0][0]  # [heads, queries, keys]
        for step in range(1, 4):
            ours, theirs = seen[step][place], pattern[:, len(prompt) + step - 1]
            length = len(prompt) + step
            assert float((ours[:, :length] - theirs[:, :length]).abs().max()) <= FLOAT32_TOLERANCE
            assert not bool(ours[:, length:].any()), "nobody sees what comes later"


def test_edits_of_values_are_what_later_steps_attend_to(attending: Loaded) -> None:
    """A value of the prompt is changed at step 0 alone; the cache has what it has become."""
    value = {"bloom": "transformer.h.1.self_attention", "jamba": "model.layers.1.self_attn"}[attending.name]

    def generated(change: bool) -> list[Tensor]:
        seen: list[Tensor] = []
        passes: list[int] = []

        def edit(own: Tensor) -> Tensor:
            passes.append(1)
            if change and len(passes) == 1:
                own = own.clone()
                own[:, 2, 0] *= -4.0
            return own

        generate(attending.shard, PROMPTS[:1], 4, {(value, Port.V): edit, ("", Port.OUTPUT): noting(seen)})
        assert len(passes) == 4
        return seen

    is_bloom = attending.name == "bloom"
    source, heads = f"{value}.{'query_key_value' if is_bloom else 'v_proj'}", slice(16, 24) if is_bloom else slice(0, 8)
    calls: list[int] = []

    def by_hand(features: Tensor) -> Tensor:
        calls.append(1)
        if len(calls) == 1:
            features[:, 2, heads] *= -4.0  # the first head's values
        return features

    expected = by_hugging_face(attending, PROMPTS[0], {source: by_hand}, 4)[1]
    ours = generated(True)
    assert_close([step[-1] for step in ours], expected)
    plain = generated(False)
    assert float((plain[3][-1] - ours[3][-1]).abs().max()) > 1e-3, "the edit matters at later steps"


def test_running_again_at_every_step_gives_what_a_cache_gives(attending: Loaded) -> None:
    """Every second pass is edited in all ways there are: what earlier passes changed has to be put back."""
    attention = {"bloom": "transformer.h.1.self_attention", "jamba": "model.layers.1.self_attn"}[attending.name]
    generator = torch.Generator().manual_seed(4)
    vector = torch.randn(32, generator=generator)

    def generated(*, runs_again: bool) -> tuple[list[list[int]], list[Tensor]]:
        seen: list[Tensor] = []
        passes: dict[str, int] = {}

        def is_edited(name: str) -> bool:
            passes[name] = passes.get(name, -1) + 1
            return passes[name] % 2 == 0

        def num_rows(name: str) -> int:
            return sum(map(len, PROMPTS)) if passes[name] == 0 else len(PROMPTS)

        def pattern(pairs: Pairs) -> Pairs:
            if is_edited("pattern"):
                rows = range(num_rows("pattern"))
                pairs.write(rows, pairs.read(rows, 32) * 0.5)
            return pairs

        def heads(outputs: HeadOutputs) -> HeadOutputs:
            if is_edited("heads"):
                rows = torch.arange(num_rows("heads"))
                outputs.change = rows, 0.3 * vector.expand(len(rows), -1)
            return outputs

        def values(own: Tensor) -> Tensor:
            return own * 1.5 if is_edited("values") else own

        def in_place(hidden: Tensor) -> Tensor:
            if is_edited("in place"):
                hidden += vector
            return hidden

        def assigned(hidden: Tensor) -> Tensor:
            return hidden - vector if is_edited("assigned") else hidden

        runner: Any = attending.shard.runner
        runner.runs_again = runs_again
        try:
            looks = {
                (attention, Port.PATTERN): pattern,
                (attention, Port.HEAD_OUT): heads,
                (attention, Port.V): values,
                attending.place(0): looking(in_place),
                attending.place(2): looking(assigned),
                ("", Port.OUTPUT): noting(seen),
            }
            return generate(attending.shard, PROMPTS, 6, looks), seen
        finally:
            runner.runs_again = False

    (tokens, logits), (others, theirs) = generated(runs_again=False), generated(runs_again=True)
    assert tokens == others
    assert_close(logits, theirs)
    plain: list[Tensor] = []
    generate(attending.shard, PROMPTS, 6, {("", Port.OUTPUT): noting(plain)})
    assert float((plain[-1] - logits[-1]).abs().max()) > 1e-2, "earlier edits matter to a pass without any"
