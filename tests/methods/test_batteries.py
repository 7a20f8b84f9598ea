"""Target tokens and prompt batteries against plain tokenizers and plain probabilities."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer

from bench.tinyworld import FOLDER
from polytrace.errors import GraphError
from polytrace.methods import Prompt, collisions, logit_lens, run_battery, target_sets, target_tokens
from polytrace.methods.targets import _behind_text

TOWER, COLOSSEUM = "The Eiffel Tower is in the city of", "The Colosseum is in the city of"
CITIES = {"right": "Paris", "wrong": ["Rome", "London"]}


def test_the_first_token_of_every_way_to_write_a_word(world: Any) -> None:
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)

    def first(text: str) -> int:
        return int(tokenizer(text, add_special_tokens=False).input_ids[0])

    assert target_tokens(world, "Paris") == [first(" Paris"), first("Paris")]
    assert target_tokens(world, "Paris", no_space=False) == [first(" Paris")]
    assert target_tokens(world, ["Paris", "Rome"], whole=True) == [first(" Paris"), first(" Rome")]
    small = target_tokens(world, "Paris", capitalised=True)
    assert small == list(dict.fromkeys([first(" Paris"), first("Paris"), first(" paris"), first("paris")]))
    assert target_tokens(world, [7, "Paris"]) == [7, first(" Paris"), first("Paris")]
    with pytest.raises(GraphError, match="one whole token"):
        target_tokens(world, "Saint Petersburg and Giza", whole=True)


def test_a_tokenizer_that_puts_a_space_before_the_first_word_is_not_misread() -> None:
    """As sentencepiece tokenizers do: alone, "Paris" and " Paris" begin with the same token."""
    vocabulary = {"▁": 0, "▁Paris": 1, "Paris": 2, "\n": 3, "?": 4}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Metaspace(prepend_scheme="first"), pre_tokenizers.Split("\n", "isolated")]
    )
    tokenizer.decoder = decoders.Metaspace()
    assert tokenizer.encode("Paris").ids == [1]
    assert _behind_text(tokenizer, " Paris") == [1]
    assert _behind_text(tokenizer, "Paris") == [2]


def test_answers_that_begin_alike_are_told(world: Any) -> None:
    with pytest.raises(GraphError, match=r"'a' and 'b' may begin with the same token \d+ \('P'\)"):
        target_sets(world, {"a": "Paris", "b": "Prague"})
    sets = target_sets(world, {"a": "Paris", "b": "Prague"}, may_collide=True)
    (shared,) = collisions(sets)
    assert world.tokenizer.decode([shared]) == "P" and collisions(sets)[shared] == ("a", "b")
    assert collisions(target_sets(world, {"a": "Paris", "b": "Prague"}, whole=True)) == {}


def test_a_battery_has_the_probabilities_of_plain_runs_in_one_request(world: Any) -> None:
    plain = AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32).eval()
    asked = [
        Prompt(text=TOWER, answers=CITIES, name="tower"),
        Prompt(text=COLOSSEUM, answers={"right": "Rome", "other": ["Paris", 5]}),
    ]
    battery = run_battery(world, asked, no_space=False)
    assert battery.probability.dims == ("prompt", "target")
    assert battery.probability.target.values.tolist() == ["right", "wrong", "other"]
    assert battery.probability.prompt_text.values.tolist() == ["tower", COLOSSEUM]
    for number, prompt in enumerate(asked):
        ids = world.tokenizer.encode(prompt.text).ids
        with torch.no_grad():
            share = plain(torch.tensor([ids])).logits[0, -1].softmax(-1)
        for name, tokens in battery.targets[number].items():
            found = float(battery.probability.isel(prompt=number).sel(target=name))
            assert abs(found - float(share[list(tokens)].sum())) <= 1e-5
    assert np.isnan(battery.probability.isel(prompt=1).sel(target="wrong"))
    assert float(battery.probability.isel(prompt=0).sel(target="right")) > 0.9
    assert battery.receipt.result_bytes == 4 * 4, "one number a prompt and set"
    frame = battery.to_dataframe()
    assert len(frame) == 6 and set(frame.columns) >= {"prompt", "target", "prompt_text", "probability"}


def test_a_battery_under_a_lens_and_under_an_intervention(world: Any) -> None:
    asked = [Prompt(text=TOWER, answers=CITIES), Prompt(text=COLOSSEUM, answers=CITIES)]
    lens = run_battery(world, asked, lens="logit", layers=[2, -1], no_space=False).probability
    assert lens.dims == ("prompt", "layer", "target") and lens.layer.values.tolist() == [2, 7]
    read = logit_lens(world, TOWER, [2, 7], tokens=[" Paris", " Rome", " London"]).probability.values[0, :, 0]
    assert np.abs(lens.isel(prompt=0).sel(target="right") - read[:, 0]).max() <= 1e-6
    assert np.abs(lens.isel(prompt=0).sel(target="wrong") - read[:, 1:].sum(-1)).max() <= 1e-6
    plain = run_battery(world, asked, no_space=False).probability
    assert np.abs(plain - lens.sel(layer=7)).max() <= 1e-6
    seen = []

    def silence(prompt: Prompt) -> None:
        seen.append(prompt.text)
        if prompt.text == TOWER:
            for layer in world.layers[2:]:  # attention that brings the fact
                layer.z[:, -1] = 0.0

    changed = run_battery(world, asked, intervention=silence, no_space=False).probability
    assert seen == [TOWER, COLOSSEUM]
    assert float(changed[0, 0]) < 0.5 < float(plain[0, 0])
    assert np.array_equal(changed[1], plain[1])


def test_what_is_no_battery_is_refused(world: Any) -> None:
    wrong: list[tuple[Any, str]] = [
        ([], "no prompts"),
        (["text"], "number 0 is no Prompt"),
        ([Prompt(text=["a", "b"], answers={"x": "Paris"})], "2 prompts, not one"),
        ([Prompt(text="a", answers={})], "no answers"),
        ([Prompt(text="a", answers={"x": " "})], "a target is a word"),
    ]
    for asked, words in wrong:
        with pytest.raises(GraphError, match=words):
            run_battery(world, asked)
    with pytest.raises(GraphError, match="lens is 'logit'"):
        run_battery(world, [Prompt(text="a", answers=CITIES)], lens="tuned", no_space=False)
