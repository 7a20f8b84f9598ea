"""Of every row of the op table: where an op is said to keep prompts apart, a batch gives what each prompt gives alone.

Each tensor of each example stands for a value of one prompt (the prompts' dimension in any place) or for one that is
the same for all prompts.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import op_examples
import pytest
import torch
from op_examples import BATCH, EXAMPLES, IDS, LOGITS, ROW, SQUARE, Call, X, Y, call, names
from torch import Tensor

from engine.ops import DTYPE_NAMES, run_op
from polytrace.certificate import ValueShape
from polytrace.graph import Constant, DType, Node, NodeId, Op, Port, Read, Ref, Site
from polytrace.maps.rowwise import MixesPromptsError, prompt_dims
from polytrace.ops import OPS

PROMPTS = 3
WHERE = "user.py:1"
# Sizes are numbers of one prompt in the graph: in a batch the user writes how many prompts there are.
SIZED = {"view", "reshape", "expand", "broadcast_to", "new_zeros", "new_ones", "new_full", "new_empty"}

# Beside the examples of the table: calls in which prompts come near each other, or have a place of their own.
MORE: dict[str, list[Call]] = {
    "reshape": [call(X[:1], (1, 12)), call(X[:1], (3, 1, 4))],
    "ravel": [call(ROW)],
    "broadcast_to": [call(X[:1], (1, 3, 4)), call(ROW[:1], (5, 1))],
    "l1_loss": [call(X, Y, reduction="none"), call(X, ROW, reduction="none")],
    "kl_div": [call(X, Y.abs(), reduction="none")],
    "quantile": [call(X, torch.tensor([0.5]), 1), call(X, torch.tensor([0.5]), 1, True), call(X, torch.tensor(0.5), 0)],
    "cosine_similarity": [call(X, ROW, 2), call(X, Y[0], dim=1), call(X[0], Y, dim=0)],
    "einsum": [
        call("...d,de->...e", X, SQUARE),
        call("...d->d", X),
        call("bd,cd", LOGITS, LOGITS),
        call("ii->i", SQUARE),
    ],
    "matmul": [call(X, Y.mT), call(SQUARE, BATCH), call(ROW, BATCH), call(ROW, ROW)],
    "solve": [call(BATCH, BATCH[0]), call(BATCH[0], BATCH)],
    "diff": [call(X, 1, 1, Y[:, :1]), call(X, prepend=X[..., :1])],
    "cross_entropy": [call(BATCH, IDS % 2 + 1, reduction="none"), call(BATCH, BATCH.softmax(1), reduction="none")],
    "squeeze": [call(X[:, :1], 1), call(X[:, :1], 0)],
    "hstack": [call([ROW, ROW]), call([X, Y[:1]])],
    "pad": [call(X, (1, 1, 0, 0)), call(X, (0, 0, 0, 0, 1, 1))],
}

# Rows that count as mixing prompts wherever these are: of all elements, of pairs of rows, by values, or not known.
MIXING = names(
    "trace histc bincount unique unique_consecutive dist dot vdot multi_dot kron tensorinv tensorsolve vander renorm "
    "cov corrcoef pdist addr addbmm block_diag cartesian_prod meshgrid diag diagflat "
    "masked_select nonzero argwhere take put index_put masked_scatter "
    "diag_embed diagonal_scatter lu_solve householder_product "
    "cosine_embedding_loss margin_ranking_loss triplet_margin_loss"
)


@dataclass(frozen=True)
class Trial:
    """A call with a place for the prompts of each of its tensors, None where all prompts have the same."""

    name: str
    call: Call
    tensors: tuple[Tensor, ...]  # of one prompt
    dims: tuple[int | None, ...]

    def operands(self, make: Callable[[int], Any]) -> Call:
        """Arguments with `make(place)` for each tensor."""
        places = itertools.count()

        def put(part: Any) -> Any:
            if isinstance(part, Tensor):
                return make(next(places))
            return type(part)([put(one) for one in part]) if isinstance(part, (tuple, list)) else part

        return tuple([put(part) for part in self.call[0]]), {key: put(part) for key, part in self.call[1].items()}

    def prompt(self, number: int) -> list[Tensor]:
        """What a prompt gives."""
        return results(self.name, *self.operands(lambda place: self._of(place, number)))

    def batch(self, found: int | None) -> list[Tensor]:
        """What all prompts give together."""
        args, kwargs = self.operands(self._of_all)
        if self.name == "cond":  # by each prompt's own number
            chosen, others = args[0] != 0, args[1:]
            rank = others[0].ndim
            size = [1] * rank
            if self.dims[0] is not None:
                assert found is not None
                size[found] = PROMPTS
            return [torch.where(chosen.reshape(size), *others)]
        if self.name in SIZED and found is not None and not any(isinstance(part, torch.dtype) for part in args):
            (alone,) = self.prompt(0)
            size = list(alone.shape)
            size[found] = PROMPTS
            args = (args[0], tuple(size), *args[2:]) if "new" in self.name else (args[0], tuple(size))
            kwargs = {key: part for key, part in kwargs.items() if key not in ("size", "shape")}
        return results(self.name, args, kwargs)

    def said(self, alone: list[Tensor]) -> list[int | None] | None:
        """Where the tracker finds the prompts of each result; None where it says that they are mixed."""
        nodes: list[Node] = []
        shapes: list[ValueShape | None] = []

        def add(node: Node, shape: ValueShape | None) -> NodeId:
            nodes.append(node)
            shapes.append(shape)
            return NodeId(len(nodes) - 1)

        values = []
        for tensor, dim in zip(self.tensors, self.dims, strict=True):
            if dim is None:
                values.append(add(Constant(name="c", where=WHERE), shape_of(tensor)))
                continue
            site = Site(module="layers.0", port=Port.OUTPUT)
            read = add(Read(site=site, invoke=0, where=WHERE), shape_of(tensor.movedim(dim, 0)))
            values.append(
                add(Op(name="movedim", args=(Ref(read), 0, dim), where=WHERE), shape_of(tensor)) if dim else read
            )
        args, kwargs = self.operands(lambda place: Ref(values[place]))
        op = Op(name=self.name, args=plain(args), kwargs={k: plain(part) for k, part in kwargs.items()}, where=WHERE)
        is_several = isinstance(run(self.name, *self.operands(lambda place: self._of(place, 0))), (tuple, list))
        made = add(op, None if is_several else shape_of(alone[0]))
        if is_several:
            for place, one in enumerate(alone):
                add(Op(name="item", args=(Ref(made), place), where=WHERE), shape_of(one))
        try:
            found = prompt_dims(nodes, shapes)
        except MixesPromptsError:
            return None
        return found[made + 1 :] if is_several else [found[made]]

    def _of(self, place: int, number: int) -> Tensor:
        tensor = self.tensors[place]
        return tensor if self.dims[place] is None else varied(tensor, number)

    def _of_all(self, place: int) -> Tensor:
        dim = self.dims[place]
        if dim is None:
            return self.tensors[place]
        return torch.cat([self._of(place, number) for number in range(PROMPTS)], dim)


def shape_of(tensor: Tensor) -> ValueShape:
    return ValueShape(shape=tuple(tensor.shape), dtype=DTYPE_NAMES[tensor.dtype])


def plain(part: Any) -> Any:
    if isinstance(part, torch.dtype):
        return DType(DTYPE_NAMES[part])
    return type(part)([plain(one) for one in part]) if isinstance(part, (tuple, list)) else part


def varied(tensor: Tensor, number: int) -> Tensor:
    """Another prompt's: within the same range, symmetric and positive where it was."""
    if tensor.is_floating_point() or tensor.is_complex():
        return tensor * (1 - 0.2 * number)
    return tensor.flatten().roll(number).view(tensor.shape)


def run(name: str, args: Any, kwargs: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return run_op(name, args, kwargs, seed=(0, 0))


def results(name: str, args: Any, kwargs: Any) -> list[Tensor]:
    made = run(name, args, kwargs)
    return list(made) if isinstance(made, (tuple, list)) else [made]


def placed(tensor: Tensor) -> Iterator[tuple[Tensor, int | None]]:
    """A tensor as one that all prompts share, and with one prompt in the place of each dimension or in front."""
    yield tensor, None
    yield tensor[None], 0
    for dim in range(tensor.ndim):
        yield tensor.narrow(dim, 0, 1).contiguous(), dim


@cache
def kept_apart(name: str) -> list[tuple[Trial, list[list[Tensor]], list[int | None]]]:
    """Trials of an op in which prompts are said to be kept apart, what each prompt gives, and the places."""
    found = []
    for one in (*EXAMPLES[name], *MORE.get(name, [])):
        forms = [list(placed(tensor)) for tensor in op_examples.tensors([*one])]
        # of many tensors the later ones are like the first or shared
        for chosen in itertools.product(*forms[:2], *(form[:3] for form in forms[2:])):
            if all(dim is None for _, dim in chosen):
                continue
            trial = Trial(name, one, tuple(tensor for tensor, _ in chosen), tuple(dim for _, dim in chosen))
            try:
                alone = [trial.prompt(number) for number in range(PROMPTS)]
            except (RuntimeError, TypeError, ValueError, IndexError):
                continue
            if (said := trial.said(alone[0])) is not None:
                found.append((trial, alone, said))
    return found


@pytest.mark.parametrize("name", sorted(EXAMPLES))
def test_an_op_that_keeps_prompts_apart_gives_a_batch_what_it_gives_each_prompt(name: str) -> None:
    for trial, alone, said in kept_apart(name):
        told = f"{trial.call} with prompts in {trial.dims}"
        together = trial.batch(said[0])
        for place, (one, dim) in enumerate(zip(together, said, strict=True)):
            rows = [prompt[place] for prompt in alone]
            expected = rows[0] if dim is None else torch.cat(rows, dim)
            assert one.shape == expected.shape, told
            if not OPS[name].is_random:
                torch.testing.assert_close(one, expected, rtol=1e-5, atol=1e-6, equal_nan=True, msg=told)


def test_which_ops_count_as_mixing_prompts_wherever_these_are() -> None:
    assert {name for name in EXAMPLES if not OPS[name].is_made and not kept_apart(name)} == set(MIXING)
