"""Target tokens: the tokens that an answer can begin with, and whether two answers begin alike."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from polytrace.errors import GraphError
from polytrace.lines import user_line
from polytrace.literals import scalar
from polytrace.methods.places import token_ids
from polytrace.tokenizer import token_texts

if TYPE_CHECKING:
    from polytrace.model import Model

Words = str | int | Iterable[str | int]

_BEFORE = "\n"  # text that a word is read behind: some tokenizers put a space before the first word of a text


def target_tokens(
    model: Model,
    words: Words,
    *,
    space: bool = True,
    no_space: bool = True,
    capitalised: bool = False,
    whole: bool = False,
) -> list[int]:
    """The first token of every way to write these words, each once, in the order of the words.

    A model that answers "Paris" says " Paris" within a sentence, "Paris" at a beginning, or the first piece of either.
    `space`, `no_space`: with a space before the word, and without. `capitalised`: also with the first letter as a
    capital, and as a small one. `whole`: only where the variant is one whole token. A space alone is never a target;
    what is given as an id stands as it is. Raises GraphError where nothing is left.
    """
    given = [words] if isinstance(words, str) or scalar(words) is not None else list(words)  # type: ignore[arg-type]
    found: dict[int, None] = {}
    for word in given:
        if not isinstance(word, str):
            found.update(dict.fromkeys(token_ids(model, word)))
            continue
        if not word.strip():
            raise GraphError(f"a target is a word, not {word!r}", where=user_line())
        for variant in _variants(word.strip(), space=space, no_space=no_space, capitalised=capitalised):
            ids = _behind_text(_encoder(model), variant)
            if ids and (len(ids) == 1 or not whole) and not _is_blank(model, ids[0]):
                found[ids[0]] = None
    if not found:
        told = " as one whole token" if whole else ""
        raise GraphError(f"no way to write {words!r}{told} is left as a target", where=user_line())
    return list(found)


def target_sets(
    model: Model, answers: Mapping[str, Words], *, may_collide: bool = False, **variants: bool
) -> dict[str, list[int]]:
    """Target tokens of several answers by name: `{"right": "Paris", "wrong": ["Rome", "London"]}`.

    `variants` as of `target_tokens`. Raises GraphError where two answers share a token, unless they `may_collide`.
    """
    if not answers:
        raise GraphError("there are no answers", where=user_line())
    sets = {name: target_tokens(model, words, **variants) for name, words in answers.items()}
    if not may_collide and (shared := collisions(sets)):
        token, names = next(iter(shared.items()))
        more = f" and {len(shared) - 1} more" if len(shared) > 1 else ""
        raise GraphError(
            f"{' and '.join(map(repr, names))} may begin with the same token {token} "
            f"({token_texts(model.tokenizer, [token])[0]!r}){more}: "
            "take other words, whole=True, no_space=False, or may_collide=True",
            where=user_line(),
        )
    return sets


def collisions(sets: Mapping[str, Iterable[int]]) -> dict[int, tuple[str, ...]]:
    """Tokens that are in more than one set, and the names of these."""
    names: dict[int, list[str]] = {}
    for name, tokens in sets.items():
        for token in dict.fromkeys(tokens):
            names.setdefault(token, []).append(name)
    return {token: tuple(own) for token, own in names.items() if len(own) > 1}


def _variants(word: str, *, space: bool, no_space: bool, capitalised: bool) -> list[str]:
    spelled = [word]
    if capitalised:
        spelled += [word[0].upper() + word[1:], word[0].lower() + word[1:]]
    before = [" "] * space + [""] * no_space
    return [mark + one for one in dict.fromkeys(spelled) for mark in before]


def _behind_text(encoder: Any, text: str) -> list[int]:
    """The tokens of a text that stands behind another one."""
    before: list[int] = encoder.encode(_BEFORE, add_special_tokens=False).ids
    both: list[int] = encoder.encode(_BEFORE + text, add_special_tokens=False).ids
    if both[: len(before)] == before:
        return both[len(before) :]
    alone: list[int] = encoder.encode(text, add_special_tokens=False).ids
    return alone


def _is_blank(model: Model, token: int) -> bool:
    return not token_texts(model.tokenizer, [token])[0].strip()


def _encoder(model: Model) -> Any:
    if model.tokenizer is None:
        raise GraphError("this model came without a tokenizer: give token ids instead of words", where=user_line())
    return model.tokenizer
