"""A served model's chat template, as its tokenizer has it."""

from __future__ import annotations

import json
from pathlib import Path

from transformers import AutoTokenizer
from transformers.utils.hub import cached_file

from polytrace.description import ChatFormat

_MAX_CHARACTERS = 1 << 20  # of all templates: they travel with the description


def chat_format(source: str) -> ChatFormat | None:
    """The templates and special tokens of the model's tokenizer; None where it has no template."""
    if not _has_template(source):
        return None
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError, ImportError, KeyError, TypeError):
        return None  # a model without a tokenizer that can be loaded serves token ids
    found = tokenizer.chat_template
    templates = {"default": found} if isinstance(found, str) else dict(found or {})
    if not templates or sum(map(len, templates.values())) > _MAX_CHARACTERS:
        return None
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items() if isinstance(token, str)}
    return ChatFormat(templates=templates, special_tokens=special)


def _has_template(source: str) -> bool:
    """Whether a look at the tokenizer is worth its time: it takes a second for a large vocabulary."""
    if _file(source, "chat_template.jinja") is not None:
        return True
    settings = _file(source, "tokenizer_config.json")
    try:
        return settings is not None and bool(json.loads(settings.read_text("utf-8")).get("chat_template"))
    except (OSError, ValueError, AttributeError):
        return False


def _file(source: str, name: str) -> Path | None:
    folder = Path(source)
    if folder.is_dir():
        return folder / name if (folder / name).is_file() else None
    found = cached_file(
        source, name, _raise_exceptions_for_missing_entries=False, _raise_exceptions_for_connection_errors=False
    )
    return None if found is None else Path(found)
