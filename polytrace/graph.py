"""The intervention graph: one user's program as plain data. No torch, no I/O.

Owns the node kinds and what a request is made of. Knows nothing of models, plans or bytes on a wire
(`polytrace.wire` encodes it) and nothing of what an op does (`polytrace.ops` names it, `engine.ops` runs it).

Invariants
- A node's id is its position in `Graph.nodes`, and an operand only refers to earlier nodes: no cycles by form.
- Values are functional: in-place code was recorded as new values plus a `Write`.
- A node says where the user wrote it (`file:line`), so every error can name the line.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from types import EllipsisType
from typing import Any, NewType, TypeAlias

from polytrace.tensors import RawTensor

NodeId = NewType("NodeId", int)


class Port(Enum):
    """Which side of a module a site is on, or which point inside of an attention module."""

    INPUT = "input"  # the first positional argument, else the first keyword argument, of the module's call
    OUTPUT = "output"  # what the module's call returned
    INPUTS = "inputs"  # arguments by selectors that begin with 0 (args) or 1 (kwargs); a module's but the first one
    # What projections make: [sequences, tokens, heads, features]
    Q = "q"  # queries before norms of their own and rotation
    K = "k"  # keys, of the key/value heads, before both
    HEAD_OUT = "head_out"  # what each head adds, in the model's width: z times the head's part of the output projection
    # Where rows attend: [sequences, tokens, heads, features] but for scores and pattern.
    Q_ROT = "q_rot"  # queries as they are held against keys: rotated, not scaled
    K_ROT = "k_rot"  # keys, of the key/value heads
    V = "v"  # values, of the key/value heads
    # What the newest row may look at, read only: [sequences, positions so far, heads, features]
    KEYS = "keys"  # k_rot of all positions
    VALUES = "values"  # v of all positions
    SCORES = "scores"  # [sequences, heads, queries, keys], scaled and soft-capped; -inf where a query sees no key
    PATTERN = "pattern"  # [sequences, heads, queries, keys], what the softmax makes of them; without an attention sink
    Z = "z"  # what each head gives to the output projection
    # Behind the model's own output, where a prompt generates:
    TOKEN = "token"  # [sequences, 1] int64: what each sequence goes on with, drawn from the logits of its last token

    @property
    def is_inner(self) -> bool:
        """Whether it is a point inside of an attention module."""
        return self not in (Port.INPUT, Port.OUTPUT, Port.INPUTS, Port.TOKEN)

    @property
    def is_of_pairs(self) -> bool:
        """Whether it has a value for each query and key."""
        return self in (Port.SCORES, Port.PATTERN)

    @property
    def is_attended(self) -> bool:
        """Whether it has a row for each position so far, not for those of a pass alone."""
        return self in (Port.KEYS, Port.VALUES)

    @property
    def has_earlier(self) -> bool:
        """Whether it has what came before a pass as well, and so another shape at each step."""
        return self.is_of_pairs or self.is_attended


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """An addressable tensor in the model."""

    module: str  # path in the Hugging Face model, "" is the root
    port: Port
    selector: tuple[int | str, ...] = ()  # way into a tuple, dict or ModelOutput; () is the value itself
    visit: int = 0  # which call of the module within one forward

    def __hash__(self) -> int:  # of what tells sites apart; the two ports of a module may collide
        return hash((self.module, self.selector, self.visit))

    def __str__(self) -> str:
        module = f"{self.module}.visits[{self.visit}]" if self.visit else self.module
        path = f"{module}.{self.port.value}" if module else self.port.value
        return path + "".join(f".{key}" if isinstance(key, str) else f"[{key}]" for key in self.selector)


@dataclass(frozen=True, slots=True)
class Ref:
    """An operand that is the value of an earlier node."""

    node: NodeId


@dataclass(frozen=True, slots=True)
class DType:
    """An operand that is a dtype, by torch's name without the prefix ("float32")."""

    name: str


@dataclass(frozen=True, slots=True)
class Device:
    """An argument of a call that is a device, as torch names it ("cuda:0"): one of the machine that the model is on."""

    name: str


# What an argument of an op may be. Tuples and lists nest; slices hold operands (ints or None, or Refs).
Operand: TypeAlias = (
    "Ref | DType | bool | int | float | str | slice | EllipsisType | tuple[Operand, ...] | list[Operand] | None"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Read:
    """The site's rows of one invoke, `[sequences, longest, *tail]`, left-padded with zeros: a snapshot.

    Step 0 is the prompt. At every later step of a generation an invoke has one token a sequence, so `longest` is 1.
    """

    site: Site
    invoke: int
    where: str
    step: int = 0  # the first step at which it acts
    num_steps: int = 1  # how many: the same body at each


@dataclass(frozen=True, slots=True, kw_only=True)
class Write:
    """Hands a value back to the model, exact shape of the read.

    `in_place=False` replaces what the port hands on (`site = v`): only that edge changes. `in_place=True` changes the
    tensor for everyone in the model who holds it from then on (`site[...] = v`, `+=`), as in torch.
    """

    site: Site
    invoke: int
    value: Ref
    in_place: bool
    where: str
    step: int = 0  # as of Read
    num_steps: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Op:
    """A call of the closed op table (`polytrace.ops.OPS`)."""

    name: str
    args: tuple[Operand, ...]
    kwargs: Mapping[str, Operand] = field(default_factory=dict)
    where: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """A module of the model called on values: `model.lm_head(h)`. Runs where the module lives."""

    module: str
    args: tuple[Operand, ...]
    where: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameter:
    """A parameter or buffer of the model by its full path, unsharded."""

    path: str
    where: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Constant:
    """A tensor that came with the request, by its name in `Request.constants`."""

    name: str
    where: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Mask:
    """`[sequences, longest]` bool: True where the invoke's left-padded view has a token."""

    invoke: int
    where: str


LOG = "log"  # what the names of saves begin with that the user is told while the request runs
MAX_LOG_BYTES = 16_384  # of one value of these


@dataclass(frozen=True, slots=True, kw_only=True)
class Save:
    """Returns a value to the user under a name; that of a step under `name_at(name, step)`."""

    name: str
    value: Ref
    where: str
    step: int | None = None  # as of Read; None: once, whenever its value is there
    num_steps: int = 1


def name_at(name: str, step: int) -> str:
    """The name in a result of what a save in a loop gives at a step."""
    return f"{name}@{step}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Last:
    """Behind a generation's loop: the first of these values that came. Values of steps that never came are absent.

    An absent value makes absent what is computed from it, but for lists (`torch.stack`), which lose it.
    """

    values: tuple[Ref, ...]  # the latest step's first
    where: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Stop:
    """Ends sequences of an invoke behind a step at which the value is true (not zero)."""

    value: Ref  # one value, or one a sequence
    invoke: int
    where: str
    step: int = 0  # as of Read
    num_steps: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Carried:
    """A value that an earlier step of the generation left. Made when a request is cut into steps, never sent."""

    shape: tuple[int, ...]
    dtype: str
    stage: int  # that has it
    where: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Backward:
    """Asks for the gradients of a value, as `loss.backward()` does. It has no value itself: `Grad` nodes name it."""

    loss: Ref  # floating
    gradient: Ref | None  # of the loss's shape, what it is weighed with; None: 1, and the loss has one element
    where: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Grad:
    """The gradient of one backward with regard to a value: of the value's shape and dtype.

    Of a read it is the total of everything behind the place where it was read, before a `GradWrite` there.
    """

    of: Ref  # a read, constant, op, call; floating
    backward: Ref
    where: str


@dataclass(frozen=True, slots=True, kw_only=True)
class GradWrite:
    """From here on backwards the gradient with regard to a value is another, as `value.grad = new` says."""

    of: Ref
    backward: Ref
    value: Ref  # of the shape of `of`
    where: str


class Turn(Enum):
    """What happens to the gradient at a site when a pass is run backwards."""

    TAKE = "take"  # what a write gave: its gradient goes to the written value, and no further back
    ADD = "add"  # what was computed from a read adds to the gradient there
    LOOK = "look"  # the total with regard to a read
    SET = "set"  # the total with regard to a read becomes another


@dataclass(frozen=True, slots=True, kw_only=True)
class SiteGrad:
    """One turn at the site of a read or write, in a wave that runs backwards. Made by the scheduler, never sent."""

    turn: Turn
    at: NodeId  # the Read or Write
    wave: int  # of the program, that runs backwards
    first: tuple[Site, int, int] | None = None  # its tensor is seen at an earlier place: the site, its stage and order
    value: Ref | None  # that is added or set; of the shape of the read
    where: str


@dataclass(frozen=True, slots=True, kw_only=True)
class OpGrad:
    """The gradient with regard to one operand of an op or a call, which is run again for it. Never sent."""

    op: NodeId  # the Op or Call
    operand: int  # which of `operands(op)`
    needs: tuple[Ref, ...]  # the operands of the op, whose values it is run on again
    gradients: tuple[Ref | None, ...]  # with regard to its results, one each; None: nobody has used it
    where: str


@dataclass(frozen=True, slots=True, kw_only=True)
class SeedGrad:
    """Ones of a value's shape: where a backward begins. Never sent."""

    of: Ref
    where: str


Node: TypeAlias = (
    Read
    | Write
    | Op
    | Call
    | Parameter
    | Constant
    | Mask
    | Save
    | Last
    | Stop
    | Carried
    | Backward
    | Grad
    | GradWrite
    | SiteGrad
    | OpGrad
    | SeedGrad
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Graph:
    """Nodes in the order the user wrote them; ids are positions."""

    nodes: tuple[Node, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How a token is drawn from logits: transformers' processors, in its order. The default takes the likeliest."""

    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 0  # 0: all
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0  # a sequence's draws depend on it, on the sequence's place in its invoke and on the step


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """How the sequences of an invoke go on."""

    max_new_tokens: int
    sampling: Sampling = field(default_factory=Sampling)
    eos: tuple[int, ...] = ()  # a sequence ends behind one of these
    stop: tuple[str, ...] = ()  # ... or when its new text has one of these
    logprobs: int | None = None  # log-probabilities of its tokens are told, and of so many likeliest beside


@dataclass(frozen=True, slots=True)
class Given:
    """A tensor among the arguments of a call: a constant of the request, by its name."""

    name: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """What one call of a model is given, where sequences of tokens do not say it (`PassLayout.WHOLE`).

    Plain data: numbers, texts, None, slices and ranges of integers, `DType`, `Device`, `Given`, and lists, tuples and
    dicts of these.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Invoke:
    """The prompts of one `tracer.invoke(...)`, as token ids. Several samples of a prompt are several sequences.

    Of a model that is called as it is (`PassLayout.WHOLE`) it is one call, and its one sequence says nothing.
    """

    sequences: tuple[tuple[int, ...], ...]
    generation: Generation | None = None  # None: it does not go on
    # Behind step 0, where a port is named that has what came before:
    before: int = 0  # positions before its first column, of the longest sequence
    pads: int = 0  # so many fewer the shortest has
    inputs: Inputs | None = None  # of one call of a model that is called as it is; else the images in its prompts

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence: the width of the left-padded view."""
        return max(len(sequence) for sequence in self.sequences)

    @property
    def num_tokens(self) -> int:
        """Tokens of all sequences, pads not counted."""
        return sum(len(sequence) for sequence in self.sequences)

    @property
    def is_ragged(self) -> bool:
        """Whether the view has pad rows."""
        return len({len(sequence) for sequence in self.sequences}) > 1


class Sharing(Enum):
    """Whose rows a request may share where they are equal by construction."""

    TENANT = "tenant"
    OFF = "off"


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What a request asks of the run beside its graph."""

    seed: int = 0  # of random ops; their draws depend on the seed and on which draw of the program it is
    sharing: Sharing = Sharing.TENANT
    edits: tuple[str, ...] = ()  # names of those that the graph began with, for the receipt


@dataclass(frozen=True, slots=True, kw_only=True)
class KeptSave:
    """A save whose value stays on the service when the request has ended well, instead of going to the user."""

    save: str  # the name of the Save
    name: str
    is_state: bool  # the new content of a state that is there already
    ttl_s: float | None = None  # seconds until it is purged; None: when somebody deletes it


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """A graph, its prompts and its constants: all that a user sends."""

    graph: Graph
    invokes: tuple[Invoke, ...]
    constants: Mapping[str, RawTensor]
    options: Options = field(default_factory=Options)
    keeps: tuple[KeptSave, ...] = ()


def refs(operand: Operand) -> list[NodeId]:
    """The nodes an operand refers to, in the order they stand."""
    found: list[NodeId] = []
    _collect((operand,), found)
    return found


def operands(node: Node) -> tuple[NodeId, ...]:
    """The nodes whose values a node needs, in the order they stand."""
    if isinstance(node, (Write, Save, Stop)):
        return (node.value.node,)
    if isinstance(node, Backward):
        return (node.loss.node,) if node.gradient is None else (node.loss.node, node.gradient.node)
    if isinstance(node, Grad):
        return (node.of.node, node.backward.node)
    if isinstance(node, GradWrite):
        return (node.of.node, node.backward.node, node.value.node)
    if isinstance(node, SiteGrad):
        return () if node.value is None else (node.value.node,)
    if isinstance(node, OpGrad):
        return tuple([value.node for value in (*node.needs, *node.gradients) if value is not None])
    if isinstance(node, SeedGrad):
        return (node.of.node,)
    if isinstance(node, Last):
        return tuple([value.node for value in node.values])
    if isinstance(node, (Op, Call)):
        found: list[NodeId] = []
        _collect(node.args, found)
        if isinstance(node, Op) and node.kwargs:
            _collect(node.kwargs.values(), found)
        return tuple(found)
    return ()


def draw_of(op: Op, node: NodeId) -> int:
    """Which of its request's draws a random op is. Recorded ones say so: what they draw stays when nodes move."""
    number = op.kwargs.get("draw", node)
    return number if isinstance(number, int) else node


LEAVES = frozenset({type(None), type(Ellipsis), bool, int, float, str, DType})  # operands that refer to nothing


def _collect(parts: Iterable[Operand], found: list[NodeId]) -> None:
    """Appends the nodes that operands refer to."""
    for part in parts:
        if type(part) in LEAVES:
            continue
        if isinstance(part, Ref):
            found.append(part.node)
        elif isinstance(part, slice):
            if not (part.start is None and part.stop is None and part.step is None):
                _collect((part.start, part.stop, part.step), found)
        elif isinstance(part, (tuple, list)):
            _collect(part, found)
