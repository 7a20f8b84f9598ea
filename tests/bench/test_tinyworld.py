"""The shipped model is what its card says: size, shape, tokenizer, and scores computed anew on held-out samples."""

import json
import random

import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoTokenizer, LlamaForCausalLM, PreTrainedModel

from bench.tinyworld import FOLDER, corpus, evaluate

NUM_SAMPLES = 200


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return evaluate.load()[0]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return evaluate.load_tokenizer()


def test_the_model_is_an_unmodified_llama_with_four_key_value_heads(model: PreTrainedModel) -> None:
    assert type(model) is LlamaForCausalLM
    assert model.config.num_key_value_heads == 4
    assert model.config.num_attention_heads == 8
    assert model.config.num_hidden_layers >= 8
    assert model.lm_head.weight.data_ptr() != model.model.embed_tokens.weight.data_ptr()
    divisible_by_four = (model.config.vocab_size, model.config.hidden_size, model.config.intermediate_size)
    assert all(size % 4 == 0 for size in divisible_by_four)


def test_the_model_is_small_enough_to_ship(model: PreTrainedModel) -> None:
    assert model.num_parameters() <= 12_000_000
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) <= 25_000_000


def test_both_tokenizers_agree_and_give_the_text_back(tokenizer: Tokenizer) -> None:
    wrapped = AutoTokenizer.from_pretrained(FOLDER)
    rng = random.Random(0)
    texts = [corpus.sentence(rng).text for _ in range(50)] + ["Zażółć gęślą jaźń?", "  two  spaces\n", "x = [1, 2]"]
    for text in texts:
        ids = tokenizer.encode(text).ids
        assert wrapped(text)["input_ids"] == ids
        assert ids[0] == corpus.BOS
        assert tokenizer.decode(ids) == wrapped.decode(ids, skip_special_tokens=True) == text


def test_every_name_is_one_token_inside_a_sentence(tokenizer: Tokenizer) -> None:
    assert all(len(tokenizer.encode(f" {name}", add_special_tokens=False).ids) == 1 for name in corpus.NAMES)


def test_held_out_phrasings_and_names_occur_nowhere_in_training() -> None:
    rng = random.Random(0)
    told = {corpus.training_indirect_object(rng).answer.strip() for _ in range(3000)}
    assert told.isdisjoint(corpus.HELD_OUT_NAMES)
    assert len(told) == len(corpus.NAMES) - len(corpus.HELD_OUT_NAMES)
    for relation in corpus.RELATIONS:
        assert set(relation.train).isdisjoint(relation.held_out)


def test_nine_in_ten_facts_are_known_in_phrasings_never_seen(model: PreTrainedModel, tokenizer: Tokenizer) -> None:
    facts = random.Random(1).sample(list(corpus.held_out_facts()), NUM_SAMPLES)
    assert evaluate.accuracy(model, tokenizer, [sentence for _, sentence in facts]) >= 0.9


@pytest.mark.parametrize("is_new_frame", [False, True])
def test_nine_in_ten_indirect_objects_are_right_with_names_never_seen(
    model: PreTrainedModel, tokenizer: Tokenizer, is_new_frame: bool
) -> None:
    rng = random.Random(2)
    sentences = [corpus.held_out_indirect_object(rng, is_new_frame=is_new_frame) for _ in range(NUM_SAMPLES)]
    assert evaluate.accuracy(model, tokenizer, sentences) >= 0.9


def test_the_induction_head_of_the_card_is_the_strongest_and_as_strong_as_it_says() -> None:
    model, _ = evaluate.load()
    card = json.loads((FOLDER / "scores.json").read_text())["induction_head"]
    scores_LH = evaluate.induction_scores(model, num_rows=16)
    found = evaluate.induction_head(scores_LH)
    assert (found.layer, found.head) == (card["layer"], card["head"])
    # A quarter of the card's rows, so the mean may lie a little elsewhere.
    assert found.score == pytest.approx(card["score"], abs=0.05)
    assert found.score > 0.6


@pytest.mark.parametrize("question", corpus.FACT_PROMPTS)
def test_example_questions_are_answered(
    model: PreTrainedModel, tokenizer: Tokenizer, question: corpus.Question
) -> None:
    assert question.subject in question.prompt
    assert _said_next(model, tokenizer, question.prompt) == question.answer


@pytest.mark.parametrize("pair", corpus.FACT_PAIRS + corpus.INDIRECT_OBJECT_PAIRS)
def test_example_pairs_are_of_equal_length_and_both_answered(
    model: PreTrainedModel, tokenizer: Tokenizer, pair: corpus.Pair
) -> None:
    assert len(tokenizer.encode(pair.clean).ids) == len(tokenizer.encode(pair.corrupt).ids)
    assert _said_next(model, tokenizer, pair.clean) == pair.clean_answer
    assert _said_next(model, tokenizer, pair.corrupt) == pair.corrupt_answer


@torch.inference_mode()
def _said_next(model: PreTrainedModel, tokenizer: Tokenizer, prompt: str) -> str:
    logits_NTV = model(input_ids=torch.tensor([tokenizer.encode(prompt).ids])).logits
    return tokenizer.decode([int(logits_NTV[0, -1].argmax())])
