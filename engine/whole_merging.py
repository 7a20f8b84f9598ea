"""Whether calls of one structure may be one call, tried on the served weights, and what each has of every site.

Calls are put together along the first dimension of their tensors, and run call by call (`engine.whole_manner`). The
gate looks at every side of every module: beside other calls, also those without a number, each must have the bits that
it has alone in that manner, and these must be those of the call as it is to 1e-5 in float32. What passes runs
so always, alone too; what does not is called as it is. Numbers of calls in one are tried when they are first wanted:
one that fails is not used, and no bit depends on that.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field
from functools import partial
from itertools import cycle, islice
from typing import Any

import torch
from torch import Tensor, nn

from engine.arguments import Arguments, Selector
from engine.leaves import first_argument
from engine.module_state import ModuleState, kept_tensors, settings_of
from engine.whole_call import Key
from engine.whole_contents import Called, extremes, other, telling
from engine.whole_manner import CallByCall
from engine.whole_places import gpus_of, let_go
from engine.whole_sites import leaves_of, overlaps, told
from engine.writes import with_member
from polytrace.graph import Port
from scheduling.alike import MOST_CALLS

SIZES = (1, 2, 3, 4, 6, 8, 12, MOST_CALLS)  # calls in one
_NUM_KINDS = 4  # calls of other content that the gate puts beside each other
_TOLERANCE = 1e-5  # of a call in this manner, to the call as it is: of the largest value, in float32

Spot = tuple[Key, Selector]
Rows = Mapping[Spot, int | None]  # of one call; None: of all, whoever is beside it
_Note = Callable[[Spot, Tensor], None]


@dataclass(slots=True)
class Verdict:
    """What the gate has found of one structure of arguments."""

    rows: Rows = field(default_factory=dict)  # sites that are not there are none that a call has for itself
    refusal: str | None = None  # why calls are run as they are
    tried: dict[int, str | None] = field(default_factory=lambda: {1: None})  # calls in one -> why not

    def most(self, num_calls: int) -> int:
        """Of so many calls those that may go as one, as far as is known."""
        fits = [size for size in SIZES if self.tried.get(size, "") is None]
        return min(num_calls, fits[-1])

    def size_of(self, num_calls: int) -> int:
        """Calls in one that has room for so many."""
        return next(size for size in SIZES if size >= num_calls and self.tried.get(size, "") is None)


def judge(model: nn.Module, called: Called, device: torch.device) -> Verdict | None:
    """Tries a call of this structure, alone and as two. None where the call as it is raises, or there is no memory:
    that says nothing of others.
    """
    refusal = _refusal(model, called)
    if refusal is not None:
        return Verdict(refusal=refusal)
    verdict = Verdict()
    called = telling(called)

    def look() -> None:
        plain: dict[Spot, Tensor] = {}
        shapes: dict[Spot, tuple[int, ...]] = {}
        try:
            _run(model, called, lambda spot, tensor: plain.__setitem__(spot, tensor.clone()), manner=nullcontext())
        except Exception as error:
            raise _BrokenError from error

        def own(spot: Spot, tensor: Tensor) -> None:
            _check_close(spot, tensor, plain.pop(spot, None))
            shapes[spot] = tuple(tensor.shape)

        _run(model, called, own)
        pair: dict[Spot, tuple[int, ...]] = {}
        ones: set[Spot] = set()  # where calls are one in memory, as of `expand`

        def of_two(spot: Spot, tensor: Tensor) -> None:
            pair[spot] = tuple(tensor.shape)
            if overlaps(tensor):
                ones.add(spot)

        _run(model, together([called] * 2, 2), of_two)
        if plain or pair.keys() != shapes.keys():
            raise _Refusal("in this manner a call visits other sites")
        verdict.rows = {
            spot: None if shape == pair[spot] else shape[0]
            for spot, shape in shapes.items()
            if shape == pair[spot] or (shape and pair[spot] == (2 * shape[0], *shape[1:]) and spot not in ones)
        }
        if all(rows is None for rows in verdict.rows.values()):
            raise _Refusal("no site has its calls along its first dimension")
        _try_size(model, called, verdict.rows, 2)

    try:
        refusal = _carefully(model, device, look)
    except (_BrokenError, torch.OutOfMemoryError):
        return None
    except _MixedError as found:
        refusal = str(found)
    if refusal is not None:
        return Verdict(refusal=refusal)
    verdict.tried[2] = None
    return verdict


def try_up_to(verdict: Verdict, num_calls: int, model: nn.Module, called: Called, device: torch.device) -> None:
    """Tries the number of calls in one that has room for so many, and the one below it, where that was not done yet.
    Refuses all where what a call has depends on what others have: it does so in two as well, if more rarely.
    """
    called = telling(called)
    wanted = next((size for size in SIZES if size >= num_calls), MOST_CALLS)
    for size in (SIZES[SIZES.index(wanted) - 1], wanted):
        if size not in verdict.tried:
            try:
                verdict.tried[size] = _carefully(model, device, partial(_try_size, model, called, verdict.rows, size))
            except _MixedError as found:
                verdict.refusal = str(found)
                return
            except torch.OutOfMemoryError as error:
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


class _MixedError(Exception):
    """What a call has depends on what others have."""


class _BrokenError(Exception):
    pass


def _refusal(model: nn.Module, called: Called) -> str | None:
    """Why it need not be tried."""
    values = [*called[0], *called[1].values()]
    tensors = [value for value in values if isinstance(value, Tensor)]
    has_more = any(isinstance(value, (tuple, list, dict)) for value in values)
    if has_more or not tensors or any(not tensor.ndim or not len(tensor) for tensor in tensors):
        return "its arguments are not tensors that have a first dimension, and plain values"
    dtypes = {tensor.dtype for tensor in (*model.parameters(), *tensors)}
    if torch.float16 in dtypes:
        return "in float16 models look whether any value of a batch is too large"
    if any("experts" in type(module).__name__.lower() for module in model.modules()):
        return "experts get as many rows as are sent to them, by whomever"
    return None


def _carefully(model: nn.Module, device: torch.device, look: Callable[[], None]) -> str | None:
    """Why not, if `look` finds it; the model's buffers, numbers and random numbers are then as they were."""
    before = ModuleState(model)
    kept, settings, chance = _versions(model), settings_of(model), _chance(model)
    try:
        look()
        is_same = _versions(model) == kept and settings_of(model) == settings
        if not is_same or not torch.equal(chance, _chance(model)):
            return "a call changes the model, or draws random numbers"
    except _Refusal as found:
        return str(found)
    except (_MixedError, _BrokenError, torch.OutOfMemoryError):
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
    return [(id(one), _mark(one) if one.is_inference() else one._version) for one in kept]


def _chance(model: nn.Module) -> Tensor:
    return torch.cat([torch.get_rng_state(), *map(torch.cuda.get_rng_state, gpus_of(model))])


def _try_size(model: nn.Module, called: Called, rows: Rows, size: int) -> None:
    """_MixedError where what a call has in so many depends on others, _Refusal where it is not what it has alone."""
    kinds = [called, *[other(called, seed) for seed in range(1, min(size, _NUM_KINDS))]]
    alone = [{spot: mark for (spot, _), mark in _marks(model, [(0, kind)], rows).items()} for kind in kinds]
    numbers = list(islice(cycle(range(len(kinds))), size))
    beside = [(number, kinds[number]) for number in numbers]
    found = _marks(model, beside, rows)
    kept = {0, size - 1} if size > 2 else {0}  # who has neighbours of the strangest sort
    for change in extremes(called):
        company = [one if place in kept else (None, change(one[1])) for place, one in enumerate(beside)]
        for (spot, place), mark in _marks(model, company, rows).items():
            if mark != found.get((spot, place)):
                raise _MixedError(f"{_name(spot)} has other bits beside calls of other content")
    turned = numbers[1:] + numbers[:1]
    others = _marks(model, beside[1:] + beside[:1], rows, is_replacing=True)
    for order, marks in ((numbers, found), (turned, others)):
        if {spot for spot, _ in marks} != alone[0].keys():
            raise _Refusal("calls in one visit other sites")
        for (spot, place), mark in marks.items():
            if mark != alone[order[place]].get(spot):
                raise _Refusal(f"{_name(spot)} has other bits beside other calls")


def _marks(
    model: nn.Module, company: Sequence[tuple[int | None, Called]], rows: Rows, *, is_replacing: bool = False
) -> dict[tuple[Spot, int], int]:
    """What those of calls in one have that are numbered, by their places; 0 where they have nothing of their own."""
    marks: dict[tuple[Spot, int], int] = {}

    def note(spot: Spot, tensor: Tensor) -> None:
        for place, (number, _) in enumerate(company):
            if number is not None:
                marks[spot, place] = _mark(rows_of(tensor, place, rows[spot])) if spot in rows else 0

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


def _run(model: nn.Module, called: Called, note: _Note, *, is_replacing: bool = False, manner: Any = None) -> None:
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
        notes(path, Port.INPUTS, None, Arguments(args, kwargs).others())

    def behind(path: str, _module: nn.Module, _args: tuple[Any, ...], output: Any) -> Any:
        return notes(path, Port.OUTPUT, output, leaves_of(output)[1])

    with ExitStack() as stack, torch.no_grad():
        for path, module in model.named_modules():
            stack.callback(module.register_forward_pre_hook(partial(before, path), with_kwargs=True).remove)
            stack.callback(module.register_forward_hook(partial(behind, path)).remove)
        args, kwargs = together([called], 1)  # models change their arguments
        stack.enter_context(CallByCall() if manner is None else manner)
        model(*args, **kwargs)


def _joined(values: Sequence[Any]) -> Any:
    return torch.cat(list(values)) if isinstance(values[0], Tensor) else values[0]


_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_ODD = 0x9E3779B97F4A7C15 - (1 << 64)  # the golden ratio's bits


def _mark(tensor: Tensor) -> int:
    """A number that differs where a bit does, but for which NaN it is: so that nobody has to keep what was there."""
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    if tensor.is_floating_point():
        tensor = torch.where(tensor == tensor, tensor, float("nan"))
    bits = tensor.contiguous().view(_INTEGERS[tensor.itemsize]).flatten().long()
    places = torch.arange(1, len(bits) + 1, device=bits.device) * _ODD | 1
    return hash((tuple(tensor.shape), tensor.dtype, int((bits * places).sum())))


def _is_equal(own: Tensor, other: Tensor) -> bool:
    """Bit for bit, but for which NaN it is."""
    if own.shape != other.shape or own.dtype != other.dtype:
        return False
    same = own == other
    return bool((same | ((own != own) & (other != other))).all())


def _name(spot: Spot) -> str:
    (path, port, visit), _ = spot
    return f"{path or 'the model'}.{port.value} (visit {visit})"
