"""The oracle: programs run by plain Hugging Face, one sequence at a time, with torch's own in-place code in hooks."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from programs import EVERYWHERE, Action, Program, Source, vector
from torch import Tensor, nn
from transformers import PreTrainedModel


def run_by_hand(model: PreTrainedModel, program: Program, *, without_edits: bool = False) -> list[Tensor]:
    """The saved values of `programs.record`, in order, as left-padded views whose pads are zeros."""
    saved: list[Tensor] = []
    sources: dict[Source, Tensor] = {}
    for invoke, prompts in enumerate(program.prompts):
        longest = max(map(len, prompts))
        runs = [_HandRun(model, program, invoke, longest - len(prompt), sources, without_edits) for prompt in prompts]
        values = [run.run(prompt) for run, prompt in zip(runs, prompts, strict=True)]
        saved.extend(torch.cat(each) for each in zip(*values, strict=True))
        for source in program.sources(invoke):
            sources[source] = torch.cat([run.found[source] for run in runs]).mean(0)
    return saved


class _HandRun:
    """One prompt through the plain model with one hook for each place that somebody names."""

    def __init__(
        self,
        model: PreTrainedModel,
        program: Program,
        invoke: int,
        pads: int,
        sources: dict[Source, Tensor],
        without_edits: bool,
    ) -> None:
        self.model, self.program, self.pads = model, program, pads
        self.actions = program.actions[invoke]
        self.wanted = program.sources(invoke)
        self.sources, self.without_edits = sources, without_edits
        self.reads: dict[int, Tensor] = {}
        self.found: dict[Source, Tensor] = {}

    def run(self, prompt: tuple[int, ...]) -> list[Tensor]:
        """What the prompt's row of each saved value is: `[1, ...]`."""
        todo: dict[tuple[str, str], list[tuple[int, Action] | Source]] = {}
        for source in self.wanted:
            todo.setdefault((source.place.module, source.place.port), []).append(source)
        for number, action in enumerate(self.actions):
            todo.setdefault((action.place.module, action.place.port), []).append((number, action))
        with ExitStack() as stack, torch.no_grad():
            for (path, port), items in todo.items():
                module = self.model.get_submodule(path)
                hook = self._hook(items)
                if port == "output":
                    handle = module.register_forward_hook(lambda m, a, out, hook=hook: hook(out))
                else:
                    handle = module.register_forward_pre_hook(_on_input(hook), with_kwargs=True)
                stack.callback(handle.remove)
            logits: list[Tensor] = []
            last = self.model.get_submodule(self.program.family.logits().module).register_forward_hook(
                lambda m, a, out: logits.append(out.clone())
            )
            stack.callback(last.remove)
            self.model(input_ids=torch.tensor([prompt]), use_cache=False)
        reads = [self._seen(self.actions[number], value) for number, value in sorted(self.reads.items())]
        return [*reads, logits[-1][:, -1]]

    def _hook(self, items: list[tuple[int, Action] | Source]) -> Callable[[Any], Any]:
        def hook(value: Any) -> Any:
            for item in items:
                place = item.place if isinstance(item, Source) else item[1].place
                tensor = value[place.selector[0]] if place.selector else value
                if isinstance(item, Source):
                    self.found[item] = tensor[:, item.at.index].clone()
                elif item[1].is_edit:
                    value = value if self.without_edits else self._edit(item[1], value, tensor)
                else:
                    self.reads[item[0]] = tensor.clone()
            return value

        return hook

    def _seen(self, action: Action, tensor: Tensor) -> Tensor:
        padded = torch.cat([tensor.new_zeros(1, self.pads, *tensor.shape[2:]), tensor], 1)
        if action.at != EVERYWHERE:
            padded = padded[:, action.at.index]
        if action.kind == "lens":  # by modules without hooks: calling them is no visit
            norm, head = map(self.model.get_submodule, (self.program.family.norm, self.program.family.logits().module))
            with torch.no_grad():
                return head(norm(padded))
        return padded

    def _edit(self, action: Action, value: Any, tensor: Tensor) -> Any:
        columns = action.at.columns(self.pads + tensor.shape[1])
        positions = torch.tensor([c - self.pads for c in columns if c >= self.pads], dtype=torch.long)
        if action.kind == "add":
            added = vector(action.seed, action.place.width, tensor.dtype)
            tensor[:, positions, action.span] += added[action.span]
        elif action.kind == "fill":
            tensor[:, positions, action.span] = action.value
        elif action.source is not None:
            tensor[:, positions] = self.sources[action.source]
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
