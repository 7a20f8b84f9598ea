"""Patchscopes: a hidden state is put into another prompt, and the model itself says what is in it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from polytrace import functions
from polytrace.errors import GraphError
from polytrace.lines import user_line
from polytrace.literals import scalar
from polytrace.methods.labels import labelled
from polytrace.methods.places import Of, Prompts, check_top_k, layers_of, point_of, positions_of, prompts_of, token_ids
from polytrace.methods.unembedding import behind_head, prepare_unembedding
from polytrace.tokenizer import token_texts

if TYPE_CHECKING:
    from xarray import DataArray

    from polytrace.certificate import Receipt
    from polytrace.model import Model

StateMapping = Callable[[Any, int, int], Any]  # a state, the layer it is of, the layer it goes to -> what is put there


@dataclass(frozen=True, kw_only=True)
class Target:
    """The prompt that a state is put into, and where: `Target(prompt="cat -> cat; hello -> hello; ?")`."""

    prompt: Any  # one prompt of any kind that `model.trace` takes
    position: int | Sequence[int] = -1  # the place of the placeholder, or several that all get the state


def repeat_target(
    words: Sequence[str] = ("king", "1135", "hello"),
    placeholder: str = "?",
    *,
    between: str = " ",
    separator: str = "\n",
) -> Target:
    r"""A prompt that has words repeated, so that the model names what stands in the placeholder's position at its end.

    As in the authors' experiments on next-token prediction: "king king\n1135 1135\nhello hello\n?". `between` stands
    between a word and itself, `separator` between words.
    """
    return Target(prompt=separator.join([*(f"{word}{between}{word}" for word in words), placeholder]))


@dataclass(frozen=True, kw_only=True, eq=False)
class Scope:
    """What the model said of each state: arrays over prompt x layer x position [x target_layer] x rank (or x token).

    `layer` and `position` are those of the source; `target_layer` is a dimension where target layers were given.
    """

    probability: DataArray
    token: DataArray | None  # texts, most likely first; None where tokens were asked for
    token_id: DataArray | None
    text: DataArray | None  # what was generated, without the dimension of rank; None where nothing was
    receipts: tuple[Receipt, ...]  # one a generated token, one without generation


def patchscope(
    model: Model,
    prompts: Any,
    target: Target | str,
    layers: Any = None,
    positions: Any = -1,
    *,
    target_layers: Any = None,
    mapping: StateMapping | None = None,
    top_k: int = 5,
    tokens: Any = None,
    generate: int = 0,
    of: Of = "resid_post",
) -> Scope:
    """Puts states of source prompts into a target prompt (Ghandeharioun et al. 2024, arXiv:2401.06102).

    Every state, that is each of the source's `prompts` at each of `layers` (by default all) and `positions` (by default
    the last), goes to the target's position at the same layer, or at each of `target_layers`. `mapping(state, layer,
    target_layer)` may change it on its way, or give a tensor of yours instead; its code is recorded. `target`: a
    `Target`, or a text whose last token is the placeholder. What comes back is the next token behind the target: the
    `top_k` most likely ones, or chosen `tokens`' probabilities. `of`: a named point, where states are read and put.

    `generate=n`: also the n tokens that the model goes on with, greedily, the state kept in its position; less where it
    ends by itself. The service does not generate, so each token is a request of its own whose prompts are one token
    longer: n requests, of which each runs the source prompts and the targets' rows behind the placeholder anew.
    """
    where = user_line()
    sources = prompts_of(model, prompts)
    numbers = layers_of(model, layers)
    places, is_whole = positions_of(sources, positions)
    if is_whole and len({len(own) for own in sources.sequences}) > 1:
        raise GraphError("positions=None takes prompts of one length: give positions, or one prompt", where=where)
    ids = None if tokens is None else token_ids(model, tokens)
    top_k = check_top_k(model, top_k) if ids is None else 0
    if not isinstance(generate, int) or generate < 0 or (ids is not None and generate):
        raise GraphError("generate is a number of tokens, and does not go with tokens=", where=where)
    into, holes = _target(model, target, where)
    goals = None if target_layers is None else layers_of(model, target_layers)
    cells = [
        _Cell(prompt, layer, place, goal)
        for prompt in range(len(sources))
        for layer in numbers
        for place in places
        for goal in (goals if goals is not None else [layer])
    ]
    texts: list[str] | None = None
    if generate:
        rows, texts, receipts = _generated(model, sources, cells, into, holes, mapping, of, generate, top_k)
    else:
        rows, receipt = _patched(model, sources, cells, [into] * len(cells), holes, mapping, of, top_k, ids)
        receipts = (receipt,)
    dims: dict[str, Any] = {"prompt": None, "layer": numbers, "position": places}
    if goals is not None:
        dims["target_layer"] = goals
    return scope_of(model, sources, dims, rows, ids, receipts, texts)


@dataclass(frozen=True, slots=True)
class _Cell:
    """A state and where it goes."""

    prompt: int
    layer: int
    position: int
    goal: int


def _target(model: Model, target: Target | str, where: str) -> tuple[tuple[int, ...], list[int]]:
    """The target's ids and its holes, counted from the beginning."""
    chosen = target if isinstance(target, Target) else Target(prompt=target)
    found = prompts_of(model, chosen.prompt)
    if len(found) != 1:
        raise GraphError(f"a target is one prompt, not {len(found)}", where=where)
    own = chosen.position if scalar(chosen.position) is not None else list(chosen.position)  # type: ignore[arg-type]
    holes, _ = positions_of(found, own)
    return found.sequences[0], [hole % found.longest for hole in holes]


def _patched(
    model: Model,
    sources: Prompts,
    cells: Sequence[_Cell],
    targets: Sequence[tuple[int, ...]],
    holes: Sequence[int],
    mapping: StateMapping | None,
    of: Of,
    top_k: int,
    ids: list[int] | None,
) -> tuple[list[Any], Receipt]:
    """One request: probabilities and ids of what follows each target, `[cells, top_k]`, or of the chosen ids."""
    prepare_unembedding(model)
    states: dict[tuple[int, int, int], Any] = {}
    read = []
    with model.trace() as tracer:
        for prompt in dict.fromkeys(cell.prompt for cell in cells):
            with tracer.invoke([list(sources.sequences[prompt])]):
                length = len(sources.sequences[prompt])
                for layer, position in dict.fromkeys((c.layer, c.position) for c in cells if c.prompt == prompt):
                    states[prompt, layer, position] = point_of(model.layers[layer], of)[:, position % length]
        for cell, target in zip(cells, targets, strict=True):
            with tracer.invoke([list(target)]):
                state = states[cell.prompt, cell.layer, cell.position]
                state = state if mapping is None else mapping(state, cell.layer, cell.goal)
                hidden = point_of(model.layers[cell.goal], of)
                for hole in holes:
                    hidden[:, hole] = state
                read.append(next_tokens(behind_head(model, model.lm_head.output[:, -1]), top_k, ids))
        saved = [functions.cat(list(part)).save() for part in zip(*read, strict=True)]
    return saved, tracer.receipt


def next_tokens(logits: Any, top_k: int, ids: list[int] | None) -> tuple[Any, ...]:
    """Of `[prompts, vocabulary]`: probabilities and ids of the most likely, or probabilities of the chosen."""
    probability = logits.float().softmax(-1)
    if ids is not None:
        return (probability[:, ids],)
    values, tokens = probability.topk(top_k)
    return values, tokens.int()


def _generated(
    model: Model,
    sources: Prompts,
    cells: Sequence[_Cell],
    into: tuple[int, ...],
    holes: Sequence[int],
    mapping: StateMapping | None,
    of: Of,
    count: int,
    top_k: int,
) -> tuple[list[Any], list[str], tuple[Receipt, ...]]:
    """The first step's readings, what each cell went on with, and a receipt a step."""
    ends = _ends(model)
    said: list[list[int]] = [[] for _ in cells]
    going = list(range(len(cells)))
    first: list[Any] = []
    receipts: list[Receipt] = []
    while going and len(receipts) < count:
        targets = [(*into, *said[number]) for number in going]
        step = 1 if first else top_k
        rows, receipt = _patched(
            model, sources, [cells[number] for number in going], targets, holes, mapping, of, step, None
        )
        receipts.append(receipt)
        first = first or rows
        for number, token in zip(going, rows[1][:, 0].tolist(), strict=True):
            said[number].append(token)
        going = [number for number in going if said[number][-1] not in ends]
    texts = [generated_text(model, into, [token for token in own if token not in ends]) for own in said]
    return first, texts, tuple(receipts)


def generated_text(model: Model, before: Sequence[int], said: Sequence[int]) -> str:
    """Tokens as the text that they are behind others: a character may lie in several, a space in the first."""
    if model.tokenizer is None:
        return "".join(token_texts(None, said))
    start, whole, alone = (
        str(model.tokenizer.decode(list(ids), skip_special_tokens=False)) for ids in (before, [*before, *said], said)
    )
    return whole[len(start) :] if whole.startswith(start) else alone


def _ends(model: Model) -> set[int]:
    """Tokens with which the model ends a text."""
    end = model.config.get("eos_token_id")
    return {end} if isinstance(end, int) else set(end or ())


def scope_of(
    model: Model,
    sources: Prompts,
    dims: dict[str, Any],
    rows: Sequence[Any],
    ids: list[int] | None,
    receipts: tuple[Receipt, ...],
    texts: list[str] | None = None,
) -> Scope:
    """Rows of `next_tokens`, one for each place of `dims`, as labelled arrays."""
    import numpy as np

    shape = [len(sources), *(len(labels) for labels in dims.values() if labels is not None)]
    last = {"rank": None} if ids is None else {"token": list(token_texts(model.tokenizer, ids))}
    coords: dict[str, Any] = {}
    if "position" in dims:
        around = [[own[place] for place in dims["position"]] for own in sources.texts]
        coords["position_token"] = (("prompt", "position"), around)

    def array(values: Any, name: str, more: dict[str, Any]) -> DataArray:
        whole = np.asarray(values).reshape([*shape, *([-1] if more else [])])
        return labelled(whole, {**dims, **more}, name=name, prompts=sources.labels).assign_coords(coords)

    tokens = None if ids is not None else np.asarray(rows[1])
    words = None if tokens is None else np.array(token_texts(model.tokenizer, tokens.ravel().tolist()), dtype=object)
    return Scope(
        probability=array(rows[0], "probability", last),
        token=None if words is None else array(words, "token", last),
        token_id=None if tokens is None else array(tokens, "token_id", last),
        text=None if texts is None else array(np.array(texts, dtype=object), "text", {}),
        receipts=receipts,
    )
