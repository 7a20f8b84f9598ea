"""TransformerLens's habits against plain Hugging Face with hooks written by hand for each family."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from families import model_of
from torch import Tensor

import polytrace
from polytrace.errors import GraphError, TooLargeError
from polytrace.methods.transformer_lens import ActivationCache, HookedModel

TOLERANCE = 1e-5  # of max(1, max|plain|), float32
PROMPT = [[7, 3, 5, 9, 11, 2, 4]]
LAYER = 1
TINYWORLD = Path(__file__).resolve().parents[2] / "bench" / "tinyworld" / "model"


@dataclass(frozen=True)
class Places:
    """Where a family keeps things, by hand: paths in the model, and in a layer."""

    embed: str
    layers: str
    ln1: str
    attention: str
    out: str
    ln2: str
    mlp: str
    act: str
    down: str
    final: str
    q: str | None = None  # the module whose output is the queries side by side
    positions: str | None = None
    attn_out: str | None = None  # where it is not attention's own output
    mlp_out: str | None = None
    is_parallel: bool = False
    is_centring: bool = False
    eps: float = 1e-6


PLACES = {
    "gpt2": Places(
        *("transformer.wte", "transformer.h", "ln_1", "attn", "attn.c_proj", "ln_2", "mlp", "mlp.act", "mlp.c_proj"),
        "transformer.ln_f",
        positions="transformer.wpe",
        is_centring=True,
        eps=1e-5,
    ),
    "llama": Places(
        *("model.embed_tokens", "model.layers", "input_layernorm", "self_attn", "self_attn.o_proj"),
        *("post_attention_layernorm", "mlp", "mlp.act_fn", "mlp.down_proj", "model.norm"),
        q="self_attn.q_proj",
    ),
    "gemma2": Places(
        *("model.embed_tokens", "model.layers", "input_layernorm", "self_attn", "self_attn.o_proj"),
        *("pre_feedforward_layernorm", "mlp", "mlp.act_fn", "mlp.down_proj", "model.norm"),
        q="self_attn.q_proj",
        attn_out="post_attention_layernorm",
        mlp_out="post_feedforward_layernorm",
    ),
    "gpt_neox": Places(
        *("gpt_neox.embed_in", "gpt_neox.layers", "input_layernorm", "attention", "attention.dense"),
        *("post_attention_layernorm", "mlp", "mlp.act", "mlp.dense_4h_to_h", "gpt_neox.final_layer_norm"),
        is_parallel=True,
        is_centring=True,
        eps=1e-5,
    ),
}


@dataclass
class Both:
    """A family's plain model and the served one."""

    plain: Any
    places: Places
    hooked: HookedModel


@pytest.fixture(scope="module", params=PLACES)
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Both]:
    folder = tmp_path_factory.mktemp("model")
    plain = model_of(request.param)
    plain.save_pretrained(folder)
    with polytrace.load(str(folder), threads=1) as model:
        yield Both(plain, PLACES[request.param], HookedModel(model))


def test_a_cache_has_what_hooks_see(both: Both) -> None:
    logits, cache = both.hooked.run_with_cache(PROMPT)
    expected = _seen(both.plain, both.places)
    for name, value in expected.items():
        assert _off(cache[name], value) <= TOLERANCE, name
    assert _off(logits, _run(both.plain)) <= TOLERANCE
    assert ("blocks.1.hook_resid_mid" in cache) != both.places.is_parallel


def test_what_is_added_to_the_residual_sums_up_to_it_and_to_the_logits(both: Both) -> None:
    logits, cache = both.hooked.run_with_cache(PROMPT)
    parts = cache.decompose_resid()
    assert _off(parts.sum(0), cache["resid_post", -1]) <= TOLERANCE
    hooked, cap = both.hooked, both.plain.config.to_dict().get("final_logit_softcapping")
    of_bias = hooked.ln_final.b @ hooked.W_U[:, 5] + hooked.b_U[5]
    logit = cache.logit_attrs(parts, 5).sum(0) + of_bias
    assert _off(cap * (logit / cap).tanh() if cap else logit, logits[..., 5]) <= TOLERANCE
    plain = cache.logit_attrs(parts, 5, fold_ln=False).sum(0)
    assert _off(plain, logits[..., 5]) > 100 * TOLERANCE  # the final norm's weight is not nothing


def test_weights_make_of_activations_what_the_model_makes(both: Both) -> None:
    """In front of norms that stand behind attention and MLP, which `out` and `down` are the last before."""
    hooked, layer = both.hooked, f"{both.places.layers}.{LAYER}"
    _, cache = hooked.run_with_cache(PROMPT)
    block = hooked.blocks[LAYER]
    given = _hooked_output(both.plain, f"{layer}.{both.places.out}")
    assert _off(cache.stack_head_results(2)[4:].sum(0) + block.attn.b_O, given) <= TOLERANCE
    assert torch.equal(hooked.W_O[LAYER], block.attn.W_O)
    given = _hooked_output(both.plain, f"{layer}.{both.places.down}")
    assert _off(cache.get_neuron_results(LAYER).sum(-2) + block.mlp.b_out, given) <= TOLERANCE
    taken = cache["normalized", LAYER, "ln1"] * block.ln1.w + block.ln1.b
    for name in ("q", "k", "v"):
        weight, bias = getattr(block.attn, f"W_{name.upper()}"), getattr(block.attn, f"b_{name.upper()}")
        assert _off(torch.einsum("bpd,hdc->bphc", taken, weight) + bias, cache[name, LAYER]) <= TOLERANCE, name
    taken = cache["normalized", LAYER, "ln2"] * block.ln2.w + block.ln2.b
    if (gate := hooked.W_gate) is not None:
        pre = taken @ gate[LAYER]
    else:
        pre = taken @ block.mlp.W_in + block.mlp.b_in
    assert _off(pre, cache["pre", LAYER]) <= TOLERANCE
    last = hooked.unembed(hooked.ln_final(cache["resid_post", -1]))
    assert _off(last, _hooked_output(both.plain, "lm_head")) <= TOLERANCE
    embedded = hooked.W_E[torch.tensor(PROMPT)]
    scale = cache["embed"].norm() / embedded.norm()  # of Gemma, the square root of the width
    assert _off(embedded * scale, cache["embed"]) <= TOLERANCE


def test_hooks_change_what_hooks_by_hand_change(both: Both) -> None:
    plain = _run(both.plain)
    for name, change in _changes(both.places).items():
        expected = _run(both.plain, change)
        assert _off(expected, plain) > 100 * TOLERANCE, name
        returned = both.hooked.run_with_hooks(PROMPT, fwd_hooks=[(name, lambda value, hook: _changed(value))])
        assert _off(returned, expected) <= TOLERANCE, name
        in_place = both.hooked.run_with_hooks(PROMPT, fwd_hooks=[(name, _change_in_place)])
        assert _off(in_place, expected) <= TOLERANCE, name


def test_of_prompts_of_different_lengths_each_has_its_own_numbers(both: Both) -> None:
    prompts = [PROMPT[0], PROMPT[0][:4]]
    names = ["blocks.1.attn.hook_pattern", "blocks.1.ln2.hook_scale", "blocks.2.hook_attn_out"]
    (_, loss), cache = both.hooked.run_with_cache(prompts, names_filter=names, return_type="both")
    (_, long), _ = both.hooked.run_with_cache(prompts[:1], names_filter=names, return_type="both")
    (_, short), alone = both.hooked.run_with_cache(prompts[1:], names_filter=names, return_type="both")
    assert torch.equal(cache["pattern", 1][1:, :, 3:, 3:], alone["pattern", 1])
    assert torch.equal(cache["attn_out", 2][1:, 3:], alone["attn_out", 2])
    assert _off(loss * 9, long * 6 + short * 3) <= TOLERANCE
    per_token = both.hooked(prompts, "loss", loss_per_token=True)
    assert not per_token[1, :3].any()
    assert _off(per_token.sum(), loss * 9) <= TOLERANCE
    last = both.hooked.run_with_cache(prompts, names_filter=names[2], pos_slice=-1)[1]["attn_out", 2]
    assert torch.equal(last, cache["attn_out", 2][:, -1:])
    with pytest.raises(GraphError, match="different lengths, 4 to 7 tokens"):
        both.hooked.run_with_cache(prompts, names_filter=names, pos_slice=2)


# on one model


@pytest.fixture(scope="module")
def hooked(world: Any) -> HookedModel:
    return HookedModel(world)


TOWER = "The Eiffel Tower is in the city of"


def test_only_what_is_chosen_moves_and_nothing_runs_behind_it(hooked: HookedModel) -> None:
    output, cache = hooked.run_with_cache(
        TOWER, names_filter="blocks.2.hook_resid_post", return_type=None, pos_slice=-1, stop_at_layer=4
    )
    assert output is None
    assert list(cache) == ["blocks.2.hook_resid_post"]
    assert hooked.receipt is not None
    assert hooked.receipt.result_bytes == cache.nbytes == 4 * 256
    assert hooked.receipt.token_layers == 9 * 3
    residual, cache = hooked.run_with_cache(TOWER, stop_at_layer=2)
    assert hooked.receipt.token_layers == 9 * 2
    assert torch.equal(residual, cache["resid_post", 1])
    assert not any(name.startswith(("blocks.2", "ln_final")) for name in cache)


def test_a_price_is_what_a_run_returns(hooked: HookedModel) -> None:
    certificate = hooked.price(TOWER, names_filter=lambda name: "hook_z" in name)
    _, cache = hooked.run_with_cache(TOWER, names_filter=lambda name: "hook_z" in name)
    assert hooked.receipt is not None
    assert certificate.result_bytes == hooked.receipt.result_bytes == cache.nbytes + 4 * 9 * 3200


def test_a_cache_that_is_too_large_says_what_takes_most_of_it(hooked: HookedModel) -> None:
    with pytest.raises(TooLargeError, match=r"attn.hook_attn_scores 512 MiB.*names_filter, pos_slice or stop_at_layer"):
        hooked.run_with_cache([[7] * 512] * 8, return_type=None)


def test_texts_begin_with_the_models_bos_token_unless_they_should_not(hooked: HookedModel) -> None:
    ids = hooked.to_tokens(TOWER)
    assert ids[0, 0] == hooked.model.config.bos_token_id
    assert torch.equal(hooked(ids), hooked(TOWER))
    without = hooked.to_tokens(TOWER, prepend_bos=False)
    assert torch.equal(without, ids[:, 1:])
    assert torch.equal(hooked(without), hooked(TOWER, prepend_bos=False))
    assert hooked.to_str_tokens(TOWER)[1:4] == ["The", " Eiffel", " Tower"]
    assert hooked.to_string(without[0]) == TOWER
    assert hooked.to_single_str_token(hooked.to_single_token(" Paris")) == " Paris"
    assert hooked.get_token_position(" Tower", TOWER) == 3
    with pytest.raises(GraphError, match="'The Eiffel' is 2 tokens, not one: 'The', ' Eiffel'"):
        hooked.to_single_token("The Eiffel")
    padded = hooked.to_tokens(["The Eiffel", TOWER])
    assert padded.shape == (2, 9)
    assert (padded[0, 3:] == hooked.model.config.pad_token_id).all()


def test_hooks_that_were_added_stay_until_they_are_reset(hooked: HookedModel) -> None:
    def silenced(value: Any, hook: Any) -> Any:
        return value * 0.0

    plain = hooked(TOWER)
    hooked.add_hook("blocks.3.hook_mlp_out", silenced)
    hooked.add_perma_hook("blocks.4.hook_mlp_out", silenced)
    two = hooked(TOWER)
    hooked.reset_hooks()
    one = hooked(TOWER)
    hooked.reset_hooks(including_permanent=True)
    assert torch.equal(hooked(TOWER), plain)
    assert (one - plain).abs().max() > 0.01
    assert (two - one).abs().max() > 0.01


def test_a_hook_may_put_values_aside_and_use_the_users_own(hooked: HookedModel) -> None:
    _, clean = hooked.run_with_cache(TOWER)
    seen: list[Any] = []

    def patched(value: Any, hook: Any) -> Any:
        seen.append(value[:, -1].clone().save())
        value[:, -1] = clean[hook.name][:, -1]
        return value

    other = "The Galata Tower is in the city of"
    logits = hooked.run_with_hooks(other, fwd_hooks=[("blocks.7.hook_resid_post", patched)])
    assert torch.equal(seen[0], hooked.run_with_cache(other)[1]["resid_post", 7][:, -1])
    assert _off(logits[:, -1], hooked(TOWER)[:, -1]) <= TOLERANCE
    assert _off(logits[:, -2], hooked(TOWER)[:, -2]) > 100 * TOLERANCE


def test_hooks_at_one_norm_see_what_those_before_put_there(hooked: HookedModel) -> None:
    own = torch.full((1, 9, 1), 3.0)

    def doubled(value: Any, hook: Any) -> None:
        value *= 2.0

    name = "blocks.1.ln1.hook_scale"
    both = hooked.run_with_hooks(TOWER, fwd_hooks=[(name, lambda value, hook: own), (name, doubled)])
    once = hooked.run_with_hooks(TOWER, fwd_hooks=[(name, lambda value, hook: 2 * own)])
    assert torch.equal(both, once)
    assert torch.equal(own, torch.full((1, 9, 1), 3.0))
    assert (both - hooked(TOWER)).abs().max() > 0.01


def test_a_hook_may_look_where_the_model_is_asked_to_let_it(hooked: HookedModel) -> None:
    looking = HookedModel(hooked.model, peek=True)
    changed = looking.run_with_hooks(TOWER, fwd_hooks=[("hook_embed", _branching)])
    assert torch.equal(changed, hooked(TOWER))
    with pytest.raises(GraphError, match="cannot look at it"):
        hooked.run_with_hooks(TOWER, fwd_hooks=[("hook_embed", _branching)])


def test_runs_in_a_session_are_one_request_with_shared_rows(hooked: HookedModel) -> None:
    def silenced(value: Any, hook: Any) -> None:
        value[:, -1] = 0.0

    names = [f"blocks.{layer}.hook_mlp_out" for layer in range(8)]
    with hooked.model.session() as session:
        _, cache = hooked.run_with_cache(TOWER, names_filter="blocks.2.hook_resid_post")
        runs = [hooked.run_with_hooks(TOWER, fwd_hooks=[(name, silenced)]) for name in names]
    assert session.receipt.token_layers < session.receipt.token_layers_alone / 2
    assert torch.equal(cache["resid_post", 2], hooked.run_with_cache(TOWER)[1]["resid_post", 2])
    for name, run in zip(names, runs, strict=True):
        assert torch.equal(run, hooked.run_with_hooks(TOWER, fwd_hooks=[(name, silenced)])), name
        assert (run - hooked(TOWER)).abs().max() > 0.01, name


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda model: model.run_with_cache(TOWER, names_filter="blocks.9.hook_resid_pre"), "it has blocks 0-7"),
        (lambda model: model.run_with_cache(TOWER, names_filter="blocks.1.attn.hook_zz"), "blocks.1.attn.hook_z"),
        (lambda model: model.run_with_cache(TOWER, names_filter="blocks.1.hook_q_input"), r"change `attn\.hook_q`"),
        (lambda model: model.run_with_cache(TOWER, names_filter=["ln_final.hook_scale"], stop_at_layer=2), "is behind"),
        (lambda model: model.run_with_cache(TOWER, stop_at_layer=9), "blocks 0-7"),
        (lambda model: model.run_with_cache(TOWER, incl_bwd=True), "gradients"),
        (lambda model: model.run_with_cache(TOWER, return_type="logit"), "'logits', 'loss', 'both' or None"),
        (lambda model: model.run_with_cache([TOWER, TOWER], remove_batch_dim=True), "for one prompt; these are 2"),
        (lambda model: model.run_with_hooks(TOWER, fwd_hooks=[(lambda name: False, _changed)]), "says yes to none"),
        (lambda model: model.run_with_hooks(TOWER, bwd_hooks=[("hook_embed", _changed)]), "gradients"),
        (lambda model: model.generate(TOWER), "generation is not part"),
        (lambda model: model.W_pos, "this model has no W_pos"),
        (lambda model: model([[5]], "loss"), "one token each"),
    ],
)
def test_what_cannot_be_is_refused_by_line(hooked: HookedModel, call: Callable[[Any], Any], told: str) -> None:
    with pytest.raises(GraphError, match=told) as caught:
        call(hooked)
    assert caught.value.where is not None
    assert caught.value.where.startswith("test_hooked.py:")


def test_what_is_not_cached_is_a_key_error_with_its_name(hooked: HookedModel) -> None:
    _, cache = hooked.run_with_cache(TOWER, names_filter=lambda name: "resid" in name)
    with pytest.raises(KeyError, match=r"blocks.2.attn.hook_z is not in this cache of 24: choose it with names_filter"):
        cache["z", 2]
    assert ActivationCache({}, hooked).nbytes == 0


def test_where_attention_and_the_mlp_have_one_norm_what_it_gives_is_read_only(tmp_path: Path) -> None:
    model_of("phi").save_pretrained(tmp_path)
    with polytrace.load(str(tmp_path), threads=1) as model:
        hooked = HookedModel(model)
        _, cache = hooked.run_with_cache(PROMPT)
        assert torch.equal(cache["normalized", 1, "ln1"], cache["normalized", 1, "ln2"])
        with pytest.raises(GraphError, match="take what the same norm gives"):
            hooked.run_with_hooks(PROMPT, fwd_hooks=[("blocks.1.ln2.hook_normalized", lambda value, hook: value * 2)])
        with pytest.raises(GraphError, match="side by side"):
            hooked.run_with_cache(PROMPT, names_filter="blocks.1.hook_resid_mid")


def test_what_brings_its_own_request_is_asked_for_before_a_block(hooked: HookedModel) -> None:
    with pytest.raises(GraphError, match="make it before the block begins"), hooked.model.session():
        HookedModel(hooked.model)
    with pytest.raises(GraphError, match="ask for it before the block begins"), hooked.model.session():
        hooked.weights_of("W_in")


def test_where_a_norm_stands_behind_the_sum_what_attention_adds_is_not_told(tmp_path: Path) -> None:
    from transformers import OPTConfig, OPTForCausalLM

    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": 96, "hidden_size": 32, "ffn_dim": 64, "num_hidden_layers": 2}
    config = OPTConfig(
        **sizes, num_attention_heads=4, word_embed_proj_dim=16, do_layer_norm_before=False, max_position_embeddings=64
    )
    OPTForCausalLM(config).save_pretrained(tmp_path)
    with polytrace.load(str(tmp_path), threads=1) as model:
        hooked = HookedModel(model)
        _, cache = hooked.run_with_cache(PROMPT)
        assert "blocks.1.hook_attn_out" not in cache
        assert "blocks.1.attn.hook_z" in cache
        assert _off(cache["embed"] + cache["pos_embed"], cache["resid_pre", 0]) <= TOLERANCE  # a projection between
        with pytest.raises(GraphError, match="what attention adds to the residual"):
            cache.decompose_resid()


def test_a_weight_that_blocks_do_not_have_is_refused_with_those_they_have(tmp_path: Path) -> None:
    model_of("mixtral").save_pretrained(tmp_path)
    with polytrace.load(str(tmp_path), threads=1) as model:
        hooked = HookedModel(model)
        assert hooked.cfg.d_mlp is None
        assert not hooked.b_O.any()  # a bias that there is not is zero
        with pytest.raises(GraphError, match="block 0 has no W_out; it has W_K, W_O, W_Q, W_V"):
            _ = hooked.W_out
        with pytest.raises(GraphError, match="rows are sorted by expert"):
            hooked.run_with_cache(PROMPT, names_filter="blocks.1.mlp.hook_post")


def test_sums_that_no_module_gives_are_what_lies_between(tmp_path: Path) -> None:
    """Granite multiplies what its sublayers give before it adds them."""
    from transformers import GraniteConfig, GraniteForCausalLM

    torch.manual_seed(0)
    config = GraniteConfig(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        residual_multiplier=0.3,
        embedding_multiplier=6.0,
    )
    plain = GraniteForCausalLM(config).eval()
    plain.save_pretrained(tmp_path)
    with polytrace.load(str(tmp_path), threads=1) as model:
        hooked = HookedModel(model)
        assert not {"attention_added", "mlp_added"} & set(model.layers[1].points)
        _, cache = hooked.run_with_cache(PROMPT)
        assert _off(cache.decompose_resid().sum(0), cache["resid_post", -1]) <= TOLERANCE
        given = _hooked_output(plain, "model.layers.1.self_attn")
        assert _off(cache["attn_out", 1], 0.3 * given) <= TOLERANCE
        expected = _run(plain, ("model.layers.1.self_attn", "output", lambda value: value * 1.5))
        ours = hooked.run_with_hooks(PROMPT, fwd_hooks=[("blocks.1.hook_attn_out", lambda value, hook: value * 1.5)])
        assert _off(ours, expected) <= TOLERANCE
        assert _off(expected, _run(plain)) > 100 * TOLERANCE


# the oracle

Change = tuple[str, str, Callable[[Tensor], Tensor]]


def _changed(value: Any) -> Any:
    """Each head's eight features by eight factors, side by side or not."""
    return value * torch.linspace(0.5, 1.5, 8).repeat(value.shape[-1] // 8)


def _change_in_place(value: Any, hook: Any) -> None:
    value[:] = _changed(value)


def _branching(value: Any, hook: Any) -> Any:
    return value if value.norm() > 1 else value * 2


def _changes(places: Places) -> dict[str, Change]:
    """An edit of each of TransformerLens's points, as a plain hook makes it."""
    layer = f"{places.layers}.{LAYER}"
    found: dict[str, Change] = {
        "blocks.1.hook_resid_pre": (layer, "input", _changed),
        "blocks.1.attn.hook_z": (f"{layer}.{places.out}", "input", _changed),
        "blocks.1.hook_attn_out": (f"{layer}.{places.attn_out or places.attention}", "output", _changed),
        "blocks.1.mlp.hook_post": (f"{layer}.{places.down}", "input", _changed),
        "blocks.1.hook_mlp_out": (f"{layer}.{places.mlp_out or places.mlp}", "output", _changed),
        "blocks.1.hook_resid_post": (layer, "output", _changed),
        "blocks.1.mlp.hook_pre": (f"{layer}.{places.act}", "input", _changed),
    }
    if places.positions is None:
        found["hook_embed"] = (f"{places.layers}.0", "input", _changed)
    else:
        found["hook_embed"] = (places.embed, "output", _changed)
        found["hook_pos_embed"] = (places.positions, "output", _changed)
    if not places.is_parallel:
        found["blocks.1.hook_resid_mid"] = (
            f"{layer}.{places.ln2}",
            "input",
            lambda value: value.copy_(_changed(value)),  # for the sum behind it too
        )
    if places.q is not None:
        found["blocks.1.attn.hook_q"] = (f"{layer}.{places.q}", "output", _changed)
    return found


def _run(plain: Any, change: Change | None = None, seen: dict[tuple[str, str], Tensor] | None = None) -> Tensor:
    """Logits of the plain model with one change by a hook; `seen` is filled with what its keys are given."""
    with ExitStack() as stack, torch.no_grad():
        if change is not None:
            path, side, function = change
            module = plain.get_submodule(path)
            if side == "output":
                handle = module.register_forward_hook(
                    lambda m, a, out: (function(out[0]), *out[1:]) if isinstance(out, tuple) else function(out)
                )
            else:
                handle = module.register_forward_pre_hook(lambda m, args: (function(args[0]), *args[1:]))
            stack.callback(handle.remove)
        for key in seen or {}:
            stack.callback(_watched(plain, key, seen or {}))
        logits: Tensor = plain(input_ids=torch.tensor(PROMPT), use_cache=False).logits
    return logits


def _watched(plain: Any, key: tuple[str, str], seen: dict[tuple[str, str], Tensor]) -> Callable[[], None]:
    def keep(value: Any) -> None:
        seen[key] = (value[0] if isinstance(value, tuple) else value).clone()

    module = plain.get_submodule(key[0])
    if key[1] == "output":
        remove: Callable[[], None] = module.register_forward_hook(lambda m, a, out: keep(out)).remove
    else:
        remove = module.register_forward_pre_hook(lambda m, args: keep(args)).remove
    return remove


def _hooked_output(plain: Any, path: str) -> Tensor:
    seen = {(path, "output"): torch.empty(0)}
    _run(plain, seen=seen)
    return seen[path, "output"]


def _seen(plain: Any, places: Places) -> dict[str, Tensor]:
    """Activations by TransformerLens's names, from plain hooks."""
    layer = f"{places.layers}.{LAYER}"
    heads = plain.config.num_attention_heads
    wanted = {
        "blocks.1.hook_resid_pre": (layer, "input"),
        "blocks.1.attn.hook_z": (f"{layer}.{places.out}", "input"),
        "blocks.1.hook_attn_out": (f"{layer}.{places.attn_out or places.attention}", "output"),
        "blocks.1.mlp.hook_pre": (f"{layer}.{places.act}", "input"),
        "blocks.1.mlp.hook_post": (f"{layer}.{places.down}", "input"),
        "blocks.1.hook_mlp_out": (f"{layer}.{places.mlp_out or places.mlp}", "output"),
        "blocks.1.hook_resid_post": (layer, "output"),
        "hook_embed": (f"{places.layers}.0", "input") if places.positions is None else (places.embed, "output"),
        "ln1": (f"{layer}.{places.ln1}", "input"),
        "ln2": (f"{layer}.{places.ln2}", "input"),
        "final": (places.final, "input"),
    }
    if places.positions is not None:
        wanted["hook_pos_embed"] = (places.positions, "output")
    if not places.is_parallel:
        wanted["blocks.1.hook_resid_mid"] = (f"{layer}.{places.ln2}", "input")
    if places.q is not None:
        wanted["blocks.1.attn.hook_q"] = (f"{layer}.{places.q}", "output")
    seen = dict.fromkeys(wanted.values(), torch.empty(0))
    _run(plain, seen=seen)
    found = {name: seen[key] for name, key in wanted.items()}
    for name in ("blocks.1.attn.hook_z", "blocks.1.attn.hook_q"):
        if name in found:
            found[name] = found[name].unflatten(-1, (heads, -1))
    for start, own in (("blocks.1.ln1", "ln1"), ("blocks.1.ln2", "ln2"), ("ln_final", "final")):
        x = found.pop(own)
        if places.is_centring:
            x = x - x.mean(-1, keepdim=True)
        found[f"{start}.hook_scale"] = (x.pow(2).mean(-1, keepdim=True) + places.eps).sqrt()
        found[f"{start}.hook_normalized"] = x / found[f"{start}.hook_scale"]
    with torch.no_grad():
        ran = plain(input_ids=torch.tensor(PROMPT), use_cache=False, output_attentions=True)
    found["blocks.1.attn.hook_pattern"] = ran.attentions[LAYER]
    return found


def _off(ours: Tensor, expected: Tensor) -> float:
    assert ours.shape == expected.shape
    return float((ours - expected).abs().max()) / max(1.0, float(expected.abs().max()))
