"""Families that cannot be packed: each prompt runs alone, all of a request in step, against plain Hugging Face."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from by_hand import run_by_hand
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from padded_families import CONFIGS, FAMILIES, FEW, LOOKS_INTO_LAYERS, OWN_FORMULA, model_from, model_of
from processes import ProcessBackend, ProcessShards
from programs import crowds, difference, find, serve
from small import close, logits_of
from torch import Tensor
from transformers import AutoModelForCausalLM
from width import keeping, wide

from engine.leaves import port_leaves
from engine.loading import check_split
from engine.local import LocalBackend
from polytrace.description import PassLayout
from polytrace.errors import PolytraceError, ServiceError
from polytrace.graph import Port
from polytrace.model import Model

FLOAT32_TOLERANCE = 1e-5  # of max(1, max|plain|)
PROMPTS = [[3, 14, 15, 92, 65], [35, 89, 79, 32, 38, 46, 26, 43], [83]]
LAYER = 1  # attends in every family that does


class Loaded:
    """A family in one process, through the gate, beside the plain model."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name, self.folder = name, folder
        torch.set_num_threads(1)
        model_of(name).save_pretrained(folder)
        self.plain = AutoModelForCausalLM.from_pretrained(folder).eval()
        self.backend = LocalBackend(str(folder), threads=1)
        self.model: Any = Model(self.backend)
        self.family = FAMILIES[name]

    def layer(self, number: int) -> Any:
        return find(self.model, self.family.layers)[number]


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Loaded]:
    """A family by its name, loaded once."""
    return cache(lambda name: Loaded(name, tmp_path_factory.mktemp(name)))


@pytest.fixture(scope="module", params=keeping(sorted(CONFIGS), FEW.__contains__))
def loaded(request: pytest.FixtureRequest, load: Callable[[str], Loaded]) -> Loaded:
    return load(request.param)


@pytest.fixture(scope="module", params=keeping(sorted(OWN_FORMULA), FEW.__contains__))
def own_formula(request: pytest.FixtureRequest, load: Callable[[str], Loaded]) -> Loaded:
    return load(request.param)


def test_the_description_says_how_prompts_run_and_why(loaded: Loaded) -> None:
    description = loaded.backend.description
    assert description.layout is PassLayout.PADDED and not description.has_forks
    assert any("each prompt runs alone" in note for note in description.notes)


def test_every_readable_port_of_every_module_is_what_a_plain_hook_sees(loaded: Loaded) -> None:
    sites = [
        (site, leaf)
        for site in loaded.backend.description.sites
        for leaf in site.leaves
        if site.port in (Port.INPUT, Port.OUTPUT) and leaf.read_refusal is None
    ]
    assert len(sites) > 40
    saved = []
    with loaded.model.trace(PROMPTS):
        for site, leaf in sites:
            value = getattr(find(loaded.model, site.module) if site.module else loaded.model, site.port.value)
            for key in leaf.selector:
                value = value[key]
            saved.append(value.save())
    longest = max(map(len, PROMPTS))
    for row, prompt in enumerate(PROMPTS):
        seen = ports_of(loaded.plain, prompt)
        for (site, leaf), ours in zip(sites, saved, strict=True):
            theirs = seen[site.module, site.port][leaf.selector]
            rows = theirs[None] if leaf.is_flat else theirs
            close(ours[row : row + 1].narrow(leaf.row_dim, longest - len(prompt), len(prompt)), rows)


def ports_of(plain: Any, prompt: list[int]) -> dict[tuple[str, Port], dict[Any, Tensor]]:
    """What every module took and gave first, by hooks."""
    seen: dict[tuple[str, Port], dict[Any, Tensor]] = {}

    def note(path: str, port: Port, value: Any) -> None:
        seen.setdefault((path, port), {way: own.clone() for way, own in port_leaves(value)[1].items()})

    with ExitStack() as stack, torch.no_grad():
        for path, module in plain.named_modules():

            def before(_module: Any, args: Any, kwargs: Any, path: str = path) -> None:
                note(path, Port.INPUT, args[0] if args else next(iter(kwargs.values()), None))

            def after(_module: Any, _args: Any, output: Any, path: str = path) -> None:
                note(path, Port.OUTPUT, output)

            stack.callback(module.register_forward_pre_hook(before, with_kwargs=True).remove)
            stack.callback(module.register_forward_hook(after).remove)
        plain(input_ids=torch.tensor([prompt]), use_cache=False)
    return seen


@settings(
    max_examples=2,  # the first is the smallest, the second a random one
    deadline=None,
    suppress_health_check=list(HealthCheck),
    phases=[Phase.explicit, Phase.reuse, Phase.generate],
)
@given(data=st.data())
def test_random_programs_have_their_own_bits_and_hugging_faces_numbers(loaded: Loaded, data: st.DataObject) -> None:
    users = data.draw(crowds(loaded.family, 6))
    for program, ours in zip(users, serve(loaded.model, loaded.backend, users, torch.float32), strict=True):
        (alone,) = serve(loaded.model, loaded.backend, [program], torch.float32)
        assert ours.has_bits_of(alone), program
        assert difference(ours.values, run_by_hand(loaded.plain, program)) <= FLOAT32_TOLERANCE, program


def test_values_flow_between_prompts_that_run_in_step_and_each_has_the_bits_it_has_alone(loaded: Loaded) -> None:
    clean, corrupt = PROMPTS[:2]
    with loaded.model.trace() as tracer:
        with tracer.invoke(clean):
            given_last = loaded.layer(2).output[0][:, -1]
        with tracer.invoke(corrupt):
            loaded.layer(2).output[0][:, -1] = given_last
            together = loaded.model.lm_head.output.save()
        with tracer.invoke(PROMPTS):  # neighbours
            beside = loaded.model.lm_head.output.save()
    for row, prompt in enumerate(PROMPTS):
        with loaded.model.trace(prompt):
            alone = loaded.model.lm_head.output.save()
        assert torch.equal(beside[row, -len(prompt) :], alone[0])
    layer = loaded.plain.get_submodule(f"{loaded.family.layers}.2")
    with hooked(layer, lambda hidden: seen.append(hidden[:, -1].clone())) as seen:
        logits_of(loaded.plain, clean)

    def put(hidden: Tensor) -> None:
        hidden[:, -1] = seen[0]

    with hooked(layer, put):
        expected = head_of(loaded.plain, corrupt)
    close(together, expected)
    assert not torch.allclose(expected[:, -1], head_of(loaded.plain, corrupt)[:, -1], atol=1e-3), "the edit matters"


@contextmanager
def hooked(layer: Any, look: Callable[[Tensor], None]) -> Iterator[list[Tensor]]:
    """A layer's hidden states are looked at, or changed in place."""
    handle = layer.register_forward_hook(lambda _m, _a, out: look(out if isinstance(out, Tensor) else out[0]))
    try:
        yield []
    finally:
        handle.remove()


def head_of(plain: Any, prompt: list[int]) -> Tensor:
    """What the head gives; a soft-cap may follow it."""
    return ports_of(plain, prompt)["lm_head", Port.OUTPUT][()]


def test_a_failing_request_leaves_its_neighbours_and_no_lane_behind(loaded: Loaded) -> None:
    before = threading.active_count()
    with loaded.model.trace(PROMPTS):
        alone = loaded.model.lm_head.output[:, -1].save()
    with pytest.raises(PolytraceError), loaded.model.trace(PROMPTS):
        places = loaded.layer(1).output[0].sum((1, 2)).long() + 1_000_000  # no such row
        loaded.layer(2).output[0][:, -1] += loaded.model.lm_head.output[0, 0, places[:1]]
        loaded.model.lm_head.output.save()
    with loaded.model.trace(PROMPTS):
        again = loaded.model.lm_head.output[:, -1].save()
    assert torch.equal(alone, again)
    assert threading.active_count() == before


def test_calls_inside_of_forwards_are_visited_for_each_prompt_as_alone(loaded: Loaded) -> None:
    """Of the middle layer and of all modules in it."""
    paths = [info.path for info in loaded.backend.description.modules]
    inside = [path for path in paths if path.startswith(f"{loaded.family.layers}.{LAYER}")]
    calls = [
        (path, site, leaf)
        for path in inside
        if (source := loaded.backend.description.modules[paths.index(path)].source) is not None
        for site in loaded.backend.description.sources[source].sites
        for leaf in site.leaves
        if leaf.read_refusal is None and site.port is Port.OUTPUT and leaf.selector == ()
    ]
    assert len(calls) > 5

    def read(prompts: Any) -> list[Any]:
        with loaded.model.trace(prompts):
            saved = []
            for path, site, _ in calls:
                call = find(loaded.model, path)
                for name in site.module.split(".source."):
                    call = getattr(call.source, name)
                saved.append(call.output.save())
        return saved

    together = read(PROMPTS)
    longest = max(map(len, PROMPTS))
    for row, prompt in enumerate(PROMPTS):
        for (_, site, leaf), ours, alone in zip(calls, together, read(prompt), strict=True):
            own = ours[row : row + 1].narrow(leaf.row_dim, longest - len(prompt), len(prompt))
            assert torch.equal(own.nan_to_num(7.0), alone.nan_to_num(7.0)), site.module


@pytest.mark.parametrize(("name", "stages"), [wide("bloom", 2), wide("mamba", 2), ("falcon_alibi", 2)])
def test_stages_change_no_bit(name: str, stages: int, tmp_path: Path) -> None:
    one = Loaded(name, tmp_path / "model")
    shards = ProcessShards(str(tmp_path / "model"), stages=stages, ranks=1)
    backend = ProcessBackend(str(tmp_path / "model"), shards, tmp_path)
    try:
        saved = []
        for model in (one.model, Model(backend)):
            layers = find(model, one.family.layers)
            with model.trace() as tracer:
                with tracer.invoke(PROMPTS):
                    carried = layers[0].output[0][:, -1]
                    saved.append(model.lm_head.output.save())
                with tracer.invoke(PROMPTS):
                    layers[3].output[0][:, -1] += carried
                    saved.append(model.lm_head.output[:, -1].save())
        assert torch.equal(saved[0], saved[2]) and torch.equal(saved[1], saved[3])
        assert not torch.allclose(saved[0][:, -1], saved[1], atol=1e-3)
    finally:
        shards.close()


def test_ranks_are_refused_with_the_way_out(tmp_path: Path) -> None:
    model_of("bloom").save_pretrained(tmp_path)
    with pytest.raises(ServiceError, match=r"cannot be split over ranks: .*attention interface; use ranks=1"):
        ProcessShards(str(tmp_path), stages=1, ranks=2)


def test_a_model_whose_forward_looks_into_its_layers_is_one_stage(tmp_path: Path) -> None:
    model_from(LOOKS_INTO_LAYERS).save_pretrained(tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    model: Any = Model(LocalBackend(str(tmp_path), threads=1))
    with model.trace() as tracer:
        with tracer.invoke(PROMPTS[:2]):
            given_last = model.rwkv.blocks[1].output[0][1, -1]
        with tracer.invoke(PROMPTS[0]):
            model.rwkv.blocks[2].output[0][0, -1] = given_last
            ours = model.head.output.save()
    with hooked(plain.rwkv.blocks[1], lambda hidden: seen.append(hidden[0, -1].clone())) as seen:
        logits_of(plain, PROMPTS[1])

    def put(hidden: Tensor) -> None:
        hidden[0, -1] = seen[0]

    untouched = logits_of(plain, PROMPTS[0])
    with hooked(plain.rwkv.blocks[2], put):
        expected = logits_of(plain, PROMPTS[0])
    close(ours, expected)
    assert not torch.allclose(untouched[:, -1], expected[:, -1], atol=1e-3)
    with pytest.raises(ServiceError, match="does not run with stubs for layers; use stages=1"):
        check_split(str(tmp_path), "auto", stages=2, ranks=1)


# families that attend by a formula of their own


def attentions_of(plain: Any, folder: Path, prompt: list[int]) -> tuple[Tensor, ...]:
    eager = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    with torch.no_grad():
        found: tuple[Tensor, ...] = eager(
            input_ids=torch.tensor([prompt]), use_cache=False, output_attentions=True
        ).attentions
    return found


def test_patterns_are_the_attentions_that_transformers_gives(own_formula: Loaded) -> None:
    longest = max(map(len, PROMPTS))
    with own_formula.model.trace(PROMPTS):
        patterns = [layer.pattern.save() for layer in find(own_formula.model, own_formula.family.layers)]
        scores = own_formula.layer(LAYER).scores.save()
    for row, prompt in enumerate(PROMPTS):
        expected = attentions_of(own_formula.plain, own_formula.folder, prompt)
        for ours, theirs in zip(patterns, expected, strict=True):
            close(ours[row : row + 1, :, longest - len(prompt) :, longest - len(prompt) :], theirs)
        own = scores[row, :, longest - len(prompt) :, longest - len(prompt) :]
        close(own.softmax(-1)[None], expected[LAYER])
        assert bool((own[:, 0, 1:] == -torch.inf).all()), "what a query does not see"


def test_edits_of_patterns_scores_and_heads_are_those_of_plain_code(own_formula: Loaded) -> None:
    out = f"{own_formula.family.layers}.{LAYER}.{own_formula.family.out_projection}"
    saved = []
    with own_formula.model.trace() as tracer:
        for edit in range(4):
            with tracer.invoke(PROMPTS[:2]):
                layer = own_formula.layer(LAYER)
                if edit == 0:
                    layer.pattern[:, 1, -1, :] = 0.125
                elif edit == 1:
                    layer.scores[:, 2, -1, -2] = -torch.inf
                elif edit == 2:
                    layer.z[:, -1, 3] *= 2.0
                else:
                    layer.head_out[:, -1, 0] = 0.0
                saved.append(own_formula.model.lm_head.output[:, -1].save())
    for row, prompt in enumerate(PROMPTS[:2]):
        untouched = logits_of(own_formula.plain, prompt)[:, -1]
        for edit, ours in enumerate(saved):
            if edit < 2:
                with softmaxes(own_formula.plain, edit, len(prompt), max(map(len, PROMPTS[:2]))):
                    expected = logits_of(own_formula.plain, prompt)[:, -1]
            else:
                with heads_changed(own_formula.plain.get_submodule(out), edit):
                    expected = logits_of(own_formula.plain, prompt)[:, -1]
            close(ours[row : row + 1], expected)
            assert float((expected - untouched).abs().max()) > 1e-4, (edit, "the edit matters")


@contextmanager
def softmaxes(plain: Any, edit: int, length: int, longest: int) -> Iterator[None]:
    """One layer's softmax, the only one of its forward, with the edit made by hand."""
    for module in plain.modules():
        if hasattr(module, "config"):
            module.config._attn_implementation_internal = "eager"
    calls: list[int] = []
    real = torch.nn.functional.softmax

    def softmax(values: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        calls.append(1)
        is_own = len(calls) == LAYER + 1
        if is_own and edit == 1:
            values = values.clone()
            values[:, 2, -1, -2] = -torch.inf
        pattern = real(values, *args, **kwargs)
        if is_own and edit == 0:
            pattern = pattern.clone()
            pattern[:, 1, -1, :] = 0.125
        return pattern

    with patch("torch.nn.functional.softmax", softmax):
        yield
    assert len(calls) == 4


@contextmanager
def heads_changed(projection: Any, edit: int) -> Iterator[None]:
    def before(_module: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        z = args[0].clone().unflatten(-1, (4, -1))
        if edit == 2:
            z[:, -1, 3] *= 2.0
        else:
            z[:, -1, 0] = 0.0
        return (z.flatten(-2),)

    handle = projection.register_forward_pre_hook(before)
    try:
        yield
    finally:
        handle.remove()


def _mixed(which: int) -> Callable[[Tensor], Tensor]:
    return lambda features: features.unflatten(-1, (4, 3, 8))[..., which, :]


def _apart(features: Tensor) -> Tensor:
    return features.unflatten(-1, (-1, 8))


_SEPARATE = {role: (f"{role}_proj", _apart) for role in "qkv"}
ROLES: dict[str, dict[str, tuple[str, Callable[[Tensor], Tensor]]]] = {  # beside the output projection
    "bloom": {role: ("query_key_value", _mixed(which)) for which, role in enumerate("qkv")},
    "gptj": _SEPARATE,
    "gpt_neo": _SEPARATE,
    "falcon": {
        "q": ("query_key_value", lambda features: _apart(features)[..., :4, :]),
        "k": ("query_key_value", lambda features: _apart(features)[..., 4:5, :]),
        "v": ("query_key_value", lambda features: _apart(features)[..., 5:, :]),
    },
    "mpt": {
        role: ("Wqkv", lambda features, which=which: features.unflatten(-1, (3, 4, 8))[..., which, :, :])
        for which, role in enumerate("qkv")
    },
    "codegen": {role: ("qkv_proj", _mixed("qvk".index(role))) for role in "qkv"},
}


@pytest.mark.parametrize("role", ["q", "k", "v"])
def test_queries_keys_and_values_are_those_of_plain_code(own_formula: Loaded, role: str) -> None:
    attention = f"{own_formula.family.layers}.{LAYER}.{own_formula.family.attention}"
    source, view = ROLES[own_formula.name][role]
    with own_formula.model.trace() as tracer:
        with tracer.invoke(PROMPTS[:2]):
            before = getattr(own_formula.layer(LAYER), role).save()
        with tracer.invoke(PROMPTS[:2]):
            getattr(own_formula.layer(LAYER), role)[:, -2, 0] *= -3.0
            after = own_formula.model.lm_head.output[:, -2:].save()
    for row, prompt in enumerate(PROMPTS[:2]):
        seen: list[Tensor] = []

        def change(_module: Any, _args: Any, output: Tensor, seen: list[Tensor] = seen) -> None:
            seen.append(view(output).clone())
            view(output)[:, -2, 0] *= -3.0

        untouched = logits_of(own_formula.plain, prompt)[:, -2:]
        handle = own_formula.plain.get_submodule(f"{attention}.{source}").register_forward_hook(change)
        expected = logits_of(own_formula.plain, prompt)[:, -2:]
        handle.remove()
        close(before[row : row + 1, -len(prompt) :], seen[0])
        close(after[row : row + 1], expected)
        assert float((expected - untouched).abs().max()) > 1e-4, "the edit matters"


def test_weights_by_name_make_what_their_points_are(own_formula: Loaded) -> None:
    with own_formula.model.trace(PROMPTS[1]):
        layer = own_formula.layer(LAYER)
        head_out, z = layer.head_out.save(), layer.z.save()
        by_weight = torch.einsum("sthc,hcd->sthd", layer.z, layer.W_O).save()
    close(by_weight, head_out)
    assert z.shape == (1, len(PROMPTS[1]), 4, 8)
