"""Which calls of a model as it is may be one call, and what each has of it.

Calls of one structure are put together along the first dimension of their tensors, always as many as one of `sizes`: a
call alone is repeated up to the least of them (matrix kernels take another path for few rows). The gate tries every
such size on the served weights before the first call goes; what does not have the same bits in any company is called
as it is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from engine.arguments import Arguments, Selector
from engine.leaves import first_argument
from engine.module_state import ModuleState, kept_tensors, settings_of
from engine.whole_call import Key
from engine.whole_sites import leaves_of, told
from engine.writes import with_member
from polytrace.graph import Port

MOST_CALLS = 16  # in one
_SIZES = (1, 2, 4, 8, MOST_CALLS)  # calls in one that are tried
_FLOORS = (1, 2, 4)  # as the least of them
_ENOUGH_CALLS = 8  # that one has to have room for
_NUM_KINDS = 4  # calls of other content that the gate puts beside each other
_TOLERANCE = 1e-5  # of a call among its own copies, to the call as it is: of the largest value, in float32

Called = tuple[tuple[Any, ...], dict[str, Any]]  # arguments of one call, or of one that is several
Rows = Mapping[tuple[Key, Selector], int | None]  # of one call; None: of all, whoever is beside it
_Seen = dict[tuple[Key, Selector], Tensor]


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the gate has found of one structure of arguments."""

    sizes: tuple[int, ...] = ()  # calls in one; none: each goes as it is
    rows: Rows = field(default_factory=dict)
    refusal: str | None = None  # why calls are not merged

    def size_of(self, num_calls: int) -> int:
        """Calls in one that has room for so many."""
        return next(size for size in self.sizes if size >= num_calls)


def judge(model: nn.Module, called: Called, device: torch.device) -> Verdict:
    """Tries calls of this structure; the model's buffers, numbers and random numbers are then as they were."""
    if not _num_rows(called):
        return Verdict(refusal="its tensors have no first dimension in common")
    before = ModuleState(model, device)
    try:
        refusal = ""
        for floor in _FLOORS:
            try:
                sizes, rows = _tried(model, called, [size for size in _SIZES if size >= floor])
            except _Refusal as found:
                refusal = str(found)
                continue
            if sizes[-1] >= _ENOUGH_CALLS:
                return Verdict(sizes=sizes, rows=rows)
        return Verdict(refusal=refusal or "calls have other bits beside other numbers of calls")
    except Exception as error:  # noqa: BLE001  whatever code of the model raises for calls in one
        return Verdict(refusal=f"calls in one raised {told(error)}")
    finally:
        before.put()


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


def _tried(model: nn.Module, called: Called, sizes: Sequence[int]) -> tuple[tuple[int, ...], Rows]:
    """The sizes up to which all have the bits of the first, and what each call has of every site."""
    kept, settings, chance = [one.clone() for one in kept_tensors(model)], settings_of(model), torch.get_rng_state()
    kinds = [called, *[_other(called, seed) for seed in range(1, _NUM_KINDS)]]
    floor = sizes[0]
    alone = [_run(model, together([kind], floor)) for kind in kinds]
    plain = _run(model, called)
    doubled = _run(model, together([called], 2 * floor))
    if not (plain.keys() == doubled.keys() == alone[0].keys()):
        raise _Refusal("calls in one visit other sites")
    rows = {site: _rows(site, plain[site], alone[0][site], doubled[site], floor) for site in plain}
    for site, tensor in plain.items():
        _check_close(site, rows_of(alone[0][site], 0, rows[site]), tensor)
    held = 0
    for size in sizes:
        try:
            _try_size(model, kinds, alone, rows, size)
        except _Refusal:
            if not held:
                raise
            break
        held += 1
    is_same = all(map(_is_equal, kept, kept_tensors(model))) and settings_of(model) == settings
    if not is_same or not torch.equal(chance, torch.get_rng_state()):
        raise _Refusal("a call changes the model, or draws random numbers")
    return tuple(sizes[:held]), rows


def _try_size(model: nn.Module, kinds: Sequence[Called], alone: Sequence[_Seen], rows: Rows, size: int) -> None:
    """_Refusal where a call has other bits in so many, beside others, or beside calls without a number."""
    for first in range(2):  # every place has had two kinds
        order = [(first + place) % _NUM_KINDS for place in range(size)]
        seen = _run(model, together([kinds[kind] for kind in order], size), is_replacing=bool(first))
        for place, kind in enumerate(order):
            _check_equal(alone[kind], seen, rows, place)
        lost = [kinds[order[0]], *[_lost(kinds[kind]) for kind in order[1:]]]
        _check_equal(alone[order[0]], _run(model, together(lost, size)), rows, 0)


def _check_equal(alone: _Seen, found: _Seen, rows: Rows, place: int) -> None:
    if alone.keys() != found.keys():
        raise _Refusal("calls in one visit other sites")
    for site, tensor in alone.items():
        own, other = rows_of(tensor, 0, rows[site]), rows_of(found[site], place, rows[site])
        if not _is_equal(own, other):
            raise _Refusal(f"{_name(site)} has other bits beside other calls")


def _check_close(site: tuple[Key, Selector], own: Tensor, plain: Tensor) -> None:
    if own.shape != plain.shape or own.dtype != plain.dtype:
        raise _Refusal(f"{_name(site)} has another shape in calls in one")
    if own.dtype == torch.float32 and own.numel():
        bound = _TOLERANCE * max(1.0, plain.nan_to_num().abs().max().item())
        if not torch.allclose(own, plain, rtol=0, atol=bound, equal_nan=True):
            raise _Refusal(f"{_name(site)} is another beside other calls")
    elif not _is_equal(own, plain):
        raise _Refusal(f"{_name(site)} has other bits beside other calls")


def _rows(site: tuple[Key, Selector], plain: Tensor, once: Tensor, twice: Tensor, floor: int) -> int | None:
    """Rows of one call, from tensors of one call, of `floor` calls, and of twice as many."""
    if once.shape == twice.shape == plain.shape:
        return None
    per_call = len(plain) if plain.ndim else 0
    if plain.ndim and all(
        one.shape == (num * per_call, *plain.shape[1:]) for one, num in ((once, floor), (twice, 2 * floor))
    ):
        return per_call
    raise _Refusal(f"{_name(site)} does not have its calls along its first dimension")


def _run(model: nn.Module, called: Called, *, is_replacing: bool = False) -> _Seen:
    """One call, and every tensor that modules take and give. `is_replacing`: each hands on a copy, as edits do."""
    seen: _Seen = {}
    counts: dict[tuple[str, Port], int] = {}

    def note(path: str, port: Port, value: Any, leaves: Mapping[Selector, Tensor]) -> Any:
        visit = counts.get((path, port), 0)
        counts[path, port] = visit + 1
        for selector, tensor in leaves.items():
            seen[(path, port, visit), selector] = tensor.clone()
            if is_replacing and port is Port.OUTPUT:
                value = with_member(value, selector, tensor.clone())
        return value

    def before(path: str, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        first = first_argument(args, kwargs)
        note(path, Port.INPUT, first, leaves_of(first)[1])
        note(path, Port.INPUTS, None, Arguments(args, kwargs).others())

    def behind(path: str, _module: nn.Module, _args: tuple[Any, ...], output: Any) -> Any:
        return note(path, Port.OUTPUT, output, leaves_of(output)[1])

    with ExitStack() as hooks, torch.no_grad():
        for path, module in model.named_modules():
            hooks.callback(module.register_forward_pre_hook(partial(before, path), with_kwargs=True).remove)
            hooks.callback(module.register_forward_hook(partial(behind, path)).remove)
        args, kwargs = together([called], 1)  # models change their arguments
        model(*args, **kwargs)
    return seen


def _num_rows(called: Called) -> int:
    """Of all tensors among the arguments; 0 where they have none in common, or there is none."""
    values = [*called[0], *called[1].values()]
    tensors = [value for value in values if isinstance(value, Tensor)]
    has_more = any(isinstance(value, (tuple, list, dict)) for value in values)
    found = {len(tensor) if tensor.ndim else 0 for tensor in tensors}
    return found.pop() if len(found) == 1 and not has_more else 0


def _joined(values: Sequence[Any]) -> Any:
    return torch.cat(list(values)) if isinstance(values[0], Tensor) else values[0]


def _other(called: Called, seed: int) -> Called:
    """A call of the same structure with other content: integers are some of its own."""
    chance = torch.Generator().manual_seed(seed)

    def changed(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        moved = value.flatten().roll(seed).reshape(value.shape)
        if not value.is_floating_point():
            return moved
        return moved + torch.randn(value.shape, generator=chance).to(value.device, value.dtype)

    return tuple(map(changed, called[0])), {name: changed(value) for name, value in called[1].items()}


def _lost(called: Called) -> Called:
    """A call with no number among its numbers."""

    def lose(value: Any) -> Any:
        is_number = isinstance(value, Tensor) and value.is_floating_point()
        return torch.full_like(value, float("nan")) if is_number else value

    return tuple(map(lose, called[0])), {name: lose(value) for name, value in called[1].items()}


def _is_equal(own: Tensor, other: Tensor) -> bool:
    """Bit for bit, but for which NaN it is."""
    if own.shape != other.shape or own.dtype != other.dtype:
        return False
    same = own == other
    return bool((same | ((own != own) & (other != other))).all())


def _name(site: tuple[Key, Selector]) -> str:
    (path, port, visit), _ = site
    return f"{path or 'the model'}.{port.value} (visit {visit})"
