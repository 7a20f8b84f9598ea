"""Promises 1 to 3 over real shard processes: stages, ranks and both, against one request alone and Hugging Face."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from below import EXPRESSIONS, PROMPT, VECTOR, whole_values
from by_hand import run_by_hand
from families import FAMILIES, model_of
from generation_programs import crowd, written
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from points import Look, furthest, look_by_hand, looks, record_look
from processes import BROKEN_SEED, FaultyShard, ProcessBackend, ProcessShards
from programs import (
    Action,
    At,
    Program,
    Served,
    crowds,
    difference,
    few_rows,
    find,
    record,
    rows_run,
    serve,
    values_in_order,
)
from width import wide

from engine.local import LocalBackend
from polytrace.errors import RunError
from polytrace.model import Model
from scheduling.policy import PassPolicy

FLOAT32_TOLERANCE = 1e-5  # of max(1, max|plain|)
EVERYONE = PassPolicy(budget_tokens=1 << 20, max_members=1000)
# The first example that hypothesis tries is the smallest one; the second is a random one.
TWICE = settings(
    max_examples=2,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    phases=[Phase.explicit, Phase.reuse, Phase.generate],
)
GRIDS = [  # stages, ranks
    ("llama", 2, 2, "float32"),
    ("gpt2", 2, 2, "float32"),
    ("llama", 4, 1, "float32"),
    ("gpt_oss", 1, 4, "float32"),  # 2 key/value heads, and 4 experts dealt out
    ("llama", 2, 2, "bfloat16"),
]
MORE_GRIDS = [
    ("mistral", 1, 4, "float32"),
    ("gemma2", 2, 2, "float32"),
    ("llama", 1, 4, "float32"),
    ("gemma3", 1, 2, "float32"),
    ("mixtral", 2, 2, "float32"),
    ("opt", 1, 2, "float32"),
]


class Deployed:
    """A tiny model on shard processes, and the plain model beside it."""

    def __init__(self, family: str, stages: int, ranks: int, dtype: str, folder: Path) -> None:
        self.family, self.stages, self.ranks, self.folder = family, stages, ranks, str(folder)
        self.dtype: torch.dtype = getattr(torch, dtype)
        self.plain = model_of(family, self.dtype)
        self.plain.save_pretrained(folder)
        self.shards = ProcessShards(
            self.folder, stages=stages, ranks=ranks, kinds={(stages - 1, ranks - 1): FaultyShard}
        )
        self.backend = ProcessBackend(self.folder, self.shards, folder, EVERYONE)
        self.model = Model(self.backend)

    def serve(self, users: list[Program], sharing: str = "tenant") -> list[Served]:
        return serve(self.model, self.backend, users, self.dtype, sharing=sharing)

    def look(self, own: Sequence[Look], sharing: str) -> Iterator[list[torch.Tensor]]:
        """What all looks save, merged."""
        family = FAMILIES[self.family]
        tracers = [record_look(self.model, family, look, run=False, sharing=sharing)[0] for look in own]
        outcomes = self.backend.run_together([self.backend.work_out(tracer.built_request()) for tracer in tracers])
        for tracer, outcome in zip(tracers, outcomes, strict=True):
            if outcome.error is not None:
                raise outcome.error
            yield values_in_order(tracer, outcome.values)


@pytest.fixture(scope="module", params=[*GRIDS, *map(wide, MORE_GRIDS)], ids=lambda grid: "-".join(map(str, grid)))
def deployed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployed]:
    deployment = Deployed(*request.param, tmp_path_factory.mktemp("model"))
    yield deployment
    deployment.shards.close()


@TWICE
@given(data=st.data())
def test_32_programs_that_share_rows_get_their_own_bits_and_hugging_faces_numbers(
    deployed: Deployed, data: st.DataObject
) -> None:
    users = data.draw(crowds(FAMILIES[deployed.family], 32))
    shared = deployed.serve(users)
    for program, ours, merged in zip(users, shared, deployed.serve(users, sharing="off"), strict=True):
        (alone,) = deployed.serve([program])
        assert ours.has_bits_of(alone), program
        assert merged.has_bits_of(alone), program
        if deployed.dtype is torch.float32:  # for bfloat16, test_promises compares errors
            assert difference(ours.values, run_by_hand(deployed.plain, program)) <= FLOAT32_TOLERANCE, program
    assert rows_run(shared) < sum(each.receipt.token_layers_alone for each in shared)
    if deployed.ranks == 1:  # stages change no bit
        one = LocalBackend(deployed.folder, threads=1, policy=EVERYONE)
        for ours, theirs in zip(shared, serve(Model(one), one, users, deployed.dtype), strict=True):
            assert ours.has_bits_of(theirs)


def test_points_inside_of_attention_are_those_of_the_whole_model(deployed: Deployed) -> None:
    family = FAMILIES[deployed.family]
    own = looks(family, [(tuple(range(1, 36)),), ((7, 3, 5, 9, 11, 2, 4), (7, 3, 5, 1))])
    shared, merged = ([*deployed.look(own, sharing)] for sharing in ("tenant", "off"))
    for look, ours, theirs in zip(own, shared, merged, strict=True):
        (alone,) = deployed.look([look], "tenant")
        assert all(map(torch.equal, ours, alone)) and all(map(torch.equal, theirs, alone)), look
        if deployed.dtype is torch.float32:
            expected = look_by_hand(deployed.plain, family, look)
            assert all(torch.equal(a.isneginf(), b.isneginf()) for a, b in zip(ours, expected, strict=True)), look
            assert furthest(ours, expected) <= FLOAT32_TOLERANCE, look


SPLIT = {  # outputs that ranks split, and the vocabulary
    "llama": ("model.layers.1.mlp.gate_proj", "model.layers.2.self_attn.q_proj", "lm_head"),
    "gemma2": ("model.layers.1.mlp.up_proj", "lm_head"),
    "gpt2": ("transformer.h.1.attn.c_attn", "transformer.h.2.mlp.c_fc"),
}


def test_of_what_ranks_split_only_what_is_asked_for_travels(deployed: Deployed) -> None:
    paths = SPLIT.get(deployed.family, ())
    if deployed.ranks == 1 or not paths:
        pytest.skip("nothing is split here")
    whole = whole_values(deployed.plain, {path: path for path in paths})
    size = 2 if deployed.dtype is torch.bfloat16 else 4
    for path in paths:
        for expression in EXPRESSIONS:
            with deployed.model.trace(PROMPT) as tracer:
                ours = expression.write(find(deployed.model, path).output).save()
            theirs = expression.write(whole[path])
            most = expression.received(len(PROMPT), deployed.ranks) * 4
            assert 0 < tracer.receipt.gathered_bytes <= most, (path, expression.name, tracer.receipt.gathered_bytes)
            if deployed.dtype is torch.float32:
                assert difference([ours], [theirs]) <= FLOAT32_TOLERANCE, (path, expression.name)
        with deployed.model.trace(PROMPT) as tracer:
            find(deployed.model, path).output.save()
        assert tracer.receipt.gathered_bytes == whole[path].numel() * size * (deployed.ranks - 1)


def test_edits_of_what_ranks_split_stay_on_the_ranks(deployed: Deployed) -> None:
    paths = SPLIT.get(deployed.family, ())[:1]
    if deployed.ranks == 1 or not paths:
        pytest.skip("nothing is split here")

    def scale(out: Any) -> None:
        out[:, :, 3:9] = 0.0
        out[:, -1, 11] = 4.0
        out[:] = out * 1.5
        out[:, 0] = VECTOR[: out.shape[-1]].to(deployed.dtype)
        out.mul_(0.9)

    for path in paths:
        with deployed.model.trace(PROMPT) as tracer:
            scale(find(deployed.model, path).output)
            ours = find(deployed.model, FAMILIES[deployed.family].norm).output[:, -1].save()
        handle = deployed.plain.get_submodule(path).register_forward_hook(lambda m, a, out: scale(out))
        theirs = whole_values(deployed.plain, {"norm": FAMILIES[deployed.family].norm})["norm"][:, -1]
        handle.remove()
        untouched = whole_values(deployed.plain, {"norm": FAMILIES[deployed.family].norm})["norm"][:, -1]
        assert tracer.receipt.gathered_bytes == 0
        if deployed.dtype is torch.float32:
            assert difference([ours], [theirs]) <= FLOAT32_TOLERANCE < difference([ours], [untouched]) / 10


def test_modules_that_ranks_split_are_called_on_whole_values(deployed: Deployed) -> None:
    if deployed.family != "llama":
        pytest.skip("llama's modules")
    mlp = deployed.plain.model.layers[1].mlp
    value = torch.randn(1, 2, 32, generator=torch.Generator().manual_seed(1)).to(deployed.dtype)
    inner = torch.randn(1, 2, 64, generator=torch.Generator().manual_seed(2)).to(deployed.dtype)
    with deployed.model.trace(PROMPT):
        own = deployed.model.model.layers[1].mlp
        ours = [own.gate_proj(value).save(), own.down_proj(inner).save(), own(value).save(), own.act_fn(inner).save()]
        ours.append(deployed.model.lm_head(value).save())
        chosen = deployed.model.lm_head(value).softmax(-1).max(-1)[1].save()
    with torch.no_grad():
        theirs = [
            mlp.gate_proj(value),
            mlp.down_proj(inner),
            mlp(value),
            mlp.act_fn(inner),
            deployed.plain.lm_head(value),
        ]
    if deployed.dtype is torch.float32:
        assert difference(ours, theirs) <= FLOAT32_TOLERANCE
        assert torch.equal(chosen, theirs[-1].argmax(-1))


def test_parameters_are_read_whole_whatever_ranks_hold_of_them(deployed: Deployed) -> None:
    stored = dict(deployed.plain.named_parameters(remove_duplicate=False))
    stored_infos = [info for info in deployed.model.description.parameters if info.of is None]  # no named weights
    split = {info.path: info for info in stored_infos if info.sharded_dim is not None}
    first = {info.path.partition(".0.")[2]: path for path, info in reversed(split.items()) if ".0." in path}
    assert bool(first) == (deployed.ranks > 1)
    with deployed.model.trace([1, 2, 3]) as tracer:
        read = {path: (find(deployed.model, path) * 1.0).save() for path in first.values()}
        deployed.model.lm_head.output[:, -1].save()
    assert tracer.receipt is not None
    for path, value in read.items():
        assert torch.equal(value, stored[path]), path


def test_key_value_heads_that_ranks_have_copies_of_are_called_whole(deployed: Deployed) -> None:
    if deployed.family not in ("mistral", "gpt_oss"):
        pytest.skip("models with more ranks than key/value heads")
    value = torch.randn(1, 2, 32, generator=torch.Generator().manual_seed(1))
    with deployed.model.trace(PROMPT):
        own = deployed.model.model.layers[1].self_attn
        ours = [own.k_proj(value).save(), own.v_proj(value).sum(-1).save()]
    plain = deployed.plain.model.layers[1].self_attn
    with torch.no_grad():
        assert difference(ours, [plain.k_proj(value), plain.v_proj(value).sum(-1)]) <= FLOAT32_TOLERANCE


def test_routers_are_those_of_one_process(deployed: Deployed) -> None:
    path = {"mixtral": "mlp.gate", "gpt_oss": "mlp.router"}.get(deployed.family)
    if path is None:
        pytest.skip("a mixture of experts")

    def ask(model: Any) -> list[torch.Tensor]:
        with model.trace(PROMPT):
            layer = model.model.layers[2]
            router, experts = find(layer, path).output, layer.mlp.experts.output
            router[1][:, -1] *= 0.25
            return [router[0].save(), router[1].save(), experts.save(), model.lm_head.output.save()]

    one = Model(LocalBackend(deployed.folder, threads=1))
    assert difference(ask(deployed.model), ask(one)) <= FLOAT32_TOLERANCE


@TWICE
@given(data=st.data())
def test_programs_of_several_passes_fork_from_what_shards_kept(deployed: Deployed, data: st.DataObject) -> None:
    for program in data.draw(crowds(FAMILIES[deployed.family], 6)):
        (alone,) = deployed.serve([program], sharing="off")
        with few_rows(deployed.backend, 24):
            (kept,) = deployed.serve([program])
        assert kept.has_bits_of(alone), program
        assert rows_run([kept]) == kept.receipt.token_layers


@TWICE
@given(data=st.data())
def test_a_graph_that_fails_on_one_shard_leaves_its_31_neighbours_unchanged(
    deployed: Deployed, data: st.DataObject
) -> None:
    family = FAMILIES[deployed.family]
    users = data.draw(crowds(family, 31))
    undisturbed = deployed.serve(users)
    prompt = list(users[0].prompts[0][0])
    with deployed.model.trace(prompt, seed=BROKEN_SEED, run=False) as failing:
        last = find(deployed.model, family.norm).input
        last[:] = last * 2.0
        deployed.model.lm_head.output[:, -1].save()
        logits = deployed.model.lm_head.output * 0.5  # fails on one rank, and all of them wait for what travels
        logits.topk(2)[1].save()
        logits.softmax(-1)[..., 3].save()
    tracers = [record(deployed.model, program, deployed.dtype, run=False)[0] for program in users]
    requests = [*(tracer.built_request() for tracer in tracers[:15]), failing.built_request()]
    requests += [tracer.built_request() for tracer in tracers[15:]]
    outcomes = deployed.backend.run_together([deployed.backend.work_out(request) for request in requests])
    failed = outcomes.pop(15)
    assert isinstance(failed.error, RunError)
    assert failed.error.where is not None and failed.error.where.startswith("test_shards.py:")
    for tracer, outcome, expected in zip(tracers, outcomes, undisturbed, strict=True):
        assert outcome.error is None
        assert all(map(torch.equal, values_in_order(tracer, outcome.values), expected.values))


@pytest.mark.parametrize("seed", [0, wide(1)])
def test_random_generations_are_those_of_one_process(deployed: Deployed, seed: int) -> None:
    """Values go from step to step between all stages; tokens are drawn where the logits are split too."""
    if deployed.family not in ("llama", "gpt2", "gemma2", "mistral"):
        pytest.skip("families whose places are all of the model's width")
    users = crowd(deployed.family, 6, seed)

    def run(backend: Any, some: Sequence[Any]) -> list[Any]:
        outcomes = backend.run_together([backend.work_out(written(user)) for user in some])
        assert all(outcome.error is None for outcome in outcomes), outcomes
        return [(outcome.values, outcome.receipt.generated) for outcome in outcomes]

    one = LocalBackend(deployed.folder, threads=1, policy=EVERYONE)
    for user, ours, theirs in zip(users, run(deployed.backend, users), run(one, users), strict=True):
        (alone,) = run(deployed.backend, [user])
        assert ours[1] == alone[1]
        assert ours[0].keys() == alone[0].keys()
        assert all(torch.equal(value, alone[0][name]) for name, value in ours[0].items()), user
        if deployed.dtype is torch.float32:
            assert ours[1] == theirs[1] and ours[0].keys() == theirs[0].keys(), user
            pairs = [(value, theirs[0][name]) for name, value in ours[0].items()]
            assert difference(*zip(*pairs, strict=True)) <= FLOAT32_TOLERANCE if pairs else True, user
            assert deployed.ranks > 1 or all(torch.equal(a, b) for a, b in pairs), user  # stages change no bit


SHARED = 6  # tokens that two prompts have in common
PROMPTS = tuple((*range(3, 3 + SHARED), *own) for own in ((40, 41, 42), (50, 51)))


def reader_and_editor(family: str) -> list[Program]:
    """One reads every kind of site at every layer, one edits one at each; what each did shows in its logits."""
    where = FAMILIES[family]
    every = [where.place(layer, part) for layer in range(where.num_layers) for part in where.parts]
    kinds = [where.place(index % where.num_layers, part) for index, part in enumerate(where.parts)]
    return [
        Program(where, ((PROMPTS[0],), (PROMPTS[1],)), (tuple(Action("read", place) for place in every),) * 2),
        *(
            Program(where, (PROMPTS[1:],), ((Action("add", place, At(one=-1), (3, place.width - 2), 7),),))
            for place in kinds
        ),
    ]


@pytest.mark.parametrize(("stages", "ranks"), [(2, 4), wide(1, 1), wide(1, 2), wide(2, 1), wide(4, 2), wide(4, 4)])
def test_every_grid_of_stages_and_ranks_gives_one_processs_numbers(stages: int, ranks: int, tmp_path: Path) -> None:
    deployed = Deployed("llama", stages, ranks, "float32", tmp_path)
    users = reader_and_editor("llama")
    served = deployed.serve(users)
    deployed.shards.close()
    untouched = run_by_hand(deployed.plain, Program(users[0].family, (PROMPTS[1:],), ((),)))
    for program, ours in zip(users, served, strict=True):
        by_hand = run_by_hand(deployed.plain, program)
        assert difference(ours.values, by_hand) <= FLOAT32_TOLERANCE, program
        if program.has_edits:
            assert (by_hand[-1] - untouched[-1]).abs().max() > 100 * FLOAT32_TOLERANCE, program
    if ranks == 1:  # stages change no bit
        one = LocalBackend(deployed.folder, threads=1, policy=EVERYONE)
        for ours, theirs in zip(served, serve(Model(one), one, users, deployed.dtype), strict=True):
            assert ours.has_bits_of(theirs)
