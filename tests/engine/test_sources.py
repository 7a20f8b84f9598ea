"""Inner operations of forwards are those of plain Hugging Face, read and written, merged, forked, split or alone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, few_of, model_of
from operations import CASES, LAYER, TOLERANCE, Case, by_hand, halved
from processes import ProcessBackend, ProcessShards
from torch import Tensor
from transformers.models.llama import modeling_llama
from width import wide

import polytrace
from engine.leaves import port_leaves
from engine.operations import watch_operations
from engine.reports import GateReport
from engine.shard import Shard
from polytrace.errors import GraphError, RunError
from polytrace.graph import Port, Site
from polytrace.model import Model
from polytrace.source_views import Operation
from polytrace.sources import SiteIndex
from scheduling.checks import table_of
from scheduling.policy import PassPolicy

IDS = [3, 17, 42, 5, 9, 30, 11]
OTHERS = [8, 25, 1, 60]
EACH = [(family, case) for family, cases in CASES.items() for case in cases]
NAMES = [f"{family}-{case.name}" for family, case in EACH]


class Loaded:
    """A tiny model as a user has it, and the plain one beside it."""

    def __init__(self, family: str, folder: Path) -> None:
        self.plain = model_of(family)
        self.plain.save_pretrained(folder)
        self.folder = str(folder)
        self.model: Any = polytrace.load(self.folder, threads=1)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Loaded]]:
    torch.set_num_threads(1)
    found = {family: Loaded(family, tmp_path_factory.mktemp(family)) for family in CASES}
    yield found
    for one in found.values():
        one.model.close()


def close(ours: Tensor, theirs: Tensor) -> None:
    assert ours.shape == theirs.shape
    assert not ours.numel() or (ours - theirs).abs().max() <= TOLERANCE * max(1.0, float(theirs.abs().max()))


def read(model: Any, cases: tuple[Case, ...], prompts: Any, **options: Any) -> list[Tensor]:
    with model.trace(prompts, **options):
        return [case.read(model).save() for case in cases]


@pytest.mark.parametrize("family", CASES)
def test_operations_have_the_values_of_the_plain_model(family: str, loaded: dict[str, Loaded]) -> None:
    own = loaded[family]
    for case, ours in zip(CASES[family], read(own.model, CASES[family], IDS), strict=True):
        close(ours, by_hand(own.plain, IDS, case)[0])


@pytest.mark.parametrize("family", few_of(FAMILIES))
def test_every_operation_that_can_be_read_has_what_the_plain_forward_has_there(family: str, tmp_path: Path) -> None:
    plain = model_of(family)
    plain.save_pretrained(tmp_path)
    with polytrace.load(str(tmp_path), threads=1) as model:
        compare_every_operation(model, plain)


def compare_every_operation(model: Any, plain: Any) -> None:
    """All that can be read of them in one trace, against a forward of the plain model that tells of its calls."""
    theirs: dict[tuple[str, Port, tuple[Any, ...]], Tensor] = {}

    def tell(path: str, port: Port, value: Any, _called: Any) -> None:
        for selector, tensor in port_leaves(value)[1].items():
            theirs.setdefault((path, port, selector), tensor.clone())

    with watch_operations(dict(plain.named_modules()), tell), torch.no_grad():
        plain(input_ids=torch.tensor([IDS]), use_cache=False)
    sources = model._index.sources
    leaves = [
        (site.module, site.port, leaf)
        for site in sources.sites()
        for leaf in site.leaves
        if leaf.read_refusal is None and (site.module, site.port, leaf.selector) in theirs
    ]
    assert len(leaves) > 200
    with model.trace(IDS):
        ours = [
            Operation(model, *sources.split(path))._port(port).read_leaf(leaf.selector).save()
            for path, port, leaf in leaves
        ]
    for (path, port, leaf), value in zip(leaves, ours, strict=True):
        plain_value = theirs[path, port, leaf.selector]
        close(value.double(), (plain_value[None] if leaf.is_flat else plain_value).double())


@pytest.mark.parametrize("family", CASES)
def test_operations_have_the_same_bits_merged_as_alone(family: str, loaded: dict[str, Loaded]) -> None:
    model, cases = loaded[family].model, CASES[family]
    alone = {name: read(model, cases, prompt) for name, prompt in (("ids", IDS), ("others", OTHERS))}
    with model.trace():
        together: dict[str, list[Any]] = {}
        for name, prompt in (("ids", IDS), ("others", OTHERS)):
            with model._tracer("", "").invoke(prompt):
                together[name] = [case.read(model).save() for case in cases]
    for name, values in together.items():
        assert all(map(torch.equal, values, alone[name])), name
    for case, view, first, second in zip(cases, read(model, cases, [IDS, OTHERS]), *alone.values(), strict=True):
        tokens = next(dim for dim in range(1, view.ndim) if view.shape[dim] == len(IDS))
        assert torch.equal(view[:1], first), case.name
        assert torch.equal(view[1:].narrow(tokens, len(IDS) - len(OTHERS), len(OTHERS)), second), case.name
        assert not view[1:].narrow(tokens, 0, len(IDS) - len(OTHERS)).any(), case.name  # pads


@pytest.mark.parametrize(("family", "case"), EACH, ids=NAMES)
def test_an_edit_acts_as_in_the_plain_model(family: str, case: Case, loaded: dict[str, Loaded]) -> None:
    own = loaded[family]
    theirs = by_hand(own.plain, IDS, case, halved)[1]
    unedited = by_hand(own.plain, IDS, case)[1]
    assert (theirs - unedited).abs().max() > 1e-3
    with own.model.trace(IDS) as tracer:
        case.assign(own.model, halved(case.read(own.model)))
        ours = own.model.output.logits.save()
    close(ours, theirs)
    assert [event.kind for event in tracer.receipt.fired if "source" in event.site] == ["read", "write"]


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_forks_at_an_operation_have_the_bits_that_nothing_shared_has(family: str, loaded: dict[str, Loaded]) -> None:
    model, cases = loaded[family].model, [case for case in CASES[family] if case.name != "head"]

    def sweep(sharing: str) -> tuple[list[Tensor], Any]:
        saved = []
        with model.trace(sharing=sharing) as tracer:
            for case in cases:
                for token in (2, 5):
                    with tracer.invoke(IDS):
                        value = case.read(model)
                        dim = 1 + (value.shape[1] != len(IDS))
                        value[(slice(None),) * dim + (token,)] *= -2.0
                        saved += [case.read(model).save(), model.lm_head.output[:, -1].save()]
        return saved, tracer.receipt

    shared, receipt = sweep("tenant")
    apart, _ = sweep("off")
    assert all(map(torch.equal, shared, apart))
    assert receipt.token_layers < receipt.token_layers_alone
    plain = read(model, tuple(cases), IDS)
    edited = shared[::4]
    assert all(not torch.equal(ours, theirs) for ours, theirs in zip(edited, plain, strict=True))


def test_in_place_code_reaches_everybody_who_holds_the_tensor(loaded: dict[str, Loaded]) -> None:
    own = loaded["llama"]
    attention = own.model.model.layers[LAYER].self_attn
    with own.model.trace(IDS):
        attention.source.transpose_0.output[:, 2, -1] = 0.0  # [1, heads, tokens, features], a view of q_proj's output
        ours = own.model.lm_head.output.save()

    def without_head(_module: Any, _args: Any, output: Tensor) -> None:
        output.view(1, len(IDS), 4, 8)[:, -1, 2] = 0.0

    handle = own.plain.model.layers[LAYER].self_attn.q_proj.register_forward_hook(without_head)
    with torch.no_grad():
        theirs = own.plain(input_ids=torch.tensor([IDS])).logits
    handle.remove()
    close(ours, theirs)
    assert (theirs - by_hand(own.plain, IDS, CASES["llama"][0])[1]).abs().max() > 1e-4


def test_an_input_is_replaced_for_this_call_only(loaded: dict[str, Loaded]) -> None:
    own = loaded["llama"]
    layer = own.model.model.layers[LAYER]
    with own.model.trace(IDS):
        layer.source.post_attention_layernorm_0.input = layer.source.post_attention_layernorm_0.input * 2.0
        inner = layer.post_attention_layernorm.input.save()
        mlp = layer.mlp.output.save()
        after = layer.output[0].save()
    with own.model.trace(IDS):
        residual = layer.post_attention_layernorm.input.save()
    assert torch.equal(inner, residual * 2.0)
    assert torch.equal(after, residual + mlp)  # the residual stream is as it was


def test_other_passes_run_the_unmodified_code(loaded: dict[str, Loaded]) -> None:
    own = loaded["llama"]
    model, runner = own.model, own.model.backend.shard.runner

    def hidden() -> list[Tensor]:
        saved: list[Tensor] = []
        with model.trace(IDS):
            saved += [layer.output[0].save() for layer in model.model.layers]
        return saved

    before = hidden()
    read(model, CASES["llama"], IDS)
    with pytest.raises(RunError), model.trace(IDS):
        number = model.model.layers[0].mlp.source.act_fn_0.output.argmax()
        model.model.embed_tokens.weight[number + 10_000].save()  # it fails inside of the pass
    assert all(map(torch.equal, hidden(), before))
    assert not any("forward" in module.__dict__ for module in runner.model.modules())


def test_requests_at_operations_of_one_module_share_a_pass(loaded: dict[str, Loaded]) -> None:
    own = loaded["llama"]
    programs, alone = [], []
    for number, case in enumerate(CASES["llama"]):
        with own.model.trace([5 + number, *IDS], run=False) as tracer:
            case.assign(own.model, halved(case.read(own.model)))
            own.model.lm_head.output.save()
        programs.append(own.model.backend.work_out(tracer.built_request()))
        with own.model.trace([5 + number, *IDS]):
            case.assign(own.model, halved(case.read(own.model)))
            alone.append(own.model.lm_head.output.save())
    outcomes = own.model.backend.run_together(programs)
    merged = [next(iter(outcome.values.values())) for outcome in outcomes]
    assert all(map(torch.equal, merged, alone))
    assert {len(outcome.receipt.passes) for outcome in outcomes} == {1}
    assert {outcome.receipt.passes[0].requests for outcome in outcomes} == {len(programs)}


def test_an_operation_whose_rows_are_not_its_own_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        sums = torch.cumsum(x, 1)  # over the rows of whoever stands before
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x)) + sums[:, :1] * 0.0

    model_of("llama").save_pretrained(tmp_path)
    monkeypatch.setattr(modeling_llama.LlamaMLP, "forward", forward)
    with polytrace.load(str(tmp_path), threads=1) as model:
        source = model.model.layers[LAYER].mlp.source
        with pytest.raises(GraphError, match="depend on the neighbours"), model.trace(IDS):
            source.torch_cumsum_0.output.save()
        with model.trace(IDS):
            saved = source.act_fn_0.output.save()
    assert saved.shape == (1, len(IDS), 64)


def test_an_operation_that_calls_a_module_has_the_modules_values(loaded: dict[str, Loaded]) -> None:
    model = loaded["llama"].model
    layer = model.model.layers[2]
    with model.trace(IDS):
        pairs = [
            (layer.mlp.source.self_act_fn_0.output.save(), layer.mlp.act_fn.output.save()),
            (layer.mlp.source.down_proj_0.input.save(), layer.mlp.down_proj.input.save()),
            (layer.source.self_attn_0.output[0].save(), layer.self_attn.output[0].save()),
            (model.source.model_0.output.last_hidden_state.save(), model.model.norm.output.save()),
        ]
    assert all(torch.equal(ours, theirs) for ours, theirs in pairs)
    assert repr(layer.source.mlp_0.source) == repr(layer.mlp.source)


@pytest.mark.parametrize(
    ("stages", "ranks", "family"), [(2, 2, "llama"), wide(2, 1, "gemma2"), wide(1, 2, "gpt2"), (1, 2, "mixtral")]
)
def test_operations_of_a_split_model_are_those_of_the_whole(
    stages: int, ranks: int, family: str, tmp_path: Path
) -> None:
    plain = model_of(family)
    plain.save_pretrained(tmp_path)
    shards = ProcessShards(str(tmp_path), stages=stages, ranks=ranks)
    try:
        backend = ProcessBackend(str(tmp_path), shards, tmp_path, PassPolicy(budget_tokens=1 << 20))
        model: Any = Model(backend)
        compare_every_operation(model, plain)
        assert model.description.notes == ()  # what is refused of operations is said where it is asked for
        cases = CASES[family]
        for case, ours in zip(cases, read(model, cases, IDS), strict=True):
            close(ours, by_hand(plain, IDS, case)[0])
        for case in cases:
            with model.trace(IDS):
                case.assign(model, halved(case.read(model)))
                logits = model.output.logits.save()
            close(logits, by_hand(plain, IDS, case, halved)[1])
        if family == "llama":
            refuses_what_no_rank_has(model)
    finally:
        shards.close()


class ReplacedShard(Shard):
    """The gate is run again, as after a loss, and rank 0 has forgotten what it knew, as a new process has."""

    def gate(self, is_first: bool = True) -> GateReport:
        before = super().gate(is_first)
        if self.links.rank == 0:
            self._proven = None
        after = super().gate(is_first=False)
        assert after == before
        return after


def test_a_rank_that_is_new_knows_what_the_lost_one_knew_of_operations(tmp_path: Path) -> None:
    model_of("llama").save_pretrained(tmp_path)
    kinds: dict[tuple[int, int], type[Shard]] = {(0, rank): ReplacedShard for rank in range(2)}
    shards = ProcessShards(str(tmp_path), stages=1, ranks=2, kinds=kinds)
    try:
        with pytest.raises(GraphError, match="may be a part of a sum"):
            refuses_a_part_of_a_sum(Model(ProcessBackend(str(tmp_path), shards, tmp_path)))
    finally:
        shards.close()


def refuses_a_part_of_a_sum(model: Any) -> None:
    with model.trace(IDS):
        model.model.embed_tokens.source.F_embedding_0.output.save()


def refuses_what_no_rank_has(model: Any) -> None:
    """A rank has a part of the sum that an embedding is, and `o_proj` multiplies without its own forward."""
    with pytest.raises(GraphError, match="may be a part of a sum"):
        refuses_a_part_of_a_sum(model)
    with pytest.raises(GraphError, match="ranks share"), model.trace(IDS):
        model.model.layers[0].self_attn.o_proj.source.F_linear_0.output.save()
    with pytest.raises(GraphError, match="on 2 stages"), model.trace(IDS):
        model.model.source.rotary_emb_0.output[0][:] = 0.0
        model.lm_head.output.save()
    described = model.description
    assert described.why_no_gradients == ""
    refused = {site.module for site in described.sites for leaf in site.leaves if leaf.gradient_refusal}
    assert {module.rpartition(".")[2] for module in refused} == {"rotary_emb", "self_attn", *map(str, range(4))}
    operation = "model.layers.0.self_attn.q_proj.source.F_linear_0"  # behind which ranks add up what they give back
    sites = SiteIndex(described, table_of(described).sources)
    _, leaf = sites[Site(module=operation, port=Port.INPUTS, selector=(0, 0), visit=0)]
    assert leaf.gradient_refusal is not None and "a part of a sum" in leaf.gradient_refusal
    with pytest.raises(GraphError, match=r"has no gradient: .* a part of a sum") as refusal, model.trace(IDS):
        taken = model.model.layers[0].self_attn.q_proj.source.F_linear_0.input
        model.output.logits.sum().backward()
        taken.grad.save()
    assert "test_sources.py" in str(refusal.value)


def test_what_cannot_be_had_is_refused_with_the_reason(loaded: dict[str, Loaded]) -> None:
    model = loaded["llama"].model
    attention = model.model.layers[0].self_attn

    def refused(reason: str, act: Any) -> None:
        with pytest.raises(GraphError, match=reason) as caught, model.trace(IDS):
            act()
        assert "test_sources.py" in str(caught.value)

    refused("several times in one forward", lambda: model.model.source.decoder_layer_0.output.save())
    refused("for all tokens of all prompts", lambda: attention.q_proj.source.F_linear_0.inputs[0][1].save())
    refused("does not come to this call", lambda: attention.source.past_key_values_update_0.output.save())
    refused("first argument of .* holds no tensor", lambda: attention.source.attention_interface_0.input.save())
    refused("points .*q_rot, k_rot, v", lambda: attention.source.attention_interface_0.source)
    refused("every layer takes", lambda: attention.source.apply_rotary_pos_emb_0.inputs[0][2].mul_(2.0).save())
    refused("no function of the model's own", lambda: attention.source.contiguous_0.source)
    refused("ModuleList|does not call", lambda: model.model.layers.source)
    with pytest.raises(AttributeError, match="did you mean act_fn_0"):
        _ = model.model.layers[0].mlp.source.act_fun_0


def test_tokens_are_counted_in_the_dimension_where_an_operation_has_them(loaded: dict[str, Loaded]) -> None:
    model = loaded["llama"].model
    source = model.model.layers[0].self_attn.source
    with pytest.raises(GraphError, match="not in the second dimension"), model.trace(IDS):
        source.transpose_0.output.at(0).save()
    with pytest.raises(GraphError, match="mask"), model.trace([IDS, OTHERS]):
        source.transpose_0.output.mean(2).save()  # [sequences, heads, tokens, features]
    with model.trace([IDS, OTHERS]):
        heads = source.transpose_0.output.mean(1).save()
        last = source.transpose_0.output[:, :, -1].save()
        same = source.view_0.output[:, -1].save()
    assert heads.shape == (2, len(IDS), 8)
    assert torch.equal(last, same)


def test_a_request_that_names_an_operation_by_hand_is_checked(loaded: dict[str, Loaded]) -> None:
    table = loaded["llama"].model._index
    for path, reason in (
        ("model.layers.1.mlp.source.nothing_0", "has no operation 'nothing_0'"),
        ("model.layers.1.mlp.source.self_act_fn_0.source.x_0", "calls a module"),
        ("model.layers.9.mlp.source.self_act_fn_0", "names no operation"),
    ):
        assert table.sources.site(path, Port.OUTPUT) is None
        assert reason in table.sources.why_none(path)
    own = loaded["llama"].model.backend.scheduler._table
    with pytest.raises(GraphError, match="no operation 'nothing_0'"):
        own.site(Site(module="model.layers.1.mlp.source.nothing_0", port=Port.OUTPUT), "reads", "here.py:1")
    with pytest.raises(GraphError, match="has the ports inputs and output"):
        own.site(Site(module="model.layers.1.mlp.source.self_act_fn_0", port=Port.INPUT), "reads", "here.py:1")


def test_a_source_is_shown_with_the_names_beside_the_lines(loaded: dict[str, Loaded]) -> None:
    source = loaded["llama"].model.model.layers[0].self_attn.source
    drawn = repr(source)
    assert "self_q_proj_0" in drawn
    assert "* def forward(" in drawn
    line = next(line for line in drawn.split("\n") if "apply_rotary_pos_emb(" in line)
    assert line.startswith(" apply_rotary_pos_emb_0 ") and "->  15" in line  # as nnsight counts
    assert list(source)[:3] == ["self_q_proj_0", "view_0", "transpose_0"]
    assert dir(source.apply_rotary_pos_emb_0.source.rotate_half_0.source) == ["torch_cat_0"]
    assert "--> " in repr(source.attention_interface_0)
