"""Programs over the steps of a generation, against Hugging Face's `generate` with hooks: greedy, float32.

Tokens are equal; values within `FLOAT32_TOLERANCE` of max(1, max|plain|).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import pytest
import torch
from small import FLOAT32_TOLERANCE, IDS, OTHER, VOCABULARY, WIDTH, loaded, small_llama
from torch import Tensor

import polytrace
from polytrace.errors import GraphError, RunError
from polytrace.streaming import Piece

NEW = 8
Change = Callable[[Tensor, int], Tensor | None]  # takes what a module gave, and the step


@pytest.fixture(scope="module")
def plain() -> Any:
    model = small_llama()
    model.generation_config.eos_token_id = None
    model.config.eos_token_id = None
    return model


@pytest.fixture(scope="module")
def model(plain: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with loaded(plain, tmp_path_factory.mktemp("llama")) as one:
        yield one


VECTOR = torch.linspace(-1.0, 1.0, WIDTH)


def by_hand(
    plain: Any, ids: list[int], changes: dict[str, Change] | None = None, new: int = NEW, **more: Any
) -> tuple[list[int], list[Tensor]]:
    """The new tokens, and the logits of each step's last token, of transformers' own generation with hooks."""
    with ExitStack() as stack, torch.no_grad():
        for path, change in (changes or {}).items():
            stack.callback(plain.get_submodule(path).register_forward_hook(_hook(change)).remove)
        told = plain.generate(
            torch.tensor([ids]),
            attention_mask=torch.ones(1, len(ids), dtype=torch.long),
            max_new_tokens=new,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
            pad_token_id=0,
            **more,
        )
    return told.sequences[0, len(ids) :].tolist(), list(told.logits)


def _hook(change: Change) -> Any:
    steps = iter(range(1000))

    def hook(module: Any, args: Any, output: Any) -> Any:
        hidden = output[0] if isinstance(output, tuple) else output
        changed = change(hidden, next(steps))
        if changed is None:
            return None
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    return hook


def close(ours: Tensor, other: Tensor) -> bool:
    return (ours - other).abs().max().item() <= FLOAT32_TOLERANCE * max(1.0, other.abs().max().item())


def test_plain_greedy_is_transformers_own(model: Any, plain: Any) -> None:
    ids, logits = by_hand(plain, IDS)
    with model.generate(IDS, max_new_tokens=NEW) as tracer, tracer.all():
        ours = model.lm_head.output[:, -1].save()
        tokens = tracer.token.save()
    assert list(tracer.result.ids) == ids
    assert tracer.result.finish == "length"
    assert len(ours) == NEW and ours.numbers == tuple(range(NEW))
    assert all(close(one, other) for one, other in zip(ours, logits, strict=True))
    assert tokens.stack()[:, 0].tolist() == ids
    assert (ours.stack()[-1] == ours[-1]).all()


def test_steering_at_every_step_is_a_hook_and_a_loop_is_its_body_recorded_once(model: Any, plain: Any) -> None:
    ids, logits = by_hand(plain, IDS, {"model.layers.1": lambda hidden, step: hidden + VECTOR})
    assert ids != by_hand(plain, IDS)[0], "an edit that changes no token shows nothing"
    with model.generate(IDS, max_new_tokens=NEW) as looped:
        found = []
        for _ in looped.iter[:]:
            model.model.layers[1].output[0][:] += VECTOR
            found.append(model.lm_head.output[:, -1].save())
    with model.generate(IDS, max_new_tokens=NEW) as once, once.all():
        model.model.layers[1].output[0][:] += VECTOR
        same = model.lm_head.output[:, -1].save()
    assert list(looped.result.ids) == list(once.result.ids) == ids
    assert all(close(one, other) for one, other in zip(found, logits, strict=True))
    assert all(torch.equal(one, other) for one, other in zip(found, same, strict=True))


def test_code_outside_of_a_loop_acts_at_step_0_alone(model: Any, plain: Any) -> None:
    ids, _ = by_hand(plain, IDS, {"model.layers.1": lambda hidden, step: hidden + VECTOR if step == 0 else None})
    with model.generate(IDS, max_new_tokens=NEW) as tracer:
        model.model.layers[1].output[0][:] += VECTOR
    assert list(tracer.result.ids) == ids
    (write,) = [event for event in tracer.receipt.fired if event.kind.startswith("write")]
    assert (write.steps, write.of_steps) == (1, NEW)
    assert "fired at 1 of 8 steps" in str(write)


def test_steps_are_real_numbers_and_values_are_carried_from_one_to_the_next(model: Any, plain: Any) -> None:
    vectors = torch.randn(NEW, WIDTH, generator=torch.Generator().manual_seed(3))
    seen: list[Tensor] = []

    def change(hidden: Tensor, step: int) -> Tensor:
        seen.append(hidden[:, -1].clone())
        carried = torch.stack(seen[:-1]).sum(0) if step else torch.zeros(1, WIDTH)
        return hidden + 0.3 * carried[:, None] + (vectors[step] if step != 2 else 0.0)

    ids, _ = by_hand(plain, IDS, {"model.layers.2": change})
    with model.generate(IDS, max_new_tokens=NEW) as tracer:
        total, lasts = 0.0, []
        for step in tracer.iter[:]:
            hidden = model.model.layers[2].output[0]
            last = hidden[:, -1].clone()
            if step:
                hidden += 0.3 * total[:, None]
            if step != 2:
                hidden += vectors[step]
            total = last if step == 0 else total + last
            lasts.append(last)
        whole = total.save()
        mean = torch.stack(lasts).mean(0).save()
    assert list(tracer.result.ids) == ids
    assert close(whole, torch.stack(seen).sum(0))
    assert close(mean, torch.stack(seen).mean(0))


def test_steps_that_never_come_are_no_failure(model: Any, plain: Any) -> None:
    ids, logits = by_hand(plain, IDS)
    eos = ids[3]
    came = ids.index(eos) + 1
    with model.generate(IDS, max_new_tokens=NEW, eos=eos) as tracer:
        kept, listed = polytrace.save([]), []
        for step in tracer.iter[:]:
            value = model.lm_head.output[:, -1]
            listed.append(value.save())
            kept.append(value * 1.0)
            total = value if step == 0 else total + value  # noqa: F821
        model_last = value.save()
        sum_of_all = total.save()
        stacked = torch.stack(listed).save()
        late = torch.stack(listed[came:]).sum(0).save() if came < NEW else None
    assert (list(tracer.result.ids), tracer.result.finish) == (ids[:came], "eos")
    assert len(polytrace.came(listed)) == len(kept) == came
    assert listed[came - 1].steps.numbers == tuple(range(came))
    assert torch.equal(listed[0].steps[-1], listed[came - 1])
    assert all(close(one, other) for one, other in zip(kept, logits[:came], strict=True))
    assert close(sum_of_all, torch.stack(logits[:came]).sum(0))
    assert stacked.shape == (came, 1, VOCABULARY)
    with pytest.raises(GraphError, match=f"step {came} never came"):
        listed[came] + 1
    assert late is None or polytrace.came([late]) == []
    assert model_last is listed[-1] or close(model_last, logits[came - 1])


def test_a_forced_token_goes_on_and_a_constrained_choice_too(model: Any, plain: Any) -> None:
    forced = by_hand(plain, IDS)[0]
    forced[2] = (forced[2] + 1) % VOCABULARY
    rest = by_hand(plain, IDS + forced[:3], new=NEW - 3)[0]
    with model.generate(IDS, max_new_tokens=NEW) as tracer:
        for step in tracer.iter[:]:
            if step == 2:
                tracer.token = forced[2]
    assert list(tracer.result.ids) == forced[:3] + rest

    allowed = torch.full((VOCABULARY,), float("-inf"))
    allowed[[5, 6, 7]] = 0.0
    ids, _ = by_hand(plain, IDS, {"lm_head": lambda logits, step: logits + allowed})
    with model.generate(IDS, max_new_tokens=NEW) as tracer, tracer.all():
        model.lm_head.output[:] += allowed
    assert list(tracer.result.ids) == ids and set(ids) <= {5, 6, 7}

    with model.generate([IDS, OTHER], max_new_tokens=3) as tracer, tracer.iter[1]:
        tracer.token = torch.tensor([11, 12])
    assert [one.ids[1] for one in tracer.result] == [11, 12]


@pytest.mark.parametrize("wrong", [VOCABULARY, -1])
def test_a_forced_token_that_there_is_not_is_told_with_its_line(model: Any, wrong: int) -> None:
    with (
        pytest.raises(RunError, match=f"step 2 of prompt 1: .* the token {wrong}; ids are 0-{VOCABULARY - 1}") as told,
        model.generate([IDS, OTHER], max_new_tokens=4) as tracer,
    ):
        for step in tracer.iter[:]:
            if step == 2:
                tracer.token[1] = wrong
    assert told.value.where is not None and told.value.where.startswith("test_generation_language.py:")


def test_texts_to_end_at_are_refused_without_a_tokenizer_and_hurt_nobody(model: Any) -> None:
    with pytest.raises(GraphError, match="need a tokenizer") as told, model.generate(IDS, max_new_tokens=4, stop="a"):
        pass
    assert told.value.where is not None
    with model.generate(IDS, max_new_tokens=4, run=False) as tracer:
        pass
    request = tracer.built_request()
    way = replace(request.invokes[0].generation, stop=("a",))
    with pytest.raises(GraphError, match="need a tokenizer"):
        model.backend.run(replace(request, invokes=(replace(request.invokes[0], generation=way),)))


def test_a_value_ends_the_generation(model: Any, plain: Any) -> None:
    ids, _ = by_hand(plain, IDS)
    with model.generate(IDS, max_new_tokens=NEW) as tracer, tracer.all():
        tracer.stop(when=tracer.token == ids[4])
    stop = ids.index(ids[4]) + 1
    assert (list(tracer.result.ids), tracer.result.finish) == (ids[:stop], "stop")
    with model.generate(IDS, max_new_tokens=NEW) as tracer:
        for step in tracer.iter[:]:
            if step == 1:
                tracer.stop()
    assert list(tracer.result.ids) == ids[:2]


def test_next_moves_one_module_or_all_on(model: Any, plain: Any) -> None:
    _, logits = by_hand(plain, IDS)
    with model.generate(IDS, max_new_tokens=4) as tracer:
        first = model.lm_head.output[:, -1].save()
        second = model.lm_head.next().output[:, -1].save()
        third = model.lm_head.next().output[:, -1].save()
        still = model.model.layers[3].output[0].save()  # another module, whose first step it is
        moved = (third - first).save()
    assert all(close(one, other) for one, other in zip((first, second, third), logits, strict=False))
    assert still.shape[1] == len(IDS) and torch.equal(moved, third - first)
    with model.generate(IDS, max_new_tokens=4) as tracer:
        tracer.next(2)
        later = model.lm_head.output[:, -1].save()
    assert torch.equal(later, third)


def test_invokes_go_on_each_in_its_own_way(model: Any, plain: Any) -> None:
    ids, _ = by_hand(plain, IDS)
    with model.generate(max_new_tokens=NEW) as tracer:
        with tracer.invoke(OTHER, generate=False):
            source = model.model.layers[1].output[0][:, -1]
        with tracer.invoke(IDS, max_new_tokens=3):
            short = tracer.result
        with tracer.invoke(IDS):
            for _ in tracer.iter[1:3]:
                model.model.layers[1].output[0][:, -1] += 0.5 * source
            patched = tracer.result
        vector = source.save()

    def change(hidden: Tensor, step: int) -> Tensor | None:
        return hidden + 0.5 * vector if step in (1, 2) else None

    assert list(short.ids) == ids[:3]
    assert list(patched.ids) == by_hand(plain, IDS, {"model.layers.1": change})[0]
    assert [one.invoke for one in tracer.result] == [1, 2]


def test_samples_depend_on_the_seed_alone_and_prompts_of_a_list_go_on_together(model: Any, plain: Any) -> None:
    keywords: dict[str, Any] = {"max_new_tokens": 6, "do_sample": True, "temperature": 1.5, "top_k": 20}
    with model.generate(IDS, n=3, seed=5, **keywords) as several:
        pass
    with model.generate(IDS, seed=5, **keywords) as one:
        pass
    with model.generate(IDS, n=3, seed=6, **keywords) as another:
        pass
    assert len(several.result) == 3 and len({sample.ids for sample in several.result}) > 1
    assert several.result[0].ids == one.result.ids
    assert [sample.ids for sample in several.result] != [sample.ids for sample in another.result]
    with model.generate([IDS, OTHER], max_new_tokens=NEW, logprobs=2) as tracer:
        pass
    assert [list(ids) for ids in tracer.result.ids] == [by_hand(plain, ids)[0] for ids in (IDS, OTHER)]
    logits = by_hand(plain, OTHER)[1]
    expected = [float(one.log_softmax(-1).max()) for one in logits]
    assert tracer.result[1].logprobs == pytest.approx(expected, abs=1e-4)
    assert [likeliest[0][0] for likeliest in tracer.result[1].likeliest] == list(tracer.result[1].ids)


def test_an_edited_model_is_edited_at_every_step(model: Any, plain: Any) -> None:
    with model.edit() as edited:
        model.model.layers[1].output[0][:] += VECTOR
    ids, _ = by_hand(plain, IDS, {"model.layers.1": lambda hidden, step: hidden + VECTOR})
    with edited.generate(IDS, max_new_tokens=NEW) as tracer:
        pass
    assert list(tracer.result.ids) == ids
    with model.edit() as begun:
        model.model.layers[1].output[0].at(0)[:] += VECTOR  # a place in the prompt

    def change(hidden: Tensor, step: int) -> Tensor | None:
        return torch.cat([hidden[:, :1] + VECTOR, hidden[:, 1:]], 1) if step == 0 else None

    with begun.generate(IDS, max_new_tokens=NEW) as tracer:
        pass
    assert list(tracer.result.ids) == by_hand(plain, IDS, {"model.layers.1": change})[0]
    with model.edit() as last:
        model.model.layers[1].output[0].at(-1)[:] += VECTOR

    def newest(hidden: Tensor, step: int) -> Tensor:
        return torch.cat([hidden[:, :-1], hidden[:, -1:] + VECTOR], 1)

    with last.generate(IDS, max_new_tokens=NEW) as tracer:
        pass
    assert list(tracer.result.ids) == by_hand(plain, IDS, {"model.layers.1": newest})[0]


def test_an_edit_by_the_mask_is_of_every_token_that_comes(model: Any, plain: Any) -> None:
    with model.edit() as edited:
        model.model.layers[1].output[0][:] += VECTOR * edited.mask[..., None]
    with edited.generate([IDS, OTHER], max_new_tokens=NEW) as tracer:
        pass
    steered = {"model.layers.1": lambda hidden, step: hidden + VECTOR}
    assert [list(ids) for ids in tracer.result.ids] == [by_hand(plain, ids, steered)[0] for ids in (IDS, OTHER)]


def test_modules_masks_and_shapes_of_later_steps(model: Any, plain: Any) -> None:
    with model.generate([IDS, OTHER], max_new_tokens=3) as tracer:
        shapes, guesses = [], []
        for _ in tracer.iter[:]:
            hidden = model.model.layers[3].output[0]
            shapes.append(tuple(hidden.shape))
            guess = model.lm_head(model.model.norm(hidden[:, -1]))
            shapes.append(tuple(guess.shape))
            guesses.append((guess - model.lm_head.output[:, -1]).abs().max().save())
            tokens = (hidden * tracer.mask[..., None]).sum(1)
            shapes.append(tuple(tokens.shape))
            guesses.append((hidden.at(-1) - hidden[:, -1]).abs().max().save())
        with pytest.raises(GraphError, match="step 3"):
            model.lm_head.next(3).output.sum()
    assert shapes[:3] == [(2, len(IDS), WIDTH), (2, VOCABULARY), (2, WIDTH)]
    assert shapes[3:6] == [(2, 1, WIDTH), (2, VOCABULARY), (2, WIDTH)]
    assert all(float(one) < 1e-4 for one in guesses)


def test_tokens_are_heard_as_they_come(model: Any) -> None:
    heard: list[Piece] = []
    with model.generate([IDS, OTHER], max_new_tokens=4, stream=heard.append) as tracer:
        pass
    for place, one in enumerate(tracer.result):
        assert tuple(token.id for token in heard if token.sequence == place) == one.ids
    assert [token.finish for token in heard][-2:] == ["length", "length"]
    assert [piece.id for piece in model.stream(IDS, max_new_tokens=4)] == list(tracer.result[0].ids)

    def forced(tracer: Any) -> None:
        for step in tracer.iter[:]:
            tracer.token = 40 + step

    for piece in model.stream(IDS, forced, max_new_tokens=20):
        if piece.step == 2:
            break
    assert piece.id == 42
    with pytest.raises(GraphError, match="no keyword"):
        list(model.stream(IDS, max_tokens=4))
    with model.generate(IDS, max_new_tokens=2) as tracer:
        pass  # it goes on behind a loop that was left
    assert len(tracer.result.ids) == 2


def test_logs_and_caches_of_a_generation(model: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with model.generate(IDS, max_new_tokens=3) as tracer:
        cache = tracer.cache(modules=[model.model.layers[2]])
        for step in tracer.iter[:]:
            tracer.log(f"step {step}", model.lm_head.output[:, -1].norm())
    printed = capsys.readouterr().out
    assert all(f"step {step}: " in printed for step in range(3))
    assert cache["model.layers.2"].output.shape[1] == len(IDS)


def test_a_generation_ends_where_the_models_own_configuration_says(plain: Any, tmp_path: Any) -> None:
    ids, _ = by_hand(plain, IDS)
    ending = small_llama()
    ending.generation_config.eos_token_id = [ids[2], 63]
    with loaded(ending, tmp_path) as model:
        with model.generate(IDS, max_new_tokens=NEW) as tracer:
            pass
        with model.generate(IDS, max_new_tokens=NEW, eos=None) as whole:
            pass
    assert (list(tracer.result.ids), tracer.result.finish) == (ids[: ids.index(ids[2]) + 1], "eos")
    assert list(whole.result.ids) == ids


def test_what_is_drawn_at_each_step_depends_on_the_seed_alone(model: Any) -> None:
    def noisy(seed: int) -> tuple[list[int], Tensor]:
        with model.generate(IDS, max_new_tokens=5, seed=seed) as tracer:
            found = []
            for _ in tracer.iter[:]:
                hidden = model.model.layers[1].output[0]
                noise = torch.randn_like(hidden[:, -1])
                hidden[:, -1] += 0.3 * noise
                found.append(noise.save())
        return list(tracer.result.ids), torch.stack(found)

    ids, noise = noisy(3)
    assert len({float(one.sum()) for one in noise}) == 5, "each step has draws of its own"
    again, same = noisy(3)
    assert ids == again and torch.equal(noise, same)
    assert not torch.equal(noise, noisy(4)[1])


def test_what_is_drawn_from_nothing_is_drawn_once_wherever_it_is_used(model: Any) -> None:
    with model.generate(IDS, max_new_tokens=4) as tracer:
        noise = polytrace.functions.randn(WIDTH)
        used, own = [], []
        for _ in tracer.iter[:]:
            used.append((noise + 0.0 * model.model.layers[0].output[0][:, -1]).save())
            own.append((polytrace.functions.randn(WIDTH) + 0.0 * model.model.layers[0].output[0][:, -1]).save())
        noise = noise.save()
    assert all(torch.equal(one[0], noise) for one in used)
    assert len({float(one.sum()) for one in own} | {float(noise.sum())}) == 5
    with (
        pytest.raises(GraphError, match="drawn once for all of them"),
        model.generate(IDS, max_new_tokens=4) as tracer,
        tracer.all(),
    ):
        polytrace.functions.randn(WIDTH)


def test_a_users_own_truths_end_sequences(model: Any) -> None:
    with model.generate([IDS, OTHER], max_new_tokens=5) as tracer, tracer.iter[1:]:
        tracer.stop(when=torch.tensor([True, False]))
    assert [(len(one.ids), one.finish) for one in tracer.result] == [(2, "stop"), (5, "length")]


def test_truths_of_all_prompts_end_each_its_own(model: Any) -> None:
    alone = []
    for ids in (IDS, OTHER):
        with model.generate(ids, max_new_tokens=5) as tracer:
            pass
        alone.append(list(tracer.result.ids))

    def ended(when: Any) -> list[tuple[list[int], str]]:
        with model.generate(max_new_tokens=5) as tracer:
            with tracer.invoke([IDS, OTHER]):
                pass
            with tracer.invoke(OTHER):
                pass
            with tracer.invoke():
                tracer.stop(when=when(tracer))
        return [(list(one.ids), one.finish) for one in tracer.result]

    first, other = alone[0], alone[1]
    whole = [(first, "length"), (other, "length"), (other, "length")]
    cut = [(first[:1], "stop"), (other[:1], "stop"), (other[:1], "stop")]
    assert ended(lambda tracer: tracer.token == first[0]) == [cut[0], *whole[1:]] and first[0] != other[0]
    assert ended(lambda tracer: (tracer.token == other[0])[:, None]) == [whole[0], *cut[1:]]
    assert ended(lambda tracer: torch.tensor([False, False, True])) == [*whole[:2], cut[2]]
    assert ended(lambda tracer: torch.tensor([True])) == cut
    with pytest.raises(GraphError, match=r"one for each of the 3 sequences of all prompts, not shape \[2\]") as told:
        ended(lambda tracer: torch.tensor([True, False]))
    assert told.value.where is not None and told.value.where.startswith("test_generation_language.py:")


def test_what_is_there_of_a_generation_that_ends_early(model: Any) -> None:
    kept, values, total = [], [], 0
    with model.generate(IDS, max_new_tokens=5) as tracer:
        for step in tracer.iter[:]:
            value = model.model.layers[2].output[0][:, -1]
            kept.append(value.save())
            each = value.save()
            values.append(value)
            total = total + value
            last = 2 * value
            if step == 2:
                tracer.stop()
        stacked = torch.stack(values).save()
        of_all = torch.stack(values).sum(0).save()
        named = sum(values).save()
        total, last = total.save(), last.save()
    assert tracer.result.finish == "stop" and len(tracer.result.ids) == 3
    came = polytrace.came(kept)
    assert (
        len(came) == 3 and [torch.equal(one, other) for one, other in zip(came, each.steps, strict=True)] == [True] * 3
    )
    assert torch.equal(stacked, torch.stack(came))
    assert torch.allclose(of_all, sum(came)) and torch.allclose(total, sum(came)) and not torch.allclose(total, came[2])
    assert torch.equal(last, 2 * came[2])
    assert "never came" in repr(named) and "never came" in repr(kept[4])
    with pytest.raises(GraphError, match="never came"):
        _ = named.shape


def test_loops_stand_behind_each_other_and_not_in_each_other(model: Any) -> None:
    with model.generate(IDS, max_new_tokens=3) as tracer:
        for _ in tracer.iter[:]:
            first = model.model.layers[0].output[0][:, -1].save()
        with tracer.iter[1:]:
            second = model.model.layers[0].output[0][:, -1].save()
    assert torch.equal(first, second[-1])
    with pytest.raises(GraphError, match="open already"), model.generate(IDS, max_new_tokens=3) as tracer:
        for _ in tracer.iter[:]:
            for _ in tracer.iter[1:]:
                pass


def test_a_forced_token_has_its_own_log_probability(model: Any) -> None:
    with model.generate(IDS, max_new_tokens=2, logprobs=1) as tracer:
        model.lm_head.output[:, -1, 7] += 0.5
        logits = model.lm_head.output[:, -1].save()
        tracer.token = torch.tensor([9])
    assert tracer.result.ids[0] == 9 and tracer.result.likeliest[0][0][0] != 9
    assert abs(tracer.result.logprobs[0] - float(logits.log_softmax(-1)[0, 9])) < 1e-5


def test_a_token_is_used_at_the_next_step_and_not_in_a_layer_of_its_own(model: Any) -> None:
    told = r"the token that the same step draws \(.*\), which comes behind the whole model: use it at the next step"
    with pytest.raises(GraphError, match=told), model.generate(IDS, max_new_tokens=3) as tracer, tracer.all():
        model.model.layers[1].output[0][:, -1] += tracer.token[:, None] * 0.1


def test_adapters_and_standard_names_at_every_step(model: Any, plain: Any) -> None:
    generator = torch.Generator().manual_seed(1)
    left, right = 0.3 * torch.randn(WIDTH, 1, generator=generator), 0.3 * torch.randn(1, 64, generator=generator)
    weight = plain.model.layers[2].mlp.down_proj.weight
    before = weight.data.clone()
    weight.data += left @ right
    changed = by_hand(plain, IDS)[0]
    weight.data.copy_(before)
    edit = polytrace.delta({"model.layers.2.mlp.down_proj": (left, right)})
    with model.generate(IDS, max_new_tokens=NEW, edits=[edit]) as tracer:
        pass
    assert list(tracer.result.ids) == changed != by_hand(plain, IDS)[0]

    steered = by_hand(plain, IDS, {"model.layers.1": lambda hidden, step: last_steered(hidden)})[0]
    with model.generate([IDS, OTHER], max_new_tokens=NEW) as tracer:
        for _ in tracer.iter[:]:
            model.steer(1, VECTOR, positions=[-1])
            shares = model.next_token_probs.save()
            values = model.model.layers[1].v.save()
    assert list(tracer.result[0].ids) == steered
    assert shares.steps.stack().shape == (NEW, 2, VOCABULARY) and values.shape == (2, 1, 2, 8)


def last_steered(hidden: Tensor) -> Tensor:
    return torch.cat([hidden[:, :-1], hidden[:, -1:] + VECTOR], 1)


def test_values_of_two_prompts_do_not_change_places_when_one_has_ended(model: Any, plain: Any) -> None:
    short, _ = by_hand(plain, OTHER)
    with model.generate(max_new_tokens=NEW) as tracer:
        with tracer.invoke(OTHER, eos=short[2]):
            others = [model.lm_head.output[:, -1] for _ in tracer.iter[:]]
        with tracer.invoke(IDS):
            both = []
            for step in tracer.iter[:]:
                pair = torch.stack([others[step], model.lm_head.output[:, -1]])
                both.append(pair[0].save())
    came = short.index(short[2]) + 1
    assert len(tracer.result[0].ids) == came < NEW == len(tracer.result[1].ids)
    logits = by_hand(plain, OTHER)[1]
    assert len(polytrace.came(both)) == came
    assert all(close(one, other) for one, other in zip(polytrace.came(both), logits, strict=False))
