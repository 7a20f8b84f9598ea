"""Tokens become text that is never taken back, whatever bytes they are cut at, and that ends before a stop text."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE

from api.texts import StopCutter, TextStream, special_tokens


def of_bytes() -> Tokenizer:
    """Every byte is a token, as GPT-2 writes them."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(BPE(vocab={letter: place for place, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<end>"])
    return tokenizer


def of_pieces() -> Tokenizer:
    """Words begin with a mark, and what has no piece falls back to bytes, as Llama 2 writes them."""
    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "b", "▁a", "▁b", "é"]
    vocab = {piece: place for place, piece in enumerate(pieces)}
    model = BPE(vocab=vocab, merges=[("▁", "a"), ("▁", "b")], unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    return tokenizer


def streamed(tokenizer: Any, prompt: list[int], ids: list[int]) -> list[str]:
    stream = TextStream(tokenizer, prompt, special_tokens(tokenizer))
    return [*(stream.add(token) for token in ids), stream.rest()]


@pytest.mark.parametrize("make", [of_bytes, of_pieces])
@given(
    prompt=st.text("ab é", min_size=1, max_size=5),
    text=st.text(st.one_of(st.sampled_from("ab é😀ñ한"), st.characters(exclude_categories=["Cs"])), max_size=12),
)
@settings(max_examples=60, deadline=None)
def test_the_pieces_are_the_text_and_no_character_is_cut(make: Any, prompt: str, text: str) -> None:
    tokenizer = make()
    whole = tokenizer.encode(prompt + text).ids
    before = len(tokenizer.encode(prompt).ids)
    if whole[:before] != tokenizer.encode(prompt).ids:
        return  # the text changes how the prompt's last word is cut
    pieces = streamed(tokenizer, whole[:before], whole[before:])
    expected = tokenizer.decode(whole)[len(tokenizer.decode(whole[:before])) :]
    assert "".join(pieces) == expected
    assert all("�" not in piece for piece in pieces) or "�" in text


@given(st.lists(st.one_of(st.integers(0, 255), st.sampled_from([*range(128, 256)])), max_size=60), st.text("aé😀"))
@settings(max_examples=100, deadline=None)
def test_bytes_that_are_no_text_are_told_as_such_and_do_not_hold_up_what_follows(noise: list[int], text: str) -> None:
    tokenizer = of_bytes()
    byte_of = {place: letter for letter, place in tokenizer.get_vocab().items()}
    ids = [*(number for number in noise if number in byte_of), *tokenizer.encode(text).ids]
    prompt = tokenizer.encode("a").ids
    pieces = streamed(tokenizer, prompt, ids)
    assert "".join(pieces) == tokenizer.decode(prompt + ids)[1:]
    for place in range(24, len(ids)):
        assert any(pieces[place - 24 : place]), "nothing is held back for long"


def test_half_a_character_at_the_end_is_told_at_the_end() -> None:
    tokenizer = of_bytes()
    prompt, ids = tokenizer.encode("a").ids, tokenizer.encode("é😀").ids
    assert streamed(tokenizer, prompt, ids[:-1]) == ["", "é", "", "", "", "�"]
    assert streamed(tokenizer, prompt, ids) == ["", "é", "", "", "", "😀", ""]


def test_a_special_token_has_no_text() -> None:
    tokenizer = of_bytes()
    end = tokenizer.token_to_id("<end>")
    assert streamed(tokenizer, [end, end], [end, *tokenizer.encode("b").ids, end]) == ["", "b", "", ""]


@given(st.lists(st.text("ab", max_size=3), max_size=8), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3))
@settings(max_examples=200, deadline=None)
def test_a_text_is_cut_before_its_first_stop_text_wherever_its_pieces_end(pieces: list[str], stops: list[str]) -> None:
    cutter = StopCutter(stops)
    given_ = [cutter.add(piece) for piece in pieces]
    found = "".join(given_) + cutter.rest()
    whole = "".join(pieces)
    # the first piece with which a stop text is whole decides; of those that it completes, the one that begins first
    for end in range(len(pieces) + 1):
        so_far = "".join(pieces[:end])
        places = [so_far.find(stop) for stop in stops if stop in so_far]
        if places:
            assert found == whole[: min(places)] and cutter.is_over
            return
    assert found == whole and not cutter.is_over
