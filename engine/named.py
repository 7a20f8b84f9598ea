"""The names that the field has for a layer's inner points and weights, given to what they are in this model.

Owns which site, part of a site or view of a parameter a name stands for, worked out from a model's sites and its
anatomy (`engine.anatomy`); what has no such thing gets a refusal with the reason. `Q`, `K` and `HEAD_OUT` become sites
of their own: they are not tensors that a module takes or gives, but parts of one or made of one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from engine.anatomy import Anatomy, find_anatomy, signature
from engine.arguments import Selector
from engine.own_formula import OwnFormula
from engine.partitions import Form, NamedWeight, Units, units_of
from engine.parts import Packed, Parts
from engine.standard import StandardNames, find_standard_names
from polytrace.description import Leaf, ParameterInfo, PointInfo, SiteInfo
from polytrace.graph import Port, Site
from polytrace.sources import operation_path
from polytrace.tree import join


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadView:
    """How a point with heads is seen in the output, or made of the input, of another module."""

    module: str
    units: Units
    is_transposed: bool = False  # of what is made of the input: its weight is [W, D], as GPT-2's


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadsTaken:
    """Heads' results side by side, seen in the input of the module that projects them back."""

    module: str
    num_heads: int


@dataclass(frozen=True, slots=True, kw_only=True)
class CallView:
    """Scores or patterns that are a tensor between the calls of a forward."""

    module: str
    way: str  # to the call, inside of the module's forward
    port: Port
    selector: Selector  # of the tensor there


Views = Mapping[tuple[str, Port], HeadView | HeadsTaken | CallView]


@dataclass(frozen=True, slots=True, kw_only=True)
class Named:
    """All names of a model."""

    sites: tuple[SiteInfo, ...]  # the model's and those of the points that are views, in the model's order
    points: tuple[PointInfo, ...]  # but those that are sites under their own name
    views: Views
    weights: tuple[NamedWeight, ...]
    standard: StandardNames
    layer_parts: tuple[Parts | None, ...]  # of each layer, as its tiny twin has them


def name_parts(
    model: PreTrainedModel,
    layers: str,
    sites: Sequence[SiteInfo],
    attention: str,
    pairs: Mapping[tuple[str, Port, Selector], int],
) -> Named:
    """Finds them by structure. Runs a tiny twin of the model once for each configuration.

    `attention` is the implementation by which the model attends; `pairs` are tensors between calls that have a value
    for each query and key, with their numbers of heads.
    """
    anatomy = find_anatomy(model.config, layers, attention)
    namer = _Namer(model, layers, sites, anatomy, pairs)
    return namer.named()


_LOGITS: Selector = ("logits",)
_OF_DECODERS = ("embed_tokens", "layers", "ln_final")
_TWO_STACKS = "the model has an encoder and a decoder: name the modules of one by their paths"


def unnamed(sites: Sequence[SiteInfo], num_layers: int) -> Named:
    """A model whose parts have the names of its modules alone, but for what it returns."""
    has_logits = any((site.module, site.port) == ("", Port.OUTPUT) and _LOGITS in _selectors(site) for site in sites)
    logits = Site(module="", port=Port.OUTPUT, selector=_LOGITS)
    return Named(
        sites=tuple(sites),
        points=(
            *(
                PointInfo(module="", name=name, site=None, refusal=_TWO_STACKS)
                for name in ("input_ids", "token_embeddings")
            ),
            *((PointInfo(module="", name="logits", site=logits),) if has_logits else ()),
        ),
        views={},
        weights=(),
        standard=StandardNames(
            modules={}, refusals=dict.fromkeys(_OF_DECODERS, _TWO_STACKS), parts=(), points=(), facts=()
        ),
        layer_parts=(None,) * num_layers,
    )


def _selectors(site: SiteInfo) -> set[Selector]:
    return {leaf.selector for leaf in site.leaves}


class NamedParameters(Mapping[str, Tensor]):
    """Parameters and buffers by path, and named weights made when they are asked for."""

    def __init__(self, stored: Mapping[str, Tensor], weights: Sequence[NamedWeight], copies: Mapping[str, int]) -> None:
        """`copies`: so many ranks hold the same part of a parameter; 1 where it is not said."""
        self._stored, self._copies = stored, copies
        self._weights = {weight.path: weight for weight in weights if weight.of in stored}

    def __getitem__(self, path: str) -> Tensor:
        weight = self._weights.get(path)
        return (
            self._stored[path]
            if weight is None
            else weight.view(self._stored[weight.of], self._copies.get(weight.of, 1))
        )

    def of_whole(self, path: str, parameter: Tensor) -> Tensor:
        """A named weight of the whole parameter."""
        return self._weights[path].view(parameter)

    def named(self) -> Iterator[tuple[str, Tensor]]:
        """Named weights of what is here."""
        return ((path, self[path]) for path in self._weights)

    def __iter__(self) -> Iterator[str]:
        yield from self._stored
        yield from self._weights

    def __len__(self) -> int:
        return len(self._stored) + len(self._weights)


def named_infos(weights: Sequence[NamedWeight], stored: Mapping[str, Tensor]) -> Iterator[ParameterInfo]:
    """What a description says of named weights; ranks are not looked at."""
    for weight in weights:
        whole = weight.view(stored[weight.of])
        dtype = str(whole.dtype).removeprefix("torch.")
        yield ParameterInfo(
            path=weight.path, shape=tuple(whole.shape), dtype=dtype, stage=0, sharded_dim=None, of=weight.of
        )


class _Namer:
    """One model on the meta device."""

    def __init__(
        self,
        model: PreTrainedModel,
        layers: str,
        sites: Sequence[SiteInfo],
        anatomy: Anatomy,
        pairs: Mapping[tuple[str, Port, Selector], int],
    ) -> None:
        self.model, self.layers, self.sites, self.anatomy, self.pairs = model, layers, sites, anatomy, pairs
        self.at = {(info.module, info.port): info for info in sites if info.visit == 0}
        self.behind: dict[int, list[SiteInfo]] = {}  # sites to be put behind one of an order
        self.views: dict[tuple[str, Port], HeadView | HeadsTaken | CallView] = {}
        self.points: list[PointInfo] = []
        self.weights: list[NamedWeight] = []

    def named(self) -> Named:
        listed: Any = self.model.get_submodule(self.layers)
        for number, layer in enumerate(listed):
            path = f"{self.layers}.{number}"
            self._residual(path, self.anatomy.kinds.get(signature(layer)))
            attention = next(
                (own for own, port in self.at if port is Port.Q_ROT and f"{own}.".startswith(f"{path}.")), None
            )
            parts = self.anatomy.kinds.get(signature(layer))
            if attention is not None and parts is not None and attention == _under(path, parts.attention or ""):
                self._attention(path, attention, parts)
            elif attention is not None:
                for name in ("q", "k", "head_out"):
                    self._refuse(attention, name, _NO_TWIN if parts is None else _SEVERAL)
            elif parts is not None and parts.formula is not None and parts.attention is not None:
                self._own_attention(path, _under(path, parts.attention), parts, parts.formula)
            elif parts is not None and parts.attention is not None:
                for name in ("q", "k", "v", "scores", "pattern", "z", "head_out"):
                    self._refuse(_under(path, parts.attention), name, _FUSED)
            if attention is None and parts is not None and parts.attention is not None:
                attention = _under(path, parts.attention)
            if attention is not None and (attention, Port.KEYS) not in self.at:
                for name, own in (("keys", "k"), ("values", "v")):
                    self._refuse(attention, name, _OWN_CACHE.format(own=own))
            if parts is not None:
                self._mlp(path, parts)
        self._root()
        ordered = [own for info in self.sites for own in (info, *self.behind.get(info.order, ()))]
        sites = tuple(replace(info, order=order) for order, info in enumerate(ordered))
        taken = set(dict(self.model.named_parameters())) | set(dict(self.model.named_buffers()))
        weights = tuple(weight for weight in self.weights if weight.path not in taken)
        at = {(info.module, info.port): info for info in sites if info.visit == 0}
        standard = find_standard_names(self.model, self.layers, self.anatomy, at)
        return Named(
            sites=sites,
            points=(*self.points, *standard.points),
            views=self.views,
            weights=weights,
            standard=standard,
            layer_parts=tuple(self.anatomy.kinds.get(signature(layer)) for layer in listed),
        )

    # the residual

    def _residual(self, path: str, parts: Parts | None) -> None:
        self._point(path, "resid_pre", path, Port.INPUT)
        self._point(path, "resid_post", path, Port.OUTPUT)
        if parts is None:
            self._refuse(path, "resid_mid", _NO_TWIN)
        elif parts.mid is None:
            self._refuse(path, "resid_mid", parts.why_no_mid)
        else:
            self._point(path, "resid_mid", f"{path}.{parts.mid}", Port.INPUT)

    # attention

    def _attention(self, path: str, attention: str, parts: Parts) -> None:
        query, key = self.at[attention, Port.Q_ROT].leaves[0], self.at[attention, Port.K_ROT].leaves[0]
        heads, size = query.tail
        groups = key.tail[0]
        self._roles(path, attention, parts, heads, groups, size, {"q": Port.Q, "k": Port.K, "v": None})
        out = None if parts.out is None else _under(path, parts.out)
        taken = None if out is None else self.at.get((out, Port.INPUT))
        value = self.at[attention, Port.Z].leaves[0].tail
        if out is None or taken is None or taken.leaves[0].is_flat or taken.leaves[0].tail != (value[0] * value[1],):
            self._refuse(attention, "head_out", _NO_HEAD_OUT)
        else:
            units = Units(total=value[0], start=0, count=value[0], size=value[1])
            hidden = self.at[out, Port.OUTPUT].leaves[0].tail[0]
            self._insert(taken, attention, Port.HEAD_OUT, replace(taken.leaves[0], tail=(value[0], hidden)))
            is_transposed = isinstance(self.model.get_submodule(out), Conv1D)
            self.views[attention, Port.HEAD_OUT] = HeadView(module=out, units=units, is_transposed=is_transposed)
            self._weight(attention, "W_O", out, "weight", Form.FROM_HEADS, units)
            self._weight(attention, "b_O", out, "bias", Form.ROWS)
        self._tell_of_head_out(attention, parts)
        if parts.dropout is not None:
            for name in ("input", "output"):
                self._point(_under(path, parts.dropout), name, attention, Port.PATTERN)

    def _roles(
        self,
        path: str,
        attention: str,
        parts: Parts,
        heads: int,
        groups: int,
        size: int,
        ports: Mapping[str, Port | None],
    ) -> None:
        """Queries, keys and values where projections give them, those of them as sites that have a port; weights."""
        share = heads // groups
        counts = {"q": heads, "k": groups, "v": groups}
        for role, port in ports.items():
            packed = parts.roles.get(role)
            units = None if packed is None else self._units(path, packed, role, counts, size, groups)
            if packed is None or units is None:
                if port is not None:
                    self._refuse(attention, role, _NO_HEADS.format(role=role, rotated=f"{role}_rot"))
                continue
            source = _under(path, packed.module)
            if port is not None:
                info = self.at[source, Port.OUTPUT]
                self._insert(info, attention, port, replace(info.leaves[0], tail=(counts[role], size)))
                self.views[attention, port] = HeadView(module=source, units=units)
            letter = role.upper()
            self._weight(attention, f"W_{letter}", source, "weight", Form.TO_HEADS, units)
            self._weight(attention, f"b_{letter}", source, "bias", Form.HEADS, units)
            if role != "q":
                self._weight(attention, f"W_{letter}_by_head", source, "weight", Form.TO_HEADS, units, share=share)
                self._weight(attention, f"b_{letter}_by_head", source, "bias", Form.HEADS, units, share=share)

    def _own_attention(self, path: str, attention: str, parts: Parts, formula: OwnFormula) -> None:
        """Of a module that attends by a formula of its family."""
        call = operation_path(attention, formula.way)
        num_heads = self._add_pairs(
            attention, Port.PATTERN, call, CallView(module=attention, way=formula.way, port=Port.OUTPUT, selector=())
        )
        if formula.scores is not None:
            self._add_pairs(
                attention,
                Port.SCORES,
                call,
                CallView(module=attention, way=formula.way, port=Port.INPUTS, selector=formula.scores),
            )
        out = None if parts.out is None else _under(path, parts.out)
        taken = None if out is None else self.at.get((out, Port.INPUT))
        width = taken.leaves[0].tail if taken is not None and not taken.leaves[0].is_flat else ()
        if out is None or taken is None or num_heads is None or len(width) != 1 or width[0] % num_heads:
            for name in ("z", "head_out"):
                self._refuse(attention, name, _NO_HEAD_OUT if name == "head_out" else _NO_Z)
            return
        size = width[0] // num_heads
        self._insert(taken, attention, Port.Z, replace(taken.leaves[0], tail=(num_heads, size)))
        self.views[attention, Port.Z] = HeadsTaken(module=out, num_heads=num_heads)
        hidden = self.at[out, Port.OUTPUT].leaves[0].tail[0]
        self._insert(taken, attention, Port.HEAD_OUT, replace(taken.leaves[0], tail=(num_heads, hidden)))
        units = Units(total=num_heads, start=0, count=num_heads, size=size)
        is_transposed = isinstance(self.model.get_submodule(out), Conv1D)
        self.views[attention, Port.HEAD_OUT] = HeadView(module=out, units=units, is_transposed=is_transposed)
        self._weight(attention, "W_O", out, "weight", Form.FROM_HEADS, units)
        self._weight(attention, "b_O", out, "bias", Form.ROWS)
        self._tell_of_head_out(attention, parts)
        groups = self._num_groups(path, parts, num_heads, size)
        if groups is not None:
            own = {"q": Port.Q, "k": Port.K, "v": Port.V}
            self._roles(path, attention, parts, num_heads, groups, size, dict(own))

    def _num_groups(self, path: str, parts: Parts, num_heads: int, size: int) -> int | None:
        """Key/value heads, from the width of what gives the keys; None where nothing is known to."""
        packed = parts.roles.get("k")
        info = None if packed is None else self.at.get((_under(path, packed.module), Port.OUTPUT))
        if packed is None or info is None or len(info.leaves[0].tail) != 1:
            return None
        units = info.leaves[0].tail[0] // size
        return units if packed.order == ("k",) else (units - num_heads) // 2

    def _add_pairs(self, attention: str, port: Port, call: str, view: CallView) -> int | None:
        """A site of a value for each query and key, where a call has it; the number of heads."""
        info = self.at.get((call, view.port))
        leaf = None if info is None else next((one for one in info.leaves if one.selector == view.selector), None)
        shape = None if leaf is None else self.pairs.get((call, view.port, view.selector))
        if info is None or leaf is None or shape is None:
            self._refuse(attention, port.value, f"{call} does not give it in this forward")
            return None
        own = replace(
            leaf, tensor=None, tail=(shape,), of_pairs=True, dtype="float32", read_refusal=None, write_refusal=None
        )
        self._insert(info, attention, port, own)
        self.views[attention, port] = view
        return shape

    def _tell_of_head_out(self, attention: str, parts: Parts) -> None:
        if (told := _before_it_is_added(parts)) is not None and (attention, Port.HEAD_OUT) in self.views:
            self.points.append(
                PointInfo(module=attention, name="head_out", note=told, site=Site(module=attention, port=Port.HEAD_OUT))
            )

    def _units(
        self, path: str, packed: Packed, role: str, counts: Mapping[str, int], size: int, groups: int
    ) -> Units | None:
        info = self.at.get((_under(path, packed.module), Port.OUTPUT))
        width = size * sum(counts[other] for other in packed.order)
        if info is None or info.structure != "tensor" or info.leaves[0].is_flat or info.leaves[0].tail != (width,):
            return None
        return units_of(role, packed.order, counts, size, groups if packed.is_interleaved else 1)

    # the MLP

    def _mlp(self, path: str, parts: Parts) -> None:
        if parts.experts is not None:
            block = _under(path, parts.experts.rpartition(".")[0])
            if parts.mlp is None or _under(path, parts.mlp) != block:
                for name in ("mlp_pre", "mlp_post"):
                    self._refuse(block, name, f"inside {parts.experts} rows are sorted by expert, not by token")
            if parts.router is not None:
                router, way = _under(path, parts.router[0]), parts.router[1]
                told = (
                    f"{router} has chosen experts by then: change what it chose, the other members of {router}.output"
                )
                self._point(block, "router", router, Port.OUTPUT, way, write_refusal=told if way else None)
            else:
                self._refuse(block, "router", "no module of this layer gives one logit for each expert")
        if parts.mlp is None or parts.down is None or parts.act is None:
            if parts.experts is None:
                for name in ("mlp_pre", "mlp_post"):
                    self._refuse(path, name, _NO_NEURONS)
            return
        owner, down = _under(path, parts.mlp), _under(path, parts.down)
        self._point(owner, "mlp_post", down, Port.INPUT)
        self._point(owner, "mlp_pre", _under(path, parts.act), Port.INPUT)
        is_gated = "up" in parts.roles
        names = {"gate": "gate" if is_gated else "in", "up": "in"}
        for role, name in names.items():
            packed = parts.roles.get(role)
            if packed is not None:
                counts = dict.fromkeys(packed.order, 1)
                units = units_of(role, packed.order, counts, None, 1) if len(packed.order) > 1 else None
                source = _under(path, packed.module)
                self._weight(owner, f"W_{name}", source, "weight", Form.MATRIX, units)
                self._weight(owner, f"b_{name}", source, "bias", Form.HEADS, units)
        self._weight(owner, "W_out", down, "weight", Form.MATRIX)
        self._weight(owner, "b_out", down, "bias", Form.ROWS)

    # the model

    def _root(self) -> None:
        paths = {id(module): path for path, module in self.model.named_modules()}
        embedding, head = self.model.get_input_embeddings(), self.model.get_output_embeddings()
        if isinstance(embedding, nn.Module):
            self._weight("", "W_E", paths[id(embedding)], "weight", Form.ROWS)
        if isinstance(head, nn.Module):
            self._weight("", "W_U", paths[id(head)], "weight", Form.MATRIX)
            self._weight("", "b_U", paths[id(head)], "bias", Form.ROWS)
        if self.anatomy.positions is not None:
            path, first = self.anatomy.positions
            self._weight("", "W_pos", path, "weight", Form.ROWS, first=first)

    # what names stand for

    def _point(
        self, owner: str, name: str, module: str, port: Port, way: tuple[int | str, ...] = (), **more: str | None
    ) -> None:
        info = self.at.get((module, port))
        leaves = {leaf.selector: leaf for leaf in info.leaves} if info is not None else {}
        selector = way if way in leaves else (0,)
        if selector not in leaves:
            self._refuse(owner, name, f"{module}.{port.value} is no tensor of this forward")
            return
        site = Site(module=module, port=port, selector=selector)
        self.points.append(PointInfo(module=owner, name=name, site=site, **more))

    def _refuse(self, owner: str, name: str, reason: str) -> None:
        self.points.append(PointInfo(module=owner, name=name, site=None, refusal=reason))

    def _insert(self, behind: SiteInfo, module: str, port: Port, leaf: Leaf) -> None:
        own = replace(leaf, selector=(), mutated=False, tensor=None)
        info = replace(behind, module=module, port=port, structure="tensor", leaves=(own,), keyword=None)
        self.behind.setdefault(behind.order, []).append(info)

    def _weight(
        self, owner: str, name: str, module: str, parameter: str, form: Form, units: Units | None = None, **more: Any
    ) -> None:
        source = self.model.get_submodule(module)
        if getattr(source, parameter, None) is None:
            return
        self.weights.append(
            NamedWeight(
                path=join(owner, name),
                of=f"{module}.{parameter}",
                form=form,
                units=units,
                is_transposed=isinstance(source, Conv1D),
                **more,
            )
        )


def _before_it_is_added(parts: Parts) -> str | None:
    """What happens to what heads gave before it is in the residual, where something does."""
    if parts.norm_behind is not None:
        return f"before {parts.norm_behind}, which norms what attention gave before it is added to the residual"
    if abs(parts.scale - 1) > 1e-3:
        return f"before the layer adds {parts.scale:.4g} times it to the residual"
    return None


def _under(path: str, way: str) -> str:
    """A path in a layer; "" is the layer itself."""
    return join(path, way) if way else path


_NO_TWIN = "no tiny twin of this family could be run, which tells what its parts are"
_FUSED = (
    "this family attends by torch's fused attention here, which shows nothing between what the module takes and gives: "
    "`attention_input`, `attention_output`"
)
_SEVERAL = "this layer attends more than once"
_NO_Z = "no module of this layer takes all heads' results side by side"
_NO_NEURONS = "no activation that is a module of its own stands before a projection back to the residual"
_NO_HEADS = (
    "no module's output has each head's {role} as attention is given it, but for a factor, a rotation and a norm's "
    "length: read {rotated}, or the outputs of this module's projections"
)
_OWN_CACHE = (
    "each sequence runs alone here, with a cache that the model makes itself, which nothing looks into: `{own}`, where "
    "the family has it, is what each step puts there"
)
_NO_HEAD_OUT = (
    "no module of this layer takes all heads' z side by side: read and write `z`, which is what each head found"
)
