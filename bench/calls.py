"""16 users' calls of models that are called as they are: merged, one by one, and batched by hand.

    python -m bench.run calls

Each user changes one block's output of a call of his own and wants what the model gives. Contenders, in one process on
the same weights, taking turns in a shuffled order:
- `hand-batched`: one call of plain torch with one hook that changes every user's rows;
- `plain`: a call with a hook for each user, one by one;
- `as it is`: the requests through the engine, which does not merge calls, one by one;
- `alone`: through an engine that does, each with nobody beside it: what merging costs who has the model for himself;
- `merged`: all requests added to that engine's scheduler, then its loop until all have their results.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from bench.merged import again
from bench.race import median_ms, race, ratio
from engine.whole_local import WholeBackend
from polytrace.whole_model import WholeModel
from scheduling.plan import Program
from scheduling.scheduler import Outcome

TOLERANCE = 1e-5  # of max(1, max|plain|)


@dataclass(frozen=True, slots=True, kw_only=True)
class CallsConfig:
    """One run of the benchmark."""

    kinds: tuple[str, ...] = ("vit", "bert", "whisper")
    num_users: int = 16
    rounds: int = 12
    threads: int = 1
    device: str = "cpu"
    is_small: bool = False  # narrow models: on a CPU what calls cost beside their products


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """A model, the block whose output users change, and a call of each."""

    model: nn.Module
    block: str
    argument: str
    calls: tuple[Tensor, ...]

    def plain(self, call: Tensor, vectors: Tensor) -> Tensor:
        """What the model gives where rows of a block's output get these vectors, the first row of each call."""

        def change(_module: nn.Module, _args: Any, output: Any) -> None:
            hidden = output if isinstance(output, Tensor) else output[0]
            hidden[:, 0] += vectors

        handle = self.model.get_submodule(self.block).register_forward_hook(change)
        try:
            with torch.no_grad():
                result: Tensor = self.model(**{self.argument: call})[0]
                return result.cpu()  # waits for the device
        finally:
            handle.remove()


def kind_of(name: str, config: CallsConfig) -> Kind:
    """With random weights."""
    torch.manual_seed(0)
    width, layers, heads = (64, 2, 2) if config.is_small else (384, 6, 6)
    sizes: dict[str, Any] = {
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": 4 * width,
    }
    size, frames = (32, 40) if config.is_small else (112, 200)
    users = range(config.num_users)
    if name == "vit":
        made: nn.Module = transformers.ViTForImageClassification(
            transformers.ViTConfig(**sizes, image_size=size, patch_size=size // 7)
        )
        calls = tuple([torch.randn(1, 3, size, size) for _ in users])
        return _on(config, Kind(model=made, block="vit.layers.0", argument="pixel_values", calls=calls))
    if name == "bert":
        made = transformers.BertModel(transformers.BertConfig(**sizes, vocab_size=1000))
        calls = tuple([torch.randint(1, 1000, (1, 24)) for _ in users])
        return _on(config, Kind(model=made, block="encoder.layer.0", argument="input_ids", calls=calls))
    made = WhisperEncoder(
        transformers.WhisperConfig(
            d_model=width,
            encoder_layers=layers,
            encoder_attention_heads=heads,
            encoder_ffn_dim=4 * width,
            max_source_positions=frames // 2,
        )
    )
    calls = tuple([torch.randn(1, 80, frames) for _ in users])
    return _on(config, Kind(model=made, block="layers.0", argument="input_features", calls=calls))


def run(config: CallsConfig) -> dict[str, Any]:
    """The figures, as plain JSON."""
    torch.set_num_threads(config.threads)
    return {name: _of_kind(kind_of(name, config), config) for name in config.kinds}


def _of_kind(kind: Kind, config: CallsConfig) -> dict[str, Any]:
    vectors = torch.randn(config.num_users, _width(kind), device=config.device)
    merging, plain = (WholeBackend(kind.model, name="calls", merges=merges) for merges in (True, False))
    programs = {backend: _programs(backend, kind, vectors) for backend in (merging, plain)}
    batch = torch.cat(kind.calls)
    by_hand = [kind.plain(call, vectors[user : user + 1]) for user, call in enumerate(kind.calls)]
    together = _run(merging, programs[merging])
    alone = [outcome for program in programs[merging] for outcome in _run(merging, [program])]
    seconds = race(
        {
            "hand-batched": lambda: kind.plain(batch, vectors),
            "plain": lambda: [kind.plain(call, vectors[[user]]) for user, call in enumerate(kind.calls)],
            "as it is": lambda: [_run(plain, [program]) for program in programs[plain]],
            "alone": lambda: [_run(merging, [program]) for program in programs[merging]],
            "merged": lambda: _run(merging, programs[merging]),
        },
        rounds=config.rounds,
    )
    return {
        "as it is / merged": asdict(ratio(seconds["as it is"], seconds["merged"])),
        "plain / merged": asdict(ratio(seconds["plain"], seconds["merged"])),
        "merged / hand-batched": asdict(ratio(seconds["merged"], seconds["hand-batched"])),
        "alone / as it is": asdict(ratio(seconds["alone"], seconds["as it is"])),
        "median_ms": median_ms(seconds),
        "calls_merged": [outcome.receipt.passes[0].calls_merged for outcome in together if outcome.receipt],
        "correct": {
            "merged_is_alone_bit_for_bit": all(
                torch.equal(_only(one), _only(other)) for one, other in zip(together, alone, strict=True)
            ),
            "largest_difference_to_plain": max(
                float((_only(one).cpu() - wanted).abs().max() / max(1.0, float(wanted.abs().max())))
                for one, wanted in zip(together, by_hand, strict=True)
            ),
            "allowed": TOLERANCE,
        },
    }


def _programs(backend: WholeBackend, kind: Kind, vectors: Tensor) -> list[Program]:
    model: Any = WholeModel(backend)
    found = []
    for user, call in enumerate(kind.calls):
        with model.trace(**{kind.argument: call}, run=False) as tracer:
            block = model.get_submodule(kind.block).output
            hidden = block if isinstance(block, Tensor) else block[0]
            hidden[:, 0] += vectors[user].cpu()
            output = model.output
            output[output.keys()[0]].save()
        found.append(backend.work_out(tracer.built_request()))
    return found


def _run(backend: WholeBackend, programs: Sequence[Program]) -> list[Outcome]:
    outcomes: list[Outcome] = backend.run_together(list(map(again, programs)))
    for outcome in outcomes:
        if outcome.error is not None:
            raise outcome.error
    return outcomes


def _only(outcome: Outcome) -> Tensor:
    (value,) = outcome.values.values()
    return torch.as_tensor(value)


def _on(config: CallsConfig, kind: Kind) -> Kind:
    model = kind.model.eval().requires_grad_(False).to(config.device)
    calls = tuple([call.to(config.device) for call in kind.calls])
    return Kind(model=model, block=kind.block, argument=kind.argument, calls=calls)


def _width(kind: Kind) -> int:
    config: Any = kind.model.config
    return int(getattr(config, "hidden_size", None) or config.d_model)


def is_right(figures: Mapping[str, Any]) -> bool:
    """Whether every value was what it should be."""
    correct = [figure["correct"] for figure in figures.values()]
    return all(
        one["merged_is_alone_bit_for_bit"] and one["largest_difference_to_plain"] <= TOLERANCE for one in correct
    )


def tell(figures: Mapping[str, Any]) -> str:
    """The figures for a person."""
    lines = []
    for name, figure in figures.items():
        lines += [
            f"{name}: {max(figure['calls_merged'])} calls in one",
            f"  one by one as it is against merged: {_shown(figure['as it is / merged'])}",
            f"  plain one by one against merged:    {_shown(figure['plain / merged'])}",
            f"  merged against batched by hand:     {_shown(figure['merged / hand-batched'])}",
            f"  alone where calls may be merged:    {_shown(figure['alone / as it is'])} of as it is",
            "  median ms: " + ", ".join(f"{who} {ms:.1f}" for who, ms in figure["median_ms"].items()),
            f"  merged has the bits of alone: {figure['correct']['merged_is_alone_bit_for_bit']}; "
            f"off from plain by {figure['correct']['largest_difference_to_plain']:.1e}",
        ]
    return "\n".join(lines)


def _shown(one: Mapping[str, float]) -> str:
    return "{median:.2f}x ({low:.2f} to {high:.2f})".format(**one)


def config_for(_folder: Path, *, quick: bool) -> CallsConfig:
    """The configuration that `make bench` runs, or a short one to see that it works."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return CallsConfig(rounds=2 if quick else 12, device=device, is_small=quick)
