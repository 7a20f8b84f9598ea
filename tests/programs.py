"""Random interpretability programs that exist twice: as polytrace traces, and as plain Hugging Face hooks.

The hooks are the oracle: one sequence at a time, eager attention, torch's own in-place code, nothing of ours.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Gemma2Config, GPT2Config, LlamaConfig, PreTrainedModel

from polytrace.graph import Save

_SIZES = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4}
_HEADS = {"num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 64}
CONFIGS = {
    "llama": LlamaConfig(**_SIZES, **_HEADS),
    "gpt2": GPT2Config(vocab_size=96, n_embd=32, n_layer=4, n_head=4, n_positions=64, bos_token_id=0, eos_token_id=0),
    "gemma2": Gemma2Config(**_SIZES, **_HEADS, head_dim=8, sliding_window=5, query_pre_attn_scalar=8),
}


@dataclass(frozen=True)
class Family:
    """Where things are in a model, and how wide."""

    layers: str
    norm: str
    num_layers: int
    vocabulary: int
    width: int
    parts: tuple[tuple[str, str, tuple[int, ...], int], ...]  # path in a layer, port, way into the value, width


def llama_like(num_layers: int, vocabulary: int, width: int, neurons: int) -> Family:
    return Family(
        "model.layers",
        "model.norm",
        num_layers,
        vocabulary,
        width,
        (
            ("", "output", (), width),
            ("", "input", (), width),
            ("input_layernorm", "input", (), width),
            ("post_attention_layernorm", "output", (), width),
            ("self_attn", "output", (0,), width),
            ("self_attn.q_proj", "output", (), width),
            ("self_attn.o_proj", "input", (), width),
            ("mlp", "output", (), width),
            ("mlp.down_proj", "input", (), neurons),
        ),
    )


FAMILIES = {
    "llama": llama_like(4, 96, 32, 64),
    "gemma2": llama_like(4, 96, 32, 64),
    "gpt2": Family(
        "transformer.h",
        "transformer.ln_f",
        4,
        96,
        32,
        (
            ("", "output", (), 32),
            ("ln_1", "input", (), 32),
            ("ln_2", "output", (), 32),
            ("attn", "output", (0,), 32),
            ("attn.c_attn", "output", (), 96),
            ("attn.c_proj", "input", (), 32),
            ("mlp", "output", (), 32),
            ("mlp.c_proj", "input", (), 128),
        ),
    ),
}


@dataclass(frozen=True)
class Place:
    """A site by the names of the Hugging Face model."""

    module: str
    port: str
    selector: tuple[int, ...]
    width: int


@dataclass(frozen=True)
class Action:
    """One thing a user does at a place. `kind` says which fields count."""

    kind: str  # read, add, zero, scale, patch, lens
    place: Place
    column: int = -1
    seed: int = 0
    source: Place | None = None  # patch: read at the last position of invoke 0, averaged over its prompts


@dataclass(frozen=True)
class Program:
    """Prompts and actions of each invoke; the last logits of every invoke are saved besides."""

    family: Family
    prompts: tuple[tuple[tuple[int, ...], ...], ...]
    actions: tuple[tuple[Action, ...], ...]

    @property
    def has_edits(self) -> bool:
        return any(action.kind in ("add", "zero", "scale", "patch") for each in self.actions for action in each)


def model_of(family: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A tiny model with weights large enough that edits matter."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS[family]), attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(1.5 if family == "gemma2" else 3)  # soft-capped, it amplifies rounding more
    return model.to(dtype)


def served_together(model: Any, backend: Any, users: list[Program], dtype: torch.dtype) -> list[list[Tensor]]:
    """The saved values of each user's program, all merged as far as the backend's pass policy lets them."""
    tracers = [record(model, program, dtype, run=False)[0] for program in users]
    outcomes = backend.run_together([backend.compile(tracer.built_request()) for tracer in tracers])
    for outcome in outcomes:
        if outcome.error is not None:
            raise outcome.error
    return [ours_in_order(tracer, outcome.values) for tracer, outcome in zip(tracers, outcomes, strict=True)]


def places(family: Family) -> st.SearchStrategy[Place]:
    """Sites of the layers mostly, the final norm's input and the logits sometimes."""

    def at(layer: int, part: tuple[str, str, tuple[int, ...], int]) -> Place:
        path, port, selector, width = part
        return Place(f"{family.layers}.{layer}" + (f".{path}" if path else ""), port, selector, width)

    in_layers = st.builds(at, st.integers(0, family.num_layers - 1), st.sampled_from(family.parts))
    around = [Place(family.norm, "input", (), family.width), Place("lm_head", "output", (), family.vocabulary)]
    return st.one_of(in_layers, in_layers, in_layers, st.sampled_from(around))


@st.composite
def programs(draw: st.DrawFn, family: Family) -> Program:
    """One user's program: one or two invokes of one to three prompts, each with one to four actions."""
    token = st.integers(1, family.vocabulary - 1)
    num_invokes = draw(st.integers(1, 2))
    prompts = tuple(
        tuple(
            tuple(draw(st.lists(token, min_size=1, max_size=9))) for _ in range(draw(st.sampled_from([1, 1, 1, 2, 3])))
        )
        for _ in range(num_invokes)
    )
    actions = []
    for invoke in range(num_invokes):
        kinds = ["read", "add", "zero", "scale", "lens"] + (["patch"] if invoke else [])
        chosen = []
        for _ in range(draw(st.integers(1, 4))):
            kind = draw(st.sampled_from(kinds))
            place = draw(places(family))
            if kind == "patch":
                chosen.append(Action("patch", _residual(draw, family), source=_residual(draw, family)))
            elif kind == "lens":
                chosen.append(Action("lens", _residual(draw, family)))
            else:
                shortest = min(len(prompt) for prompt in prompts[invoke])
                column = -draw(st.integers(1, shortest))
                chosen.append(Action(kind, place, column=column, seed=draw(st.integers(0, 99))))
        actions.append(tuple(chosen))
    return Program(family, prompts, tuple(actions))


def _residual(draw: st.DrawFn, family: Family) -> Place:
    return Place(f"{family.layers}.{draw(st.integers(0, family.num_layers - 1))}", "output", (), family.width)


def vector(seed: int, width: int, dtype: torch.dtype) -> Tensor:
    return (torch.randn(width, generator=torch.Generator().manual_seed(seed)) * 2).to(dtype)


# As traces


def find(model: Any, path: str) -> Any:
    for name in path.split("."):
        model = model[int(name)] if name.isdigit() else getattr(model, name)
    return model


def get(model: Any, place: Place) -> Any:
    value = getattr(find(model, place.module), place.port)
    for key in place.selector:
        value = value[key]
    return value


def record(model: Any, program: Program, dtype: torch.dtype = torch.float32, **options: Any) -> tuple[Any, list[Any]]:
    """Writes the program as a user would; returns the tracer and the saved values, in the oracle's order."""
    saved: list[Any] = []
    sources: dict[int, Any] = {}
    with model.trace(**options) as tracer:
        for invoke, prompts in enumerate(program.prompts):
            with tracer.invoke([list(prompt) for prompt in prompts]):
                if invoke == 0:
                    for number, action in enumerate(program.actions[-1]):
                        if action.source is not None:
                            sources[number] = get(model, action.source)[:, -1].mean(0)
                for number, action in enumerate(program.actions[invoke]):
                    saved.extend(_act(model, program, action, sources.get(number), dtype))
                saved.append(model.lm_head.output[:, -1].save())
    return tracer, saved


def _act(model: Any, program: Program, action: Action, source: Any, dtype: torch.dtype) -> Iterator[Any]:
    place = action.place
    if action.kind == "read":
        yield get(model, place).save()
    elif action.kind == "add":
        get(model, place)[:, action.column] += vector(action.seed, place.width, dtype)
    elif action.kind == "zero":
        get(model, place)[..., : place.width // 2] = 0.0
    elif action.kind == "patch":
        get(model, place)[:, -1] = source
    elif action.kind == "lens":
        norm = find(model, program.family.norm)
        yield model.lm_head(norm(get(model, place)[:, -1:])).save()
    elif not place.selector:
        setattr(find(model, place.module), place.port, get(model, place) * 1.5)
    else:
        get(model, place)[:] = get(model, place) * 1.5


# As hooks


def run_by_hand(model: PreTrainedModel, program: Program, *, without_edits: bool = False) -> list[list[Tensor]]:
    """The oracle: for each saved value of `record`, one tensor a prompt, `[1, tokens, ...]` or `[1, ...]`."""
    saved: list[list[Tensor]] = []
    sources: dict[int, Tensor] = {}
    for invoke, prompts in enumerate(program.prompts):
        per_prompt = []
        firsts: dict[int, list[Tensor]] = {}
        for prompt in prompts:
            run = _HandRun(model, program, invoke, sources, without_edits)
            per_prompt.append(run.run(prompt))
            for number, value in run.source_reads.items():
                firsts.setdefault(number, []).append(value)
        sources.update({number: torch.cat(values).mean(0) for number, values in firsts.items()})
        saved.extend([list(values) for values in zip(*per_prompt, strict=True)])
    return saved


class _HandRun:
    """One prompt through the plain model with one hook for each place that somebody names."""

    def __init__(
        self, model: PreTrainedModel, program: Program, invoke: int, sources: dict[int, Tensor], without_edits: bool
    ) -> None:
        self.model, self.program, self.invoke = model, program, invoke
        self.sources, self.without_edits = sources, without_edits
        self.reads: dict[int, Tensor] = {}
        self.source_reads: dict[int, Tensor] = {}

    def run(self, prompt: tuple[int, ...]) -> list[Tensor]:
        actions = self.program.actions[self.invoke]
        wanted: dict[tuple[str, str], list[tuple[int, Action, bool]]] = {}
        if self.invoke == 0:
            for number, action in enumerate(self.program.actions[-1]):
                if action.source is not None:
                    key = (action.source.module, action.source.port)
                    wanted.setdefault(key, []).append((number, action, True))
        for number, action in enumerate(actions):
            wanted.setdefault((action.place.module, action.place.port), []).append((number, action, False))
        with ExitStack() as stack, torch.no_grad():
            for (path, port), todo in wanted.items():
                module = self.model.get_submodule(path)
                hook = self._hook(todo)
                if port == "output":
                    handle = module.register_forward_hook(lambda m, a, out, hook=hook: hook(out))
                else:
                    handle = module.register_forward_pre_hook(_on_input(hook), with_kwargs=True)
                stack.callback(handle.remove)
            logits: list[Tensor] = []
            last = self.model.get_submodule("lm_head").register_forward_hook(
                lambda m, a, out: logits.append(out.clone())
            )
            stack.callback(last.remove)
            self.model(input_ids=torch.tensor([prompt]), use_cache=False)
        values = [self.reads[number] for number, action in enumerate(actions) if action.kind in ("read", "lens")]
        if any(action.kind == "lens" for action in actions):
            values = [
                self._lens(self.reads[number]) if action.kind == "lens" else self.reads[number]
                for number, action in enumerate(actions)
                if action.kind in ("read", "lens")
            ]
        return [*values, logits[-1][:, -1]]

    def _lens(self, hidden: Tensor) -> Tensor:
        with torch.no_grad():
            norm = self.model.get_submodule(self.program.family.norm)
            return self.model.get_submodule("lm_head")(norm(hidden[:, -1:]))

    def _hook(self, todo: list[tuple[int, Action, bool]]) -> Callable[[Any], Any]:
        def hook(value: Any) -> Any:
            for number, action, is_source in todo:
                selector = action.source.selector if is_source and action.source else action.place.selector
                tensor = value[selector[0]] if selector else value
                if is_source:
                    self.source_reads[number] = tensor[:, -1].clone()
                elif action.kind in ("read", "lens"):
                    self.reads[number] = tensor.clone()
                elif not self.without_edits:
                    value = self._edit(number, action, value, tensor)
            return value

        return hook

    def _edit(self, number: int, action: Action, value: Any, tensor: Tensor) -> Any:
        if action.kind == "add":
            tensor[:, action.column] += vector(action.seed, action.place.width, tensor.dtype)
        elif action.kind == "zero":
            tensor[..., : action.place.width // 2] = 0.0
        elif action.kind == "patch":
            tensor[:, -1] = self.sources[number]
        elif action.place.selector:
            tensor.mul_(1.5)
        else:
            return value * 1.5
        return value


def _on_input(hook: Callable[[Any], Any]) -> Callable[..., Any]:
    def pre(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args:
            return (hook(args[0]), *args[1:]), kwargs
        first = next(iter(kwargs))
        return args, {**kwargs, first: hook(kwargs[first])}

    return pre


# Comparing


def by_prompt(value: Tensor, program_prompts: tuple[tuple[int, ...], ...], like: list[Tensor]) -> list[Tensor]:
    """Our left-padded value cut into one tensor a prompt, without its pad rows."""
    longest = max(map(len, program_prompts))
    parts = []
    for row, (prompt, expected) in enumerate(zip(program_prompts, like, strict=True)):
        part = value[row : row + 1]
        if expected.ndim == 3 and expected.shape[1] == len(prompt) and value.shape[1] == longest:
            part = part[:, longest - len(prompt) :]
        parts.append(part)
    return parts


def ours_in_order(tracer: Any, values: Mapping[str, Tensor]) -> list[Tensor]:
    """The values of a request that ran without its tracer, in the order its saves were written."""
    return [values[node.name] for node in tracer.request.graph.nodes if isinstance(node, Save)]


def saved_invokes(program: Program) -> list[int]:
    """Which invoke each saved value belongs to."""
    return [
        invoke
        for invoke, actions in enumerate(program.actions)
        for _ in range(1 + sum(action.kind in ("read", "lens") for action in actions))
    ]


def difference(ours: list[Tensor], by_hand: list[list[Tensor]], program: Program) -> float:
    """Largest `|a - b| / max(1, max|b|)` over all saved values."""
    worst = 0.0
    for value, expected, invoke in zip(ours, by_hand, saved_invokes(program), strict=True):
        for part, plain in zip(by_prompt(value, program.prompts[invoke], expected), expected, strict=True):
            assert part.shape == plain.shape, (part.shape, plain.shape)
            scale = max(1.0, plain.float().abs().max().item())
            worst = max(worst, (part.float() - plain.float()).abs().max().item() / scale)
    return worst
