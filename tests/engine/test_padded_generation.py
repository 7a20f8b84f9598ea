"""Generations of models that cannot be packed, as users write them: recurrences, own caches, encoders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from padded_by_hand import LAYERS, Change, Loaded, assert_close, by_hugging_face
from processes import ProcessBackend, ProcessShards
from programs import find
from torch import Tensor
from width import wide

from engine.loading import check_split
from polytrace.errors import GraphError, ServiceError
from polytrace.model import Model

PROMPTS = [[3, 14, 15, 92, 65], [35, 89, 79, 32, 38, 46, 26, 43, 5, 6, 7], [83]]
STEPS = 8
VECTOR = 2.0 * torch.randn(32, generator=torch.Generator().manual_seed(3))


def steered(hidden: Tensor) -> Tensor:
    return hidden + VECTOR


@pytest.fixture(scope="module", params=["falcon", "jamba", wide("mamba"), wide("recurrent_gemma"), "t5"])
def loaded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    return Loaded(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def t5(tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    return Loaded("t5", tmp_path_factory.mktemp("t5"))


def layer_of(loaded: Loaded, number: int) -> Any:
    return find(loaded.model, LAYERS[loaded.name])[number]


def steer(loaded: Loaded, number: int) -> None:
    layer_of(loaded, number).output[0][:] += VECTOR


def record(loaded: Loaded, prompts: Any, **options: Any) -> tuple[Any, list[Any]]:
    """A generation that is steered at every step and gives its logits."""
    logits: list[Any] = []
    with loaded.model.generate(prompts, max_new_tokens=STEPS, eos=None, **options) as tracer:
        for _ in tracer.iter[:]:
            steer(loaded, 0)
            logits.append(loaded.model.output["logits"][:, -1].save())
    return tracer, logits


def test_tokens_and_values_of_steered_steps_are_those_of_generate(loaded: Loaded) -> None:
    tracer, logits = record(loaded, PROMPTS)
    with loaded.model.generate(PROMPTS, max_new_tokens=STEPS, eos=None) as plain:
        pass
    untouched = [one.ids for one in plain.receipt.generated]
    found = [list(one.ids) for one in tracer.receipt.generated]
    for place, prompt in enumerate(PROMPTS):
        tokens, expected = by_hugging_face(loaded, prompt, {loaded.place(0)[0]: steered}, STEPS)
        assert found[place] == tokens
        assert_close([step[place] for step in logits], expected)
        assert list(untouched[place]) == by_hugging_face(loaded, prompt, {}, STEPS)[0]
    assert found != [list(own) for own in untouched], "the edits matter"
    assert loaded.shard.store.held_bytes == 0


def test_code_outside_of_the_loop_acts_at_the_prompt(loaded: Loaded) -> None:
    calls: list[int] = []

    def once(hidden: Tensor) -> Tensor:
        calls.append(1)
        return steered(hidden) if len(calls) == 1 else hidden

    if loaded.name == "recurrent_gemma":  # by hand all of its tokens run again
        length = len(PROMPTS[1])

        def once(hidden: Tensor) -> Tensor:
            return torch.cat([steered(hidden[:, :length]), hidden[:, length:]], 1)

    with loaded.model.generate(PROMPTS[1], max_new_tokens=STEPS, eos=None) as tracer:
        steer(loaded, 1)
    tokens, _ = by_hugging_face(loaded, PROMPTS[1], {loaded.place(1)[0]: once}, STEPS)
    assert list(tracer.receipt.generated[0].ids) == tokens


def test_requests_that_generate_side_by_side_have_the_bits_that_each_has_alone(loaded: Loaded) -> None:
    recorded = [record(loaded, prompts, run=False)[0] for prompts in ([PROMPTS[0]], PROMPTS[1:], [PROMPTS[2]])]
    backend = loaded.backend
    outcomes = backend.run_together([backend.work_out(tracer.built_request()) for tracer in recorded])
    for tracer, outcome in zip(recorded, outcomes, strict=True):
        assert outcome.error is None and outcome.receipt is not None
        (alone,) = backend.run_together([backend.work_out(tracer.built_request())])
        assert alone.receipt is not None
        assert outcome.receipt.generated == alone.receipt.generated
        assert set(outcome.values) == set(alone.values) and len(alone.values) == STEPS
        assert all(torch.equal(outcome.values[name], alone.values[name]) for name in alone.values)
        together = [entry.requests for entry in outcome.receipt.passes]
        assert together[0] == 1 and max(together) == 3, "prompts one by one, steps with those of others"


def test_samples_of_a_long_prompt_are_those_that_each_is_alone(loaded: Loaded) -> None:
    prompt = [3 + 7 * place % 90 for place in range(40)]
    options: dict[str, Any] = {"max_new_tokens": 6, "eos": None, "do_sample": True, "seed": 5}
    with loaded.model.generate(prompt, n=3, **options) as tracer:
        pass
    found = [one.ids for one in tracer.receipt.generated]
    assert len(set(found)) > 1, "they differ"
    with loaded.model.generate([prompt, PROMPTS[0], prompt], **options) as beside:
        pass
    assert [one.ids for one in beside.receipt.generated][::2] == found[::2], "by their places"
    assert loaded.shard.store.held_bytes == 0


def test_a_token_that_is_written_goes_on(loaded: Loaded) -> None:
    with loaded.model.generate(PROMPTS[0], max_new_tokens=4, eos=None) as tracer:
        for step in tracer.iter[:]:
            if step == 1:
                loaded.model.lm_head.output[:, -1, 7] = 1e4
    tokens, forced = [], {1: 7}
    calls: list[int] = []

    def force(logits: Tensor) -> Tensor:
        calls.append(1)
        if len(calls) - 1 in forced:
            logits[:, -1, 7] = 1e4
        return logits

    tokens, _ = by_hugging_face(loaded, PROMPTS[0], {"lm_head": force}, 4)
    assert list(tracer.receipt.generated[0].ids) == tokens and tokens[1] == 7


def test_tokens_that_are_assigned_go_on_at_every_step(loaded: Loaded) -> None:
    with loaded.model.generate(PROMPTS, max_new_tokens=4, eos=None) as tracer:
        for step in tracer.iter[:]:
            if step in (0, 2):
                tracer.token = torch.tensor([7, 8, 9]) + 10 * step
    found = [one.ids for one in tracer.receipt.generated]
    assert [own[0] for own in found] == [7, 8, 9] and [own[2] for own in found] == [27, 28, 29]
    calls: list[int] = []

    def force(logits: Tensor) -> Tensor:
        calls.append(1)
        if len(calls) in (1, 3):
            logits[:, -1, 8 + 10 * (len(calls) - 1)] = 1e4
        return logits

    assert list(found[1]) == by_hugging_face(loaded, PROMPTS[1], {"lm_head": force}, 4)[0]


# Models that have an encoder


def test_edits_of_the_encoder_act_once_and_are_what_the_decoder_attends_to(t5: Loaded) -> None:
    with t5.model.generate(PROMPTS, max_new_tokens=STEPS, eos=None) as tracer:
        t5.model.encoder.block[1].output[0][:] += VECTOR
        t5.model.encoder.final_layer_norm.output[:, -1] *= 3.0
        logits = []
        for _ in tracer.iter[:]:
            logits.append(t5.model.lm_head.output[:, 0].save())

    def last(hidden: Tensor) -> Tensor:
        hidden[:, -1] *= 3.0
        return hidden

    edits: dict[str, Change] = {"encoder.block.1": steered, "encoder.final_layer_norm": last}
    for place, prompt in enumerate(PROMPTS):
        tokens, expected = by_hugging_face(t5, prompt, edits, STEPS)
        assert list(tracer.receipt.generated[place].ids) == tokens
        assert_close([step[place] for step in logits], expected)
        untouched = by_hugging_face(t5, prompt, {}, STEPS)[1]
        assert float((untouched[-1] - expected[-1]).abs().max()) > 1e-2, "the edits matter to the last step"


def test_an_edited_encoder_is_edited_once_and_an_edited_decoder_at_every_step(t5: Loaded) -> None:
    with t5.model.edit() as edited:
        t5.model.encoder.block[1].output[0][:] += VECTOR * edited.mask[..., None]
        t5.model.decoder.block[0].output[0][:] += VECTOR
    with edited.generate(PROMPTS, max_new_tokens=STEPS, eos=None) as tracer:
        logits = [t5.model.lm_head.output[:, 0].save() for _ in tracer.iter[:]]
    for place, prompt in enumerate(PROMPTS):
        tokens, expected = by_hugging_face(t5, prompt, {"encoder.block.1": steered, "decoder.block.0": steered}, STEPS)
        assert list(tracer.receipt.generated[place].ids) == tokens
        assert_close([step[place] for step in logits], expected)
        for one in ("encoder.block.1", "decoder.block.0"):
            assert tokens != by_hugging_face(t5, prompt, {one: steered}, STEPS)[0], "both edits matter"
    fired = {one.site: one.steps for one in tracer.receipt.fired if one.kind != "read"}
    assert fired == {"encoder.block.1.output[0]": 1, "decoder.block.0.output[0]": STEPS}


def test_traces_have_the_prompts_columns_in_the_encoder_and_one_in_the_decoder(t5: Loaded) -> None:
    model = t5.model
    with model.trace(PROMPTS):
        encoded = model.encoder.block[2].output[0].save()
        decoded = model.decoder.block[1].output[0].save()
        keys = model.decoder.block[0].layer[1].EncDecAttention.k.output.save()
        logits = model.lm_head.output.save()
        mean = model.lm_head.output.mean(1).save()
        named = model.logits.save()
    longest = max(map(len, PROMPTS))
    assert encoded.shape == keys.shape == (3, longest, 32)
    assert decoded.shape == (3, 1, 32) and logits.shape == (3, 1, 96)
    assert torch.equal(mean, logits[:, 0]) and torch.equal(named, logits)
    for place, prompt in enumerate(PROMPTS):
        with torch.no_grad():
            theirs = t5.plain(
                input_ids=torch.tensor([prompt]),
                decoder_input_ids=torch.tensor([[0]]),
                use_cache=False,
            )
        assert_close([encoded[place, -len(prompt) :]], [hidden_of(t5, prompt)])
        assert not bool(encoded[place, : longest - len(prompt)].any()), "pads"
        assert_close([logits[place]], [theirs.logits[0]])


def hidden_of(t5: Loaded, prompt: list[int]) -> Tensor:
    """What the encoder's last layer gives."""
    seen: list[Tensor] = []
    handle = t5.plain.encoder.block[2].register_forward_hook(lambda _m, _a, out: seen.append(out[0][0].clone()))
    with torch.no_grad():
        t5.plain(input_ids=torch.tensor([prompt]), decoder_input_ids=torch.tensor([[0]]), use_cache=False)
    handle.remove()
    return seen[0]


def test_values_flow_from_one_prompts_encoder_to_anothers_decoder(t5: Loaded) -> None:
    model = t5.model
    with model.trace() as tracer:
        with tracer.invoke(PROMPTS[0]):
            given = model.encoder.block[0].output[0][:, -1]
        with tracer.invoke(PROMPTS[1]):
            model.decoder.block[0].output[0][:, 0] = given
            logits = model.lm_head.output.save()
    seen: list[Tensor] = []
    handle = t5.plain.encoder.block[0].register_forward_hook(lambda _m, _a, out: seen.append(out[0][:, -1].clone()))
    by_hugging_face(t5, PROMPTS[0], {}, 1)
    handle.remove()

    def put(hidden: Tensor) -> Tensor:
        hidden[:, 0] = seen[0]
        return hidden

    assert_close([logits[0, 0]], by_hugging_face(t5, PROMPTS[1], {"decoder.block.0": put}, 1)[1])


def test_a_group_of_prompts_has_one_row_each_in_the_decoder(t5: Loaded) -> None:
    model = t5.model
    with model.trace() as tracer:
        for prompt in PROMPTS:
            with tracer.invoke(prompt):
                pass
        with tracer.invoke():
            encoded = model.encoder.block[0].output[0].save()
            model.decoder.block[0].output[0][:, 0] *= 2.0
            logits = model.lm_head.output.save()
    with model.trace(PROMPTS) as together:
        model.decoder.block[0].output[0][:, 0] *= 2.0
        expected = model.lm_head.output.save()
    assert encoded.shape[:2] == (3, max(map(len, PROMPTS)))
    assert torch.equal(logits, expected) and logits.shape == (3, 1, 96)
    assert together.receipt.notes == (), "the decoder has no pads"


def test_the_encoder_does_not_run_at_later_steps_and_that_is_said(t5: Loaded) -> None:
    with (
        pytest.raises(GraphError, match="which the encoder reads at step 0 alone"),
        t5.model.generate(PROMPTS[0], max_new_tokens=3, eos=None) as tracer,
    ):
        for _ in tracer.iter[:]:
            t5.model.encoder.block[0].output[0].save()


def test_a_model_with_an_encoder_is_one_stage(t5: Loaded) -> None:
    with pytest.raises(ServiceError, match=r"has an encoder and a decoder.*use stages=1"):
        check_split(t5.backend.source, "auto", stages=2, ranks=1)


# Stages


@pytest.mark.parametrize("name", ["mamba"])
def test_stages_change_no_bit_of_a_generation(name: str, tmp_path: Path) -> None:
    one = Loaded(name, tmp_path / "model")
    shards = ProcessShards(str(tmp_path / "model"), stages=2, ranks=1)
    backend = ProcessBackend(str(tmp_path / "model"), shards, tmp_path)
    try:
        found = []
        for model in (one.model, Model(backend)):
            layers = find(model, one.layers)
            with model.generate(PROMPTS, max_new_tokens=4, eos=None) as tracer:
                steps = []
                for _ in tracer.iter[:]:
                    layers[3].output[0][:] += VECTOR
                    steps.append(model.lm_head.output[:, -1].save())
            found.append(([own.ids for own in tracer.receipt.generated], [step.clone() for step in steps]))
        (tokens, values), (others, theirs) = found
        assert tokens == others and all(map(torch.equal, values, theirs))
    finally:
        shards.close()
