"""What a deployment tells of its model: module tree, sites in the model's order, parameters, limits. Pure data.

One object serves three readers: the client (paths, shapes, nearest names), the planner (orders, stages) and
`engine.shapes` (view shapes). It is made once, at load (`engine.probe`, `engine.placing`), and is JSON on the wire.

Invariants
- `sites` is sorted by `order`; orders are unique and grow along the forward, so also along stages.
- The view of a leaf by a request is `[sequences, longest, *tail]`, full size on every rank.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any

from polytrace.graph import Port, Site


class Rows(Enum):
    """Which rows of the packed stream a site has."""

    ALL = "all"
    KEPT = "kept"  # only the positions that the plan keeps for the head (final norm's consumers: lm_head, logits)
    DECODER = "decoder"  # one a sequence, of a model that has an encoder: the prompt's rows are the encoder's


class PassLayout(Enum):
    """How the sequences of a pass run."""

    PACKED = "packed"  # one after another in one stream, in which rows are shared and end
    PADDED = "padded"  # each alone, in step: for models that mix a row with its neighbours, or mask by themselves
    WHOLE = "whole"  # there are none: an invoke is one call of the model as it is, and sites follow from its arguments


@dataclass(frozen=True, slots=True, kw_only=True)
class Leaf:
    """One tensor behind a port: the port's value itself, or a member of a tuple, dict or ModelOutput."""

    selector: tuple[int | str, ...]
    tail: tuple[int, ...]  # dimensions after [sequences, tokens], unsharded; of pairs: (heads,)
    dtype: str
    sharded_dim: int | None = None  # index into `tail` that tensor-parallel ranks split evenly; None: all have all
    sharded_blocks: int = 1  # that dimension is this many equal blocks, each split over the ranks (GPT-2's fused q|k|v)
    sharded_copies: int = 1  # so many neighbouring ranks hold the same part (key/value heads, when ranks are more)
    mutated: bool = False  # the model changes this tensor in place later: reads must copy
    read_refusal: str | None = None  # why the site cannot be read, None when it can
    write_refusal: str | None = None  # why the site cannot be written, None when it can
    is_flat: bool = False  # in the model its rows lie in the first dimension, `[tokens, ...]` without sequences
    in_place_refusal: str | None = None  # why only `site = value` is possible, None when in-place code is too
    of_pairs: bool = False  # it has a value for each query and key: [sequences, heads, tokens, tokens]
    is_attended: bool = False  # it has a row for each position so far: [sequences, positions, ...]
    row_dim: int = 1  # of a view, the dimension of its tokens: 2 in [sequences, heads, tokens, features]
    num_columns: int | None = None  # of a view, however long the prompts are; None: the longest prompt's tokens
    gradient_refusal: str | None = None  # why there is no gradient there, None when there is one where any is
    tensor: int | None = None  # leaves of one number are one tensor in a forward; None: no other leaf is it
    is_whole: bool = False  # `tail` is all of its shape: it is seen as the module has it, without sequences and tokens

    @property
    def column_dim(self) -> int:
        """The dimension of a view that its columns are: tokens, or queries."""
        return 2 if self.of_pairs else self.row_dim

    @property
    def sharded_view_dim(self) -> int | None:
        """The dimension of a view that ranks split."""
        if self.sharded_dim is None:
            return None
        return 1 + self.sharded_dim + (not self.of_pairs and self.sharded_dim >= self.row_dim - 1)

    def view_shape(
        self, num_sequences: int, longest: int, num_columns: int | None = None, *, before: int = 0
    ) -> tuple[int, ...]:
        """The view of so many sequences; of some columns only when their number is given.

        Of pairs there are `before` more keys, which come before the columns; of what is attended so many more rows.
        """
        if self.is_whole:
            return self.tail
        whole = longest if self.num_columns is None else self.num_columns
        columns = whole if num_columns is None else num_columns
        if self.of_pairs:
            return (num_sequences, *self.tail, columns, before + longest)
        if self.is_attended:
            return (num_sequences, before + columns, *self.tail)
        dim = self.row_dim - 1
        return (num_sequences, *self.tail[:dim], columns, *self.tail[dim:])


@dataclass(frozen=True, slots=True, kw_only=True)
class MemberInfo:
    """What lies in a port of a model that is called as it is, and is no tensor that can be read."""

    selector: tuple[int | str, ...]
    class_name: str  # "NoneType": it is None
    names: tuple[str, ...] = ()  # of its places: it is a namedtuple
    why_not: str | None = None  # "is not looked into": why it has no members; None: it has some, or is None


@dataclass(frozen=True, slots=True, kw_only=True)
class SiteInfo:
    """One port of one module, at its place in the model's order."""

    module: str
    port: Port
    visit: int
    order: int  # place in the model's order of events within one forward
    stage: int  # the stage whose window owns the module
    structure: str  # "tensor", "tuple", "list", "dict" (ModelOutput too), "arguments" or "other"
    rows: Rows
    leaves: tuple[Leaf, ...]  # none: a model that is called as it is has no tensor there in this visit
    keyword: str | None = None  # of an input that is given by keyword: its name
    members: tuple[MemberInfo, ...] = ()  # beside the leaves

    @property
    def layouts(self) -> dict[tuple[int | str, ...], int]:
        """In which dimension of the model's tensor the rows lie, where that is not the second."""
        dims = ((leaf.selector, 0 if leaf.is_flat else leaf.row_dim) for leaf in self.leaves)
        return {selector: dim for selector, dim in dims if dim != 1}


@dataclass(frozen=True, slots=True, kw_only=True)
class ModuleInfo:
    """One module of the tree, in `named_modules` order."""

    path: str
    class_name: str
    is_list: bool  # a ModuleList: indexed, sliced and iterated, never called
    is_decoder_layer: bool  # `.output[0]` on it means the hidden states
    is_layer: bool = False  # it stands in a list of a transformers model and attends, or mixes tokens in its stead
    first_stage: int  # the first stage that has it: a module called on a value runs there
    call_refusal: str | None = None  # why it cannot be called on a value, None when it can
    source: int | None = None  # its place in `ModelDescription.sources`, None when the forward never calls it
    is_dict: bool = False  # a ModuleDict: its members have names, also where these are numbers


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceCode:
    """A function of the model as it was written. Its calls are the operations."""

    name: str
    text: str
    operations: tuple[tuple[str, int], ...]  # name and line of the text, counted from 0; in the order of evaluation


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceInfo:
    """The operations of modules that are equal in code and shapes (`polytrace.sources`)."""

    # Way to an operation inside of the forward, "" the forward itself -> the code of what it calls, in `codes`
    codes: Mapping[str, int]
    sites: tuple[SiteInfo, ...]  # `module` is the way to the operation, `order` counts from the module's input
    calls: Mapping[str, str]  # operations that call a module -> its path below this one
    closed: Mapping[str, str]  # operations that call something else which has no source to be visited -> why
    refusal: str | None = None  # why none can be visited, None when they can


@dataclass(frozen=True, slots=True, kw_only=True)
class ParameterInfo:
    """One parameter or buffer, unsharded."""

    path: str
    shape: tuple[int, ...]
    dtype: str
    stage: int  # its home stage
    sharded_dim: int | None  # dimension that tensor-parallel ranks split evenly; None: every rank has all
    sharded_blocks: int = 1  # see `Leaf`
    sharded_copies: int = 1
    of: str | None = None  # of a named weight (`W_Q`): the parameter that it is a view of
    is_of_whole: bool = False  # ... of the whole only: ranks' parts of that do not have parts of this


@dataclass(frozen=True, slots=True, kw_only=True)
class PointInfo:
    """A name that is no port: the tensor that it stands for in this model, or why there is none."""

    module: str  # that has the name
    name: str
    site: Site | None
    refusal: str | None = None
    write_refusal: str | None = None  # why it can only be read, None when the tensor alone decides
    note: str | None = None  # what people have to know of it in this family


class Outcome(Enum):
    """What became of a check at load."""

    HOLDS = "holds"
    UNCHECKED = "not checked"
    FAILS = "fails"


@dataclass(frozen=True, slots=True, kw_only=True)
class Checked:
    """What was checked of names when the model was loaded, on the served weights."""

    names: tuple[str, ...]  # of points, or standard names of modules
    says: str
    outcome: Outcome
    layers: tuple[int, ...]  # ascending; none: it is about the model
    error: float | None = None  # the largest over layers, beyond rounding and relative to what is compared
    told: str | None = None  # numbers for people, or why it does not hold or was not checked


@dataclass(frozen=True, slots=True, kw_only=True)
class PartInfo:
    """A module inside of a decoder layer by its standard name, or why this layer has no such module."""

    module: str  # the decoder layer
    name: str  # "self_attn" or "mlp"
    path: str | None
    refusal: str | None = None
    is_parallel: bool = False  # attention and MLP of this layer both take the residual before it


@dataclass(frozen=True, slots=True, kw_only=True)
class FactInfo:
    """A number of the model: one for all layers, or one for each; or why there is no such number."""

    name: str
    values: tuple[int, ...]
    refusal: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What one request may be. Checked when it is submitted, before memory is taken."""

    max_sequence_tokens: int  # the model's context length
    max_request_tokens: int = 4_194_304  # all sequences of all invokes
    max_request_bytes: int = 1 << 30  # the request as a file
    max_nodes: int = 1_000_000
    max_value_bytes: int = 1 << 30  # any one value of the graph
    max_live_bytes: int = 4 << 30  # the graph's values at one site visit, those that wait for later visits included
    max_result_bytes: int = 1 << 30  # all saves together
    # As `scheduling.policy.BUDGET_TOKENS`, which is in a room above: who serves prompts puts the policy's here.
    pass_tokens: int = 8192  # rows of a pass at its widest layer; invokes that have more take several
    trunk_bytes: int = 1 << 30  # a shard, of rows that passes leave for later passes of their requests
    tape_bytes: int = 4 << 30  # a shard, of what passes keep for gradients


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatFormat:
    """The tokenizer's own chat template, in Jinja. Rendered in a sandbox: by clients, or a worker of the service."""

    templates: Mapping[str, str]  # by name; "default" where there is one only
    special_tokens: Mapping[str, str]  # what templates know beside the messages: bos_token, eos_token, ...


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageInfo:
    """What stands for an image in a prompt: so many tokens of one kind, whose rows the image's features are."""

    token: int
    rows: int  # of an image; 0 where each has a grid of patches
    shape: tuple[int, ...]  # of an image's pixels: channels, height, width; of a patch, where there are grids
    flops: int  # to make its rows; to make a row, where there are grids
    modules: tuple[str, ...]  # that make them
    merge: int = 0  # patches side by side that become a row, each way, of a grid [time, height, width]; 0: no grids


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelDescription:
    """All that anyone outside the shards knows of a deployed model."""

    name: str  # the deployment's name
    class_name: str  # the Hugging Face class
    dtype: str  # of the served weights
    vocab_size: int
    hidden_size: int
    num_layers: int
    layers: str  # path of the decoder layers' ModuleList
    stages: int
    ranks: int
    fingerprint: str  # of configuration, dtype and probing: two descriptions with one fingerprint agree in every shape
    config: Mapping[str, Any]  # the Hugging Face configuration as plain JSON
    modules: tuple[ModuleInfo, ...]
    sites: tuple[SiteInfo, ...]
    parameters: tuple[ParameterInfo, ...]
    limits: Limits
    key_value_bytes: int  # of one row's keys and values at one layer, on one shard
    hidden_bytes: int  # of one row's hidden states
    tape_bytes: int = 0  # of what one row keeps of one layer for a gradient's way back, on one shard
    tape_fill_bytes: int = 0  # of what one layer keeps besides, however few rows: of its experts' tiles, partly empty
    why_no_gradients: str = ""  # why there are none; empty: there are
    row_multiple: int  # a pass's rows are padded to a multiple of it, so that bits do not depend on their number
    has_kept_rows: bool  # the forward takes `logits_to_keep`, so the head can run on chosen rows only
    has_forks: bool = True  # the gate found that equal rows may be shared and rows that nobody needs left out
    has_exact_rows: bool = True  # the gate found that a row's bits do not depend on how many rows run beside it
    layout: PassLayout = PassLayout.PACKED
    points: tuple[PointInfo, ...] = ()  # named points that are not sites of their own name
    standard: Mapping[str, str] = field(default_factory=dict)  # modules that every decoder has, by standard name
    not_standard: Mapping[str, str] = field(default_factory=dict)  # standard names that lead nowhere here -> why
    parts: tuple[PartInfo, ...] = ()  # modules inside of decoder layers by their standard names
    facts: tuple[FactInfo, ...] = ()  # heads and their sizes
    checked: tuple[Checked, ...] = ()  # what was checked of names at load
    notes: tuple[str, ...] = field(default=())  # what the gate found, for people
    codes: tuple[SourceCode, ...] = ()
    sources: tuple[SourceInfo, ...] = ()
    chat: ChatFormat | None = None  # how conversations become prompts; None: the model came without a chat template
    eos: tuple[int, ...] = ()  # tokens that end a text, by the model's own configuration of its generation
    images: ImageInfo | None = None  # how images stand in prompts; None: prompts have none
    of_invokes: tuple[tuple[SiteInfo, ...], ...] = ()  # of one request, where the layout is WHOLE: sites of each invoke
    offloaded: tuple[str, ...] = ()  # modules of such a model whose weights are there only while they run


def serve_the_same(one: ModelDescription, other: ModelDescription) -> bool:
    """Whether two deployments' shards serve the same, wherever its weights have found room."""
    limits = replace(one.limits, tape_bytes=other.limits.tape_bytes)
    return replace(one, offloaded=other.offloaded, limits=limits) == other


def logits_of(sites: Iterable[SiteInfo]) -> tuple[SiteInfo, Leaf] | None:
    """The logits that the model returns; None when it returns none."""
    for info in sites:
        if info.module == "" and info.port is Port.OUTPUT:
            for leaf in info.leaves:
                if leaf.selector == ("logits",) and len(leaf.tail) == 1:
                    return info, leaf
    return None


def index_sites(description: ModelDescription) -> dict[Site, tuple[SiteInfo, Leaf]]:
    """Every leaf by the site that names it. Make it once and keep it."""
    return {
        Site(module=info.module, port=info.port, selector=leaf.selector, visit=info.visit): (info, leaf)
        for info in description.sites
        for leaf in info.leaves
    }
