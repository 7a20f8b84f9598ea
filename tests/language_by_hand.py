"""The oracle of random programs: plain Hugging Face, prompt by prompt, with hooks and replaced functions.

The prompts of an invoke run side by side, a thread each: at a site that a program names all wait for the last, one
of them puts their tensors into the left-padded view that the program means and does what the program says with torch's
own code, and every prompt goes on with its rows.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cache
from typing import Any

import torch
from families import model_of
from language_meanings import change, compute, given_to, instead, made, tokens_first
from language_programs import Apply, Block, Call, Edit, Mask, Program, Read, Skip, Statement, Weigh
from language_sites import Attend, HeadOut, Hook, Patched, Spot, spots
from names import HEADS, SIZE, weights_by_hand
from operations import put_in_place
from points import attending
from programs import find
from torch import Tensor

See = Callable[[Tensor], Tensor]  # what a prompt has at a site: what it goes on with


@cache
def plain_model(family: str) -> Any:
    return model_of(family)


@cache
def plain_weight(family: str, owner: str, weight: str) -> Tensor:
    """A parameter or a buffer by its path, or a weight by name."""
    if weight.startswith("W_"):
        layer = int(owner.rpartition(".")[2]) if owner else 0
        return weights_by_hand(plain_model(family), family, layer)[weight]
    found: Tensor = getattr(find(plain_model(family), owner), weight).detach()
    return found


def run_by_hand(program: Program, *, without_edits: bool = False) -> list[Tensor]:
    """The saved values of `language_written.record`, in order."""
    return _Run(program, without_edits).saved()


class _Run:
    """A program; invokes one after another, as values go from earlier to later ones."""

    def __init__(self, program: Program, without_edits: bool) -> None:
        self.program, self.without_edits = program, without_edits
        self.plain = plain_model(program.family)
        self.values: dict[str, Tensor] = {}
        self.makers = {
            each.name: (each, number)
            for number, block in enumerate(program.blocks)
            for each in block.statements
            if isinstance(each, (Apply, Call, Weigh, Mask))
        }
        self.parts: dict[str, list[Tensor]] = {}  # of what an invoke without prompts reads: each prompt's
        self.parts_spot: dict[str, Spot] = {}

    def saved(self) -> list[Tensor]:
        found: list[Tensor] = []
        for number, block in enumerate(self.program.blocks):
            if block.prompts:
                behind = [each for each in self.program.blocks[number + 1 :] if not each.prompts]
                _Together(self, number, block, behind).run()
            else:
                for name in [each.name for each in block.statements if isinstance(each, Read)]:
                    spot = self.parts_spot[name]
                    lengths = [len(prompt) for prompt in self.program.prompts_of(number)]
                    self.values[name] = padded(self.parts[name][: len(lengths)], spot, max(lengths))
            found += [self.value(name) for name in block.saved]
        return found

    def value(self, name: str) -> Tensor:
        """Computed when it is first needed."""
        if name not in self.values:
            statement, number = self.makers[name]
            lengths = [len(prompt) for prompt in self.program.prompts_of(number)]
            match statement:
                case Apply(_, _, operands, _):
                    found = compute(statement, [self.value(each) for each in operands], lengths)
                case Call(_, path, operand, shape):
                    given = self.value(operand)
                    found = self.plain.get_submodule(path)(given_to(given, shape))
                case Weigh(_, owner, weight, row):
                    found = plain_weight(self.program.family, owner, weight)[row : row + 1]
                case Mask():
                    columns = torch.arange(max(lengths))
                    found = torch.stack([columns >= max(lengths) - length for length in lengths])
            self.values[name] = found
        return self.values[name]


class _Together:
    """The prompts of one invoke, side by side."""

    def __init__(self, run: _Run, number: int, block: Block, behind: Sequence[Block]) -> None:
        self.run_, self.block, self.prompts = run, block, block.prompts
        self.longest, self.shortest = max(map(len, self.prompts)), min(map(len, self.prompts))
        self.family = run.program.family
        self.todo: dict[Spot, list[tuple[Statement, bool]]] = {}  # and whether an invoke without prompts says it
        self.skips: dict[str, Tensor] = {}
        entries = {spot.path: spot for spot in spots(self.family) if spot.keys == ("input",)}
        self.exits: dict[str, Spot] = {spot.path: spot for spot in spots(self.family) if spot.keys == ("output",)}
        for statement in block.statements:
            if isinstance(statement, (Read, Edit)):
                self.todo.setdefault(statement.spot, []).append((statement, False))
            elif isinstance(statement, Skip):
                self.todo.setdefault(entries[statement.path], []).append((statement, False))
                self.todo.setdefault(self.exits[statement.path], []).insert(0, (statement, False))
        for other in behind:
            for statement in other.statements:
                if isinstance(statement, (Read, Edit)):
                    self.todo.setdefault(statement.spot, []).append((statement, True))
        self.slots: list[Any] = [None] * len(self.prompts)
        self.barrier = threading.Barrier(len(self.prompts), timeout=60)
        self.own = threading.local()
        self.errors: list[BaseException] = []

    def run(self) -> None:
        def one(row: int) -> None:
            self.own.row, self.own.is_quiet = row, False
            try:
                with torch.no_grad():
                    self.run_.plain(input_ids=torch.tensor([self.prompts[row]]), use_cache=False)
            except BaseException as error:  # noqa: BLE001
                self.errors.append(error)
                self.barrier.abort()

        with ExitStack() as stack:
            stack.enter_context(installed(self.run_.plain, {spot: self.seer(spot) for spot in self.todo}, self.own))
            threads = [threading.Thread(target=one, args=(row,)) for row in range(len(self.prompts))]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        errors = [each for each in self.errors if not isinstance(each, threading.BrokenBarrierError)]
        if self.errors:
            raise (errors or self.errors)[0]

    def seer(self, spot: Spot) -> See:
        def see(tensor: Tensor) -> Tensor:
            row = self.own.row
            self.slots[row] = tensor
            if self.barrier.wait() == 0:
                self.own.is_quiet = True
                self.act(spot)
                self.own.is_quiet = False
            self.barrier.wait()
            found: Tensor = self.slots[row]
            return found

        return see

    def act(self, spot: Spot) -> None:
        """Every statement at this site, in the order of the program."""
        for statement, is_everyones in self.todo[spot]:
            if is_everyones:
                for row, prompt in enumerate(self.prompts):
                    self.one(statement, spot, [row], len(prompt), is_everyones)
            else:
                self.one(statement, spot, range(len(self.prompts)), self.longest, is_everyones)

    def one(self, statement: Statement, spot: Spot, rows: Sequence[int], longest: int, is_everyones: bool) -> None:
        view = padded([self.slots[row] for row in rows], spot, longest)
        run = self.run_
        match statement:
            case Read(name, _) if is_everyones:
                run.parts.setdefault(name, []).append(view)
                run.parts_spot[name] = spot
            case Read(name, _):
                run.values[name] = view
            case Edit(_, how, operand, numbers, assigns) if not run.without_edits:
                value = run.value(operand) if operand else None
                shortest = self.shortest_of(statement) if is_everyones else self.shortest
                if assigns:
                    new = tokens_first(made(how, tokens_first(view, spot), value, numbers, shortest), spot)
                    self.put(spot, rows, new)
                else:
                    change(how, tokens_first(view, spot), value, numbers, shortest)
                    for row, given in zip(rows, self.cut(spot, rows, view), strict=True):
                        self.slots[row].copy_(given)
            case Skip(path, operand) if not run.without_edits:
                if spot is self.exits[path] or spot == self.exits[path]:
                    self.put(spot, rows, self.skips[path])
                else:
                    self.skips[path] = instead(view, run.value(operand) if operand else None)

    def shortest_of(self, statement: Statement) -> int:
        blocks = self.run_.program.blocks
        number = next(
            place for place, block in enumerate(blocks) if statement in block.statements and not block.prompts
        )
        return min(map(len, self.run_.program.prompts_of(number)))

    def put(self, spot: Spot, rows: Sequence[int], new: Tensor) -> None:
        for row, given in zip(rows, self.cut(spot, rows, new), strict=True):
            self.slots[row] = given.contiguous()

    def cut(self, spot: Spot, rows: Sequence[int], view: Tensor) -> Iterator[Tensor]:
        for place, row in enumerate(rows):
            length = len(self.prompts[row])
            own = view[place : place + 1].narrow(spot.token_dim, view.shape[spot.token_dim] - length, length)
            yield own[..., -length:] if spot.writes == "scale" else own


def padded(parts: Sequence[Tensor], spot: Spot, longest: int) -> Tensor:
    """The left-padded view of what prompts have: zeros, and -inf where a score's key is no token."""
    found = []
    for part in parts:
        pads = longest - part.shape[spot.token_dim]
        if spot.writes == "scale":
            empty = -torch.inf if spot.name == "scores" else 0.0
            part = torch.cat([part.new_full((*part.shape[:3], pads), empty), part], 3)
        shape = list(part.shape)
        shape[spot.token_dim] = pads
        found.append(torch.cat([part.new_zeros(shape), part], spot.token_dim))
    return torch.cat(found)


# Plain Hugging Face with somebody at its sites


@contextmanager
def installed(plain: Any, sees: dict[Spot, See], own: Any) -> Iterator[None]:
    """Calls `see` wherever a site's tensor is, in threads whose `own.is_quiet` is False."""

    def is_quiet() -> bool:
        return getattr(own, "is_quiet", True)

    points: dict[tuple[int, str], list[tuple[Attend, See]]] = {}
    with ExitStack() as stack:
        for spot, see in sees.items():
            match spot.hand:
                case Hook(path, side, key, view):
                    module = plain.get_submodule(path) if path else plain
                    look = _looking(key, view, see, is_quiet)
                    if side == "output":
                        handle = module.register_forward_hook(lambda m, a, out, look=look: look(out))
                    else:
                        handle = module.register_forward_pre_hook(_before(key, look), with_kwargs=True)
                    stack.callback(handle.remove)
                case HeadOut(path):
                    hook = _heads(see, is_quiet)
                    stack.callback(plain.get_submodule(path).register_forward_hook(hook).remove)
                case Attend(path, point) as hand:
                    points.setdefault((id(plain.get_submodule(path)), point), []).append((hand, see))
                case Patched() as hand:
                    stack.enter_context(_patched(plain, hand, see, own, is_quiet))

        def at(module: Any, point: str, value: Tensor) -> Tensor:
            for hand, see in points.get((id(module), point), ()):
                value = see(value.transpose(1, 2)).transpose(1, 2) if hand.heads_first else see(value.clone())
            return value

        stack.enter_context(attending(plain, at))
        yield


def _looking(key: int | str | None, view: Any, see: See, is_quiet: Callable[[], bool]) -> Callable[[Any], Any]:
    """Of what a hook is given, with one of its members replaced; or the same object, changed in place."""

    def base(tensor: Tensor) -> Tensor:
        is_flat = tensor.dim() == 2
        seen = view(tensor[None] if is_flat else tensor)
        new = see(seen)
        if new is seen:
            return tensor
        whole = tensor.clone()
        view(whole[None] if is_flat else whole).copy_(new)
        return whole

    def look(value: Any) -> Any:
        if is_quiet():
            return value
        if isinstance(value, Tensor):
            return base(value)
        if isinstance(value, tuple):
            place = key or 0
            return tuple(base(one) if number == place else one for number, one in enumerate(value))
        value[key] = base(value[key])
        return value

    return look


def _before(key: int | str | None, look: Callable[[Any], Any]) -> Callable[..., Any]:
    def pre(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if isinstance(key, str):
            name, place = key.split(".")
            pair = kwargs[name]
            new = look(pair[int(place)])
            return args, {**kwargs, name: tuple(new if n == int(place) else one for n, one in enumerate(pair))}
        place = key or 0
        if args:
            return tuple(look(one) if number == place else one for number, one in enumerate(args)), kwargs
        first = next(iter(kwargs))
        return args, {**kwargs, first: look(kwargs[first])}

    return pre


def _heads(see: See, is_quiet: Callable[[], bool]) -> Callable[..., Any]:
    def hook(module: Any, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        if is_quiet():
            return output
        weight = module.weight.T if type(module).__name__ == "Conv1D" else module.weight
        each = torch.einsum("sthc,dhc->sthd", args[0].unflatten(-1, (HEADS, SIZE)), weight.unflatten(1, (HEADS, SIZE)))
        before = each.clone()
        after = see(each)
        if torch.equal(before, after):
            return output
        bias = getattr(module, "bias", None)
        return after.sum(2) if bias is None else after.sum(2) + bias

    return hook


@contextmanager
def _patched(plain: Any, hand: Patched, see: See, own: Any, is_quiet: Callable[[], bool]) -> Iterator[None]:
    """One call of a function in each forward; calls are counted by thread."""
    case = hand.case
    owner = case.owner(plain)
    original = getattr(owner, case.function)
    port, *way = case.keys
    counter = f"calls of {case.name}"

    def look(value: Any) -> Any:
        tensor = value[way[0]] if way and port == "output" else value
        new = see(tensor[None] if case.is_flat else tensor)
        new = new[0] if case.is_flat else new
        if not (way and port == "output"):
            return new
        return tuple(new if place == way[0] else one for place, one in enumerate(value))

    def function(*args: Any, **kwargs: Any) -> Any:
        if is_quiet():
            return original(*args, **kwargs)
        calls = getattr(own, counter, 0)
        setattr(own, counter, calls + 1)
        if calls != hand.call:
            return original(*args, **kwargs)
        if port == "output":
            return look(original(*args, **kwargs))
        place = way[-1] if port == "inputs" else 0
        args = tuple(look(one) if number == place else one for number, one in enumerate(args))
        return original(*args, **kwargs)

    with put_in_place(owner, case.function, function):
        yield


def look_around(family: str, own: Sequence[Spot]) -> dict[Spot, tuple[tuple[int, ...], torch.dtype]]:
    """What one prompt of five tokens has at each site; each must be there once."""
    found: dict[Spot, tuple[tuple[int, ...], torch.dtype]] = {}

    def seer(spot: Spot) -> See:
        def see(tensor: Tensor) -> Tensor:
            assert spot not in found, spot
            found[spot] = tuple(tensor.shape), tensor.dtype
            return tensor

        return see

    class Loud:
        is_quiet = False

    plain = plain_model(family)
    with installed(plain, {spot: seer(spot) for spot in own}, Loud()), torch.no_grad():
        plain(input_ids=torch.tensor([[1, 2, 3, 4, 5]]), use_cache=False)
    assert len(found) == len(own), [spot for spot in own if spot not in found]
    return found
