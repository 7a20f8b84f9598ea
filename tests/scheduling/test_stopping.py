"""When sequences end: against decoding everything anew at each token, and against transformers' own criterion."""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import cache

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, StopStringCriteria

from bench import tinyworld
from polytrace.graph import Generation
from polytrace.tokenizer import load_tokenizer
from scheduling.stopping import Decode, Stopping

LONG = 10_000


@cache
def byte_level() -> Tokenizer:
    """The demo model's: every byte is a token, and many words."""
    return load_tokenizer((tinyworld.FOLDER / "tokenizer.json").read_bytes())


@cache
def byte_fallback() -> Tokenizer:
    """As Llama's first ones: words with their space, which decoders drop in front of a text, and bytes."""
    pieces = ["<unk>", "<s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    words = [
        "▁",
        "▁stop",
        "st",
        "op",
        "stopper",
        "▁sto",
        "p",
        "a",
        "▁a",
        "b",
        "\n",
        "中",
        "é",
        "▁Rome",
        ".",
        "o",
        "s",
        "t",
    ]
    tokenizer = Tokenizer(
        models.BPE(
            {piece: place for place, piece in enumerate([*pieces, *words])}, [], unk_token="<unk>", byte_fallback=True
        )
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>"])
    return tokenizer


TOKENIZERS = {"byte level": byte_level, "byte fallback": byte_fallback}
TEXTS = [
    "The stop is here. Stop there, or stopper? sto pp stop",
    "one\n\ntwo\nthree\n\n\nfour",
    "naïve café, über alles: 中文字符, 日本語 and 🙂🙃 emoji 🏳️‍🌈 done",
    "aaaaabaaaaab ababab",
]


def some_ids(tokenizer: Tokenizer, chosen: random.Random) -> list[int]:
    """Texts cut in odd places, with tokens in between that nobody asked for."""
    ids: list[int] = []
    while len(ids) < 60:
        piece = chosen.choice(TEXTS)
        start = chosen.randrange(len(piece))
        cut = tokenizer.encode(piece[start : start + chosen.randint(1, 12)], add_special_tokens=False).ids
        ids += cut if chosen.random() < 0.7 else chosen.choices(range(tokenizer.get_vocab_size()), k=2)
    return ids


def some_stops(chosen: random.Random, written: str) -> list[str]:
    """Pieces of what will be written, and others."""
    stops = []
    for _ in range(chosen.randint(1, 3)):
        source = chosen.choice([written, written, *TEXTS]).replace("\ufffd", "")
        start = chosen.randrange(max(1, len(source) - 8))
        stops.append(source[start : start + chosen.randint(1, 8)] or "stop")
    return stops


def ends_at(stopping: Stopping, ids: Sequence[int]) -> int | None:
    """At which token a sequence ends by a text."""
    for place, token in enumerate(ids):
        reason = stopping.advance(token)
        if reason is not None:
            assert reason == "stop"
            return place
    return None


def ends_by_decoding_all(tokenizer: Tokenizer, stops: Sequence[str], prompt: list[int], ids: list[int]) -> int | None:
    known = len(tokenizer.decode(prompt, skip_special_tokens=False))
    for place in range(len(ids)):
        text = tokenizer.decode([*prompt, *ids[: place + 1]], skip_special_tokens=False)[known:]
        if any(stop in text for stop in stops):
            return place
    return None


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("has_prompt", [False, True])
def test_a_sequence_ends_where_its_whole_text_first_has_a_stop(name: str, has_prompt: bool) -> None:
    tokenizer = TOKENIZERS[name]()
    num_ended = num_late = 0
    for seed in range(400):
        chosen = random.Random(seed)
        ids = some_ids(tokenizer, chosen)
        # a prompt that ends inside a character would change what its own text is
        prompt = tokenizer.encode(chosen.choice(TEXTS[:2]), add_special_tokens=False).ids if has_prompt else []
        stops = some_stops(chosen, tokenizer.decode(ids, skip_special_tokens=False))
        stopping = Stopping(Generation(max_new_tokens=LONG, stop=tuple(stops)), decoding(tokenizer), prompt)
        wanted = ends_by_decoding_all(tokenizer, stops, prompt, ids)
        assert ends_at(stopping, ids) == wanted, (seed, stops)
        num_ended += wanted is not None
        num_late += wanted is not None and wanted > 10
    assert 400 > num_ended > 200 and num_late > 50


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_sequence_ends_at_the_token_at_which_transformers_ends_it(name: str) -> None:
    tokenizer = TOKENIZERS[name]()
    theirs = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    num_ended = 0
    for seed in range(12):
        chosen = random.Random(seed)
        stops = ["stop", ["\n\n", "é"], ["中文", "Rome."], "op"][seed % 4]
        stops = [stops] if isinstance(stops, str) else stops
        criterion = StopStringCriteria(theirs, stops)
        for _ in range(25):
            ids = some_ids(tokenizer, chosen)
            stopping = Stopping(Generation(max_new_tokens=LONG, stop=tuple(stops)), decoding(tokenizer))
            # theirs writes each token as it is behind others, so a first token is put before, in which no text ends
            first = tokenizer.encode("a", add_special_tokens=False).ids
            wanted = next(
                (
                    place
                    for place in range(len(ids))
                    if criterion(torch.tensor([[*first, *ids[: place + 1]]]), None).item()
                ),
                None,
            )
            assert ends_at(stopping, ids) == wanted
            num_ended += wanted is not None
    assert num_ended > 60


def decoding(tokenizer: Tokenizer, most: int = 40) -> Decode:
    """Decodes few tokens at a time only."""

    def decode(ids: Sequence[int]) -> str:
        assert len(ids) <= most
        return str(tokenizer.decode(list(ids), skip_special_tokens=False))

    return decode


def test_a_text_may_span_tokens_and_end_inside_one() -> None:
    tokenizer = byte_fallback()
    ids = [tokenizer.token_to_id(piece) for piece in ("a", "▁sto", "p", "▁stop", "stopper")]
    for stop, place in {" stop": 2, "a st": 1, "pst": 4, "top s": 3, "stopp": 4, "a": 0, " a": None}.items():
        stopping = Stopping(Generation(max_new_tokens=LONG, stop=(stop,)), decoding(tokenizer))
        assert ends_at(stopping, ids) == place


def test_a_character_of_several_tokens_is_found_at_its_last() -> None:
    tokenizer = byte_level()
    ids = tokenizer.encode("é🙂!", add_special_tokens=False).ids
    assert len(ids) > 3
    stopping = Stopping(Generation(max_new_tokens=LONG, stop=("🙂",)), decoding(tokenizer))
    assert ends_at(stopping, ids) == len(ids) - 2


def test_a_long_run_of_broken_bytes_costs_no_more_than_a_short_one() -> None:
    tokenizer = byte_level()
    broken = tokenizer.encode("é", add_special_tokens=False).ids[0]
    stopping = Stopping(Generation(max_new_tokens=LONG, stop=("stop",)), decoding(tokenizer))
    assert ends_at(stopping, [broken] * 500) is None
    ids = tokenizer.encode(" stop", add_special_tokens=False).ids
    assert ends_at(stopping, ids) == len(ids) - 1


def test_tokens_that_write_nothing_leave_the_text_together() -> None:
    tokenizer = byte_fallback()
    silent = tokenizer.token_to_id("<s>")

    def decode(ids: Sequence[int]) -> str:
        assert len(ids) < 40
        return str(tokenizer.decode(list(ids), skip_special_tokens=True))

    ids = [tokenizer.token_to_id("a"), *[silent] * 100, tokenizer.token_to_id("▁stop")]
    assert ends_at(Stopping(Generation(max_new_tokens=LONG, stop=("a stop",)), decode), ids) == 101


def test_an_end_token_goes_before_a_text_and_a_text_before_the_length() -> None:
    tokenizer = byte_fallback()
    stop, other = tokenizer.token_to_id("▁stop"), tokenizer.token_to_id("a")
    generation = Generation(max_new_tokens=2, eos=(stop,), stop=("stop",))
    assert Stopping(generation, decoding(tokenizer)).advance(stop) == "eos"
    both = Stopping(Generation(max_new_tokens=2, stop=("stop",)), decoding(tokenizer))
    assert [both.advance(token) for token in (other, stop)] == [None, "stop"]
    plain = Stopping(Generation(max_new_tokens=2, eos=(stop, 7)))
    assert [plain.advance(token) for token in (other, other)] == [None, "length"]
    assert Stopping(Generation(max_new_tokens=1)).advance(other) == "length"


def test_stop_texts_without_a_tokenizer_are_refused() -> None:
    with pytest.raises(ValueError, match="need the model's tokenizer"):
        Stopping(Generation(max_new_tokens=1, stop=("x",)))
