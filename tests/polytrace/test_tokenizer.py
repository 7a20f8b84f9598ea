"""`model.tokenizer`: transformers' calls with transformers' numbers, and all that `tokenizers` has."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Encoding
from transformers import AutoTokenizer

import polytrace
from bench import tinyworld
from polytrace.errors import GraphError

TEXTS = ["The Eiffel Tower is in the city of", " Paris", ""]


@pytest.fixture(scope="module")
def model() -> Iterator[Any]:
    with polytrace.load(str(tinyworld.FOLDER), threads=1) as model:
        yield model


@pytest.fixture(scope="module")
def theirs() -> Any:
    return AutoTokenizer.from_pretrained(str(tinyworld.FOLDER))


@pytest.mark.parametrize("special", [True, False])
def test_a_call_gives_what_transformers_gives(model: Any, theirs: Any, special: bool) -> None:
    for text in TEXTS:
        ours, expected = model.tokenizer(text, add_special_tokens=special), theirs(text, add_special_tokens=special)
        assert ours.input_ids == ours["input_ids"] == expected.input_ids
        assert ours.attention_mask == expected.attention_mask
    ours, expected = model.tokenizer(TEXTS, add_special_tokens=special), theirs(TEXTS, add_special_tokens=special)
    assert ours.input_ids == expected.input_ids and ours.attention_mask == expected.attention_mask
    assert model.tokenizer(" Paris").input_ids[0] == theirs.bos_token_id != model.tokenizer(" Rome").input_ids[1]


def test_tensors_and_arrays_of_a_call(model: Any, theirs: Any) -> None:
    ours, expected = model.tokenizer(TEXTS[0], return_tensors="pt"), theirs(TEXTS[0], return_tensors="pt")
    assert torch.equal(ours.input_ids, expected.input_ids) and ours.input_ids.dtype == torch.int64
    assert torch.equal(ours.attention_mask, expected.attention_mask)
    assert np.array_equal(
        model.tokenizer([TEXTS[1]] * 2, return_tensors="np").input_ids, [theirs(TEXTS[1]).input_ids] * 2
    )
    with pytest.raises(GraphError, match=r"these texts have 1 to \d+ tokens.*\(test_tokenizer.py:\d+\)"):
        model.tokenizer(TEXTS, return_tensors="pt")
    with pytest.raises(GraphError, match="return_tensors is 'pt' or 'np', not 'tf'"):
        model.tokenizer("a", return_tensors="tf")
    for tokens in ([1, 2], 3, None, torch.tensor(3), torch.tensor([1, 2])):
        with pytest.raises(GraphError, match=r"takes a text, or several: write \.decode\(ids\).*test_tokenizer.py:\d+"):
            model.tokenizer(tokens)


def test_what_a_call_gives_is_a_prompt(model: Any) -> None:
    with model.trace(TEXTS[0]):
        logits = model.lm_head.output[:, -1].save()
    with model.trace(model.tokenizer(TEXTS[0])) as tracer:
        same = model.lm_head.output[:, -1].save()
    assert torch.equal(logits, same) and tracer.lengths == (len(model.tokenizer.encode(TEXTS[0])),)
    with model.trace(model.tokenizer.encode(TEXTS[0])):
        same = model.lm_head.output[:, -1].save()
    assert torch.equal(logits, same)


def test_decode_takes_whatever_has_tokens_in_it(model: Any, theirs: Any) -> None:
    ids = model.tokenizer(TEXTS[0]).input_ids
    text = theirs.decode(ids, skip_special_tokens=True)
    decode = model.tokenizer.decode
    for given in (ids, tuple(ids), torch.tensor(ids), np.array(ids), list(torch.tensor(ids)), list(np.array(ids))):
        assert decode(given) == text
    for one in (ids[-1], torch.tensor(ids[-1]), np.int64(ids[-1]), torch.tensor([ids[-1]])):
        assert decode(one) == theirs.decode([ids[-1]])
    rows = torch.tensor([ids, ids])
    assert decode(rows) == model.tokenizer.batch_decode(rows) == [text, text]
    assert decode(ids, skip_special_tokens=False) == decode(ids, False) == theirs.decode(ids) != text
    assert decode([]) == ""
    for wrong in (1.5, torch.tensor([1.0]), "Paris", True):
        with pytest.raises(GraphError, match=r"a token id is an integer, not .*\(test_tokenizer.py:\d+\)"):
            decode(wrong)
    with pytest.raises(GraphError, match="a recorded value has no data yet"), model.trace(ids):
        decode(model.lm_head.output[0, -1].argmax(-1))


def test_an_encoding_is_a_list_of_its_ids_and_all_that_tokenizers_has(model: Any, theirs: Any) -> None:
    encoded = model.tokenizer.encode(TEXTS[0], add_special_tokens=False)
    assert encoded == encoded.ids == theirs.encode(TEXTS[0], add_special_tokens=False)
    assert isinstance(encoded.encoding, Encoding) and encoded.tokens == encoded.encoding.tokens
    assert encoded.offsets[0][0] == 0 and encoded[0] == encoded.ids[0]
    bos = theirs.bos_token
    assert model.tokenizer.token_to_id(bos) == model.tokenizer.get_vocab()[bos] == theirs.bos_token_id
    assert model.tokenizer.id_to_token(5) == theirs.convert_ids_to_tokens(5) and len(model.tokenizer) == len(theirs)
    assert "token_to_id" in dir(model.tokenizer)
    with pytest.raises(AttributeError, match="has no 'apply_chat_template': it is the `tokenizers`"):
        _ = model.tokenizer.apply_chat_template
