"""Tiny models of all classes that nnterp names, with a tokenizer that has words, as folders that both sides load."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from bench.families.configurations import tiny_config, tiny_model
from bench.families.page import NNTERP

_VOCABULARY = 320  # at most: bytes, a pad, and what words are put together of
_TEXT = "the king the queen the cat the dog sat on the mat saw near the hat"


def make(name: str, folder: Path) -> None:
    """A class's tiny model, which edits show in, and the tokenizer."""
    tokenizer, config = _tokenizer(), tiny_config(name)
    config.get_text_config(decoder=True).vocab_size = len(tokenizer)
    tiny_model(name, config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def make_all(folder: Path) -> dict[str, Path]:
    """One folder a class."""
    folders = {name: folder / name for name in NNTERP}
    for name, own in folders.items():
        make(name, own)
    return folders


def _tokenizer() -> PreTrainedTokenizerFast:
    """Byte pairs, so that every text has tokens, and a space before a word belongs to it."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=_VOCABULARY, initial_alphabet=alphabet, special_tokens=["<pad>"], show_progress=False
    )
    made.train_from_iterator([_TEXT], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", eos_token="<pad>", padding_side="left", model_max_length=64
    )
