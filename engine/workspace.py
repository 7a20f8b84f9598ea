"""Memory that an op takes while it runs, beyond its operands and results, where that may be far more.

One place for it: everything else that is refused for its size is refused for the size of a value (`engine.shapes`). A
decomposition, a sort or a pooling works on a few copies of its operands, and is not looked at here.
"""

from __future__ import annotations

import math

from polytrace.ops import OPS, Reach

Shape = tuple[int, ...]

_DISTANCES = frozenset(
    {
        *("cosine_similarity", "pairwise_distance", "vecdot", "dist", "trapezoid", "cumulative_trapezoid"),
        *("cosine_embedding_loss", "margin_ranking_loss", "triplet_margin_loss"),
    }
)


def work_elements(name: str, shapes: list[Shape], equation: object = None) -> int:
    """Elements of the largest tensor that an op makes on its way to its result, 0 where the result says it all.

    `shapes` are those of its operands, which fit, in the order they stand; `equation` is its first argument.
    """
    if name in _DISTANCES or OPS[name].reach is Reach.LOSS:
        return _broadcast(shapes)
    if name == "einsum" and len(shapes) > 2:
        return _einsum(str(equation), shapes)
    if name == "scaled_dot_product_attention" and len(shapes) > 1:
        query, key = shapes[:2]
        return math.prod(query[:-1]) * key[-2]
    if name == "bilinear":
        return math.prod(shapes[0]) * shapes[2][0]
    if name.startswith("conv"):
        return math.prod(shapes[0]) * math.prod(shapes[1][2:])  # windows side by side
    return 0


def _broadcast(shapes: list[Shape]) -> int:
    """Elements of what operands of equal rights make together."""
    rank = max((len(shape) for shape in shapes), default=0)
    padded = [(1,) * (rank - len(shape)) + shape for shape in shapes]
    return math.prod([max(sizes) for sizes in zip(*padded, strict=True)])


def _einsum(equation: str, shapes: list[Shape]) -> int:
    """torch joins the operands from left to right and sums a letter away once no later operand has it."""
    left, arrow, right = equation.replace(" ", "").partition("->")
    terms = left.split(",")
    if "." in left or list(map(len, terms)) != list(map(len, shapes)):
        return math.prod([math.prod(shape) for shape in shapes])  # a bound
    pairs = [pair for term, shape in zip(terms, shapes, strict=True) for pair in zip(term, shape, strict=True)]
    sizes = {letter: max(size for own, size in pairs if own == letter) for letter, _ in pairs}
    kept = right if arrow else "".join(letter for letter in sizes if left.count(letter) == 1)
    largest, joined = 0, set(terms[0])
    for place, term in enumerate(terms[1:], 1):
        joined = (joined | set(term)) & (set("".join(terms[place + 1 :])) | set(kept))
        largest = max(largest, math.prod([sizes[letter] for letter in joined]))
    return largest
