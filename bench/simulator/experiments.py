"""What tenants of the simulator ask: experiments as researchers write them, on prompts of some length.

Each is recorded through the client and worked out once a length, as a service does it. A tenant's request is then the
same program over tokens of its own (`Worked.of`): who is before whom, what forks where and what is carried do not
depend on which tokens these are, as long as prompts that differ there differ here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from engine.census import Census
from engine.direct import DirectBackend
from polytrace.description import ModelDescription
from polytrace.errors import PolytraceError
from polytrace.graph import Request
from polytrace.model import Model
from scheduling.plan import Plan, Program, RequestId, ShardResult
from scheduling.program import owned

Tokens = tuple[int, ...]
Ask = Callable[[Any, list[int]], Request]


@dataclass(frozen=True, slots=True, kw_only=True)
class Experiment:
    """One kind of request."""

    ask: Ask  # records it, given a model and a prompt of different tokens
    lengths: Mapping[int, float]  # tokens of a prompt -> how often
    shared: float = 0.0  # of a prompt, what is the same in all of a tenant's: instructions, few-shot examples


def _lens(model: Any, ids: list[int]) -> Request:
    """What every seventh layer would say next."""
    with model.trace([ids], run=False) as tracer:
        for layer in model.model.layers[::7]:
            model.lm_head(model.model.norm(layer.output[0][:, -1])).topk(5)[1].save()
    return _built(tracer)


def _activations(model: Any, ids: list[int]) -> Request:
    """The residual stream of four texts at two thirds of the depth, for a probe or a dictionary."""
    texts = [ids[start:] + ids[:start] for start in range(4)]
    with model.trace(texts, run=False) as tracer:
        model.model.layers[_at(model, 2 / 3)].output[0].save()
    return _built(tracer)


def _patch(model: Any, ids: list[int]) -> Request:
    """The clean run's residual at one token of the corrupt run."""
    at, layer = len(ids) * 3 // 4, model.model.layers[_at(model, 0.4)]
    with model.trace(run=False) as tracer:
        with tracer.invoke([ids]):
            residual = layer.output[0][:, at]
        with tracer.invoke([_corrupt(ids, at)]):
            layer.output[0][:, at] = residual
            model.lm_head.output[:, -1].topk(10)[0].save()
    return _built(tracer)


def _ablation(model: Any, ids: list[int]) -> Request:
    """Some neurons off at the last quarter of the prompt."""
    with model.trace([ids], run=False) as tracer:
        model.model.layers[_at(model, 0.5)].mlp.down_proj.input[:, len(ids) * 3 // 4 :, 1024:1088] = 0.0
        model.lm_head.output[:, -1].topk(10)[0].save()
    return _built(tracer)


def _steering(model: Any, ids: list[int]) -> Request:
    """The residual made larger everywhere."""
    with model.trace([ids], run=False) as tracer:
        model.model.layers[_at(model, 0.3)].output[0][:] *= 1.5
        model.lm_head.output[:, -1].save()
    return _built(tracer)


def _sweep(model: Any, ids: list[int]) -> Request:
    """A map of 14 layers x 8 tokens: the clean residual put into the corrupt run, one at a time."""
    first = len(ids) // 2
    layers = model.model.layers[:: max(1, len(model.model.layers) // 14)]
    with model.trace(run=False) as tracer:
        with tracer.invoke([ids]):
            residuals = [layer.output[0] for layer in layers]
        corrupt = _corrupt(ids, first)
        for layer, residual in zip(layers, residuals, strict=True):
            for at in range(first, len(ids), max(1, (len(ids) - first) // 8)):
                with tracer.invoke([corrupt]):
                    layer.output[0][:, at] = residual[:, at]
                    model.lm_head.output[:, -1, :2].save()
    return _built(tracer)


def _generation(model: Any, ids: list[int]) -> Request:
    """So many new tokens, read at one layer."""
    with model.generate([ids], max_new_tokens=24, do_sample=False, eos=None, run=False) as tracer, tracer.all():
        model.model.layers[_at(model, 0.5)].output[0][:, -1].save()
    return _built(tracer)


EXPERIMENTS: Mapping[str, Experiment] = {
    "lens": Experiment(ask=_lens, lengths={64: 2, 256: 2, 768: 1}, shared=0.5),
    "activations": Experiment(ask=_activations, lengths={512: 1, 1024: 2, 2048: 1}),
    "patch": Experiment(ask=_patch, lengths={96: 2, 320: 1, 1024: 1}, shared=0.5),
    "ablation": Experiment(ask=_ablation, lengths={128: 1, 512: 1, 1536: 1}, shared=0.5),
    "steering": Experiment(ask=_steering, lengths={128: 2, 1024: 1}),
    "sweep": Experiment(ask=_sweep, lengths={48: 1, 96: 1}),
    "generation": Experiment(ask=_generation, lengths={64: 1, 384: 1}, shared=0.5),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Worked:
    """A program that waits for its tokens."""

    experiment: str
    length: int
    program: Program  # over the tokens 0, 1, 2, ..., `length`
    shared: int  # tokens at the begin of the prompt that are the same in all of a tenant's
    distinct: tuple[Tokens, ...]  # sequences of it
    places: tuple[tuple[int, ...], ...]  # by invoke: which of them

    def of(self, request: RequestId, tokens: Sequence[int], tenant: str, *, is_interactive: bool) -> Program:
        """The request with that id. `tokens[t]` stands for the program's token t; the last is none of the others."""
        own = [tuple(map(tokens.__getitem__, sequence)) for sequence in self.distinct]
        invokes = tuple(
            [
                replace(invoke, sequences=tuple([own[place] for place in places]))
                for invoke, places in zip(self.program.invokes, self.places, strict=True)
            ]
        )
        program = replace(self.program, request=request, invokes=invokes)
        if program.chain is not None:
            parts = tuple([replace(part, request=request) for part in program.chain.parts])
            program = replace(program, chain=replace(program.chain, parts=parts))
        return owned(program, tenant, is_interactive=is_interactive, shares_across_tenants=False)


def work_out(names: Sequence[str], census: Census, description: ModelDescription) -> dict[str, dict[int, Worked]]:
    """Of each experiment a program for each length."""
    backend = DirectBackend("", NoShards(), description, census.model)
    model: Any = Model(backend)
    return {
        name: {length: _work_out(name, length, model, backend) for length in EXPERIMENTS[name].lengths}
        for name in names
    }


class NoShards:
    """Of a deployment that only works requests out."""

    def have_room(self) -> bool:
        return False

    def submit(self, plan: Plan) -> None:
        raise AssertionError("there is no room")

    def finished(self) -> Iterable[tuple[Plan, tuple[ShardResult, ...] | PolytraceError]]:
        return ()


def _work_out(name: str, length: int, model: Any, backend: DirectBackend) -> Worked:
    experiment = EXPERIMENTS[name]
    program = backend.work_out(experiment.ask(model, list(range(length))))
    distinct = list(dict.fromkeys(sequence for invoke in program.invokes for sequence in invoke.sequences))
    return Worked(
        experiment=name,
        length=length,
        program=program,
        shared=int(length * experiment.shared),
        distinct=tuple(distinct),
        places=tuple([tuple(map(distinct.index, invoke.sequences)) for invoke in program.invokes]),
    )


def _at(model: Any, depth: float) -> int:
    """The layer so deep in the model."""
    return int(depth * len(model.model.layers))


def _corrupt(ids: list[int], at: int) -> list[int]:
    """With another token there, which the prompt has nowhere."""
    return [*ids[:at], len(ids), *ids[at + 1 :]]


def _built(tracer: Any) -> Request:
    request: Request = tracer.built_request()
    return request
