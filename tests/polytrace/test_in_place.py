"""In-place code means what it means in torch: one function runs on a tensor and, recorded, through the op table."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from engine.ops import TORCH_DTYPES, resolve, run_op
from polytrace.errors import GraphError
from polytrace.graph import Constant, Mask, Op, Read, Request, Save, Write
from polytrace.model import Model

V = torch.arange(8.0) / 8
IDS = torch.tensor([2, 0])
BITS = torch.tensor([[True, False, True]])

Program = Callable[[Any], Any]


def run(request: Request, sites: dict[str, Tensor]) -> tuple[list[Tensor], dict[str, Tensor]]:
    """The saved values of a graph and the sites' values after it, by the rules of the graph alone."""
    sites = {name: value.clone() for name, value in sites.items()}
    values: dict[int, Any] = {}
    saved = []
    for position, node in enumerate(request.graph.nodes):
        match node:
            case Read():
                values[position] = sites[str(node.site)].clone()
            case Write():
                assert values[node.value.node].shape == sites[str(node.site)].shape
                sites[str(node.site)] = values[node.value.node].to(sites[str(node.site)].dtype)
            case Constant():
                raw = request.constants[node.name]
                data = torch.frombuffer(bytearray(raw.data), dtype=TORCH_DTYPES[raw.dtype])
                values[position] = data.reshape(raw.shape)
            case Op():
                args = tuple(resolve(arg, values) for arg in node.args)
                kwargs = {key: resolve(value, values) for key, value in node.kwargs.items()}
                values[position] = run_op(node.name, args, kwargs, seed=(0, position))
            case Mask():
                values[position] = torch.ones(1, 3, dtype=torch.bool)
            case Save():
                saved.append(values[node.value.node])
    return saved, sites


def check(model: Model, program: Program) -> Request:
    """The program gives on a site's value what it gives on a tensor, and leaves the same in the site."""
    start = torch.randn(1, 3, 8, generator=torch.Generator().manual_seed(0))
    with model.trace([1, 2, 3], run=False) as tracer:
        value = model.model.layers[1].mlp.output
        program(value).save()
        value.save()
    request = tracer.request
    assert request is not None
    saved, sites = run(request, {"model.layers.1.mlp.output": start})
    tensor = start.clone()
    expected = program(tensor)
    torch.testing.assert_close(saved[0], expected, rtol=0, atol=0)
    torch.testing.assert_close(saved[-1], tensor, rtol=0, atol=0)
    torch.testing.assert_close(sites["model.layers.1.mlp.output"], tensor, rtol=0, atol=0)
    return request


def add_to_last_token(h: Any) -> Any:
    h[:, -1] += V
    return h


def add_through_a_view(h: Any) -> Any:
    last = h[:, -1]
    last += V
    last *= 2
    return h


def change_a_base_behind_its_view(h: Any) -> Any:
    last = h[:, -1]
    h[:, 1:] = 0
    return last + 1


def change_one_view_behind_another(h: Any) -> Any:
    first, rest = h[:, 0], h[:, :2]
    rest.mul_(3)
    return first


def change_a_copy(h: Any) -> Any:
    copy = h.clone()
    copy += 1
    copy[:, 0] = 0
    return copy


def change_a_transposed_part(h: Any) -> Any:
    h.transpose(1, 2)[:, 2:5][:, 0] -= 1
    return h


def change_heads(h: Any) -> Any:
    h.view(1, 3, 2, 4)[:, :, 1] = 0
    return h


def change_a_split(h: Any) -> Any:
    left, right = h.split(4, dim=-1)
    right[...] = left * 2
    left.zero_()
    return right


def change_an_unbound_token(h: Any) -> Any:
    tokens = h.unbind(1)
    tokens[1].fill_(7)
    return tokens[0] + tokens[1]


def change_by_list(h: Any) -> Any:
    h[:, [0, 2]] += V
    return h


def change_by_tensor(h: Any) -> Any:
    h[:, IDS] *= 2
    return h


def change_by_mask(h: Any) -> Any:
    h[BITS] = 0
    return h


def change_by_own_mask(h: Any) -> Any:
    h[h > 0] = -1
    return h


def change_a_list_behind_a_view(h: Any) -> Any:
    h[0][[0, 2]] = 5
    h[:, :2][:, [1]] += V
    return h


def change_all_at_once(h: Any) -> Any:
    h += V
    h.mul_(0.5)
    h -= h.mean(-1, keepdim=True)
    h[...] = h.clamp_(-1, 1) / 2
    return h


def change_by_doubles(h: Any) -> Any:
    h += V.double()  # the value's own dtype stays
    return h * 1


def swap(h: Any) -> Any:
    first = h[:, 0].clone()
    h[:, 0] = h[:, 1]
    h[:, 1] = first
    return h


def assign_to_itself(h: Any) -> Any:
    h[:, 0] = h[:, 0]
    h[:, 0] += 1
    return h


def copy_from(h: Any) -> Any:
    h[:, 0].copy_(h[:, 2])
    return h


def masked_fill(h: Any) -> Any:
    h.masked_fill_(BITS[..., None], 0.5)
    return h


def change_a_copy_of_part(h: Any) -> Any:
    part = h[:, [0, 1]]
    part += 1
    return part


PROGRAMS = [value for value in list(globals().values()) if "h" in getattr(value, "__annotations__", {})]


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.__name__)
def test_in_place_code_is_torch_s(model: Model, program: Program) -> None:
    check(model, program)


STEPS: list[Program] = [
    lambda h: h[..., -1:],
    lambda h: h[1:],
    lambda h: h[-1],
    lambda h: h[..., :2],
    lambda h: h.transpose(0, -1),
    lambda h: h.unsqueeze(0),
    lambda h: h[None],
    lambda h: h.clone(),
    lambda h: h[[0]],
    lambda h: h.unbind(0)[0],
    lambda h: h.chunk(2, -1)[0],
    lambda h: h * 2,
    lambda h: h,
]


def _add(h: Any) -> None:
    h += 1


def _scale_first(h: Any) -> None:
    h[0] *= 2


EDITS: list[Callable[[Any], Any]] = [
    _add,
    _scale_first,
    lambda h: h.zero_(),
    lambda h: h.mul_(3),
    lambda h: h.__setitem__(Ellipsis, -1.0),
    lambda h: h.__setitem__([0], 4.0),
    lambda h: h.sub_(h.mean()),
    lambda h: h.relu_(),
]


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(st.data())
def test_any_mix_of_views_and_edits_is_torch_s(model: Model, data: st.DataObject) -> None:
    plan = data.draw(
        st.lists(
            st.tuples(st.sampled_from(["view", "edit"]), st.integers(0, 30), st.integers(0, 30)), min_size=1, max_size=7
        )
    )

    def program(h: Any) -> Any:
        values = [h]
        for kind, which, source in plan:
            value = values[source % len(values)]
            if value.ndim == 0 or 0 in value.shape:
                continue
            if kind == "view":
                made = STEPS[which % len(STEPS)](value)
                if made.ndim and 0 not in made.shape:
                    values.append(made)
            else:
                EDITS[which % len(EDITS)](value)
        return torch.stack([value.sum() for value in values])

    check(model, program)


def writes(request: Request) -> list[Write]:
    return [node for node in request.graph.nodes if isinstance(node, Write)]


@pytest.mark.parametrize("program", [add_to_last_token, change_by_list, change_by_mask, change_heads, masked_fill])
def test_one_statement_is_one_write(model: Model, program: Program) -> None:
    (write,) = writes(check(model, program))
    assert write.in_place


def test_a_site_takes_part_in_python_s_own_assignments(model: Model) -> None:
    layer = model.model.layers[1]
    with model.trace([1, 2, 3], run=False) as tracer:
        layer.output += 1
        layer.output[0] *= 2
        layer.output[0][:, -1] -= 3
        layer.self_attn.output[0] += 1
        model.output.logits[:, -1] += 1
        layer.output.save()
    assert tracer.request is not None
    start = torch.ones(1, 3, 8)
    names = ["model.layers.1.output", "model.layers.1.self_attn.output[0]", "output.logits"]
    (saved,), sites = run(tracer.request, {names[0]: start, names[1]: start, names[2]: torch.zeros(1, 3, 32)})
    expected = (start + 1) * 2
    expected[:, -1] -= 3
    assert torch.equal(saved, expected)
    assert torch.equal(sites[names[0]], expected)
    assert torch.equal(sites[names[1]], start + 1)
    assert sites[names[2]].sum() == 32
    assert [write.in_place for write in writes(tracer.request)] == [True] * 5


def test_assigning_a_site_is_an_edge(model: Model) -> None:
    layer = model.model.layers[1]
    with model.trace([1, 2, 3], run=False) as tracer:
        layer.output = layer.output * 2
        layer.output[0] = layer.output[0] + 1
        layer.self_attn.output = (layer.self_attn.output[0] * 2, None)
        model.output.logits = model.output.logits + 1
        model.output.logits.save()
    assert tracer.request is not None
    assert [(str(write.site), write.in_place) for write in writes(tracer.request)] == [
        ("model.layers.1.output", False),
        ("model.layers.1.output", False),
        ("model.layers.1.self_attn.output[0]", False),
        ("output.logits", False),
    ]


def test_handing_a_tuple_back_with_one_member_changed_writes_that_member(model: Model) -> None:
    attention = model.model.layers[1].self_attn
    with model.trace([1, 2, 3], run=False) as tracer:
        attention.output = (attention.output[0] + 1, *attention.output[1:])
        attention.output = (attention.output[0], None)
        attention.output[0].save()
    assert tracer.request is not None
    assert len(writes(tracer.request)) == 1


def test_a_snapshot_keeps_what_it_was(model: Model) -> None:
    site = model.model.layers[1].mlp
    with model.trace([1, 2, 3], run=False) as tracer:
        before = site.output.save()
        site.output[...] = 0
        after = site.output.save()
        assert before is not after
    assert tracer.request is not None
    saved, _ = run(tracer.request, {"model.layers.1.mlp.output": torch.ones(1, 3, 8)})
    assert saved[0].sum() == 24 and saved[1].sum() == 0


def test_changing_a_stale_snapshot_would_undo_a_write_and_is_refused(model: Model) -> None:
    def program(h: Any) -> None:
        model.model.layers[1].mlp.output[:, 0] += 1
        h[:, 1] += 1

    with pytest.raises(GraphError, match=r"read before test_in_place.py:\d+ changed model.layers.1.mlp.output"):
        check(model, program)


def test_an_edit_that_reaches_nothing_names_its_line(model: Model) -> None:
    def program(h: Any) -> Any:
        copy = h * 2
        copy[:, -1] = 0
        return h

    with pytest.raises(GraphError, match="reaches nothing") as caught:
        check(model, program)
    assert caught.value.where == f"test_in_place.py:{program.__code__.co_firstlineno + 2}"


def test_an_edit_overwritten_by_another_is_no_error(model: Model) -> None:
    with model.trace([1, 2, 3]):
        copy = model.model.layers[1].output[0] * 2
        copy += 1
        copy[...] = 0
        copy.save()


def test_positions_are_views(model: Model) -> None:
    with model.trace([[1, 2, 3], [4]], run=False) as tracer:
        h = model.model.layers[1].mlp.output
        h.at(0)[...] = 1
        h.at([-1, 0])[..., :4] += 2
        h.save()
    assert tracer.request is not None
    (saved,), _ = run(tracer.request, {"model.layers.1.mlp.output": torch.zeros(2, 3, 8)})
    expected = torch.zeros(2, 3, 8)
    expected[0, 0] = expected[1, 2] = 1
    # the second prompt has one token, which is both its first and its last: the later of the two writes stays
    expected[0, 0, :4] += 2
    expected[0, 2, :4] += 2
    expected[1, 2, :4] += 2
    assert torch.equal(saved, expected)
