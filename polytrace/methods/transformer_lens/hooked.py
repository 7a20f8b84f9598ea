"""`HookedModel`: TransformerLens's interface to a served model, in one process or over HTTP, each run one request."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from polytrace.certificate import Certificate, Receipt
from polytrace.errors import GraphError
from polytrace.lines import user_line
from polytrace.methods.transformer_lens.blocks import find_blocks
from polytrace.methods.transformer_lens.cache import ActivationCache
from polytrace.methods.transformer_lens.config import config_of
from polytrace.methods.transformer_lens.facts import find_facts
from polytrace.methods.transformer_lens.hook_table import HookTable
from polytrace.methods.transformer_lens.names import BY_NAME_ALONE, block_of
from polytrace.methods.transformer_lens.running import Hook, Run, record
from polytrace.methods.transformer_lens.tokens import Tokens
from polytrace.methods.transformer_lens.weights import Weights, refuse_inside
from polytrace.model import Model
from polytrace.tracing import Tracer

NamesFilter = str | Sequence[str] | Callable[[str], bool] | None
HookFunction = Callable[..., Any]
_NO_GRADIENTS = (
    "hooks here are forward ones: gradients are `loss.backward()` and `value.grad` in a trace of the model itself"
)
_LATER = {
    "generate": "generation is not part of polytrace yet",
    "generate_stream": "generation is not part of polytrace yet",
    "set_use_split_qkv_input": "heads do not get inputs of their own here: change `attn.hook_q`, `hook_k`, `hook_v`",
    "set_use_attn_in": "heads do not get inputs of their own here: change `attn.hook_q`, `hook_k`, `hook_v`",
    "set_use_hook_mlp_in": "`hook_mlp_in` is there without: name it, in names_filter or in a hook",
    "state_dict": "weights stay where the model is served: W_E, W_Q, blocks[3].mlp.W_out and the like bring one",
    "parameters": "weights stay where the model is served: W_E, W_Q, blocks[3].mlp.W_out and the like bring one",
}


class HookPoint:
    """What a hook is told beside the value."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.ctx: dict[Any, Any] = {}  # the user's own, until `reset_hooks`

    def layer(self) -> int:
        """The number of its block. Raises GraphError outside of blocks."""
        number = block_of(self.name)
        if number is None:
            raise GraphError(f"{self.name} is in no block", where=user_line())
        return number

    def __repr__(self) -> str:
        return f"HookPoint({self.name!r})"


@dataclass(frozen=True, slots=True)
class Output:
    """`return_type="both"`."""

    logits: Any
    loss: Any

    def __iter__(self) -> Iterator[Any]:
        return iter((self.logits, self.loss))


@dataclass(frozen=True, slots=True, eq=False)
class _Added:
    """A hook that is there for later runs."""

    names: tuple[str, ...]
    function: HookFunction
    is_permanent: bool = False


class HookedModel(Tokens, Weights):
    """A polytrace model with TransformerLens's names and calls: `HookedModel(polytrace.load(folder))`.

    The numbers are the model's own, those of TransformerLens's `from_pretrained_no_processing`. A hook is recorded, not
    run: Python that needs a number of the value is refused as in any trace, or looks where `peek=True`. Needs torch.
    One thread at a time.
    """

    def __init__(self, model: Model, *, default_prepend_bos: bool = True, peek: bool = False) -> None:
        """`default_prepend_bos`: texts begin with the model's BOS token where it has one, as in TransformerLens.

        `peek`: hooks may look at values (`if value.norm() > 10:`), each look one request more.
        """
        try:
            import torch  # noqa: F401
        except ImportError:
            raise GraphError("HookedModel computes with torch, which is not here: pip install torch") from None
        self.model = model
        self.default_prepend_bos = default_prepend_bos
        self.peek = peek
        self.receipt: Receipt | None = None  # of the last run
        refuse_inside("a HookedModel asks the model about its norms: make it")
        blocks = find_blocks(model)
        self.facts = find_facts(model, blocks)  # one small request: how norms work, what is added to the residual
        self.hook_table = HookTable(model, blocks, self.facts)  # what each activation's name stands for
        self.cfg = config_of(model, self.hook_table, default_prepend_bos)  # sizes and kinds by TransformerLens's names
        self.use_attn_result = False  # whether filters choose `attn.hook_result` too
        self._added: list[_Added] = []
        self._points: dict[str, HookPoint] = {}
        self._kept: dict[Any, Any] = {}  # weights that have come

    # what there is

    @property
    def hook_dict(self) -> dict[str, HookPoint]:
        """Every activation by name, in the model's order."""
        return {name: self._point(name) for name in self.hook_table.names()}

    # runs

    def __call__(
        self,
        prompts: Any,
        return_type: str | None = "logits",
        *,
        loss_per_token: bool = False,
        prepend_bos: bool | None = None,
        stop_at_layer: int | None = None,
    ) -> Any:
        """Logits `[prompts, positions, vocabulary]`, the loss, both, or None; with the hooks that were added.

        `prompts`: texts, or tokens as in `model.trace`; prompts of different lengths are padded on the left. "loss" is
        the mean over all tokens that are predicted, pads left out; `loss_per_token`: `[prompts, positions - 1]`.
        `stop_at_layer`: what that block takes, instead of logits; it and all behind it does not run.
        """
        run = self._run(return_type, loss_per_token, stop_at_layer)
        return self._send(prompts, prepend_bos, run)[0]

    forward = __call__

    def run_with_cache(
        self,
        prompts: Any,
        *,
        names_filter: NamesFilter = None,
        return_type: str | None = "logits",
        loss_per_token: bool = False,
        prepend_bos: bool | None = None,
        stop_at_layer: int | None = None,
        pos_slice: Any = None,
        remove_batch_dim: bool = False,
        return_cache_object: bool = True,
        device: Any = None,
        incl_bwd: bool = False,
    ) -> tuple[Any, Any]:
        """What the model gives and an `ActivationCache` of what `names_filter` chooses: only that moves.

        `names_filter`: a name, names, or a function of a name; None: all but `attn.hook_result`, `hook_mlp_in` and
        `unembed.hook_in`, `hook_out`, which are there by their names. `pos_slice`: of positions, an int keeps the
        dimension; of prompts of different lengths negative ints alone. Raises TooLargeError where the cache is more
        than one request returns, with what takes most of it.
        """
        if incl_bwd:
            raise GraphError(_NO_GRADIENTS, where=user_line())
        run = self._run(return_type, loss_per_token, stop_at_layer)
        run = replace(
            run,
            cached=self._chosen(names_filter, run.stop),
            positions=[pos_slice] if isinstance(pos_slice, int) else pos_slice,
            is_without_batch=remove_batch_dim,
        )
        output, found = self._send(prompts, prepend_bos, run)
        if not return_cache_object:
            return output, found
        cache = ActivationCache(found, self, has_batch_dim=not remove_batch_dim)
        return output, cache if device is None else cache.to(device)

    def run_with_hooks(
        self,
        prompts: Any,
        *,
        fwd_hooks: Iterable[tuple[Any, HookFunction]] = (),
        bwd_hooks: Iterable[Any] = (),
        return_type: str | None = "logits",
        loss_per_token: bool = False,
        prepend_bos: bool | None = None,
        stop_at_layer: int | None = None,
        reset_hooks_end: bool = True,
        clear_contexts: bool = False,
    ) -> Any:
        """One run with hooks `(name or function of a name, fn)`; `fn(value, hook=...)` returns another value or None.

        What it changes in place is changed, as in TransformerLens. A value that a hook puts aside has data after the
        run if the hook calls `.save()` on it.
        """
        with self.hooks(fwd_hooks, bwd_hooks, reset_hooks_end=reset_hooks_end, clear_contexts=clear_contexts):
            return self(
                prompts,
                return_type,
                loss_per_token=loss_per_token,
                prepend_bos=prepend_bos,
                stop_at_layer=stop_at_layer,
            )

    def price(
        self,
        prompts: Any,
        *,
        names_filter: NamesFilter = None,
        return_type: str | None = "logits",
        prepend_bos: bool | None = None,
        stop_at_layer: int | None = None,
        pos_slice: Any = None,
    ) -> Certificate:
        """What `run_with_cache` would cost and return, `result_bytes` above all; nothing runs."""
        run = self._run(return_type, False, stop_at_layer)
        positions = [pos_slice] if isinstance(pos_slice, int) else pos_slice
        run = replace(run, cached=self._chosen(names_filter, run.stop), positions=positions)
        with self.model.trace(self._prompts(prompts, prepend_bos), run=False) as tracer:
            record(self, tracer, run)
        return self.model.validate(tracer)

    # hooks that stay

    @contextmanager
    def hooks(
        self,
        fwd_hooks: Iterable[tuple[Any, HookFunction]] = (),
        bwd_hooks: Iterable[Any] = (),
        *,
        reset_hooks_end: bool = True,
        clear_contexts: bool = False,
    ) -> Iterator[HookedModel]:
        """A block in which every run has these hooks."""
        if list(bwd_hooks):
            raise GraphError(_NO_GRADIENTS, where=user_line())
        added = [_Added(self._named(names), function) for names, function in fwd_hooks]
        self._added += added
        try:
            yield self
        finally:
            if reset_hooks_end:
                self._added = [hook for hook in self._added if not any(hook is own for own in added)]
                if clear_contexts:
                    self._points.clear()

    def add_hook(self, name: Any, hook: HookFunction, dir: str = "fwd", is_permanent: bool = False) -> None:
        """A hook of every later run, until `reset_hooks`."""
        if dir != "fwd":
            raise GraphError(_NO_GRADIENTS, where=user_line())
        self._added.append(_Added(self._named(name), hook, is_permanent))

    def add_perma_hook(self, name: Any, hook: HookFunction, dir: str = "fwd") -> None:
        """A hook that `reset_hooks` leaves."""
        self.add_hook(name, hook, dir, is_permanent=True)

    def reset_hooks(self, *, including_permanent: bool = False, clear_contexts: bool = True) -> None:
        """Later runs have no hooks any more."""
        self._added = [hook for hook in self._added if hook.is_permanent and not including_permanent]
        if clear_contexts:
            self._points.clear()

    def set_use_attn_result(self, use_attn_result: bool) -> None:
        """Whether filters choose `attn.hook_result` too, `[prompts, positions, heads, d_model]`; by name it is had."""
        self.use_attn_result = use_attn_result

    def __getattr__(self, name: str) -> Any:
        if name in _LATER:
            raise GraphError(f"HookedModel has no {name}: {_LATER[name]}", where=user_line())
        raise AttributeError(f"HookedModel has no {name!r}; `.model` is the polytrace model itself")

    # one run

    def _run(self, return_type: str | None, loss_per_token: bool, stop_at_layer: int | None) -> Run:
        if return_type not in ("logits", "loss", "both", None):
            raise GraphError(f"return_type is 'logits', 'loss', 'both' or None, not {return_type!r}", where=user_line())
        stop, layers = stop_at_layer, self.cfg.n_layers
        if stop is not None:
            stop = stop + layers if stop < 0 else stop
            if not 0 <= stop <= layers:
                raise GraphError(
                    f"stop_at_layer={stop_at_layer}: this model has blocks 0-{layers - 1}", where=user_line()
                )
        hooks = [
            Hook(name, hook.function, self._point(name)) for hook in self._added for name in self._before(hook, stop)
        ]
        return Run(return_type=return_type, loss_per_token=loss_per_token, stop=stop, hooks=tuple(hooks))

    def _send(self, prompts: Any, prepend_bos: bool | None, run: Run) -> tuple[Any, dict[str, Any]]:
        """The output and the activations, which have data when this returns (in a session, when that ends)."""
        tracer: Tracer
        with self.model.trace(self._prompts(prompts, prepend_bos), peek=self.peek) as tracer:
            output, found = record(self, tracer, run)
        self.receipt = tracer._receipt
        both = Output(*output) if run.stop is None and run.return_type == "both" else output
        return both, found

    # names

    def _chosen(self, names_filter: NamesFilter, stop: int | None) -> tuple[str, ...]:
        """The activations that a filter means, in the model's order."""
        table = self.hook_table
        if names_filter is None or callable(names_filter):
            chosen = [name for name in self._offered() if _is_before(name, stop)]
            return tuple(name for name in chosen if names_filter is None or names_filter(name))
        names = [names_filter] if isinstance(names_filter, str) else list(names_filter)
        for name in names:
            table.place(name)
            _check_before(name, stop)
        return tuple(sorted(dict.fromkeys(names), key=table.place))

    def _named(self, names: Any) -> tuple[str, ...]:
        """The activations that a hook is for: one name, or those that a function says yes to."""
        table = self.hook_table
        if isinstance(names, str):
            table.place(names)
            return (names,)
        if not callable(names):
            raise GraphError(f"a hook is for a name or a function of a name, not for {names!r}", where=user_line())
        chosen = tuple(name for name in self._offered() if names(name))
        if not chosen:
            raise GraphError("the function of a hook's names says yes to none of this model's", where=user_line())
        return chosen

    def _offered(self) -> list[str]:
        """What a filter may choose."""
        return [name for name in self.hook_table.names() if self._is_offered(name)]

    def _is_offered(self, name: str) -> bool:
        return not name.endswith(BY_NAME_ALONE) or (self.use_attn_result and name.endswith("hook_result"))

    def _before(self, hook: _Added, stop: int | None) -> tuple[str, ...]:
        for name in hook.names:
            _check_before(name, stop)
        return hook.names

    def _point(self, name: str) -> HookPoint:
        return self._points.setdefault(name, HookPoint(name))


def _is_before(name: str, stop: int | None) -> bool:
    number = block_of(name)
    if stop is None:
        return True
    return name in ("hook_embed", "hook_pos_embed") if number is None else number < stop


def _check_before(name: str, stop: int | None) -> None:
    if not _is_before(name, stop):
        raise GraphError(f"{name} is behind stop_at_layer={stop}: that run never comes to it", where=user_line())
