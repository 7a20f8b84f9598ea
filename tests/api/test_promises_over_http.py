"""Promises 1 to 4 and 6 as users meet them: tinyworld on 2 x 2 shards, 32 users at once over HTTP."""

from __future__ import annotations

import re
import runpy
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from by_hand import run_by_hand
from families import llama_like
from gradient_calls import check_gradients
from hooked_calls import check_habits
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from lens_calls import check_directions, check_lens, check_scopes, check_tuned_lens, check_without_torch
from patching_calls import check_equal, every_method
from programs import Program, crowds, difference, record
from sae_calls import check_saes
from small import close, without_layers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from vector_calls import check_vectors

import polytrace
import polytrace.functions
from bench.service import Service
from bench.tinyworld import FOLDER
from polytrace.errors import GraphError
from polytrace.model import Model
from polytrace.standard import VALUES
from polytrace.support import Support

FLOAT32_TOLERANCE = 1e-5  # of max(1, max|plain|)
# The first example that hypothesis tries is the smallest one; the second is a random one.
TWICE = settings(
    max_examples=2,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    phases=[Phase.explicit, Phase.reuse, Phase.generate],
)

PROMPT = "The Eiffel Tower is in the city of"
CHAT = [{"role": "user", "content": "The Eiffel Tower"}]


@pytest.fixture(scope="module")
def plain() -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(FOLDER, attn_implementation="eager", dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def url(world_service: Service) -> str:
    return world_service.url


@pytest.fixture(scope="module")
def model(url: str) -> Model:
    return polytrace.connect(url, "tinyworld", rename={"model.layers": "blocks"}, remote=True, dispatch=True)


@pytest.fixture(scope="module")
def local() -> Iterator[Model]:
    """The same weights in this process."""
    with polytrace.load(str(FOLDER), threads=1) as found:
        yield found


def family_of(plain: PreTrainedModel) -> Any:
    config = plain.config
    return llama_like(config.num_hidden_layers, config.vocab_size, config.hidden_size, config.intermediate_size)


def at_once(model: Model, users: list[Program]) -> tuple[list[list[torch.Tensor]], list[Any]]:
    """Every program by a thread of its own, as far as possible at the same moment."""
    saved: dict[int, list[torch.Tensor]] = {}
    tracers: dict[int, Any] = {}
    barrier = threading.Barrier(len(users))

    def user(number: int) -> None:
        barrier.wait()
        tracers[number], saved[number] = record(model, users[number])

    threads = [threading.Thread(target=user, args=(number,)) for number in range(len(users))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [saved[number] for number in range(len(users))], [tracers[number] for number in range(len(users))]


@TWICE
@given(data=st.data())
def test_32_users_at_once_get_the_bits_they_get_alone_and_hugging_faces_numbers(
    model: Model, plain: PreTrainedModel, data: st.DataObject
) -> None:
    users = data.draw(crowds(family_of(plain), 32))
    together, tracers = at_once(model, users)
    assert max(entry.requests for tracer in tracers for entry in tracer.receipt.passes) > 1
    for program, ours in zip(users, together, strict=True):
        alone = record(model, program)[1]
        assert all(torch.equal(a, b) for a, b in zip(ours, alone, strict=True)), program
        assert difference(ours, run_by_hand(plain, program)) <= FLOAT32_TOLERANCE, program


def test_receipts_say_what_fired_where_and_that_only_saves_moved(model: Model) -> None:
    with model.trace("The Eiffel Tower is in the city of") as tracer:
        neuron = model.model.layers[2].mlp.down_proj.input[:, -1, 5].save()
        head = model.model.layers[6].self_attn.o_proj.input[:, :, :32].save()
        model.model.layers[6].self_attn.o_proj.input[:, :, :32] = 0.0
        last = model.lm_head.output[:, -1].save()
    receipt = tracer.receipt
    assert receipt.result_bytes == neuron.nbytes + head.nbytes + last.nbytes
    assert receipt.read_bytes > receipt.result_bytes
    assert [(entry.site, entry.kind) for entry in receipt.fired if "write" in entry.kind] == [
        ("model.layers.6.self_attn.o_proj.input", "write in place")
    ]


def steered(model: Model) -> tuple[list[torch.Tensor], list[int]]:
    """A named edit, then a loop in a session whose step depends on what was seen; the values and the looks' bytes."""
    prompts = ["The Eiffel Tower is in the city of", "The Colosseum is in the city of"]
    vector = torch.randn(model.config.hidden_size, generator=torch.Generator().manual_seed(0))
    with model.edit("steered"):
        model.model.layers[1].output[0][:, -1] += vector
    looks = []
    with model.session(peek=True) as session:
        state: Any = torch.zeros(model.config.hidden_size)
        for _, prompt in session.repeat(3, data=prompts):
            with model.trace(prompt, edits=["steered"]):
                model.model.layers[2].output[0][:, -1] += state
                seen = model.model.layers[6].output[0][:, -1]
                state = state + seen.squeeze(0) * (0.1 if float(seen.norm()) > 1 else 0.2)
                logits = model.lm_head.output[:, -1]
        saved = [state.save(), logits.save()]
        looks += [receipt.result_bytes for receipt in session.peeks]
    assert session.receipt.edits == ("steered@1",)
    model.delete_edit("steered")
    return saved, looks


def test_sessions_looks_and_kept_edits_are_what_they_are_in_one_process(model: Model) -> None:
    with polytrace.load(str(FOLDER), threads=1, dtype="float32") as local:
        theirs, _ = steered(local)
    ours, looks = steered(model)
    assert looks == [4, 4, 4]
    assert difference(ours, theirs) <= FLOAT32_TOLERANCE


def test_names_and_arguments_are_served_with_hugging_faces_numbers(model: Model, plain: PreTrainedModel) -> None:
    ids = [5, 9, 3, 40, 7, 21]
    with model.trace(ids):
        layer = model.model.layers[3]
        layer.q[:, -1, 1] *= -3.0
        ours = [
            layer.q.save(),
            layer.resid_mid.save(),
            layer.head_out[:, :, 2].save(),
            layer.self_attn.inputs[1]["position_embeddings"][0].save(),
            model.output.save().logits,
        ]
        weights = layer.self_attn.W_O[2].save()
    seen: dict[str, torch.Tensor] = {}
    attention, size = plain.model.layers[3].self_attn, plain.config.head_dim

    def scaled(_module: Any, _args: Any, output: torch.Tensor) -> None:
        output.unflatten(-1, (-1, size))[:, -1, 1] *= -3.0
        seen["q"] = output.unflatten(-1, (-1, size)).clone()

    handles = [
        attention.q_proj.register_forward_hook(scaled),
        attention.o_proj.register_forward_pre_hook(lambda _m, args: seen.update(z=args[0].unflatten(-1, (-1, size)))),
        attention.register_forward_pre_hook(
            lambda _m, _a, kwargs: seen.update(cos=kwargs["position_embeddings"][0]), with_kwargs=True
        ),
        plain.model.layers[3].post_attention_layernorm.register_forward_pre_hook(
            lambda _m, args: seen.update(mid=args[0].clone())
        ),
    ]
    with torch.no_grad():
        logits = plain(input_ids=torch.tensor([ids]), use_cache=False).logits
        head = attention.o_proj.weight[:, 2 * size : 3 * size].T.clone()
        untouched = [handle.remove() for handle in handles] and plain(input_ids=torch.tensor([ids])).logits
    assert (
        difference(ours, [seen["q"], seen["mid"], seen["z"][:, :, 2] @ head, seen["cos"], logits]) <= FLOAT32_TOLERANCE
    )
    assert torch.equal(weights, head)
    assert difference([logits], [untouched]) > 100 * FLOAT32_TOLERANCE


def test_sweeps_of_patching_are_what_they_are_in_one_process(model: Model, local: Model) -> None:
    check_equal(every_method(model), every_method(local))


@pytest.mark.parametrize("check", [check_lens, check_tuned_lens, check_scopes, check_directions, check_habits])
def test_a_method_gives_what_it_gives_in_one_process_and_moves_no_more(check: Any, url: str, local: Model) -> None:
    check(polytrace.connect(url, "tinyworld"), local)


@pytest.mark.parametrize("check", [check_vectors, check_saes, check_gradients])
def test_vectors_and_features_are_what_they_are_in_one_process(
    check: Any, url: str, local: Model, tmp_path: Path
) -> None:
    check(polytrace.connect(url, "tinyworld"), local, tmp_path)


def test_a_method_that_only_reads_needs_no_torch(url: str) -> None:
    check_without_torch(url)


def test_a_graph_that_fails_tells_its_owner_which_line_and_hurts_nobody(model: Model) -> None:
    prompt = "The Eiffel Tower is in the city of"

    def quiet() -> torch.Tensor:
        with model.trace(prompt):
            saved = [model.lm_head.output[:, -1].save()]
        return saved[0]

    alone, errors, together = quiet(), [], []

    def fail() -> None:
        try:
            with model.trace(prompt):
                ids = model.lm_head.output[0].argmax(-1) + 10_000_000
                model.model.embed_tokens(ids).save()
        except polytrace.RunError as error:
            errors.append(error)

    threads = [threading.Thread(target=fail)]
    threads += [threading.Thread(target=lambda: together.append(quiet())) for _ in range(7)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(together) == 7
    assert all(torch.equal(logits, alone) for logits in together)
    (error,) = errors
    assert error.where is not None
    assert error.where.startswith("test_promises_over_http.py:")


def test_a_map_over_http_gives_the_numbers_of_one_process_and_goes_on_in_its_folder(
    model: Model, tmp_path: Path
) -> None:
    names = ("Eiffel Tower", "Colosseum", "Space Needle", "Brandenburg Gate")
    prompts = [f"The {names[number % 4]} is in the city of"[: 12 + number % 25] for number in range(600)]

    def body_of(model: Model) -> Any:
        def body() -> dict[str, Any]:
            layer = model.model.layers[4].output[0]
            layer[:, -1] *= 1.5
            logits = model.lm_head.output[:, -1]
            return {
                "layer": layer,
                "best": polytrace.top_k(logits.softmax(-1).amax(-1), 5),
                "mean": polytrace.mean(logits),
                "covariance": polytrace.covariance(layer[..., :8], over="tokens"),
            }

        return body

    mapping = model.map(prompts, body_of(model), to=tmp_path)
    rows = [row for part in mapping for row in part.rows("layer")]
    again = model.map(prompts, body_of(model), to=tmp_path).run()
    with polytrace.load(str(FOLDER), threads=1) as here:
        local = here.map(prompts, body_of(here))
        theirs = [row for part in local for row in part.rows("layer")]
    assert len(rows) == len(theirs) == 600
    for ours, other in zip(rows, theirs, strict=True):
        assert (ours - other).abs().max() <= FLOAT32_TOLERANCE * max(1.0, float(other.abs().max()))
    for number in (3, 599):
        with model.trace(prompts[number]):
            model.model.layers[4].output[0][:, -1] *= 1.5
            alone = model.model.layers[4].output[0].save()
        assert torch.equal(rows[number], alone[0])
    for name in ("mean", "covariance"):
        ours, other = mapping.results[name], local.results[name]
        assert (ours - other).abs().max() <= FLOAT32_TOLERANCE * max(1.0, float(other.abs().max()))
        assert torch.equal(ours, again[name])
    assert mapping.results["best"].prompts.tolist() == local.results["best"].prompts.tolist()


def test_nothing_that_serves_can_run_what_a_user_sent() -> None:
    root = Path(polytrace.__file__).parent.parent
    ways = ("pickle.", "import pickle", "eval(", "exec(", "torch.load(", "trust_remote_code=True", "marshal.")
    for room in ("polytrace", "scheduling", "engine", "cluster", "api"):
        for file in (root / room).rglob("*.py"):
            text = file.read_text().replace(".eval()", "")
            text = re.sub(r"torch\.load\([^()]*weights_only=True[^()]*\)", "", text)  # takes tensors, refuses code
            assert not [way for way in ways if way in text], file


def test_operations_inside_of_forwards_are_those_of_this_process(model: Any) -> None:
    ids = [1, 5, 9, 2, 30, 12]
    with polytrace.load(str(FOLDER)) as here:
        saved = []
        for one in (here, model):
            layer = one.model.layers[3]
            with one.trace(ids):
                rotary = layer.self_attn.source.apply_rotary_pos_emb_0.source.rotate_half_0.output.save()
                query = layer.self_attn.source.attention_interface_0.inputs[0][1].save()
                layer.mlp.source.act_fn_0.output *= 0.5
                edited = one.lm_head.output.save()
            with one.trace(ids):
                plain = one.lm_head.output.save()
            saved.append((rotary, query, edited, plain))
        assert repr(here.model.layers[3].self_attn.source) == repr(model.model.layers[3].self_attn.source)
    for ours, theirs in zip(*saved, strict=True):
        assert (ours - theirs).abs().max() <= FLOAT32_TOLERANCE * max(1.0, float(theirs.abs().max()))
    assert (saved[1][2] - saved[1][3]).abs().max() > 1e-2
    with pytest.raises(polytrace.errors.GraphError, match="several times"), model.trace(ids):
        model.model.source.decoder_layer_0.output.save()


def test_standard_names_and_their_script_are_the_same_in_this_process_and_on_shards(model: Any) -> None:
    own: Any = polytrace.load(str(FOLDER), threads=1)
    script = runpy.run_path(str(Path(__file__).resolve().parents[2] / "examples" / "standard_names.py"))
    vector = torch.randn(own.hidden_size, generator=torch.Generator().manual_seed(0))

    def ask(served: Any, edits: str) -> dict[str, torch.Tensor]:
        with served.trace([PROMPT, "The Colosseum is in"]):
            if edits == "assigned":
                served.token_embeddings = served.token_embeddings * 2
                for name in ("layers_input", "attentions_input", "attentions_output", "mlps_input", "mlps_output"):
                    values = getattr(served, name)
                    values[2] = values[2] * 1.5
                    values[-1] = values[-1] * 1.5
                served.attention_probabilities[-2] = served.attention_probabilities[-2] * 0.5
            elif edits == "in place":
                served.layers_output[3][:, -1] += vector
                served.attention_probabilities[6][:, 3, -1] = 0.0
                served.logits[:, 0] = 0.0
                served.steer([1, 6], vector, positions=[0, -1])
                served.skip_layers(4, 5)
            found = {f"{name}[{layer}]": getattr(served, name)[layer].save() for layer in (1, 3, 6) for name in VALUES}
            for name in ("token_embeddings", "input_ids", "attention_mask", "next_token_probs", "logits"):
                found[name] = getattr(served, name).save()
            found["projected"] = served.project_on_vocab(served.layers_output[2][:, -1]).save()
        return found

    bare = ask(own, "")
    for edits in ("", "assigned", "in place"):
        here, there = ask(own, edits), ask(model, edits)
        for name, value in here.items():
            assert difference([there[name].float()], [value.float()]) <= FLOAT32_TOLERANCE, (edits, name)
        assert not edits or difference([here["logits"]], [bare["logits"]]) > 0.01
    for function, arguments in (
        ("logit_lens", (PROMPT,)),
        ("head_patching", ("The Colosseum is in", "The Kremlin is in")),
        ("steering", (PROMPT, "The Colosseum is in", "The Kremlin is in", 5, 1.0)),
    ):
        here, there = (script[function](served, *arguments) for served in (own, model))
        pairs = zip(here, there, strict=True) if function == "logit_lens" else [(here, there)]
        for value, served in pairs:
            assert difference([served.float()], [value.float()]) <= FLOAT32_TOLERANCE, function
    with model.trace(PROMPT) as tracer:
        hidden = torch.cat([value[:, -1] for value in model.layers_output])
        values, tokens = model.project_on_vocab(hidden).softmax(-1).topk(3)
        values.save(), tokens.save()
    assert tracer.receipt.result_bytes == values.nbytes + tokens.nbytes == 8 * 3 * (4 + 8)
    assert model.get_topk_closest_tokens(vector, 2) == pytest.approx(own.get_topk_closest_tokens(vector, 2), rel=1e-4)
    assert (repr(model.standard), model.blocks) == (repr(own.standard), model.layers)
    own.close()


def test_logs_are_told_while_a_request_runs_with_the_bits_of_its_result(model: Any, capsys: Any) -> None:
    with model.trace() as tracer:
        value: Any = None
        for number in range(16):
            with tracer.invoke(PROMPT):
                if value is not None:
                    model.model.layers[0].output[0][:, -1] = value
                value = model.model.layers[7].output[0][:, -1]
                tracer.log(f"pass {number}", value[0, :3])
    assert len(tracer.receipt.passes) == 16
    printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("pass ")]
    assert [line.split(":")[0] for line in printed] == [f"pass {number}" for number in range(16)]
    assert [line.split(": ", 1)[1] for line in printed] == [str(log.value) for log in tracer.logs]
    heard: dict[str, Any] = {}
    result = model.backend.run(tracer.request, hear=heard.update)
    assert heard  # before it ended
    assert all(torch.equal(result.values[name], value) for name, value in heard.items())


def test_conversations_are_rendered_with_the_served_template(model: Any, chat_world: Path) -> None:
    ids = AutoTokenizer.from_pretrained(chat_world).apply_chat_template(CHAT, add_generation_prompt=True)["input_ids"]
    with model.trace(CHAT) as tracer:
        by_chat = model.lm_head.output[:, -1].save()
    with model.trace([int(token) for token in ids]):
        by_ids = model.lm_head.output[:, -1].save()
    assert tracer.request.invokes[0].sequences == (tuple(ids),) and torch.equal(by_chat, by_ids)


def test_skips_caches_and_empty_invokes_are_the_same_on_four_shards(model: Any, plain: PreTrainedModel) -> None:
    with model.trace() as tracer:
        with tracer.invoke(PROMPT):
            for number in (3, 4):  # the last layer of one stage and the first of the next
                model.model.layers[number].skip(model.model.layers[number].input)
            skipped = model.lm_head.output.save()
        with tracer.invoke("The Colosseum is in"):
            cache = tracer.cache(select=lambda h: h[:, -1])
        with tracer.invoke():
            last = model.lm_head.output[:, -1].save()
    ids = torch.tensor([model.tokenizer.encode(PROMPT).ids])
    with without_layers(plain, "model.layers", {3, 4}), torch.no_grad():
        close(skipped, plain(ids, use_cache=False).logits)
    assert torch.equal(last[:1], skipped[:, -1]) and torch.equal(last[1:], cache["lm_head"].output)
    assert len(cache) > 90, cache.refused
    rows = tracer.receipt.passes[0].layer_rows
    assert rows[3] == rows[4] < rows[2]


def test_a_scan_runs_nothing_and_aliases_and_refusals_are_as_in_one_process(model: Any, url: str) -> None:
    with model.scan(PROMPT) as tracer:
        hidden = model.lm_head(model.model.norm(model.model.layers[2].output[0][:, -1]))
    assert hidden.shape == (1, 3200) and tracer.certificate.passes == 1
    with pytest.raises(GraphError, match="exact shape"), model.scan(PROMPT):
        model.blocks[0].output = torch.zeros(1, 2, 3)
    with pytest.raises(GraphError, match="is served in float32, not in bfloat16"):
        polytrace.connect(url, "tinyworld", torch_dtype=torch.bfloat16)


class Splice(torch.nn.Module):
    """An autoencoder with dropout, as a user writes it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.encode = torch.nn.Sequential(
            torch.nn.Linear(width, 64), torch.nn.ReLU(inplace=True), torch.nn.Dropout(0.5)
        )
        self.decode = torch.nn.Linear(64, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        made: torch.Tensor = self.decode(self.encode(x))
        return made


def test_own_modules_choices_spectra_and_draws_are_the_same_in_this_process_and_on_shards(model: Model) -> None:
    torch.manual_seed(0)
    splice = Splice(model.config["hidden_size"])

    def program(used: Model) -> list[torch.Tensor]:
        with used.trace("The Eiffel Tower is in the city of", seed=3):
            first, last = used.model.layers[0].output[0], used.model.layers[-1].output[0]
            spectrum = torch.fft.rfft(first, dim=-1)
            decoded = splice(used.model.layers[1].output[0])
            used.model.layers[1].output[0][:] = polytrace.cond(decoded.norm() > 0, decoded, lambda: decoded / 0)
            smooth = torch.fft.irfft(spectrum * (spectrum.abs() > 0.1), n=first.shape[-1]) + last  # from another stage
            values = torch.linalg.svdvals(last.flatten(0, 1))
            hidden = used.model.layers[2].mlp.down_proj.input  # each rank has a part
            best = hidden.take_along_dim(hidden.topk(3, dim=-1).indices, dim=-1)
            noise = polytrace.functions.randn(4, 5)
            chosen = torch.multinomial(used.lm_head.output[0, -1].softmax(-1), 5)
            saved = [smooth.save(), values.save(), best.save(), noise.save(), used.lm_head.output[:, -1].save()]
            saved.append(chosen.save())
        return saved

    with polytrace.load(str(FOLDER), threads=1) as local:
        expected = program(local)
    ours = program(model)
    assert difference(ours[:5], expected[:5]) <= FLOAT32_TOLERANCE
    assert torch.equal(ours[3], expected[3]) and torch.equal(ours[5], expected[5])
    assert all(value.isfinite().all() for value in ours[:5])


def test_what_was_checked_of_names_at_load_is_told_over_http(model: Model) -> None:
    ours, whole = model.support(), polytrace.load(FOLDER).support()
    before = "resid_pre = resid_post of the layer before"  # whose ends are on two stages once

    def told(support: Support) -> list[tuple[Any, ...]]:
        checked = [[(check.says, check.outcome) for check in row.checked if check.says != before] for row in support]
        return [(row.name, row.layers, row.where, row.sizes, *own) for row, own in zip(support, checked, strict=True)]

    assert told(ours) == told(whole) and not ours.failing
    (mid,) = ours["resid_mid"]
    assert mid.where == "post_attention_layernorm.input"
    assert {"resid_mid = resid_pre + self_attn.output", "an edit of it changes the logits"} < set(mid.holds)
    assert "on 2 x 2 shards" in repr(ours)
