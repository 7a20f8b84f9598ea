"""Gradients inside of attention, at views, at edges and through calls, against plain autograd; merged and alone."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gradient_programs
import padded_families
import pytest
import torch
from families import FAMILIES, model_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from points import POINTS, attending
from programs import difference, find, values_in_order
from torch import Tensor
from width import examples, wide

from engine.local import LocalBackend
from polytrace.model import Model
from scheduling.policy import PassPolicy

TOLERANCE = 1e-5  # of max(1, max|plain|), float32
PROMPTS = ((5, 6, 7, 8, 9, 11, 12, 40, 3, 4, 22, 50), (3, 4, 9, 17, 8))
WEIGHTS = torch.randn(96, generator=torch.Generator().manual_seed(3)) * 0.2
EVERYONE = PassPolicy(budget_tokens=1 << 16, max_members=1000)


@pytest.fixture(scope="module", params=["llama", "gpt2", "gemma2", "gpt_oss"])
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return _served(request.param, tmp_path_factory)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return _served("llama", tmp_path_factory)


def _served(family: str, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("model")
    plain = model_of(family)
    plain.save_pretrained(folder)
    backend = LocalBackend(str(folder), threads=1, policy=EVERYONE)
    return FAMILIES[family], plain, Model(backend), backend


def _merged(backend: LocalBackend, tracers: list[Any]) -> list[list[Tensor]]:
    """What each saves, in order."""
    outcomes = backend.run_together([backend.work_out(tracer.built_request()) for tracer in tracers])
    for outcome in outcomes:
        assert outcome.error is None, outcome.error
    assert backend.shard._tapes.is_empty  # nothing is kept of requests that have ended
    return [values_in_order(tracer, outcome.values) for tracer, outcome in zip(tracers, outcomes, strict=True)]


# --- points inside of attention


def _change(point: str, value: Any) -> None:
    """In place, behind what was read."""
    if point in ("scores", "pattern"):
        value[:, 1, -2, -4:] *= 0.5
    else:
        value[:, -2, 1] *= -2.0


def _own_part(point: str, value: Any) -> Any:
    """What a point itself gives to the loss."""
    last = value[:, :, -1, -3:] if point in ("scores", "pattern") else value[:, -1]
    return 0.1 * (last.exp() if point == "scores" else last.tanh()).sum()


def _record_point(model: Any, family: Any, point: str, edit: str) -> Any:
    first, later = (find(model, f"{family.layers}.{layer}.{family.attention}") for layer in (1, 2))
    with model.trace([list(prompt) for prompt in PROMPTS], run=False) as tracer:
        seen = getattr(first, point)
        if edit == "scaled":
            _change(point, getattr(first, point))
        elif edit == "frozen":
            setattr(first, point, getattr(first, point).detach())
        behind = getattr(later, point)
        with ((model.lm_head.output[:, -1] @ WEIGHTS).tanh().sum() + _own_part(point, seen)).backward():
            seen.grad.save()
            behind.grad.save()
    return tracer


def _point_by_hand(plain: Any, family: Any, point: str, edit: str, prompt: tuple[int, ...]) -> list[Tensor]:
    layers = {id(plain.get_submodule(f"{family.layers}.{layer}.{family.attention}")): layer for layer in (1, 2)}
    seen: dict[int, Tensor] = {}

    def at(module: Any, own: str, value: Tensor) -> Tensor:
        layer = layers.get(id(module))
        if layer is None or own != point:
            return value
        seen[layer] = value
        if layer == 1 and edit == "scaled":
            value = value.clone()
            _change(point, value)
        return value.detach() if layer == 1 and edit == "frozen" else value

    logits: list[Tensor] = []
    handle = plain.lm_head.register_forward_hook(lambda module, args, out: logits.append(out))
    with attending(plain, at):
        plain(input_ids=torch.tensor([prompt]), use_cache=False)
    handle.remove()
    loss = (logits[0][:, -1] @ WEIGHTS).tanh().sum() + _own_part(point, seen[1])
    return [grad[0] for grad in torch.autograd.grad(loss, [seen[1], seen[2]])]


@pytest.mark.parametrize("point", POINTS)
def test_gradients_at_points_of_attention_are_those_of_the_formula(served: Any, point: str) -> None:
    family, plain, model, backend = served
    edits = ["none", "scaled", "frozen"]
    tracers = [_record_point(model, family, point, edit) for edit in edits]
    values = {}
    for edit, tracer in zip(edits, tracers, strict=True):
        merged = _merged(backend, [tracer, _record_point(model, family, point, edit), tracers[0]])
        (alone,) = _merged(backend, [_record_point(model, family, point, edit)])
        values[edit] = alone
        for own in merged[:2]:
            assert all(map(torch.equal, own, alone)), edit
        for number, prompt in enumerate(PROMPTS):
            length = len(prompt)
            pair = point in ("scores", "pattern")
            ours = [v[number, :, -length:, -length:] if pair else v[number, -length:] for v in values[edit]]
            assert difference(ours, _point_by_hand(plain, family, point, edit, prompt)) <= TOLERANCE, edit
    for edit in edits[1:]:
        assert difference(values[edit], values["none"]) > 2 * TOLERANCE, edit


# --- what modules' values are seen as


def test_gradients_of_heads_are_those_of_the_projections(llama: Any) -> None:
    _, plain, model, backend = llama
    with model.trace([list(PROMPTS[0])], run=False) as tracer:
        attention = model.model.layers[1].self_attn
        seen = [getattr(attention, name) for name in ("q", "k", "head_out")]
        attention.head_out[:, -1, 2] *= 0.0
        with (model.lm_head.output[:, -1] @ WEIGHTS).tanh().sum().backward():
            for value in seen:
                value.grad.save()
    (ours,) = _merged(backend, [tracer])

    own: dict[str, Tensor] = {}
    attention = plain.model.layers[1].self_attn

    def without_head(module: Any, args: tuple[Tensor]) -> tuple[Tensor]:
        own["z"] = args[0]
        changed = args[0].clone()
        changed[:, -1, 16:24] = 0.0
        return (changed,)

    handles = [
        attention.q_proj.register_forward_hook(lambda m, a, out: own.__setitem__("q", out)),
        attention.k_proj.register_forward_hook(lambda m, a, out: own.__setitem__("k", out)),
        attention.o_proj.register_forward_pre_hook(without_head),
        attention.o_proj.register_forward_hook(lambda m, a, out: own.__setitem__("out", out)),
    ]
    loss = (plain(torch.tensor([PROMPTS[0]]), use_cache=False).logits[:, -1] @ WEIGHTS).tanh().sum()
    for handle in handles:
        handle.remove()
    q, k, out = torch.autograd.grad(loss, [own["q"], own["k"], own["out"]])
    heads = out[:, :, None].expand(-1, -1, 4, -1).clone()
    heads[:, -1, 2] = 0.0  # what is multiplied with zero gives nothing
    expected = [q.unflatten(-1, (4, 8)), k.unflatten(-1, (4, 8)), heads]
    assert difference(ours, expected) <= TOLERANCE
    assert float(heads[:, -1].abs().max()) > 100 * TOLERANCE


# --- edges, and those who hold a tensor


def _at_norm(plain: Any, change: Callable[[Tensor], Tensor], *, is_held: bool) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss where a layer's first norm gets something else; with `is_held` the residual does as well."""
    own: dict[str, Tensor] = {}
    layer = plain.model.layers[1]

    def hook(_module: Any, args: tuple[Tensor]) -> tuple[Tensor]:
        own["before"] = args[0]
        own["behind"] = change(args[0])
        return (own["behind"],)

    handle = (layer if is_held else layer.input_layernorm).register_forward_pre_hook(hook)
    logits = plain(torch.tensor([PROMPTS[0]]), use_cache=False).logits
    handle.remove()
    return (logits[:, -1] @ WEIGHTS).tanh().sum(), own


@pytest.mark.parametrize("is_held", [True, False], ids=["in place", "assigned"])
def test_the_residual_has_what_is_written_in_place_and_not_what_is_assigned(llama: Any, is_held: bool) -> None:
    _, plain, model, backend = llama
    added = torch.randn(32, generator=torch.Generator().manual_seed(1)) * 0.3
    norm = model.model.layers[1].input_layernorm
    with model.trace([list(PROMPTS[0])], run=False) as tracer:
        vector = tracer.value(added)
        before = norm.input
        if is_held:
            norm.input[:] = norm.input * 0.5 + vector
        else:
            norm.input = norm.input * 0.5 + vector
        behind = norm.input
        with (model.lm_head.output[:, -1] @ WEIGHTS).tanh().sum().backward():
            for value in (before, behind, vector):
                value.grad.save()
    (ours,) = _merged(backend, [tracer])
    plain_vector = added.clone().requires_grad_()
    loss, own = _at_norm(plain, lambda value: value * 0.5 + plain_vector, is_held=is_held)
    expected = torch.autograd.grad(loss, [own["before"], own["behind"], plain_vector])
    assert difference(ours, list(expected)) <= TOLERANCE
    assert difference(ours[:1], [expected[1]]) > TOLERANCE  # before and behind differ


def test_calls_of_modules_have_gradients(llama: Any) -> None:
    _, plain, model, backend = llama
    with model.trace([list(PROMPTS[0])], run=False) as tracer:
        hidden = model.model.layers[1].output
        early = model.lm_head(model.model.norm(hidden))
        with (early[:, -1] @ WEIGHTS).tanh().sum().backward():
            hidden.grad.save()
    (ours,) = _merged(backend, [tracer])
    own: list[Tensor] = []
    handle = plain.model.layers[1].register_forward_hook(lambda m, a, out: own.append(out))
    plain(torch.tensor([PROMPTS[0]]), use_cache=False)
    handle.remove()
    loss = (plain.lm_head(plain.model.norm(own[0]))[:, -1] @ WEIGHTS).tanh().sum()
    assert difference(ours, list(torch.autograd.grad(loss, own))) <= TOLERANCE


# --- neighbours and memory


def _of_layer(model: Any, prompt: tuple[int, ...], trouble: str = "") -> Any:
    with model.trace([list(prompt)], run=False) as tracer:
        hidden = model.model.layers[0].output
        model.model.layers[1].input[:, 2] *= float("nan") if trouble == "nan inside" else 1.0
        loss = (model.lm_head.output[:, -1] @ WEIGHTS).tanh().sum()
        with (loss * float("inf") if trouble == "infinite loss" else loss).backward():
            grad = hidden.grad
            if trouble == "fails":
                grad = grad.flatten()[(grad.abs().argmax() + 1_000_000).reshape(1)]
            grad.save()
    return tracer


@pytest.mark.parametrize("trouble", ["nan inside", "infinite loss", "fails"])
def test_a_neighbours_trouble_changes_no_bit_of_my_gradient(llama: Any, trouble: str) -> None:
    _, _, model, backend = llama
    (alone,) = _merged(backend, [_of_layer(model, PROMPTS[1])])
    users = [_of_layer(model, (3, 4, 5), trouble), _of_layer(model, PROMPTS[1]), _of_layer(model, (7, 7, 7), trouble)]
    first, mine, _ = backend.run_together([backend.work_out(tracer.built_request()) for tracer in users])
    assert mine.error is None
    assert all(map(torch.equal, values_in_order(users[1], mine.values), alone))
    if trouble == "fails":
        assert first.error is not None and "out of bounds" in str(first.error)
    else:
        assert not all(bool(torch.isfinite(value).all()) for value in first.values.values())
    assert backend.shard._tapes.is_empty


def test_layers_that_run_again_keep_less_and_give_the_same_bits(served: Any) -> None:
    family, _, model, backend = served
    found, kept = [], []
    for reruns in (False, True):
        with model.trace([list(prompt) for prompt in PROMPTS], run=False) as tracer:
            hidden = find(model, f"{family.layers}.0").input
            middle = find(model, f"{family.layers}.2.{family.attention}").z
            loss = (model.lm_head.output[:, -1] @ WEIGHTS).tanh().sum()
            for _ in range(2):  # and so are the gradients of a second loss
                loss.backward()
                hidden.grad.save()
                middle.grad.save()
        program = backend.work_out(tracer.built_request())
        waves = tuple(replace(wave, reruns=reruns and bool(wave.cuts)) for wave in program.waves)
        with _counting(backend) as counted:
            (outcome,) = backend.run_together([replace(program, waves=waves)])
        assert outcome.error is None
        found.append(values_in_order(tracer, outcome.values))
        kept.append(max(counted))
    assert all(map(torch.equal, *found))
    assert kept[1] < kept[0] / 2
    rows = sum(map(len, PROMPTS))
    whole = rows * family.num_layers * backend.description.tape_bytes
    assert whole / 2 < kept[0] < 3 * whole  # of few rows: with padding, and what is kept beside the layers


class _counting:
    """Bytes that tapes have, behind every pass."""

    def __init__(self, backend: LocalBackend) -> None:
        self._tapes = backend.shard._tapes

    def __enter__(self) -> list[int]:
        found: list[int] = []
        free = self._tapes.free

        def counted(plan: Any) -> None:
            found.append(self._tapes.num_bytes)
            free(plan)

        self._tapes.free = counted  # type: ignore[method-assign]
        return found

    def __exit__(self, *_: object) -> None:
        del self._tapes.free  # type: ignore[attr-defined]


# --- prompts that run alone, side by side


@pytest.fixture(scope="module", params=["jamba", wide("mamba2"), wide("falcon_alibi")])
def alone(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("model")
    plain = padded_families.model_of(request.param)
    plain.save_pretrained(folder)
    return padded_families.FAMILIES[request.param], plain, LocalBackend(str(folder), threads=1, policy=EVERYONE)


@settings(
    max_examples=examples(2, 4),
    deadline=None,
    database=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)
@given(data=st.data())
def test_prompts_that_run_alone_have_gradients(alone: Any, data: st.DataObject) -> None:
    family, plain, backend = alone
    program = data.draw(gradient_programs.programs(family))
    tracers = [gradient_programs.record(Model(backend), program, run=False) for _ in range(2)]
    first, second = _merged(backend, tracers)
    (by_itself,) = _merged(backend, [gradient_programs.record(Model(backend), program, run=False)])
    assert all(map(torch.equal, first, by_itself)) and all(map(torch.equal, second, by_itself)), program
    assert difference(first, gradient_programs.run_by_hand(plain, program)) <= TOLERANCE, program


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_bfloat16_gradients_are_as_near_to_float32_as_plain_ones(family: str, tmp_path: Path) -> None:
    """Of ten prompts together our error is at most 1.1 times that of the plain model in bfloat16."""
    plain, places = model_of(family).to(torch.bfloat16), FAMILIES[family]
    plain.save_pretrained(tmp_path)
    backend = LocalBackend(str(tmp_path), dtype="bfloat16", threads=1, policy=EVERYONE)
    model = Model(backend)
    reference = copy.deepcopy(plain).float()
    draw = torch.Generator().manual_seed(0)
    prompts = torch.randint(3, 96, (10, 30), generator=draw).tolist()
    tracers = []
    for prompt in prompts:
        with model.trace([prompt], run=False) as tracer:
            hidden = find(model, f"{places.layers}.0").output
            with (model.lm_head.output[:, -1].float() @ WEIGHTS).sum().backward():
                hidden.grad.save()
        tracers.append(tracer)
    merged = _merged(backend, tracers)
    (alone,) = _merged(backend, tracers[:1])
    assert torch.equal(merged[0][0], alone[0])
    exact = torch.cat([_behind_first_layer(reference, places, prompt) for prompt in prompts])
    theirs = torch.cat([_behind_first_layer(plain, places, prompt) for prompt in prompts])
    ours = torch.cat([values[0].float() for values in merged])
    assert 0 < (ours - exact).norm() <= 1.1 * (theirs - exact).norm()


def _behind_first_layer(plain: Any, family: Any, prompt: list[int]) -> Tensor:
    seen: list[Tensor] = []
    handles = [
        plain.get_submodule(path).register_forward_hook(lambda module, args, out: seen.append(out))
        for path in (f"{family.layers}.0", "lm_head")
    ]
    plain(torch.tensor([prompt]), use_cache=False)
    for handle in handles:
        handle.remove()
    hidden, logits = seen
    return torch.autograd.grad((logits[:, -1].float() @ WEIGHTS).sum(), [hidden])[0].float()


def test_one_tensor_has_one_gradient_at_all_of_its_places(tmp_path_factory: pytest.TempPathFactory) -> None:
    """In a parallel block both norms are given the residual, one after the other."""
    _, plain, model, _ = _served("gpt_neox", tmp_path_factory)
    before, layer = (model.gpt_neox.layers[number] for number in (0, 1))
    with model.trace([list(PROMPTS[1])]):
        places = [before.output[0], layer.input, layer.input_layernorm.input, layer.post_attention_layernorm.input]
        loss = (model.lm_head.output[:, -1] @ WEIGHTS).sum() + 0.1 * places[2].square().sum()
        with loss.backward():
            grads = [place.grad.save() for place in places]
    seen: list[Tensor] = []
    handle = plain.gpt_neox.layers[0].register_forward_hook(lambda module, args, output: seen.append(output))
    logits = plain(torch.tensor([PROMPTS[1]]), use_cache=False).logits
    handle.remove()
    (expected,) = torch.autograd.grad((logits[:, -1] @ WEIGHTS).sum() + 0.1 * seen[0].square().sum(), seen[0])
    for grad in grads:
        assert (grad - expected).abs().max() <= TOLERANCE * max(1.0, float(expected.abs().max()))
