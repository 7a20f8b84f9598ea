"""Every kind of site of four families: how a user names it, and how plain Hugging Face has the same tensor.

Sites of one `moment` hold one tensor at one visit under several names: a program keeps to one of them, as which name is
written first is no matter of these tests.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from families import FAMILIES, Family
from names import POINTS, View
from operations import CASES, LAYER, Case
from programs import find

Key = str | int | tuple[str]  # an attribute, an index, a key of a dict


@dataclass(frozen=True)
class Hook:
    """An argument or the output of a module: which of several, and a view of it."""

    path: str
    side: str  # input, output
    key: int | str | None = None  # of arguments the first without
    view: View = field(default=lambda value: value, repr=False)


@dataclass(frozen=True)
class Attend:
    """A tensor of the attention formula."""

    path: str
    point: str
    heads_first: bool = False  # [sequences, heads, tokens, features]


@dataclass(frozen=True)
class HeadOut:
    """What each head adds: `z` times its part of the output projection; their sum is what that gives."""

    path: str  # of the output projection


@dataclass(frozen=True)
class Patched:
    """A call of a function."""

    case: Case
    call: int


Hand = Hook | Attend | HeadOut | Patched


@dataclass(frozen=True)
class Spot:
    """One site, by one of its names."""

    name: str
    path: str
    keys: tuple[Key, ...]
    hand: Hand = field(repr=False)
    moment: int = 0  # when in a forward
    token_dim: int = 1
    writes: str = "all"  # all, assign (never in place), scale (only products), none
    on_ranks: bool = True  # also where ranks split the model
    is_float: bool = True

    def holder(self, model: Any) -> Any:
        value = find(model, self.path) if self.path else model
        for key in self.keys[:-1]:
            value = getattr(value, key) if isinstance(key, str) else value[key[0] if isinstance(key, tuple) else key]
        return value

    def get(self, model: Any) -> Any:
        holder, key = self.holder(model), self.keys[-1]
        return getattr(holder, key) if isinstance(key, str) else holder[key[0] if isinstance(key, tuple) else key]

    def put(self, model: Any, value: Any) -> None:
        holder, key = self.holder(model), self.keys[-1]
        if isinstance(key, str):
            setattr(holder, key, value)
        else:
            holder[key[0] if isinstance(key, tuple) else key] = value


def spots(family: str) -> list[Spot]:
    """All of a model, in the order in which its forward comes to them."""
    return list(_Spots(family).all())


def spans(family: str) -> dict[str, tuple[int, int]]:
    """Modules that may be skipped, and the moments of their input and output."""
    found: dict[str, tuple[int, int]] = {}
    for spot in spots(family):
        if spot.keys[-1] in ("input", "output") and len(spot.keys) == 1:
            path, moment = spot.path, spot.moment
            first, last = found.get(path, (moment, moment))
            found[path] = min(first, moment), max(last, moment)
    names = FAMILIES[family]
    layers = {f"{names.layers}.{number}" for number in range(names.num_layers)}
    wanted = layers | {f"{layer}.mlp" for layer in layers}
    return {path: span for path, span in found.items() if path in wanted}


class _Spots:
    """Counts moments."""

    def __init__(self, family: str) -> None:
        self.family, self.names, self.now = family, FAMILIES[family], 0
        self.cases = {case.name: case for case in CASES[family]}

    def all(self) -> Iterator[Spot]:
        names: Family = self.names
        root = names.layers.partition(".")[0]
        embedding = {"gpt2": "transformer.wte"}.get(self.family, f"{root}.embed_tokens")
        yield from self.moment(self.port(embedding, "output"))
        for number in range(names.num_layers):
            yield from self.layer(f"{names.layers}.{number}", number)
        yield from self.moment(self.port(names.norm, "input"))
        yield from self.moment(self.port(names.norm, "output"))
        yield from self.moment(self.port("lm_head", "input"), *self.case("head"))
        yield from self.moment(self.port("lm_head", "output"))
        yield from self.moment(*self.case("cap"))
        logits = Spot("logits", "", ("output", "logits"), Hook("", "output", "logits"))
        yield from self.moment(logits)

    def layer(self, path: str, number: int) -> Iterator[Spot]:
        attention = f"{path}.{self.names.attention}"
        yield from self.moment(
            self.port(path, "input"),
            self.named(path, "resid_pre"),
            Spot("inputs[0][0]", path, ("inputs", 0, 0), Hook(path, "input")),
        )
        first = "ln_1" if self.family == "gpt2" else "input_layernorm"
        yield from self.sides(f"{path}.{first}")
        yield from self.heads(path, attention, number)
        if self.family == "gpt2":
            yield from self.middle(path, "ln_2")
            yield from self.neurons(path, f"{path}.mlp", "c_fc", "act", "c_proj", number, "tanh")
        elif self.family == "gemma2":
            yield from self.sides(f"{path}.post_attention_layernorm")
            yield from self.middle(path, "pre_feedforward_layernorm", number, "norm")
            yield from self.neurons(path, f"{path}.mlp", "gate_proj", "act_fn", "down_proj", number)
            yield from self.sides(f"{path}.post_feedforward_layernorm")
        elif self.family == "llama":
            yield from self.middle(path, "post_attention_layernorm", number, "norm")
            yield from self.neurons(path, f"{path}.mlp", "gate_proj", "act_fn", "down_proj", number, "act")
        else:
            yield from self.middle(path, "post_attention_layernorm")
            yield from self.experts(path, number)
        yield from self.moment(
            self.port(path, "output"),
            self.named(path, "resid_post"),
            Spot("output[0]", path, ("output", 0), Hook(path, "output"), writes="in place"),
        )

    def heads(self, layer: str, path: str, number: int) -> Iterator[Spot]:
        is_gpt2 = self.family == "gpt2"
        out = f"{layer}.{self.names.out_projection}"
        own = [self.port(path, "input")]
        if not is_gpt2:
            own.append(Spot('inputs["hidden_states"]', path, ("inputs", 1, ("hidden_states",)), Hook(path, "input")))
        yield from self.moment(*own)
        if is_gpt2:
            whole = self.port(f"{path}.c_attn", "output")
            split = self.case("split", number, on_ranks=False)
            yield from self.moment(whole, self.named(layer, "q"), self.named(layer, "k"), *split)
        else:
            for place in (0, 1):
                keys = ("inputs", 1, ("position_embeddings",), place)
                hand = Hook(path, "input", f"position_embeddings.{place}")
                yield from self.moment(Spot(f"rotary[{place}]", path, keys, hand, writes="none"))
            yield from self.moment(self.port(f"{path}.q_proj", "output"), self.named(layer, "q"))
            yield from self.moment(self.port(f"{path}.k_proj", "output"), self.named(layer, "k"))
            yield from self.moment(self.port(f"{path}.v_proj", "output"))
        yield from self.moment(*self.case("half", number, token_dim=2))
        query = Spot(
            "query", path, ("source", "attention_interface_0", "inputs", 0, 1), Attend(path, "q_rot", True), token_dim=2
        )
        z = Spot("attended", path, ("source", "attention_interface_0", "output", 0), Attend(path, "z"))
        yield from self.moment(self.attended(path, "q_rot"), query)
        yield from self.moment(self.attended(path, "k_rot"), *self.case("rotary", number, token_dim=2))
        yield from self.moment(self.attended(path, "v"))
        for name in ("scores", "pattern"):
            yield from self.moment(Spot(name, path, (name,), Attend(path, name), token_dim=2, writes="scale"))
        yield from self.moment(self.attended(path, "z"), z)
        yield from self.moment(self.port(out, "input"))
        yield from self.moment(
            self.port(out, "output"),
            Spot("head_out", path, ("head_out",), HeadOut(out)),
            *self.case("projection", number),
        )
        yield from self.moment(Spot("output[0]", path, ("output", 0), Hook(path, "output", 0)))

    def middle(self, layer: str, norm: str, number: int = -1, case: str = "") -> Iterator[Spot]:
        yield from self.moment(self.port(f"{layer}.{norm}", "input"), self.named(layer, "resid_mid"))
        yield from self.moment(*self.case(case, number))
        yield from self.moment(self.port(f"{layer}.{norm}", "output"))

    def neurons(
        self, layer: str, path: str, wide: str, act: str, down: str, number: int, case: str = ""
    ) -> Iterator[Spot]:
        yield from self.moment(self.port(path, "input"))
        yield from self.moment(self.port(f"{path}.{wide}", "output"))
        yield from self.moment(self.port(f"{path}.{act}", "input"), self.named(layer, "mlp_pre"))
        if self.family == "gpt2":
            yield from self.moment(*self.case(case, number))
            yield from self.moment(self.port(f"{path}.{act}", "output"))
        else:
            yield from self.moment(self.port(f"{path}.{act}", "output"), *self.case(case, number))
            yield from self.moment(self.port(f"{path}.up_proj", "output"))
        yield from self.moment(self.port(f"{path}.{down}", "input"), self.named(layer, "mlp_post"))
        yield from self.sides(path, self.port(f"{path}.{down}", "output"))

    def experts(self, layer: str, number: int) -> Iterator[Spot]:
        path = f"{layer}.mlp"
        yield from self.moment(self.port(path, "input"))
        gate, experts = f"{path}.gate", f"{path}.experts"
        yield from self.moment(*self.case("router", number))
        yield from self.moment(*self.case("weights", number))
        router = Spot("router", path, ("router",), Hook(gate, "output", 0), writes="none")
        yield from self.moment(router)
        yield from self.moment(Spot("weights", gate, ("output", 1), Hook(gate, "output", 1)))
        yield from self.moment(
            Spot("chosen", experts, ("inputs", 0, 1), Hook(experts, "input", 1), writes="none", is_float=False)
        )
        yield from self.moment(Spot("inputs[0][2]", experts, ("inputs", 0, 2), Hook(experts, "input", 2)))
        yield from self.moment(self.port(experts, "output"), *self.case("experts", number))
        yield from self.moment(self.port(path, "output"))

    # one

    def moment(self, *own: Spot) -> Iterator[Spot]:
        self.now += 1
        for spot in own:
            yield replace(spot, moment=self.now)

    def sides(self, path: str, *before: Spot) -> Iterator[Spot]:
        """What goes into a norm and what comes out of it; of a module whose input was there, its output."""
        for spot in before or (self.port(path, "input"),):
            yield from self.moment(spot)
        yield from self.moment(self.port(path, "output"))

    def port(self, path: str, side: str) -> Spot:
        return Spot(f"{path}.{side}", path, (side,), Hook(path, side))

    def named(self, layer: str, name: str) -> Spot:
        path, side, view = POINTS[self.family][name]
        return Spot(f"{layer}.{name}", layer, (name,), Hook(f"{layer}.{path}" if path else layer, side, None, view))

    def attended(self, path: str, point: str) -> Spot:
        return Spot(f"{path}.{point}", path, (point,), Attend(path, point))

    def case(self, name: str, number: int = LAYER, **more: Any) -> Iterator[Spot]:
        """An operation inside of a forward, where there is such a case."""
        case = self.cases.get(name)
        if case is None or number != LAYER:
            return
        call = LAYER if name == "router" else case.call  # by the formula, softmax is a method in attention
        yield _CaseSpot(f"source {name}", "", ("",), Patched(case, call), **more)


@dataclass(frozen=True)
class _CaseSpot(Spot):
    """An operation of `operations.CASES`."""

    def get(self, model: Any) -> Any:
        assert isinstance(self.hand, Patched)
        return self.hand.case.read(model)

    def put(self, model: Any, value: Any) -> None:
        assert isinstance(self.hand, Patched)
        self.hand.case.assign(model, value)
