"""Whether calls of one structure may be one call, and what each has of every site then.

Calls are put together along the first dimension of their tensors, and run call by call (`engine.whole_manner`). The
gate looks at every side of every module. The first call of a structure tries that in that manner it is the call as it
is, to 1e-5 in float32; those of its structure go so from then on, alone too, and if they are not, as they are. When two
first wait, it is proven at which sites a call has rows of its own, which depend on no other call (`engine.call_proof`),
and tried that these have the bits of alone. Numbers of calls in one are looked at when they are first wanted: one that
fails is not used, and no bit depends on that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import cycle, islice
from typing import Any

import torch
from torch import Tensor, nn

from engine.arguments import Arguments, Selector
from engine.bits import mark_of
from engine.call_axis import Along, Content, Same
from engine.call_proof import Alone, Together, UnprovenError
from engine.leaves import first_argument
from engine.module_state import ModuleState, kept_tensors, settings_of
from engine.recorder import tensors_of
from engine.whole_call import Key
from engine.whole_contents import Called, other, telling
from engine.whole_manner import call_by_call, layer_by_layer
from engine.whole_members import leaves_of, own_tensors
from engine.whole_places import gpus_of, let_go, weights_from_outside
from engine.whole_sites import overlaps, told
from engine.writes import with_member
from polytrace.graph import Port
from scheduling.alike import MOST_CALLS

SIZES = (1, 2, 3, 4, 6, 8, 12, MOST_CALLS)  # calls in one
_NUM_KINDS = 4  # calls of other content that the gate puts beside each other
_TURNS_OF_HALVES = 4  # which round most differences away
_TOLERANCE = 1e-5  # of a call in this manner, to the call as it is: of the largest value, in float32

Spot = tuple[Key, Selector]
Rows = Mapping[Spot, int | None]  # of one call; None: of all, whoever is beside it
_Note = Callable[[Spot, Tensor], None]


@dataclass(slots=True)
class Verdict:
    """What the gate has found of one structure of arguments."""

    rows: Rows = field(default_factory=dict)  # sites that are not there are none that a call has for itself
    fixed: frozenset[Spot] = frozenset()  # of these: what a call has there follows from what all have in common
    refusal: str | None = None  # why calls go one by one
    tried: dict[int, str | None] = field(default_factory=lambda: {1: None})  # calls in one -> why not

    def most(self, num_calls: int) -> int:
        """Of so many calls those that may go as one, as far as is known."""
        fits = [size for size in SIZES if self.tried.get(size, "") is None]
        return min(num_calls, fits[-1])

    def size_of(self, num_calls: int) -> int:
        """Calls in one that has room for so many."""
        return next(size for size in SIZES if size >= num_calls and self.tried.get(size, "") is None)


ALONE = Verdict()  # of a call that has nobody beside it


def goes_apart(called: Called) -> bool:
    """Whether calls of such arguments can be put together: tensors that have a first dimension, and plain values."""
    values = [*called[0], *called[1].values()]
    tensors = [value for value in values if isinstance(value, Tensor)]
    has_more = any(isinstance(value, (tuple, list, dict)) for value in values)
    return bool(tensors) and not has_more and all(tensor.ndim and len(tensor) for tensor in tensors)


def why_not_so(model: nn.Module, called: Called) -> str | None:
    """Why a call cannot go in the manner of those that may be one: numbers are not those of the call as it is.

    BrokenError where the call as it is raises.
    """
    called = telling(called)

    def look() -> None:
        plain: dict[Spot, Tensor] = {}
        with _raising_broken():
            _run(model, called, lambda spot, tensor: plain.__setitem__(spot, tensor.clone()), manner=_as_it_is)
        _run(model, called, lambda spot, tensor: _check_close(spot, tensor, plain.pop(spot, None)))
        if plain:
            raise _Refusal("in this manner a call visits other sites")

    return _carefully(model, look)


def judge(model: nn.Module, called: Called) -> Verdict:
    """Looks at a call of this structure, alone and as two. BrokenError where it raises alone."""
    verdict = Verdict()
    called = telling(called)

    def look() -> None:
        verdict.rows, verdict.fixed = _proven_rows(model, called, 2)
        if all(rows is None for rows in verdict.rows.values()):
            raise _Refusal("at no site a call's own rows can be told")
        _try_size(model, called, verdict.rows, 2)

    refusal = _carefully(model, look)
    if refusal is not None:
        return Verdict(refusal=refusal)
    verdict.tried[2] = None
    return verdict


def try_up_to(verdict: Verdict, num_calls: int, model: nn.Module, called: Called) -> None:
    """Tries the number of calls in one that has room for so many, and the one below it, where that was not done yet."""

    def look(size: int) -> None:
        if _proven_rows(model, called, size) != (verdict.rows, verdict.fixed):
            raise _Refusal("with so many calls other sites have a call's own rows")
        _try_size(model, called, verdict.rows, size)

    called = telling(called)
    wanted = next((size for size in SIZES if size >= num_calls), MOST_CALLS)
    for size in (SIZES[SIZES.index(wanted) - 1], wanted):
        if size not in verdict.tried:
            try:
                verdict.tried[size] = _carefully(model, partial(look, size))
            except BrokenError as error:
                verdict.tried[size] = told(error)


def together(calls: Sequence[Called], size: int) -> Called:
    """Calls of one structure as one; the last is repeated up to the size."""
    every = [*calls, *[calls[-1]] * (size - len(calls))]
    args, kwargs = every[0]
    joined = [_joined([one[0][place] for one in every]) for place in range(len(args))]
    return tuple(joined), {name: _joined([one[1][name] for one in every]) for name in kwargs}


def rows_of(tensor: Tensor, number: int, rows: int | None) -> Tensor:
    """What one call has of a tensor of several: a view."""
    return tensor if rows is None else tensor[number * rows : (number + 1) * rows]


class _Refusal(Exception):
    pass


class BrokenError(Exception):
    """A call raises: that says nothing of others of its structure."""


class SettledError(BrokenError):
    """A call has changed settings. Some models do so once: one behind it may tell."""


@contextmanager
def settled(model: nn.Module, called: Called, num_calls: int) -> Iterator[None]:
    """Inside, a model has what so many calls set on it; then what it had before. BrokenError where one raises."""
    before = ModuleState(model)
    try:
        with _raising_broken():
            for _ in range(num_calls):
                _run(model, telling(called), lambda _spot, _tensor: None, manner=_as_it_is)
        yield
    finally:
        let_go(model)
        before.put()


@contextmanager
def _raising_broken() -> Iterator[None]:
    try:
        yield
    except UnprovenError:
        raise
    except Exception as error:
        raise BrokenError from error


def _carefully(model: nn.Module, look: Callable[[], None]) -> str | None:
    """Why not, if `look` finds it; the model's buffers, numbers and random numbers are then as they were."""
    before = ModuleState(model)
    kept, settings, chance = _versions(model), settings_of(model), _chance(model)
    try:
        look()
        if _versions(model) != kept or not torch.equal(chance, _chance(model)):
            return "a call changes the model, or draws random numbers"
        if settings_of(model) != settings:
            raise SettledError("a call changes settings of the model")
    except _Refusal as found:
        return str(found)
    except UnprovenError as found:
        return str(found)
    except torch.OutOfMemoryError as error:
        return f"there is no memory to try it: {told(error)}"
    except BrokenError:
        raise
    except Exception as error:  # noqa: BLE001  whatever code of the model raises for calls in one
        return f"calls in one raised {told(error)}"
    finally:
        let_go(model)
        before.put()
    return None


def _versions(model: nn.Module) -> list[tuple[int, int]]:
    """Which tensors the model keeps, and how often each was written to. Offloaded weights come anew for each call."""
    kept = (one for one in kept_tensors(model) if not one.is_meta)
    return [(id(one), mark_of(one) if one.is_inference() else one._version) for one in kept]


def _chance(model: nn.Module) -> Tensor:
    return torch.cat([torch.get_rng_state(), *map(torch.cuda.get_rng_state, gpus_of(model))])


def _try_size(model: nn.Module, called: Called, rows: Rows, size: int) -> None:
    """_Refusal where what a call has in so many is not what it has alone, bit for bit."""
    is_half = any(parameter.is_floating_point() and parameter.itemsize < 4 for parameter in model.parameters())
    for turn in range(_TURNS_OF_HALVES if is_half else 1):
        _try_kinds(
            model, [other(called, _NUM_KINDS * turn + kind) for kind in range(min(size, _NUM_KINDS))], rows, size
        )


def _try_kinds(model: nn.Module, kinds: Sequence[Called], rows: Rows, size: int) -> None:
    alone = [{spot: mark for (spot, _), mark in _marks(model, [(0, kind)], rows).items()} for kind in kinds]
    numbers = list(islice(cycle(range(len(kinds))), size))
    beside = [(number, kinds[number]) for number in numbers]
    found = _marks(model, beside, rows)
    turned = numbers[1:] + numbers[:1]
    others = _marks(model, beside[1:] + beside[:1], rows, is_replacing=True)
    for order, marks in ((numbers, found), (turned, others)):
        if {spot for spot, _ in marks} != alone[0].keys():
            raise _Refusal("calls in one visit other sites")
        for (spot, place), mark in marks.items():
            if mark != alone[order[place]].get(spot):
                raise _Refusal(f"{_name(spot)} has other bits beside other calls")


def _marks(
    model: nn.Module, company: Sequence[tuple[int, Called]], rows: Rows, *, is_replacing: bool = False
) -> dict[tuple[Spot, int], int]:
    """What each of calls in one has, by their places; 0 where it has nothing of its own."""
    marks: dict[tuple[Spot, int], int] = {}

    def note(spot: Spot, tensor: Tensor) -> None:
        for place in range(len(company)):
            marks[spot, place] = mark_of(rows_of(tensor, place, rows[spot])) if spot in rows else 0

    called = together([one for _, one in company], len(company))
    _run(model, called, note, is_replacing=is_replacing)
    return marks


def _check_close(spot: Spot, own: Tensor, plain: Tensor | None) -> None:
    if plain is None:
        raise _Refusal("in this manner a call visits other sites")
    if own.shape != plain.shape or own.dtype != plain.dtype:
        raise _Refusal(f"{_name(spot)} has another shape in this manner")
    if own.dtype.is_floating_point and own.numel():
        largest = plain.double().nan_to_num(posinf=0, neginf=0).abs().max().item()
        tolerance = max(_TOLERANCE, 4 * torch.finfo(own.dtype).eps)
        if not torch.allclose(own, plain, rtol=0, atol=tolerance * max(1.0, largest), equal_nan=True):
            raise _Refusal(f"{_name(spot)} is another in this manner")
    elif not _is_equal(own, plain):
        raise _Refusal(f"{_name(spot)} is another in this manner")


def _proven_rows(model: nn.Module, called: Called, size: int) -> tuple[Rows, frozenset[Spot]]:
    """What each of so many calls has of every site, whatever is in them; and at which of these sites the proof goes by
    what they have in common, so that nobody may write there. UnprovenError where nothing can be told.
    """
    kept = list(kept_tensors(model))
    alone = Alone(kept)
    with _raising_broken():
        _run(model, called, lambda _spot, _tensor: None, manner=partial(_proving, model, alone))
    several = Together(size, alone.ran, kept)
    rows: dict[Spot, int | None] = {}
    fixed: set[Spot] = set()

    def note(spot: Spot, tensor: Tensor) -> None:
        place = several.place(tensor)
        if isinstance(place, Same):
            rows[spot] = None
        elif isinstance(place, Along) and _is_rows(place) and not overlaps(tensor):
            rows[spot] = place.inside
            if place.content is not Content.OWN or several.is_told(tensor):
                fixed.add(spot)

    _run(model, together([called] * size, size), note, manner=partial(_proving, model, several))
    return rows, frozenset(fixed)


def _is_rows(place: Along) -> bool:
    return not place.dim and place.before == 1 and place.content is not Content.COUNT


@contextmanager
def _proving(model: nn.Module, mode: Alone | Together, own: Called) -> Iterator[None]:
    with weights_from_outside(model, mode.keep), mode.running(tensors_of(own)):
        yield


def _as_it_is(_called: Called) -> AbstractContextManager[None]:
    return layer_by_layer()


def _call_by_call(_called: Called) -> AbstractContextManager[Any]:
    return call_by_call()


def _run(
    model: nn.Module,
    called: Called,
    note: _Note,
    *,
    is_replacing: bool = False,
    manner: Callable[[Called], AbstractContextManager[Any]] = _call_by_call,
) -> None:
    """One call, with every tensor that modules take and give. `is_replacing`: each hands on a copy, as edits do."""
    counts: dict[tuple[str, Port], int] = {}

    def notes(path: str, port: Port, value: Any, leaves: Mapping[Selector, Tensor]) -> Any:
        visit = counts.get((path, port), 0)
        counts[path, port] = visit + 1
        for selector, tensor in leaves.items():
            with torch._C.DisableTorchFunction():
                note(((path, port, visit), selector), tensor)
                if is_replacing and port is Port.OUTPUT:
                    value = with_member(value, selector, tensor.clone())
        return value

    def before(path: str, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        first = first_argument(args, kwargs)
        notes(path, Port.INPUT, first, leaves_of(first)[1])
        notes(path, Port.INPUTS, None, own_tensors(Arguments(args, kwargs).others()))

    def behind(path: str, _module: nn.Module, _args: tuple[Any, ...], output: Any) -> Any:
        return notes(path, Port.OUTPUT, output, leaves_of(output)[1])

    with ExitStack() as stack, torch.no_grad():
        for path, module in model.named_modules():
            stack.callback(module.register_forward_pre_hook(partial(before, path), with_kwargs=True).remove)
            stack.callback(module.register_forward_hook(partial(behind, path)).remove)
        args, kwargs = own = together([called], 1)  # models change their arguments
        stack.enter_context(manner(own))
        model(*args, **kwargs)


def _joined(values: Sequence[Any]) -> Any:
    return torch.cat(list(values)) if isinstance(values[0], Tensor) else values[0]


def _is_equal(own: Tensor, other: Tensor) -> bool:
    """Bit for bit, but for which NaN it is."""
    if own.shape != other.shape or own.dtype != other.dtype:
        return False
    same = own == other
    return bool((same | ((own != own) & (other != other))).all())


def _name(spot: Spot) -> str:
    (path, port, visit), _ = spot
    return f"{path or 'the model'}.{port.value} (visit {visit})"
