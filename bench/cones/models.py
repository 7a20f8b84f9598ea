"""Seeded random Llamas in a cached folder: `8x512` has 8 layers of 512 features.

Weights are drawn so wide (1 / sqrt(features)) that one changed row moves the logits far beyond rounding.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

CACHE = Path.home() / ".cache" / "polytrace" / "bench"
_FORMAT = 1  # of the folders; another number makes them anew


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """A Llama's widths."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    vocabulary: int = 4096
    context: int = 2048

    @property
    def name(self) -> str:
        return f"{self.layers}x{self.hidden}"


SIZES = {
    size.name: size
    for size in (
        Size(layers=4, hidden=64, intermediate=176, heads=4, kv_heads=2, vocabulary=256),  # to see that it works
        Size(layers=48, hidden=32, intermediate=64, heads=2, kv_heads=1, vocabulary=256),  # many reads
        Size(layers=8, hidden=512, intermediate=1408, heads=8, kv_heads=4),
        Size(layers=16, hidden=1024, intermediate=2816, heads=16, kv_heads=8),
    )
}


def folder_of(name: str, *, cache: Path = CACHE) -> Path:
    """The folder of a size's model, made when it is not there; a path is taken as it is."""
    if name not in SIZES:
        return Path(name)
    folder = cache / f"llama-{name}-v{_FORMAT}"
    if not folder.is_dir():
        cache.mkdir(parents=True, exist_ok=True)
        made = Path(tempfile.mkdtemp(dir=cache))
        try:
            _make(SIZES[name], made)
            made.rename(folder)
        except OSError:
            shutil.rmtree(made, ignore_errors=True)
            if not folder.is_dir():  # else somebody else has just made it
                raise
    return folder


def layer_parameters(folder: Path) -> int:
    """Weights of one decoder layer's matrices: a row that runs through it costs twice as many operations."""
    config = json.loads((folder / "config.json").read_text())
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    width = config.get("head_dim") or hidden // heads
    attention = 2 * hidden * width * (heads + config["num_key_value_heads"])
    return int(attention + 3 * hidden * config["intermediate_size"])


def _make(size: Size, folder: Path) -> None:
    config = LlamaConfig(
        num_hidden_layers=size.layers,
        hidden_size=size.hidden,
        intermediate_size=size.intermediate,
        num_attention_heads=size.heads,
        num_key_value_heads=size.kv_heads,
        vocab_size=size.vocabulary,
        max_position_embeddings=size.context,
        initializer_range=size.hidden**-0.5,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
        dtype="float32",
    )
    state = torch.get_rng_state()
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    torch.set_rng_state(state)
    model.save_pretrained(folder)
    words = Tokenizer(models.WordLevel({f"w{token}": token for token in range(size.vocabulary)}, unk_token="w2"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w2", padding_side="left")
    tokenizer.save_pretrained(folder)
