"""The tuned lens: an affine translator for each layer, trained so that what the lens reads is what the model will say.

Belrose et al., *Eliciting Latent Predictions from Transformers with the Tuned Lens* (2023, arXiv:2303.08112). Files are
those of the `tuned-lens` package: `config.json` and `params.pt`, or `params.safetensors` with the same names.
Needs torch.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polytrace.errors import GraphError, TooLargeError
from polytrace.lines import user_line
from polytrace.methods.lenses import Reading, Translate, read_lens
from polytrace.methods.places import Of, residual_leaf

if TYPE_CHECKING:
    from polytrace.model import Model

_KIND = "linear_tuned_lens"
_SLACK_BYTES = 1 << 20  # of a file of translators, for what is not their numbers
_POINTS = ("resid_pre", "resid_post")


@dataclass(frozen=True, kw_only=True, eq=False)
class TunedLens:
    """A translator for the residual that each decoder layer takes: `h + h @ weight.T + bias`, then final norm and head.

    So translator `i` is of `resid_pre` of layer `i`, which is `resid_post` of layer `i - 1`, and there is none behind
    the last layer: its residual is unembedded as it is. That is the order of the `tuned-lens` package.
    """

    weight: Any  # [layers, features, features], float32; zeros are the logit lens
    bias: Any  # [layers, features]
    config: dict[str, Any] = field(default_factory=dict)  # as in config.json

    @property
    def num_layers(self) -> int:
        return int(self.weight.shape[0])

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> TunedLens:
        """Reads a folder of the `tuned-lens` package's layout. Nothing in it is run.

        `params.safetensors` is read where there is one, else `params.pt` by torch's restricted loader
        (`weights_only=True`), which takes tensors and refuses code. Raises GraphError for another layout or kind of
        lens, TooLargeError for a file that is larger than its config says.
        """
        where, path = user_line(), Path(folder)
        config = _read_config(path, where)
        count, size = config["num_hidden_layers"], config["d_model"]
        state = _read_state(path, count * (size + 1) * size * 8 + _SLACK_BYTES, where)
        return cls._of_state(state, config, where)

    @classmethod
    def _of_state(cls, state: dict[str, Any], config: dict[str, Any], where: str) -> TunedLens:
        import torch

        count, size = config["num_hidden_layers"], config["d_model"]
        names: dict[str, tuple[int, ...]] = {f"{n}.weight": (size, size) for n in range(count)}
        if config.get("bias", True):
            names |= {f"{n}.bias": (size,) for n in range(count)}
        given = {name.removeprefix("layer_translators."): tensor for name, tensor in state.items()}
        for name, shape in names.items():
            found = tuple(given[name].shape) if name in given else None
            if found != shape:
                told = "is missing" if found is None else f"has the shape {list(found)}, not {list(shape)}"
                raise GraphError(f"{name} of the tuned lens {told}", where=where)
        if unknown := sorted(given.keys() - names.keys()):
            raise GraphError(f"the tuned lens has what its config does not say: {', '.join(unknown[:5])}", where=where)
        weight = torch.stack([given[f"{n}.weight"].float() for n in range(count)])
        bias = [given[f"{n}.bias"].float() for n in range(count)] if config.get("bias", True) else None
        return cls(weight=weight, bias=torch.stack(bias) if bias else torch.zeros(count, size), config=config)

    def save(self, folder: str | os.PathLike[str], *, safetensors: bool = False) -> None:
        """Writes `config.json` and `params.pt`, as the `tuned-lens` package does, or `params.safetensors` instead."""
        import torch

        path = Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        state = {f"{n}.weight": self.weight[n].clone() for n in range(self.num_layers)}
        state |= {f"{n}.bias": self.bias[n].clone() for n in range(self.num_layers)}
        if safetensors:
            from safetensors.torch import save_file

            save_file(state, path / "params.safetensors")
        else:
            torch.save(state, path / "params.pt")
        (path / "config.json").write_text(json.dumps({**self.config, "bias": True}, indent=2) + "\n")

    def translation(self, model: Model, of: Of = "resid_post") -> Translate:
        """What `read_lens` calls in a trace. Raises GraphError for a lens of another model's size, or another point."""
        import torch

        shape = (len(model.layers), residual_leaf(model).tail[-1])
        if (self.num_layers, int(self.weight.shape[-1])) != shape:
            raise GraphError(
                f"this tuned lens is of {self.num_layers} layers with {self.weight.shape[-1]} features; "
                f"{model.description.name} has {shape[0]} with {shape[1]}",
                where=user_line(),
            )
        if of not in _POINTS:
            raise GraphError(f"a tuned lens reads resid_post or resid_pre, not {of!r}", where=user_line())
        shift = _POINTS.index(str(of))

        def translate(hidden: Any, layer: int) -> Any:
            number = layer + shift
            if number == self.num_layers:
                return hidden
            wide = hidden.float()
            moved = torch.nn.functional.linear(wide, self.weight[number], self.bias[number])
            return (wide + moved).to(hidden.dtype)

        return translate


def tuned_lens(
    model: Model,
    prompts: Any,
    lens: TunedLens,
    layers: Any = None,
    positions: Any = -1,
    *,
    top_k: int = 5,
    tokens: Any = None,
    of: Of = "resid_post",
) -> Reading:
    """The logit lens behind a tuned lens's translators (Belrose et al. 2023, arXiv:2303.08112). As `logit_lens`.

    The translators that are used are uploaded once and stay with the service. `of`: "resid_post", so that layers are
    those of `logit_lens` (the last one has no translator), or "resid_pre", as the `tuned-lens` package counts.
    """
    translate = as_tuned_lens(lens).translation(model, of)
    return read_lens(model, prompts, layers, positions, top_k=top_k, tokens=tokens, of=of, translate=translate)


def as_tuned_lens(lens: Any) -> TunedLens:
    """The same. Raises GraphError for what is none."""
    if not isinstance(lens, TunedLens):
        raise GraphError(
            f"a tuned lens is a TunedLens, from TunedLens.load(folder) or train_tuned_lens, not {lens!r}",
            where=user_line(),
        )
    return lens


def _read_config(path: Path, where: str) -> dict[str, Any]:
    try:
        config = json.loads((path / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise GraphError(f"{path} has no config.json of a tuned lens: {error}", where=where) from None
    sizes = [config.get(name) for name in ("d_model", "num_hidden_layers")] if isinstance(config, dict) else [None]
    if not all(isinstance(size, int) and size > 0 for size in sizes):
        raise GraphError(f"the config.json in {path} has no d_model and num_hidden_layers", where=where)
    if config.get("lens_type", _KIND) != _KIND:
        raise GraphError(f"the lens in {path} is a {config['lens_type']}, not a {_KIND}", where=where)
    found: dict[str, Any] = config
    return found


def _read_state(path: Path, most_bytes: int, where: str) -> dict[str, Any]:
    import torch

    safe, pickled = path / "params.safetensors", path / "params.pt"
    file = safe if safe.exists() else pickled
    if not file.exists():
        raise GraphError(f"{path} has neither params.safetensors nor params.pt", where=where)
    if file.stat().st_size > most_bytes:
        raise TooLargeError(
            f"{file} has {file.stat().st_size:,} bytes; a lens as its config.json says has at most {most_bytes:,}",
            where=where,
        )
    try:
        if file == safe:
            from safetensors.torch import load_file

            state: Any = load_file(file)
        else:
            state = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # noqa: BLE001 - of two libraries, each with its own
        raise GraphError(f"{file} is no file of tensors: {str(error).splitlines()[0]}", where=where) from None
    if not isinstance(state, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in state.values()):
        raise GraphError(f"{file} holds more than named tensors", where=where)
    return state
