"""The workloads in nnsight, as its documentation recommends: many invokes batched into one trace, `tracer.stop()`.

Run by `bench.cones.peer` with the Python of nnsight's own environment; answers JSON lines on the standard output.
From its documentation: clean activations are cached in a trace of their own, patched invokes are batched ("Layer x
position map"), values are saved in one dict by identity, `tracer.stop()` ends a forward after the last read.
"""

from __future__ import annotations

import importlib
import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.cones.workloads import Edit, Point, Read, Run, Workload, make_workload, shape_of

nnsight: Any = importlib.import_module("nnsight")
Sources = Mapping[tuple[int, Point, int], Tensor]


def main() -> None:
    """Answers the commands on the standard input until it ends."""
    folder, answers = Path(sys.argv[1]), sys.stdout
    sys.stdout = sys.stderr
    module = importlib.import_module("nnsight.modeling.transformers")
    model = module.TransformersModel(str(folder), task="text-generation", dtype=torch.float32, dispatch=True)
    shape = shape_of(folder)
    workload: Any = None
    sources: Sources = {}
    members: list[int] = []
    rows = 1
    values: dict[int, Tensor] = {}
    for line in sys.stdin:
        command = json.loads(line)
        start = time.perf_counter()
        with torch.no_grad():
            if command["do"] == "prepare":
                torch.set_num_threads(command["threads"])
                workload = make_workload(command["case"], shape, tokens=command["tokens"], size=command["size"])
                members, rows = command["members"], command["rows"]
                sources = cached(model, workload)
                start = time.perf_counter()
            elif command["do"] == "run":
                values = run(model, workload, members, sources, rows=rows)
        answer: dict[str, Any] = {"seconds": time.perf_counter() - start}
        if command["do"] == "values":
            answer["values"] = {member: value.tolist() for member, value in values.items()}
        print(json.dumps(answer), file=answers, flush=True)


def cached(model: Any, workload: Workload) -> Sources:
    """The tensors that patches put in, from one trace a run."""
    wanted: dict[int, dict[tuple[Point, int], None]] = {}
    for one in workload.runs:
        for edit in one.edits:
            if edit.source is not None:
                wanted.setdefault(edit.source, {})[edit.point, edit.layer] = None
    found: dict[tuple[int, Point, int], Tensor] = {}
    for member, places in wanted.items():
        ordered = sorted(places, key=lambda place: place[1])
        with model.trace([list(workload.runs[member].ids)]):
            kept = nnsight.save([tensor_at(model, *place).detach().clone() for place in ordered])
        found |= {(member, *place): tensor[0] for place, tensor in zip(ordered, kept, strict=True)}
    return found


def run(model: Any, workload: Workload, members: Sequence[int], sources: Sources, *, rows: int) -> dict[int, Tensor]:
    """What the members give back; `rows` tokens, pads included, in one trace."""
    values: dict[int, Tensor] = {}
    ordered = sorted(members, key=lambda member: len(workload.runs[member].ids))
    while ordered:
        chosen = [ordered.pop(0)]
        while ordered and (len(chosen) + 1) * len(workload.runs[ordered[0]].ids) <= rows:
            chosen.append(ordered.pop(0))
        values |= trace(model, workload, chosen, sources)
    return values


def trace(model: Any, workload: Workload, chosen: Sequence[int], sources: Sources) -> dict[int, Tensor]:
    """One trace with an invoke for each of the chosen runs."""
    runs = workload.runs
    if all(runs[member].read is Read.HIDDEN and not runs[member].edits for member in chosen):
        layer = max(runs[member].layer for member in chosen)
        if all(runs[member].layer == layer for member in chosen):
            with model.trace([list(runs[member].ids) for member in chosen]) as tracer:
                hidden = model.model.layers[layer].output[:, -1].save()
                tracer.stop()
            return dict(zip(chosen, hidden, strict=True))
    with model.trace() as tracer:
        values = nnsight.save({})
        for member in chosen:
            with tracer.invoke(list(runs[member].ids)):
                change(model, runs[member], sources)
                values[member] = read(model, runs[member], workload)
    return dict(values)


def change(model: Any, one: Run, sources: Sources) -> None:
    """All edits of a run; positions are counted from the end, since pads stand before."""
    for edit in sorted(one.edits, key=depth):
        tensor = tensor_at(model, edit.point, edit.layer)
        length = len(one.ids)
        rows = slice(edit.start - length, edit.stop - length or None)
        if edit.source is not None:
            tensor[:, rows] = sources[edit.source, edit.point, edit.layer][edit.start : edit.stop]
        elif edit.added is not None:
            tensor[:, rows] += edit.added
        elif edit.channels is not None:
            tensor[:, rows, slice(*edit.channels)] = 0


def depth(edit: Edit) -> int:
    """Places in the order of the forward, which nnsight wants."""
    return -1 if edit.point is Point.EMBEDDING else edit.layer


def read(model: Any, one: Run, workload: Workload) -> Any:
    """What a run gives back."""
    if one.read is Read.HIDDEN:
        return model.model.layers[one.layer].output[0, -1].clone()
    if one.read is Read.LENS:
        best = [model.lm_head(model.model.norm(layer.output)).amax(-1)[0] for layer in model.model.layers]
        return torch.stack(best)
    logits = model.lm_head.output[0, -1]
    return logits.clone() if one.read is Read.LOGITS else logits[workload.good] - logits[workload.bad]


def tensor_at(model: Any, point: Point, layer: int) -> Any:
    """The live tensor at a place."""
    if point is Point.EMBEDDING:
        return model.model.embed_tokens.output
    block = model.model.layers[layer]
    if point is Point.RESIDUAL:
        return block.output
    return block.mlp.output if point is Point.MLP else block.self_attn.o_proj.input


if __name__ == "__main__":
    main()
