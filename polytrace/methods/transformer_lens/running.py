"""One run, recorded: hooks in the model's order, what is cached behind them, what the run returns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any

from polytrace.errors import GraphError, TooLargeError
from polytrace.lines import user_line
from polytrace.methods.transformer_lens.access import Access
from polytrace.methods.transformer_lens.names import position_dim
from polytrace.methods.transformer_lens.slices import taken
from polytrace.storage import is_recorded, state_of
from polytrace.tracing import Tracer
from polytrace.values import shape_of

if TYPE_CHECKING:
    from polytrace.methods.transformer_lens.hooked import HookedModel, HookPoint

_TOLD = 4  # kinds of activations that a refusal lists
_BYTES = {"float64": 8, "int64": 8, "float16": 2, "bfloat16": 2, "bool": 1}  # of an element; the others have 4


@dataclass(frozen=True, slots=True)
class Hook:
    """A function and the activation that it is given."""

    name: str
    function: Callable[..., Any]
    point: HookPoint


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What is asked of a run."""

    return_type: str | None
    loss_per_token: bool
    stop: int | None  # the block that does not run any more
    hooks: tuple[Hook, ...]
    cached: tuple[str, ...] = ()
    positions: Any = None  # of what is cached
    is_without_batch: bool = False


def record(hooked: HookedModel, tracer: Tracer, run: Run) -> tuple[Any, dict[str, Any]]:
    """In the open block of `tracer`: what the run returns and what it caches, saved."""
    lengths = tracer.lengths
    if run.is_without_batch and len(lengths) > 1:
        raise GraphError(f"remove_batch_dim=True is for one prompt; these are {len(lengths)}", where=user_line())
    _check_positions(run.positions, lengths)
    table = hooked.hook_table
    cached = frozenset(run.cached)
    by_name = {name: tuple(own) for name, own in groupby(sorted(run.hooks, key=_by(table.place)), lambda h: h.name)}
    found: dict[str, Any] = {}
    written: dict[str, Any] = {}
    for name in sorted({*by_name, *cached}, key=table.place):
        access = table.access(name)
        for hook in by_name.get(name, ()):
            _call(hook, access, written)
        if name in cached:
            value = taken(access.read(written), run.positions, position_dim(name))
            found[name] = value[0] if run.is_without_batch else value
    _check_size(hooked, found, run)
    for name, value in found.items():
        found[name] = _saved(value)
    return _returned(hooked, tracer, run), found


def _by(place: Callable[[str], int]) -> Callable[[Hook], int]:
    return lambda hook: place(hook.name)


def _call(hook: Hook, access: Access, written: dict[str, Any]) -> None:
    """What a hook returns takes the value's place; so does what it changed in place that is no tensor of the model."""
    value = access.read(written)
    if not access.is_tensor:
        value = value * 1  # its own, so that in-place code is seen
    made = hook.function(value, hook=hook.point)
    if made is not None and made is not value:
        access.write(written, made)
    elif not access.is_tensor and _is_changed(value):
        access.write(written, value)


def _is_changed(value: Any) -> bool:
    """Of a recorded value; nobody knows of the user's own tensor, which a hook before may have put there."""
    return not is_recorded(value) or state_of(value).storage.version > 0


def _returned(hooked: HookedModel, tracer: Tracer, run: Run) -> Any:
    model = hooked.model
    if run.return_type is None:
        return None
    if run.stop is not None:
        layer = model.layers[max(run.stop - 1, 0)]
        return (layer.resid_post if run.stop else layer.resid_pre).save()
    logits = model.output.logits
    loss = None
    if run.return_type in ("loss", "both"):
        tokens = left_padded([tuple(sequence) for sequence in tracer._sequences()])
        loss = loss_of(logits, tokens, tracer.mask, per_token=run.loss_per_token).save()
    if run.return_type == "loss":
        return loss
    saved = logits.save()
    return saved if loss is None else (saved, loss)


def left_padded(sequences: list[tuple[int, ...]]) -> Any:
    """`[prompts, longest]` of token ids; pads are 0."""
    import torch

    longest = max(map(len, sequences))
    return torch.tensor([[0] * (longest - len(sequence)) + list(sequence) for sequence in sequences])


def loss_of(logits: Any, tokens: Any, mask: Any, *, per_token: bool) -> Any:
    """Cross entropy of each next token: its mean, or `[prompts, positions - 1]` with 0 where there is a pad."""
    if tokens.shape[1] < 2:
        raise GraphError("the loss is of next tokens, and these prompts have one token each", where=user_line())
    told = logits.float().log_softmax(-1)[:, :-1].gather(-1, tokens[:, 1:, None])[..., 0]
    own = mask[:, :-1]  # a real token is followed by one, as pads are on the left
    losses = -told * own
    return losses if per_token else losses.sum() / own.sum()


def _saved(value: Any) -> Any:
    """A hook may have put a tensor of the user's own in a value's place: it is what it is."""
    return value.save() if is_recorded(value) else value


def _check_positions(positions: Any, lengths: tuple[int, ...]) -> None:
    """Positions mean the same in every prompt: all, or counted from the end."""
    if positions is None or len(set(lengths)) == 1:
        return
    listed = positions.tolist() if hasattr(positions, "tolist") else positions
    if isinstance(listed, list) and all(isinstance(one, int) and -min(lengths) <= one < 0 for one in listed):
        return
    raise GraphError(
        f"these prompts have different lengths, {min(lengths)} to {max(lengths)} tokens: pos_slice is a negative int "
        f"then, or a list of them, from -1 to {-min(lengths)}, which counts from the end of each",
        where=user_line(),
    )


def _check_size(hooked: HookedModel, found: dict[str, Any], run: Run) -> None:
    """Raises TooLargeError before anything is sent."""
    sizes: dict[str, int] = {}
    for name, value in found.items():
        if not is_recorded(value):
            continue
        shape = shape_of(value)
        number = _BYTES.get(shape.dtype, 4)
        for size in shape.shape:
            number *= size
        kind = name.split(".", 2)[2] if name.startswith("blocks.") else name
        sizes[kind] = sizes.get(kind, 0) + number
    total, limit = sum(sizes.values()), hooked.model.description.limits.max_result_bytes
    if total > limit:
        most = sorted(sizes, key=lambda kind: -sizes[kind])[:_TOLD]
        told = ", ".join(f"{kind} {sizes[kind] / 2**20:,.0f} MiB" for kind in most)
        raise TooLargeError(
            f"this cache of {len(found)} activations has {total / 2**20:,.0f} MiB and a request returns at most "
            f"{limit / 2**20:,.0f} MiB; most of it is {told}: choose with names_filter, pos_slice or stop_at_layer",
            where=user_line(),
        )
