"""What a deployment is asked for on a command line: `serve`, `deploy` and `models deploy` take the same flags."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial, wraps
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from cluster.config import ShareAcross
from polytrace.errors import UserError

if TYPE_CHECKING:
    from cluster.config import DeploymentSpec

_NONE = "none"  # takes back what a deployment has


def _or_none(kind: type[float], text: str) -> float | None:
    """What is written behind a flag that can also be taken back."""
    try:
        return None if text == _NONE else kind(text)
    except ValueError:
        raise typer.BadParameter(f"{text!r} is neither a number nor {_NONE}") from None


@dataclass(frozen=True, slots=True, kw_only=True)
class DeploymentFlags:
    """Each field is a flag, but for `given`."""

    name: Annotated[
        str | None, typer.Option("--name", help="Name of the deployment; default: the model's last part.")
    ] = None
    stages: Annotated[int, typer.Option(min=1, help="Pipeline stages: blocks of layers.")] = 1
    ranks: Annotated[int, typer.Option(min=1, help="Tensor-parallel ranks of every stage.")] = 1
    replicas: Annotated[int, typer.Option(min=1, help="Copies; requests go to the least loaded one.")] = 1
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto"
    device: Annotated[str, typer.Option(help="cpu, cuda, or auto: GPUs when the cluster has any.")] = "auto"
    cpus: Annotated[
        float | None,
        typer.Option(
            parser=partial(_or_none, float),
            metavar="NUMBER|none",
            help="Of the cluster's, for each shard; default: a small share.",
        ),
    ] = None
    random_weights: Annotated[
        int | None,
        typer.Option(
            parser=partial(_or_none, int),
            metavar="SEED|none",
            help="Read no weights but draw them; MODEL may be one that ships, as for plan.",
        ),
    ] = None
    offload: Annotated[
        float, typer.Option(min=0, metavar="GIB", help="Of each shard's weights to keep in its host's memory.")
    ] = 0.0
    share_across: Annotated[
        ShareAcross, typer.Option(help="Whose requests have rows in common where their prompts begin alike.")
    ] = ShareAcross.TENANT
    merge_calls: Annotated[
        bool,
        typer.Option(help="Of a model that is called as it is: calls of several users are one, where that is exact."),
    ] = True
    whole: Annotated[
        bool,
        typer.Option(
            "--whole/--packed", help="A vision-language model as it is, or the language model in it, with images."
        ),
    ] = True
    device_map: Annotated[
        str | None,
        typer.Option(
            metavar="NAME|FILE|none",
            help="Of a model that is called as it is, over devices of its one shard: auto, balanced, balanced_low_0, "
            'sequential, or a file such as {"vit.embeddings": 0, "vit.layers.0": "cpu", ...}.',
        ),
    ] = None
    gpus: Annotated[
        int | None,
        typer.Option(
            parser=partial(_or_none, int),
            metavar="NUMBER|none",
            help="Of the one shard with --device-map; default: those it names.",
        ),
    ] = None

    given: frozenset[str] = frozenset()  # names of the flags that the user wrote

    def spec(self, source: str, known: DeploymentSpec | None = None, *, name: str | None = None) -> DeploymentSpec:
        """The deployment of a model; what was not given is as in a `known` one, its source too. Raises UserError when
        it can be none on any cluster, and when the weights of a known one are random and nothing is said of that.
        """
        from api.settings import deployment_spec

        kept: dict[str, Any] = {} if known is None else {"source": known.source}
        kept |= {_FIELDS.get(flag, flag): value for flag, value in self._silent(known).items()}
        return deployment_spec(
            kept=kept,
            source=source,
            name=name or self.name,
            stages=self.stages,
            ranks=self.ranks,
            replicas=self.replicas,
            dtype=self.dtype,
            device=self.device,
            cpus=self.cpus,
            random_weights_seed=self.random_weights,
            offload_bytes=int(self.offload * (1 << 30)),
            share_across=self.share_across,
            merges_calls=self.merge_calls,
            whole=self.whole,
            device_map=None if self.device_map == _NONE else self.device_map,
            gpus=self.gpus,
        )

    def kept(self, known: DeploymentSpec | None) -> list[str]:
        """What a known deployment keeps because no flag said otherwise, where that is not the flag's default."""
        return [
            f"{flag.replace('_', '-')} {value / (1 << 30):g} GiB"
            if flag == "offload"
            else f"{flag.replace('_', '-')} {value}"
            for flag, value in self._silent(known).items()
            if value != _flags()[flag]
        ]

    def _silent(self, known: DeploymentSpec | None) -> dict[str, Any]:
        """What a known deployment has of the flags that were not given."""
        if known is None:
            return {}
        seed = known.random_weights_seed
        if seed is not None and "random_weights" not in self.given:
            told = f"{known.name} has random weights: say --random-weights {seed} to have them again, or"
            raise UserError(f"{told} --random-weights {_NONE} to read those of {known.source}")
        silent = [flag for flag in _flags() if flag not in self.given and flag != "name"]
        return {flag: getattr(known, _FIELDS.get(flag, flag)) for flag in silent}


_FIELDS = {  # of a spec, that flags have other names than
    "random_weights": "random_weights_seed",
    "offload": "offload_bytes",
    "merge_calls": "merges_calls",
}


def _flags() -> dict[str, Any]:
    """Their defaults by name."""
    return {field.name: field.default for field in fields(DeploymentFlags) if field.name != "given"}


def takes_deployment(command: Callable[..., None]) -> Callable[..., None]:
    """The command with a flag for each field in the place of its parameter `deployment`, which gets all of them."""
    hints = get_type_hints(DeploymentFlags, include_extras=True)
    flags = _flags()
    own = get_type_hints(command, include_extras=True)
    parameters: list[inspect.Parameter] = []
    for parameter in inspect.signature(command).parameters.values():
        if parameter.name == "deployment":
            parameters += [
                inspect.Parameter(name, parameter.kind, default=default, annotation=hints[name])
                for name, default in flags.items()
            ]
        else:
            parameters.append(parameter.replace(annotation=own[parameter.name]))

    parameters.append(inspect.Parameter("context", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context))

    @wraps(command)
    def run(context: typer.Context, **values: Any) -> None:
        sources = {name: context.get_parameter_source(name) for name in flags}
        given = frozenset(
            name for name, source in sources.items() if source is not None and "DEFAULT" not in source.name
        )
        command(deployment=DeploymentFlags(given=given, **{name: values.pop(name) for name in flags}), **values)

    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return run
