"""The tokenizer file of a served model, which clients tokenise with."""

from __future__ import annotations

from pathlib import Path

from transformers import AutoConfig, AutoTokenizer, GenerationConfig
from transformers.utils.hub import cached_file


def tokenizer_json(source: str) -> bytes | None:
    """Bytes of the model's `tokenizer.json`, made by transformers when only older files exist; None without any."""
    folder = Path(source)
    if folder.is_dir():
        file = folder / "tokenizer.json"
        found = str(file) if file.is_file() else None
    else:
        found = cached_file(source, "tokenizer.json", _raise_exceptions_for_missing_entries=False)
    if found is not None:
        return Path(found).read_bytes()
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError):
        return None
    if len(set(tokenizer.get_vocab()) - set(tokenizer.get_added_vocab())) <= 1:
        return None  # transformers makes some of their class's special tokens alone where there is no file at all
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return backend.to_str().encode() if backend is not None else None


def end_tokens(source: str) -> tuple[int, ...]:
    """The tokens behind which a text of the model ends, as its generation's configuration says, else its own."""
    try:
        found = GenerationConfig.from_pretrained(source).eos_token_id
    except (OSError, ValueError):
        found = None
    if found is None:
        try:
            found = getattr(AutoConfig.from_pretrained(source).get_text_config(), "eos_token_id", None)
        except (OSError, ValueError):
            found = None
    return () if found is None else (found,) if isinstance(found, int) else tuple(found)
