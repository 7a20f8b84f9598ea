"""Where people who know torch or nnsight write one thing and polytrace says another: the next step of a refusal."""

from __future__ import annotations

from polytrace.ops import BY_TORCH_NAME, OPS

_HOOKS = "there are no hooks: read and change `.input` and `.output` inside `with model.trace(prompt):`"
_WEIGHTS = "a weight is read by its name inside a trace, as in `model.lm_head.weight`"
_TREE = "print(model) shows its modules; lists of them are iterated and indexed"
_SERVED = "the model runs as it was loaded or is served, for everyone alike"
STEPS = "and a trace is one forward: `with model.generate(prompt, max_new_tokens=...) as tracer:` has steps"
_GENERATION = "the whole model generates: `with model.generate(prompt, max_new_tokens=...):`"
_RETURNED = "what the model returns is `model.output`, its logits are `model.logits`: `model.logits.save()`"
_FROZEN = "the model's weights are frozen: values have gradients, as in `.output.grad` behind `loss.backward()`"
_GRADIENTS = "every value has a gradient behind `loss.backward()`: `value.grad`"
_GRAD_HOOKS = "there are no hooks: change `value.grad` inside `with loss.backward():`"

_OF_MODULES = (
    dict.fromkeys(("register_forward_hook", "register_forward_pre_hook", "register_hook"), _HOOKS)
    | dict.fromkeys(("parameters", "named_parameters", "state_dict", "buffers"), _WEIGHTS)
    | dict.fromkeys(("modules", "named_modules", "children", "named_children"), _TREE)
    | dict.fromkeys(("to", "cuda", "cpu", "half", "float", "double", "bfloat16", "eval", "train"), _SERVED)
    | dict.fromkeys(("requires_grad_", "zero_grad", "grad"), _FROZEN)
    | {"generator": "what a generation gives is `tracer.result`: its `ids`, `text`, `finish`"}
    | {"forward": "call the module itself on a value", "generate": _GENERATION, "logits": _RETURNED}
)
_STEPS_OF_OPTIMISERS = (
    "torch's optimisers change tensors of yours, behind the block; in it a step gives new values: "
    "`polytrace.optim.Adam(lr=...).step([value], [value.grad])`"
)
_OF_VALUES = dict.fromkeys(("grad_fn", "retains_grad", "zero_grad"), _GRADIENTS) | {
    "is_leaf": _STEPS_OF_OPTIMISERS,  # what they ask first
    "register_hook": _GRAD_HOOKS,
    "steps": "what a line saves at each step is there when the block has ended; in it, collect values in a list",
}
_OF_STEPS = f"it is for the steps of a generation, {STEPS}"
_OF_TRACERS = {"generator": _OF_MODULES["generator"]} | dict.fromkeys(("iter", "all", "next", "token"), _OF_STEPS)


# what recorded values have beside the operations
_OF_EVERY_VALUE = ("save", "at", "shape", "dtype", "device", "ndim", "dim", "size", "numel", "item", "T", "mT")


def of_module(name: str) -> str | None:
    """What to write instead of a name that no module has; None where nothing is known of it."""
    if name in _OF_MODULES:
        return _OF_MODULES[name]
    if is_of_values(name):
        return (
            f"it is a module, not a value: write `.output.{name}` of what it returns, `.input.{name}` of what it gets"
        )
    return None


def of_value(name: str) -> str | None:
    """The same for recorded values."""
    return _OF_VALUES.get(name)


def of_tracer(name: str) -> str | None:
    """The same for a trace."""
    if name in ("output", "input", "logits") or is_of_values(name):
        return _RETURNED
    return _OF_TRACERS.get(name)


def is_of_values(name: str) -> bool:
    """Whether recorded values have an attribute of this name."""
    return name in OPS or f"Tensor.{name.rstrip('_')}" in BY_TORCH_NAME or name in _OF_EVERY_VALUE
