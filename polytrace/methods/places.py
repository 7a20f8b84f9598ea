"""Layers, heads, prompts, positions and tokens as every method takes them, checked before anything is recorded.

Layers and heads: an int, several, a slice; None is all, and negative ones count from the end. Positions: an int or
several, counted in each prompt without pads, negative from its end; None is all. Tokens: an id, or a text of one token.
What of a layer: a named point, "attention" or "mlp" for what these give, or a function of the layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from polytrace.description import PassLayout
from polytrace.errors import GraphError
from polytrace.lines import user_line
from polytrace.literals import scalar
from polytrace.methods.imports import needs
from polytrace.points import DIMS
from polytrace.prompts import PromptBook
from polytrace.standard import ROOT_VALUES
from polytrace.tokenizer import token_texts

if TYPE_CHECKING:
    from polytrace.description import Leaf
    from polytrace.model import Model
    from polytrace.modules import Module

Layers = int | slice | Iterable[int] | None
Positions = int | Sequence[int] | None
Token = int | str
Of = str | Callable[[Any], Any]  # `lambda layer: layer.mlp.output`

OF_LAYERS = tuple(name for name in DIMS if name not in ROOT_VALUES)
STREAM = tuple(name for name in OF_LAYERS if DIMS[name] == ("sequence", "token", "feature"))
GIVEN = {"attention": "attention_output", "mlp": "mlp_output"}  # short names: what these give


@dataclass(frozen=True, slots=True)
class Prompts:
    """Prompts as token ids, of one view or of several."""

    sequences: tuple[tuple[int, ...], ...]
    texts: tuple[tuple[str, ...], ...]  # of each prompt's tokens
    given: tuple[str | None, ...]  # the text of each prompt as it was given, None of ids
    is_single: bool  # one prompt, not a list of one

    def __len__(self) -> int:
        return len(self.sequences)

    @property
    def ids(self) -> list[list[int]]:
        return [list(sequence) for sequence in self.sequences]

    @property
    def lengths(self) -> list[int]:
        return [len(sequence) for sequence in self.sequences]

    @property
    def longest(self) -> int:
        return max(self.lengths)

    @property
    def are_ragged(self) -> bool:
        return min(self.lengths) < self.longest

    @property
    def labels(self) -> list[str]:
        """Each prompt as one text."""
        return ["".join(own) for own in self.texts]

    def __getitem__(self, order: Sequence[int]) -> Prompts:
        """The same in another order."""
        return Prompts(
            tuple(self.sequences[one] for one in order),
            tuple(self.texts[one] for one in order),
            tuple(self.given[one] for one in order),
            self.is_single,
        )


def prompts_of(model: Model, prompts: Any) -> Prompts:
    """Prompts of every kind that `model.trace` takes. Raises as that does."""
    needs("xarray")  # what answers are labelled with: missed before anything has run, not behind it
    if model.description.layout is PassLayout.WHOLE:
        told = f"methods are of language models, and {model.description.class_name} is called as it is"
        raise GraphError(f"{told}: write the trace (docs/any_model.md)", where=user_line())
    sequences = PromptBook(model.description, lambda: model.tokenizer).invoke(prompts).sequences
    given: list[str | None] = [None] * len(sequences)
    if isinstance(prompts, str):
        given = [prompts]
    elif isinstance(prompts, (list, tuple)) and all(isinstance(one, str) for one in prompts):
        given = list(prompts)
    is_list = isinstance(prompts, (list, tuple)) and not isinstance(prompts[0], Mapping) and scalar(prompts[0]) is None
    texts = tuple(token_texts(model.tokenizer, sequence) for sequence in sequences)
    return Prompts(sequences, texts, tuple(given), is_single=len(sequences) == 1 and not is_list)


def layers_of(model: Model, layers: Any = None) -> list[int]:
    """Numbers of decoder layers, in the order given. Raises GraphError for one that is not there, and for none."""
    return _numbered(layers, model.description.num_layers, "layer", "this model has layers")


def heads_of(count: int, heads: Any = None) -> list[int]:
    """Numbers of heads, or of other units, of which there are `count`. Raises GraphError as `layers_of`."""
    return _numbered(heads, count, "head", "there are heads")


def positions_of(prompts: Prompts, positions: Any) -> tuple[list[int], bool]:
    """Positions as they label a result, and whether they are all of the prompts'.

    All positions of prompts that differ in length are counted from the end. Raises GraphError for a shorter prompt.
    """
    if positions is None:
        longest = prompts.longest
        return list(range(-longest, 0) if prompts.are_ragged else range(longest)), True
    found = [positions] if scalar(positions) is not None else list(positions)
    for one in found:
        for prompt in range(len(prompts)):
            position_in(prompts, prompt, one)
    if not found:
        raise GraphError("no position is chosen", where=user_line())
    return [int(scalar(one)) for one in found], False  # type: ignore[arg-type]


def position_in(prompts: Prompts, prompt: int, position: Any) -> int:
    """One position of a prompt, counted from its beginning. Raises GraphError where it has no such position."""
    number, length = scalar(position), prompts.lengths[prompt]
    if not isinstance(number, int) or isinstance(number, bool):
        raise GraphError(f"a position is an integer, not {position!r}", where=user_line())
    if not -length <= number < length:
        told = f"prompt {prompt}" if len(prompts) > 1 else "this prompt"
        raise GraphError(
            f"there is no position {number} in {told}, which has {length} tokens (0-{length - 1})", where=user_line()
        )
    return number % length


def token_ids(model: Model, tokens: Any) -> list[int]:
    """Ids of one token or several. Raises GraphError for a text that is several tokens, with these, and for none."""
    listed = [tokens] if isinstance(tokens, str) or scalar(tokens) is not None else list(tokens)
    if not listed:
        raise GraphError("no token is chosen", where=user_line())
    return [_token_id(model, one) for one in listed]


def check_top_k(model: Model, top_k: Any) -> int:
    """How many of the most likely tokens come back. Raises GraphError for more than there are, and for none."""
    number, vocabulary = scalar(top_k), model.description.vocab_size
    if not isinstance(number, int) or isinstance(number, bool) or not 1 <= number <= vocabulary:
        raise GraphError(f"top_k is 1-{vocabulary}, not {top_k!r}", where=user_line())
    return number


def token_of_each(model: Model, tokens: Any, prompts: int, what: str = "tokens") -> list[int]:
    """A token for each of so many prompts: one for all, or a list as long as these."""
    ids = token_ids(model, tokens)
    if len(ids) not in (1, prompts):
        raise GraphError(f"{len(ids)} {what} for {prompts} prompts: give one, or one each", where=user_line())
    return ids * prompts if len(ids) == 1 else ids


def value_of(model: Model, number: int, of: Of) -> Any:
    """A tensor of a layer in the open invoke, to be read or changed in place."""
    layer = model.layers[number]
    if not isinstance(of, str):
        return of(layer)
    if of not in GIVEN and of not in OF_LAYERS:
        raise GraphError(f"a layer has no {of!r}; it has {', '.join((*GIVEN, *OF_LAYERS))}", where=user_line())
    point = GIVEN.get(of, of)
    if point not in layer.points:  # in hybrids only some layers attend, or have an MLP
        found = [other for other, one in enumerate(model.layers) if point in one.points]
        if found:
            raise GraphError(f"layer {number} has no {of}: give layers={found}, those that have it", where=user_line())
    return getattr(layer, point)


def point_of(layer: Module, of: Of) -> Any:
    """The same of a layer, `[sequences, tokens, features]`. Raises GraphError for a point that has other dimensions."""
    if not isinstance(of, str):
        return of(layer)
    if of not in GIVEN:
        check_stream(of)
    return getattr(layer, GIVEN.get(of, of))


def check_stream(of: str, among: Sequence[str] = ()) -> None:
    """Raises GraphError for what has not the residual's features, or is none of some such points."""
    known = among or STREAM
    if of not in known:
        told = "" if among else ", or a function"
        raise GraphError(f"{of!r} is no part of the residual; it is one of {', '.join(known)}{told}", where=user_line())


def num_heads(model: Model, number: int, of: str) -> int:
    """How many heads a point of the open invoke has."""
    return int(value_of(model, number, of).shape[DIMS[of].index("head")])


def residual_leaf(model: Model) -> Leaf:
    """What is known of the residual without a trace: its features are `tail[-1]`."""
    leaves = model._index.ports[model.layers[0]._path, "output"].leaves
    return next(leaf for _, leaf in leaves.values())


def _numbered(chosen: Any, count: int, what: str, told: str) -> list[int]:
    if chosen is None or isinstance(chosen, slice):
        found = list(range(count))[chosen or slice(None)]
    else:
        found = []
        for one in [chosen] if scalar(chosen) is not None else list(chosen):
            number = scalar(one)
            if not isinstance(number, int) or isinstance(number, bool) or not -count <= number < count:
                raise GraphError(f"there is no {what} {one!r}; {told} 0-{count - 1}", where=user_line())
            found.append(number % count)
    if not found:
        raise GraphError(f"no {what} is chosen; {told} 0-{count - 1}", where=user_line())
    return found


def _token_id(model: Model, token: Any) -> int:
    if not isinstance(token, str):
        number, vocabulary = scalar(token), model.description.vocab_size
        if not isinstance(number, int) or isinstance(number, bool) or not 0 <= number < vocabulary:
            raise GraphError(f"there is no token {token!r}; ids are 0-{vocabulary - 1}", where=user_line())
        return number
    if model.tokenizer is None:
        raise GraphError("this model came without a tokenizer: give token ids instead of texts", where=user_line())
    ids = model.tokenizer.encode(token, add_special_tokens=False).ids
    if len(ids) != 1:
        pieces = ", ".join(map(repr, token_texts(model.tokenizer, ids)))
        raise GraphError(
            f"{token!r} is {len(ids)} tokens ({pieces}), not one: give one of them, or its id; "
            "polytrace.methods.target_tokens finds the first token of each way to write a word",
            where=user_line(),
        )
    return int(ids[0])
