"""Where operations leave the calls in a tensor: what is proven holds for other contents, what mixes is not proven."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from engine.call_axis import Along, Mixed, Place, Same, reshaped
from engine.call_proof import Alone, Together, UnprovenError

CALLS, ROWS = 3, 2
Function = Callable[..., Any]
Given = tuple[Tensor, ...]

torch.manual_seed(0)
WEIGHT, TABLE, IMAGES, FEW = torch.randn(6, 6), torch.randn(9, 5), torch.randn(4, 3, 2, 2), torch.tensor([3, 0, 1])
EACH = torch.randn(CALLS * ROWS, 1)  # as large as all calls are, so of one shape with none alone


def given(seed: int) -> Given:
    """Of one call: numbers, images, integers and a mask, each with two rows."""
    chance = torch.Generator().manual_seed(seed)
    return (
        torch.randn(ROWS, 4, 6, generator=chance),
        torch.randn(ROWS, 3, 4, 4, generator=chance),
        torch.randint(1, 4, (ROWS, 4), generator=chance),
        torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]]).roll(seed, 1),
    )


def proven(function: Function, calls: Sequence[Given]) -> tuple[Any, Place]:
    """What comes of several calls in one, and where these lie in it."""
    own, together = calls[0], tuple([torch.cat(parts) for parts in zip(*calls, strict=True)])
    alone = Alone(())
    with torch.no_grad(), alone.running(own):
        function(*own)
    several = Together(len(calls), alone.ran, ())
    with torch.no_grad(), several.running(together):
        made = function(*together)
    return made, several.place(made)


def parts_of(made: Tensor, place: Along) -> list[Tensor]:
    """What each call has."""
    sizes = (place.before, CALLS, place.inside)
    apart = made.unflatten(place.dim, sizes)
    return [apart.select(place.dim + 1, call).flatten(place.dim, place.dim + 1) for call in range(CALLS)]


def conv(x: Tensor, images: Tensor, *_: Tensor) -> Tensor:
    return F.group_norm(F.conv2d(images, IMAGES), 2).relu()


def heads(x: Tensor, *_: Tensor) -> Tensor:
    q, k, v = (x.unflatten(2, (2, 3)).transpose(1, 2) for _ in range(3))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def masked_heads(x: Tensor, _i: Tensor, _n: Tensor, mask: Tensor) -> Tensor:
    q = x.unflatten(2, (2, 3)).transpose(1, 2)
    return F.scaled_dot_product_attention(q, q, q, attn_mask=mask.bool()[:, None, None, :])


def by_hand(x: Tensor, *_: Tensor) -> Tensor:
    q = x.unflatten(2, (2, 3)).transpose(1, 2).flatten(0, 1)  # [calls x rows x heads, ...]
    scores = torch.baddbmm(torch.zeros(1, 4, 4), q, q.transpose(1, 2))
    return (scores.softmax(-1) @ q).unflatten(0, (-1, 2)).transpose(1, 2).flatten(2)


def own_rows(x: Tensor, _i: Tensor, numbers: Tensor, _m: Tensor) -> Tensor:
    return x[torch.arange(len(x)), numbers[:, 0]]


def written(x: Tensor, *_: Tensor) -> Tensor:
    made = torch.zeros(len(x), 4, 6)
    made[:, 1:3] = x[:, :2]
    made[:, 0] += 1
    return made.cumsum(1)


def all_ones(x: Tensor, _i: Tensor, _n: Tensor, mask: Tensor) -> Tensor:
    return x if mask.all() else x * mask[..., None]


def all_true(x: Tensor, _i: Tensor, _n: Tensor, mask: Tensor) -> Tensor:
    keep = mask.bool()
    return x if keep.sum() == keep.numel() else x + 1


def own_ones(x: Tensor, *_: Tensor) -> Tensor:
    keep = torch.ones(len(x), 4, dtype=torch.bool)
    return x if keep.all() and keep.sum() == keep.numel() else x - 1


def class_token(x: Tensor, *_: Tensor) -> Tensor:
    return torch.cat([WEIGHT[:1].expand(len(x), 1, -1), x], 1) + torch.arange(5)[:, None]


OWN: dict[str, Function] = {
    "linear": lambda x, *_: F.linear(x, WEIGHT, WEIGHT[0]),
    "product": lambda x, *_: x @ x.transpose(1, 2),
    "product from the left": lambda x, *_: WEIGHT[:4, :4] @ x,
    "outer": lambda x, *_: torch.einsum("btd,bsd->bts", x, x),
    "flattened rows": lambda x, *_: (x.flatten(0, 1) @ WEIGHT).unflatten(0, (-1, 4)),
    "flattened members": lambda x, *_: x.flatten(1).sum(1),
    "moved to the end": lambda x, *_: x.permute(2, 1, 0).softmax(0),
    "norms": lambda x, *_: F.rms_norm(F.layer_norm(x, (6,)), (6,)),
    "batch norm of before": lambda x, i, *_: F.batch_norm(i, torch.zeros(3), torch.ones(3)),
    "convolution": conv,
    "attention": heads,
    "attention with a mask": masked_heads,
    "attention by hand": by_hand,
    "embedding": lambda x, i, n, _: F.embedding(n, TABLE),
    "indexed table": lambda x, i, n, _: TABLE[n],
    "two indices": lambda x, i, n, _: TABLE[n, n],
    "own rows": own_rows,
    "gather": lambda x, i, n, _: x.gather(2, n[..., None]),
    "few columns": lambda x, *_: x[:, FEW],
    "few of the last": lambda x, *_: x[..., FEW].index_select(1, FEW),
    "slices": lambda x, *_: x[:, 1:3, ::2],
    "all of the rows": lambda x, *_: x[: len(x)] * 2,
    "a column": lambda x, *_: x[:, -1],
    "parts": lambda x, *_: torch.cat(x.chunk(2, 2), 1).unbind(1)[0],
    "stacked": lambda x, *_: torch.stack([x, 2 * x], 0).sum(0),
    "padded": lambda x, *_: F.pad(x, (1, 2, 0, 1)),
    "pooled": lambda x, i, *_: F.adaptive_avg_pool2d(F.max_pool2d(i, 2), 1),
    "larger": lambda x, i, *_: F.interpolate(i, scale_factor=2),
    "patches": lambda x, i, *_: F.unfold(i, 2),
    "statistics": lambda x, *_: (x - x.mean((1, 2), keepdim=True)) / x.std((1, 2), keepdim=True),
    "largest": lambda x, *_: x.max(1).values + x.argmax(1),
    "sorted": lambda x, *_: x.sort(1).values.flip(2).roll(1, 2),
    "frequencies": lambda x, *_: torch.fft.fft(x, dim=2).abs(),
    "made anew": written,
    "a token before": class_token,
    "a mask of ones or not": all_ones,
    "all true or not": all_true,
    "ones of its own": own_ones,
    "repeated": lambda x, *_: x.repeat(1, 2, 1) + torch.zeros(1, 8, 6).repeat(len(x), 1, 1),
    "repeated before": lambda x, *_: x.repeat(2, 1, 1),
    "a number where a mask says": lambda x, *_: (y := x.clone(), y.__setitem__(y > 0, 3.0), y)[-1],
    "a number at rows that a mask says": lambda x, i, n, m: (y := x.clone(), y.__setitem__(m == 0, 3.0), y)[-1],
    "constants": lambda x, *_: x[:, [2, 0]] * torch.tensor(2.0) + x.new_tensor([1.0]),
    "contiguous rows": lambda x, *_: x.transpose(1, 2).contiguous().transpose(1, 2).reshape(len(x), -1),
    "units": lambda x, i, *_: F.pixel_unshuffle(F.hardswish(i), 2),
    "where": lambda x, *_: torch.where(x > 0, x, x.new_zeros(len(x), 1, 6)),
    "triangle": lambda x, *_: x.tril() + torch.ones(4, 6).triu(),
    "in place": lambda x, *_: x.clone().add_(1).mul_(x).clamp_(min=0),
    "a view in place": lambda x, *_: (y := x.clone(), y[:, 0].copy_(x[:, 1]), y.exp())[-1],
}


@pytest.mark.parametrize("name", OWN)
def test_what_is_proven_is_what_each_call_has_alone_whatever_the_others_have(name: str) -> None:
    function = OWN[name]
    _, place = proven(function, [given(1)] * CALLS)
    assert isinstance(place, Along), place
    calls = [given(seed) for seed in range(CALLS)]
    calls[1] = tuple([1e4 * one if one.is_floating_point() else one for one in calls[1]])
    calls[2] = tuple([one * float("nan") if one.is_floating_point() else one for one in calls[2]])
    with torch.no_grad():
        made = function(*[torch.cat(parts) for parts in zip(*calls, strict=True)])
        for call, part in zip(calls, parts_of(made, place), strict=True):
            torch.testing.assert_close(part, function(*call), rtol=1e-5, atol=1e-5, equal_nan=True)


def test_the_same_for_all_is_told_from_what_is_a_calls() -> None:
    made, place = proven(lambda x, *_: TABLE.sum(1).softmax(0), [given(0)] * CALLS)
    assert isinstance(place, Same)
    assert made.shape == (9,)


def stashed(x: Tensor, *_: Tensor) -> Tensor:
    made = torch.zeros(3, 6)
    made[0] = x.sum((0, 1))
    return made


def overwritten(x: Tensor, *_: Tensor) -> Tensor:
    y = x.clone()
    y[:, 0] = x[:, 0].flip(0)  # another call's
    return y[:, 1:]


def mixed_through_a_view(x: Tensor, *_: Tensor) -> Tensor:
    y = x.clone()
    view = y[:, 0]
    y.sub_(x.mean(0))
    return view


def no_longer_ones(x: Tensor, *_: Tensor) -> Tensor:
    keep = torch.ones(len(x), 4)
    keep[:, 1] = x[:, 1, 0]
    return keep.amax()


def other_content(x: Tensor, *_: Tensor) -> Tensor:
    kept = torch.zeros(())
    kept.data = x.max()
    return x * kept


def caught(x: Tensor, *_: Tensor) -> Tensor:
    try:
        return -x if x.max() > 1e9 else x
    except Exception:  # noqa: BLE001  as models do
        return x


def counted(x: Tensor, _i: Tensor, numbers: Tensor, _m: Tensor) -> Tensor:
    return torch.arange(len(x))[:, None].expand(-1, 4).gather(1, numbers)


def where_largest(x: Tensor, *_: Tensor) -> Tensor:
    made = torch.zeros(len(x), 2)
    made[:, 1] = 1
    return x * made.t().reshape(-1).max(0).indices


MIXING: dict[str, Function] = {
    "counted and a product": lambda x, *_: torch.addmm(
        torch.arange(len(x), dtype=torch.float32)[:, None], x[:, 0], WEIGHT
    ),
    "mean of all": lambda x, *_: x - x.mean(0),
    "the largest of all": lambda x, *_: torch.where(x.max() > 1e9, 0, x),
    "the first": lambda x, *_: x - x[:1],
    "the last": lambda x, *_: x - x[-1],
    "turned": lambda x, *_: x.flip(0),
    "sorted": lambda x, *_: x.sort(0).values,
    "summed up": lambda x, *_: x.cumsum(0),
    "all with all": lambda x, *_: x.flatten(1) @ x.flatten(1).T,
    "in another order": lambda x, *_: x.transpose(0, 1).reshape(len(x), 4, 6),
    "batch norm": lambda x, i, *_: F.batch_norm(i, None, None, training=True),
    "softmax of all": lambda x, *_: x.softmax(0),
    "attention between calls": lambda x, *_: F.scaled_dot_product_attention(*[x.transpose(0, 1)[:, None]] * 3),
    "how many": lambda x, *_: x / len(x),
    "more than some": lambda x, *_: x.clamp(max=float(len(x))),
    "which it is": lambda x, *_: x + torch.arange(len(x))[:, None, None],
    "a row for each": lambda x, *_: x[:, 0] * EACH[: len(x)],
    "an integer of all": lambda x, i, n, _: F.embedding(n.max(), TABLE) + x[..., :5],
    "the first integer": lambda x, i, n, _: x * n[0, 0],
    "a token anywhere": lambda x, i, n, _: torch.where((n == 2).any(), x, 2 * x),
    "stashed": stashed,
    "overwritten": overwritten,
    "a view": mixed_through_a_view,
    "no longer ones": no_longer_ones,
    "half a mask": lambda x, i, n, mask: x * mask[:, :2].all(),
    "a number of theirs": lambda x, *_: torch.full((4, 6), float(len(x))) + x,
    "made elsewhere": lambda x, *_: x + torch.tensor([float(len(x))]),
    "made of a tensor": lambda x, *_: x * torch.tensor([x.max(), x.min()])[0],
    "made of a tensor by another": lambda x, *_: x * x.new_tensor([x.max()]),
    "a parameter": lambda x, *_: x * nn.Parameter(x.max(), requires_grad=False),
    "an index in a list": lambda x, i, n, _: x[:, [n.max()]],
    "which of all": counted,
    "where it is largest": where_largest,
    "another dtype's bits": lambda x, i, n, _: x * n.int().view(torch.float32).all(),
}
LOOKING: dict[str, Function] = {
    "other content": other_content,
    "caught": caught,
    "integers": lambda x, i, n, _: x.index_select(1, torch.LongTensor([n.max()])),
    "text": lambda x, *_: x if "e+10" in repr(x.max()) else -x,
    "split at": lambda x, i, n, _: x.tensor_split(n[0, :1], 1)[0],
    "branch": lambda x, *_: x if x.max() > 1e9 else 2 * x,
    "item": lambda x, *_: x * x[0, 0, 0].item(),
    "index": lambda x, i, n, _: TABLE[n.max()] + x[..., :5],
    "list": lambda x, *_: x * x.tolist()[0][0][0],
    "array": lambda x, *_: x * float(x.numpy()[0, 0, 0]),
    "mask": lambda x, *_: x[x > 0],
    "nonzero": lambda x, *_: x.nonzero(),
    "unique": lambda x, i, n, _: n.unique(),
    "equal": lambda x, *_: x if torch.equal(x, x + 1) else -x,
    "token": lambda x, i, n, _: x if (n == 2).any() else -x,
    "half a mask": lambda x, i, n, mask: x if mask[:, :2].all() else -x,
    "ones that are none": lambda x, i, n, mask: x if mask.cumsum(0).all() else -x,
    "more operations": lambda x, *_: x + 1 if len(x) > 4 else x,
    "fewer operations": lambda x, *_: x if len(x) > 4 else x + 1,
    "row by row": lambda x, *_: torch.stack([row.sum() for row in x]),
}


@pytest.mark.parametrize("name", MIXING)
def test_what_goes_across_calls_is_not_proven(name: str) -> None:
    function = MIXING[name]
    _, place = proven(function, [given(1)] * CALLS)
    assert isinstance(place, Mixed), place


@pytest.mark.parametrize("name", LOOKING)
def test_code_that_looks_at_what_calls_have_proves_nothing(name: str) -> None:
    with pytest.raises(UnprovenError):
        proven(LOOKING[name], [given(1)] * CALLS)


def test_elements_in_their_order_keep_calls_together_or_not() -> None:
    calls = 3
    along = Along(1, 2, 5)
    assert reshaped(along, (4, 30, 7), (8, 15, 7), calls) == Along(1, 1, 5)
    assert reshaped(along, (4, 30, 7), (4, 2, 3, 35), calls) == Along(2, 1, 1)
    assert reshaped(along, (4, 30, 7), (120, 7), calls) == Along(0, 8, 5)
    assert isinstance(reshaped(along, (4, 30, 7), (8, 3, 7, 5), calls), Along)
    assert isinstance(reshaped(along, (4, 30, 7), (10, 12, 7), calls), Mixed)
    assert isinstance(reshaped(Along(0, 1, 1), (4,), (2, 2), 4), Mixed)


@pytest.mark.parametrize("rows", [1, 2])
def test_copies_that_only_several_calls_need_are_none(rows: int) -> None:
    def turned(x: Tensor, *_: Tensor) -> Tensor:
        odd = x.transpose(0, 1).contiguous().transpose(0, 1)
        return F.linear(odd, WEIGHT).reshape(len(x), -1) + odd.contiguous().flatten(1)

    calls = [tuple([part[:rows] for part in given(seed)]) for seed in range(CALLS)]
    made, place = proven(turned, [calls[0]] * CALLS)
    assert place == Along(0, 1, rows)
    with torch.no_grad():
        torch.testing.assert_close(made[:rows], turned(*calls[0]), rtol=1e-5, atol=1e-5)


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(6, 2, 12, batch_first=True)
        self.inner = nn.TransformerEncoder(layer, 1, enable_nested_tensor=True)

    def forward(self, x: Tensor, *_: Tensor) -> Tensor:
        made: Tensor = self.inner(x)
        return made


def test_torchs_own_encoder_is_proven() -> None:
    model = Encoder().eval()
    _, place = proven(model, [given(1)] * CALLS)
    assert place == Along(0, 1, ROWS)
