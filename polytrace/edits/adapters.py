"""Changed weights as edits of one request: low-rank updates of linear modules, for its own rows in a pass with others.

`lora` reads what PEFT saves, `delta` takes the two factors of each module's update. Nobody's weights change: what the
module gives gets `x A B` added. What cannot be had this way (embeddings, whole replaced modules) is refused by name.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polytrace.constants import Constants
from polytrace.contents import with_digest
from polytrace.description import Leaf, ModuleInfo
from polytrace.edits.sets import EditSet, plain_label
from polytrace.errors import GraphError
from polytrace.grammar import nearest
from polytrace.graph import Constant, DType, Node, NodeId, Op, Port, Read, Ref, Site, Write
from polytrace.lines import user_line
from polytrace.tensors import NAME_OF_CODE, RawTensor

if TYPE_CHECKING:
    from polytrace.model import Model


@dataclass(frozen=True, slots=True, kw_only=True)
class Update:
    """What one module's output gets more: `scale * into(down(x))`."""

    down: RawTensor  # [rank, inputs] as torch's Linear has weights
    into: RawTensor  # [outputs, rank]
    scale: float


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Adapter:
    """Updates of a model's modules, to be given as `edits=[...]` or to `model.edited(...)`."""

    label: str
    where: str  # the line that made it
    updates: Mapping[str, Update]  # by the module's path
    is_as_stored: bool = False  # the factors are those of the weight as the model has it, which may be transposed
    _made: dict[str, EditSet] = field(default_factory=dict)  # by the model's fingerprint

    def edits_for(self, model: Model) -> EditSet:
        """The updates as edits of a model. Raises GraphError with the path of a module that cannot have one."""
        key = model.description.fingerprint
        if key not in self._made:
            self._made[key] = _edits(self, model)
        return self._made[key]


def lora(folder: str | Path) -> Adapter:
    """A LoRA that PEFT saved: `adapter_config.json` and `adapter_model.safetensors`.

    Ranks and alphas of single modules and rank-stabilised scales are honoured. Raises GraphError with the name of what
    is not a low-rank update of a linear module.
    """
    where = user_line()
    place = Path(folder)
    config = _config(place, where)
    halves: dict[str, dict[str, RawTensor]] = {}
    for name, raw in _tensors(place, where).items():
        found = re.fullmatch(r"base_model\.model\.(.+)\.lora_(A|B)\.weight", name)
        if found is None:
            raise GraphError(
                f"{place.name} has {name}, which is no low-rank update of a linear module: merge this adapter into the "
                "weights and serve these instead",
                where=where,
            )
        halves.setdefault(found[1], {})[found[2]] = raw
    if not halves:
        raise GraphError(f"{place.name} has no updates", where=where)
    try:
        updates = {path: _update(path, pair, config, where) for path, pair in halves.items()}
    except (re.error, TypeError, AttributeError) as error:
        raise GraphError(f"{place.name} has ranks or alphas that cannot be read: {error}", where=where) from error
    return Adapter(label=plain_label(f"lora {place.name}"), where=where, updates=updates)


def delta(factors: Mapping[str, tuple[Any, Any]]) -> Adapter:
    """Updates `W + left @ right` of modules' weights as the model stores them, by the modules' paths.

    A Linear stores `[outputs, inputs]`, so left is `[outputs, rank]` and right `[rank, inputs]`; GPT-2's Conv1D stores
    `[inputs, outputs]`. Vectors stand for rank 1. Only the named module changes, also where its weight is that of
    another one too (a tied embedding). Modules are looked up when a trace starts from it.
    """
    where = user_line()
    if not isinstance(factors, Mapping) or not factors:
        raise GraphError("a delta names at least one module: {path: (left, right)}", where=where)
    constants = Constants()
    updates = {}
    for path, pair in factors.items():
        if not isinstance(pair, tuple) or len(pair) != 2:
            raise GraphError(f"the delta of {path} is a pair of matrices (left, right)", where=where)
        left, right = (constants.tensors[constants.add(part, where)] for part in pair)
        left, right = _matrix(left, (-1, 1), path, where), _matrix(right, (1, -1), path, where)
        if len(left.shape) != 2 or len(right.shape) != 2 or left.shape[1] != right.shape[0]:
            raise GraphError(
                f"left @ right is no matrix for {path}: left is {list(left.shape)}, right {list(right.shape)}",
                where=where,
            )
        updates[path] = Update(down=right, into=left, scale=1.0)
    return Adapter(label=plain_label(f"delta at {where}"), where=where, updates=updates, is_as_stored=True)


def _matrix(raw: RawTensor, shape: tuple[int, int], path: str, where: str) -> RawTensor:
    """A vector as a matrix of rank 1."""
    if len(raw.shape) != 1:
        return raw
    if not raw.is_here:  # its shape is part of what the service knows it by
        told = f"a factor of the delta of {path} stands on the service as a vector: keep it as a matrix, value[:, None]"
        raise GraphError(told, where=where)
    own = tuple(raw.shape[0] if size < 0 else size for size in shape)
    return with_digest(RawTensor(dtype=raw.dtype, shape=own, data=raw.data))


# --- as edits


def _edits(adapter: Adapter, model: Model) -> EditSet:
    nodes: list[Node] = []
    constants: dict[str, RawTensor] = {}

    def add(node: Node) -> Ref:
        nodes.append(node)
        return Ref(NodeId(len(nodes) - 1))

    def constant(raw: RawTensor) -> Ref:
        name = f"c{len(constants)}"
        constants[name] = raw
        return add(Constant(name=name, where=adapter.where))

    def op(name: str, *args: Any) -> Ref:
        return add(Op(name=name, args=args, where=adapter.where))

    for path, update in adapter.updates.items():
        (given, leaf), (site, _), is_transposed = _sites(adapter, path, update, model)
        x = add(Read(site=given, invoke=0, where=adapter.where))
        if leaf.dtype != update.down.dtype:
            x = op("to", x, DType(update.down.dtype))
        if is_transposed:  # (x @ left) @ right
            x = op("matmul", op("matmul", x, constant(update.into)), constant(update.down))
        else:
            x = op("linear", op("linear", x, constant(update.down)), constant(update.into))
        if update.scale != 1.0:
            x = op("mul", x, update.scale)
        value = op("add", add(Read(site=site, invoke=0, where=adapter.where)), x)
        add(Write(site=site, invoke=0, value=value, in_place=False, where=adapter.where))
    return EditSet(label=adapter.label, nodes=tuple(nodes), constants=constants, updates=tuple(adapter.updates))


def _sites(
    adapter: Adapter, path: str, update: Update, model: Model
) -> tuple[tuple[Site, Leaf], tuple[Site, Leaf], bool]:
    """What a module gets and what it gives, and whether the factors are those of a transposed weight."""
    table = model._index
    info = table.modules.get(path)
    if info is None:
        told = f"{adapter.label} changes {path}, which this model does not have{nearest(path, table.modules)}"
        raise GraphError(told, where=adapter.where)
    ports = [table.ports.get((path, port.value)) for port in (Port.INPUT, Port.OUTPUT)]
    weight = table.parameters.get(f"{path}.weight")
    visits = sum(site.module == path and site.port is Port.OUTPUT for site in model.description.sites)
    leaves = [port.leaves.get(()) if port is not None else None for port in ports]
    given, got = leaves
    if weight is None or len(weight.shape) != 2 or given is None or got is None or _is_table(info) or visits != 1:
        raise GraphError(
            f"{adapter.label} changes {path} ({info.class_name}), which is no linear module that a forward calls once: "
            "merge this adapter into the weights and serve these instead",
            where=adapter.where,
        )
    is_transposed = adapter.is_as_stored and info.class_name == "Conv1D"
    inputs, outputs = given[1].tail[-1], got[1].tail[-1]
    has = (update.into.shape[0], update.down.shape[1])
    if is_transposed:
        inputs, outputs = outputs, inputs
    if has != (outputs, inputs):
        raise GraphError(
            f"{adapter.label} has an update of {list(has)} for {path}, whose weight is {list(weight.shape)}",
            where=adapter.where,
        )
    for (site, _), refusal in ((given, given[1].read_refusal), (got, got[1].read_refusal or got[1].write_refusal)):
        if refusal is not None:
            raise GraphError(f"{adapter.label} changes {path}, but of {site}: {refusal}", where=adapter.where)
    return given, got, is_transposed


def _is_table(info: ModuleInfo) -> bool:
    return "Embedding" in info.class_name


# --- PEFT's folder

# what a configuration may not have, and why
_REFUSED = {
    "use_dora": "DoRA rescales whole weights",
    "modules_to_save": "it replaces whole modules",
    "target_parameters": "it changes parameters that are no module's weight",
    "trainable_token_indices": "it changes rows of the embedding",
    "layer_replication": "it is for a model with other layers",
    "alora_invocation_tokens": "it acts from certain tokens on only",
    "lora_bias": "it adds biases",
    "use_qalora": "it groups inputs",
}
# starts that take something out of the base weights: the adapter is for other weights than those that are served
_CHANGES_BASE = ("pissa", "olora", "loftq", "corda")


def _config(place: Path, where: str) -> dict[str, Any]:
    path = place / "adapter_config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise GraphError(f"{path} cannot be read, so {place.name} is no adapter: {error}", where=where) from error
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        kind = config.get("peft_type") if isinstance(config, dict) else None
        raise GraphError(f"{place.name} is an adapter of kind {kind!r}; LORA is the one that is known", where=where)
    reasons = {key: reason for key, reason in _REFUSED.items() if config.get(key)}
    if config.get("bias", "none") != "none":
        reasons["bias"] = "it has other biases than the base"
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_CHANGES_BASE):
        reasons["init_lora_weights"] = f"{start} changes the base weights too; convert it to plain LoRA when saving"
    if reasons:
        key, reason = next(iter(reasons.items()))
        told = f"{place.name} has {key}={config.get(key)!r}: {reason}, so it is no low-rank update of linear modules"
        raise GraphError(told, where=where)
    return config


def _tensors(place: Path, where: str) -> dict[str, RawTensor]:
    from safetensors import deserialize

    path = place / "adapter_model.safetensors"
    if not path.is_file():
        raise GraphError(f"{place.name} has no {path.name}: save the adapter with safe_serialization=True", where=where)
    try:
        entries: list[tuple[str, dict[str, Any]]] = deserialize(path.read_bytes())  # type: ignore[no-untyped-call]
    except Exception as error:
        raise GraphError(f"{path} is not a file of tensors: {error}", where=where) from error
    found = {}
    for name, entry in entries:
        if entry["dtype"] not in NAME_OF_CODE:
            raise GraphError(f"{name} has the dtype {entry['dtype']}, which is not known here", where=where)
        data = memoryview(bytes(entry["data"]))
        raw = RawTensor(dtype=NAME_OF_CODE[entry["dtype"]], shape=tuple(entry["shape"]), data=data)
        found[name] = with_digest(raw)  # the service has it once, whatever the number of traces
    return found


def _update(path: str, pair: Mapping[str, RawTensor], config: Mapping[str, Any], where: str) -> Update:
    if pair.keys() != {"A", "B"}:
        raise GraphError(f"the update of {path} has only its half {', '.join(pair)}", where=where)
    down, into = pair["A"], pair["B"]
    rank = _of(path, config.get("rank_pattern"), config.get("r"))
    alpha = _of(path, config.get("alpha_pattern"), config.get("lora_alpha"))
    if len(down.shape) != 2 or len(into.shape) != 2 or (down.shape[0], into.shape[1]) != (rank, rank):
        raise GraphError(
            f"the update of {path} is {list(into.shape)} x {list(down.shape)}; its configuration says rank {rank}",
            where=where,
        )
    scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    return Update(down=down, into=into, scale=float(scale))


def _of(path: str, pattern: Mapping[str, Any] | None, default: Any) -> Any:
    """A module's own number: the first pattern that its path ends with, as PEFT looks them up."""
    for key, value in (pattern or {}).items():
        if re.match(rf"(.*\.)?({key})$", path):
            return value
    return default
