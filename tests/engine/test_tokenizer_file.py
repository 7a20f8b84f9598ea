"""The tokenizer file of a model: none where the model came without one, whatever transformers makes of that."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import GPT2Config, LlamaConfig, PretrainedConfig, T5Config

from engine.tokenizer import tokenizer_json


@pytest.mark.parametrize("config", [GPT2Config(), T5Config(), LlamaConfig()], ids=lambda config: config.model_type)
def test_a_model_without_a_tokenizer_has_none(config: PretrainedConfig, tmp_path: Path) -> None:
    config.save_pretrained(tmp_path)
    assert tokenizer_json(str(tmp_path)) is None


def test_a_tokenizer_of_older_files_is_found(tmp_path: Path) -> None:
    GPT2Config().save_pretrained(tmp_path)
    (tmp_path / "vocab.json").write_text('{"<|endoftext|>": 0, "a": 1, "b": 2, "ab": 3}')
    (tmp_path / "merges.txt").write_text("#version: 0.2\na b\n")
    made = tokenizer_json(str(tmp_path))
    assert made is not None and b'"ab"' in made
