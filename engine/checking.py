"""Standard names, tried on the served weights before a model serves: a name that does not hold there is withdrawn.

`engine.anatomy` finds what names stand for on a tiny twin; what the served weights and code say may be otherwise. One
forward over a few rows tells, on every shard for what it owns:

- *A base* of 16 tokens, whose values must stand in the relations that their names promise (`engine.relations`).
- *A trial a name*, of the base's first tokens: every layer gives these the base's rows as its input and then changes
  this one name, so that one forward tries it in every layer. What the layer gives must be other than without.
- *A trial a layer*: what the layer gives is changed, and the logits must be other than without. So an edit of a name
  in a layer changes the logits: by way of what the layer gives.

A relation is checked where both its ends are on one stage. Owns what is compared with what, and whom it blames;
`engine.withdrawing` makes of it what a description says.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from engine.arguments import Selector
from engine.copies import to_device
from engine.encoders import has_encoder
from engine.gate import Trial, root_segment
from engine.head_outputs import HeadOutputs
from engine.layer_relations import LayerValues, layer_checks
from engine.named import NamedParameters
from engine.points import Pairs
from engine.relations import Check, Measured, cap_of, equal, factor_of
from engine.reports import GateReport
from engine.streams import Streams
from engine.tried_names import TriedName, TriedNames, first_leaf
from engine.views import RowView
from engine.writes import PortValue, RowWrite
from polytrace.description import Outcome, SiteInfo
from polytrace.graph import Port
from scheduling.plan import View

# R = rows of the base, S = trials, D = hidden

_BASE = 16  # tokens
_TRIAL = 2  # tokens of a name's trial: the last sees two keys; a layer's trial has one
_EXACTLY = 1e-5  # an error that leaves no room for a soft-cap or a factor
_NOISE = 4.0  # so many times what a trial without an edit differs by is no effect
_ONE_HEAD = {"q": Port.Q_ROT, "k": Port.K_ROT}  # of these one head is changed, which no other head may feel there
CHANGES = "an edit of it changes the logits"
LAYER_CHANGES = "what the layer gives changes the logits"


def check_names(trial: Trial, report: GateReport, parameters: NamedParameters) -> tuple[Check, ...]:
    """Collective: every shard calls it at once, behind its gate. One forward."""
    if has_encoder(trial.runner.model):
        return ()  # it has no names but its modules'
    return _Checker(trial, report, parameters).checks()


@dataclass(slots=True)
class _Rows:
    """Views of the trial's rows, the same at every level."""

    streams: Streams
    made: dict[tuple[int, ...], RowView] = field(default_factory=dict)

    def of(self, *segments: int) -> RowView:
        """`[S, tokens]` of segments of one length."""
        if segments not in self.made:
            length = len(self.streams.plan.segments[segments[0]].tokens)
            lengths = (length,) * len(segments)
            view = View(member=0, invoke=0, lengths=lengths, segments=segments, kept_columns=())
            self.made[segments] = RowView(view, range(length), self.streams.layer(0).row, self.streams.device)
        return self.made[segments]


class _Checker:
    def __init__(self, trial: Trial, report: GateReport, parameters: NamedParameters) -> None:
        self.trial, self.parameters = trial, parameters
        self.probe, self.links = trial.probe, trial.links
        self.standard = self.probe.standard.modules
        self.layers = self.probe.layout.layers
        self.names = TriedNames(self.probe, report, self.standard, self.links, trial.runner.window)
        self.segment = {name: number for number, name in enumerate(self.names.all, 2)}  # behind base and control
        self.first_of_layers = 2 + len(self.segment)
        self.found: list[Check] = []
        self.values: dict[str, Tensor] = {}  # the base's, of the layer that runs
        self.stirred: dict[str, float] = defaultdict(float)  # by name, in what this layer adds
        self.edited: set[str] = set()  # names that were, in this layer or around the layers
        self.strays: dict[str, list[int]] = {}  # heads that an edit of one head changed
        self.sinks: Tensor | None = None
        self.entered: Tensor | None = None  # what every layer is given in trials of names
        self.last: Tensor | None = None  # what the layer before gave the base
        self.logits: Tensor | None = None

    # the forward

    def checks(self) -> tuple[Check, ...]:
        generator = torch.Generator().manual_seed(1)
        length = min(_BASE, self.probe.max_tokens)
        base = torch.randint(0, self.probe.vocab_size, (length,), generator=generator).tolist()
        num_layers = self.probe.layout.num_layers
        segments = [
            root_segment(base, num_layers),
            *[root_segment(base[:_TRIAL], num_layers)] * (1 + len(self.segment)),
            *[root_segment(base[:1], num_layers)] * num_layers,
        ]
        sites = [
            site for place, site in self.names.at.items() if place in self.names.looks or place == ("", Port.OUTPUT)
        ]
        rows: list[_Rows] = []

        def visitor(site: SiteInfo, streams: Streams) -> Callable[[Any], Any]:
            if not rows:
                rows.append(_Rows(streams))
            return lambda value: self._visit(site, value, rows[0])

        self.trial.run(segments, visitor, has_operations=False, sites=sites)
        for name in self.names.own:
            if name.why_unread is not None:
                self._add(name.layer, (name.name,), "it is what its name says", _unchecked(name.why_unread))
        if self.links.stage == self.links.stages - 1:
            self._check_head(rows[0])
        return tuple(self.found)

    def _visit(self, site: SiteInfo, value: Any, rows: _Rows) -> Any:
        port = PortValue(value, layouts=site.layouts)
        layer = self.probe.layout.layer_of(site.module)
        is_layer = site.module.rpartition(".")[0] == self.layers
        leaf = first_leaf(site)
        if is_layer and site.port is Port.INPUT and leaf is not None and layer is not None:
            self._enter(layer, port, leaf.selector, rows)
        for look in self.names.looks[site.module, site.port]:
            if self._is_there(port, look.selector, rows):
                self.values[look.key] = _read(port, look.selector, rows.of(0))[0]
                if not look.is_name:
                    self._notice(port, look.selector, rows, is_last=is_layer)
        if isinstance(value, Pairs):
            self.sinks = value.sinks_H
        self._notice_heads(site, port, rows)
        for name in self.names.at_site(site):
            self._edit(name, port, rows, is_layer=is_layer)
        if is_layer and site.port is Port.OUTPUT and leaf is not None and layer is not None:
            self._leave(layer, port, leaf.selector, rows)
        after = port.result()
        if site.module == "" and site.port is Port.OUTPUT:
            told = PortValue(after, layouts=site.layouts)
            selector = next((own for own in (("logits",), (), (0,)) if own in told.tensors), None)
            self.logits = None if selector is None else told.tensors[selector][0]
        return after

    def _is_there(self, port: PortValue, selector: Selector, rows: _Rows) -> bool:
        if port.pairs is not None or port.heads is not None:
            return True
        tensor = port.tensors.get(selector)
        return tensor is not None and tensor.ndim >= 2 and tensor.shape[1] == rows.streams.layer(0).num_padded

    def _enter(self, layer: int, port: PortValue, selector: Selector, rows: _Rows) -> None:
        """Every trial of a name gets what the base is given."""
        self.values.clear()
        self.stirred.clear()
        self.strays.clear()
        self.edited.difference_update(name.name for name in self.names.of_layer[layer])
        self.sinks = None
        view = rows.of(*range(1, self.first_of_layers))
        hidden = _read(port, selector, rows.of(0))[:, :_TRIAL]
        if layer == 0:
            self._check_before(_read(port, selector, view))
        elif self.last is not None:
            says = "resid_pre = resid_post of the layer before"
            self._add(layer, ("resid_pre",), says, equal(_read(port, selector, rows.of(0))[0], self.last))
        port.write(selector, RowWrite(rows=view, value=hidden.expand(*view.shape, -1), in_place=False, turn=0))
        self.entered = hidden

    def _edit(self, name: TriedName, port: PortValue, rows: _Rows, *, is_layer: bool) -> None:
        if is_layer and name.site.port is Port.OUTPUT:
            return  # a trial of its own
        view = rows.of(self.segment[name.name])
        if is_layer and self.entered is not None:
            before = self.entered
        elif self._is_there(port, name.leaf.selector, rows):
            before = _read(port, name.leaf.selector, view)
        else:
            return
        if not before.is_floating_point():
            return
        if port.pairs is not None:
            changed = _changed_pairs(name.name, before[0])
        elif name.name in _ONE_HEAD:
            changed = before.clone()
            changed[..., 0, :] *= -1
        else:
            changed = before * -1
        in_place = name.name == "resid_mid"  # as `layer.resid_mid = ...` is
        port.write(name.leaf.selector, RowWrite(rows=view, value=changed, in_place=in_place, turn=1))
        self.edited.add(name.name)

    def _notice(self, port: PortValue, selector: Selector, rows: _Rows, *, is_last: bool) -> None:
        """How much each name's edit changes what is added in this layer."""
        if is_last:
            return
        trials = _read(port, selector, rows.of(*range(1, self.first_of_layers))).float()
        changes = (trials[1:] - trials[:1]).abs().flatten(1).amax(1).tolist()
        for name, change in zip(self.segment, changes, strict=True):
            self.stirred[name] = max(self.stirred[name], change)

    def _notice_heads(self, site: SiteInfo, port: PortValue, rows: _Rows) -> None:
        for name, behind in _ONE_HEAD.items():
            if site.port is behind and name in self.segment:
                both = _read(port, (), rows.of(1, self.segment[name])).float()
                change = (both[1] - both[0]).abs().amax(2).amax(0)
                least = 1e-2 * float(both.abs().max())  # a sign is twice the value; rounding is not
                self.strays[name] = (change > least).nonzero().flatten().tolist()

    def _leave(self, layer: int, port: PortValue, selector: Selector, rows: _Rows) -> None:
        base = _read(port, selector, rows.of(0))
        trials = _read(port, selector, rows.of(*range(1, self.first_of_layers))).float()
        noise = _NOISE * float((trials[0] - base[0, :_TRIAL].float()).abs().max())
        changes = (trials[1:] - trials[:1]).abs().flatten(1).amax(1).tolist()
        effects = dict(zip(self.segment, changes, strict=True))
        self.values["output:"] = base[0]
        self._check_layer(layer, effects, noise)
        view = rows.of(self.first_of_layers + layer)
        flipped = _read(port, selector, view) * -1
        port.write(selector, RowWrite(rows=view, value=flipped, in_place=False, turn=0))
        self.last = base[0]

    # what is said of it

    def _add(self, layer: int | None, names: tuple[str, ...], says: str, found: Measured, **more: Any) -> None:
        told = found.told and found.told.replace(f"{self.layers}.{layer}.", "")  # one reason for all layers
        check = Check(layer=layer, names=names, says=says, outcome=found.outcome, error=found.error, told=told, **more)
        self.found.append(check)

    def _check_layer(self, layer: int, effects: Mapping[str, float], noise: float) -> None:
        values = LayerValues(
            path=f"{self.layers}.{layer}",
            layer=layer,
            parts=self.probe.layer_parts[layer],
            names=frozenset(name.name for name in self.names.of_layer[layer] if name.why_unread is None),
            values=dict(self.values),
            sinks=self.sinks,
            strays=dict(self.strays),
            hidden_size=self.probe.hidden_size,
        )
        self.found += layer_checks(values, self.trial.runner.model, self.parameters, self.links, self._call)
        for name in self.names.of_layer[layer]:
            is_exit = name.site.module == values.path and name.site.port is Port.OUTPUT
            if is_exit or name.why_unread is not None:
                continue
            found = self._effect(name, effects[name.name], noise, "what the layer gives")
            if found.outcome is Outcome.FAILS and self.stirred[name.name] > noise:
                found = _unchecked("what it changes is lost in the rounding of the residual in the trial")
            self._add(layer, (name.name,), CHANGES, found, blames=(name.name,), is_of_writing=True)

    def _call(self, path: str, rows: Tensor) -> Tensor:
        """A module of the model applied to `[1, R, ...]`, without visits."""
        with self.trial.runner.calling(), torch.no_grad():
            module: Any = self.trial.runner.model.get_submodule(path)
            made: Tensor = module(rows)
        return made

    def _check_before(self, trials: Tensor) -> None:
        """What lies before the layers: an edit of it must change what the first of them is given."""
        changes = (trials[1:].float() - trials[:1].float()).abs().flatten(1).amax(1).tolist()
        for name, change in zip(self.segment, changes, strict=True):
            own = next((each for each in self.names.around if each.name == name), None)
            if own is None or own.site.order > self.probe.first_layer_order or own.why_unread is not None:
                continue
            self._add_effect(own, change, 0.0, "what the first layer is given")

    def _effect(self, name: TriedName, change: float, noise: float, what: str) -> Measured:
        """What an edit of a name did."""
        if name.why_read_only is not None:
            return _unchecked(f"it cannot be written: {name.why_read_only}")
        if name.name not in self.edited:
            return _unchecked("its rows were not where a trial looks for them")
        return _changed(change, noise, f"an edit of it left {what} as it was")

    def _add_effect(self, name: TriedName, change: float, noise: float, what: str) -> None:
        found = self._effect(name, change, noise, what)
        self._add(None, (name.name,), CHANGES, found, blames=(name.name,), is_of_writing=True)

    def _check_head(self, rows: _Rows) -> None:
        if self.logits is None or self.logits.shape[0] != rows.streams.layer(0).num_padded:
            self._add(None, ("lm_head",), "it gives the logits", _unchecked("the model gives no logits a row"))
            return
        logits = self.logits
        control = logits[rows.of(1).rows].float()
        noise = _NOISE * float((control - logits[rows.of(0).rows][:_TRIAL].float()).abs().max())
        num_layers = self.probe.layout.num_layers
        of_layers = range(self.first_of_layers, self.first_of_layers + num_layers)
        for layer, segment in enumerate(of_layers):
            change = float((logits[rows.of(segment).rows].float() - control[:1]).abs().max())
            found = _changed(change, noise, "another one left the logits as they were")
            self._add(layer, ("resid_post",), LAYER_CHANGES, found, blames=("resid_post",), is_of_writing=True)
        for name in self.names.around:
            if name.site.order > self.probe.last_layer_order and name.why_unread is None:
                # behind the last layer, whose own trials of these names had no edits in it
                change = float((logits[rows.of(self.segment[name.name]).rows].float() - control).abs().max())
                self._add_effect(name, change, noise, "the logits")
        width, whole = logits.shape[-1], self.probe.vocab_size
        told = None if width in (whole, whole // self.links.ranks) else f"it is [{width}] and not [{whole}]"
        found = Measured(outcome=Outcome.FAILS if told else Outcome.HOLDS, told=told)
        self._add(None, ("logits",), "a row is [vocab_size]", found, blames=("logits",))
        self._check_logits(logits[rows.of(0).rows])

    def _check_logits(self, logits: Tensor) -> None:
        """Whether the final norm and the head make the logits of what the last layer gave."""
        norm, head = (self.standard.get(name) for name in ("ln_final", "lm_head"))
        if norm is None or head is None or self.last is None:
            told = "this model has no final norm or no head that could be called"
            self._add(None, ("lm_head",), "it gives the logits", _unchecked(told))
            return
        says = "logits = lm_head(ln_final(resid_post of the last layer))"
        made = self._call(head, self._call(norm, self.last[None]))[0]
        known = getattr(self.trial.runner.model.config.get_text_config(), "final_logit_softcapping", None)
        if known:  # a cap that these logits may be too small to show
            made, says = torch.tanh(made.float() / known) * known, f"{says}, soft-capped at {known:g}"
        found = equal(logits, made)
        if found.outcome is not Outcome.UNCHECKED and (found.error or 0.0) > _EXACTLY:
            cap, factor = cap_of(logits, made), factor_of(logits, torch.zeros_like(logits), made)
            capped = None if cap is None else equal(logits, torch.tanh(made.float() / cap) * cap)
            if capped is not None and capped.outcome is Outcome.HOLDS:
                says, found = f"{says}, soft-capped at {cap:.3g}", capped
            elif (scaled := equal(logits, made.float() * factor)).outcome is Outcome.HOLDS:
                says, found = f"{says} x {factor:.4g}", scaled
        self._add(None, ("ln_final", "lm_head", "resid_post"), says, found, blames=("ln_final",))


def _changed_pairs(name: str, values_RHK: Tensor) -> Tensor:
    """Scores or patterns, otherwise distributed: a norm behind attention hears nothing of a factor."""
    if name == Port.SCORES.value:
        return torch.where(values_RHK.isfinite(), -values_RHK, values_RHK)
    changed = values_RHK.clone()
    changed[..., 0] *= -1
    return changed


def _changed(change: float, noise: float, complaint: str) -> Measured:
    """Whether a trial is other than without its edit."""
    if not (math.isfinite(change) and math.isfinite(noise)):
        return _unchecked("there are values that are not finite in the trial")
    return Measured(outcome=Outcome.HOLDS) if change > noise else Measured(outcome=Outcome.FAILS, told=complaint)


def _unchecked(told: str) -> Measured:
    return Measured(outcome=Outcome.UNCHECKED, told=told)


def _read(port: PortValue, selector: Selector, view: RowView) -> Tensor:
    """`[S, tokens, ...]` of a site, as the model made it; of pairs `[1, R, H, K]`."""
    if port.pairs is not None:
        return port.pairs.read(view.numbers, view.shape[1])[None]
    if port.heads is not None:
        rows = to_device(view.numbers, port.heads.z.device, torch.long)
        taken = HeadOutputs(port.heads.z.index_select(1, rows), port.heads.weight).whole()[0]
    else:
        taken = port.tensors[selector][0].index_select(0, view.rows)
    return taken.view(*view.shape, *taken.shape[1:])
