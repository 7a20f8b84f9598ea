"""Models that are called as they are, of every kind: the bits of plain torch with hooks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from called_by_hand import assert_three_interventions, first_of, first_tensor, plain_run
from model_kinds import DIFFUSION, KINDS, images, seeded, unet
from torch import Tensor, nn

import polytrace
from engine.whole_sites import CallSites, fake_of, record
from polytrace import methods
from polytrace.description import SiteInfo
from polytrace.errors import GraphError, RunError, TooLargeError
from polytrace.graph import Given, Inputs, Port
from polytrace.tensors import RawTensor
from scheduling.call_turns import turns_of


@pytest.mark.parametrize("kind", KINDS)
def test_three_interventions_have_the_bits_of_hooks(kind: str) -> None:
    assert_three_interventions(*KINDS[kind]())


@pytest.mark.parametrize("kind", DIFFUSION)
def test_three_interventions_on_a_diffusion_step_have_the_bits_of_hooks(kind: str) -> None:
    pytest.importorskip("diffusers")
    assert_three_interventions(*DIFFUSION[kind]())


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_call_visits_is_found_without_weights(kind: str) -> None:
    """As it is where weights are. Masks that a model drops when they mask nothing are arguments behind the first."""
    plain, _, call, _ = KINDS[kind]()
    tracer = polytrace.load(plain).trace(**call)
    inputs, constants = tracer._invokes[0].inputs, tracer.recording.constants
    assert inputs is not None
    calls = CallSites(fake_of(plain, lambda tensor: tensor.detach().to("meta")))
    found = calls.of(inputs, constants.tensors)
    really = record(plain, Inputs(args=(), kwargs=call))

    def sides(sites: tuple[SiteInfo, ...]) -> list[Any]:
        return [(site.module, site.port, site.visit, site.leaves) for site in sites if site.port is not Port.INPUTS]

    assert sides(found) == sides(really)
    assert calls.has_looked(inputs, constants.tensors) == (kind in ("llava", "qwen2_vl"))
    assert calls.of(inputs, constants.tensors) is found


class Denoiser(nn.Module):
    """A few steps of diffusion in one forward."""

    def __init__(self, network: nn.Module, steps: int) -> None:
        super().__init__()
        self.network, self.steps = network, steps

    def forward(self, sample: Tensor) -> Tensor:
        for step in reversed(range(self.steps)):
            sample = sample - 0.1 * first_tensor(self.network(sample, step))
        return sample


def test_a_step_of_a_diffusion_loop_is_a_visit() -> None:
    pytest.importorskip("diffusers")
    plain = Denoiser(unet()[0], 3)
    noise = images(1, 8)
    seen: list[Tensor] = []

    def hook(_module: nn.Module, _args: Any, output: Any) -> Tensor | None:
        seen.append(output.clone())
        return 2 * output if len(seen) == 2 else None

    handle = plain.network.get_submodule("mid_block").register_forward_hook(hook)
    with torch.no_grad():
        wanted = plain(noise)
    handle.remove()

    model = polytrace.load(plain)
    with model.trace(noise):
        middle = model.network.mid_block
        read = [visit.output.save() for visit in middle.visits]
        middle.visits[1].output = 2 * middle.visits[1].output
        result = model.output.save()
    assert torch.equal(result, wanted)
    assert torch.equal(read[0], seen[0])
    with torch.no_grad():
        assert not torch.equal(plain(noise), wanted)
    with model.trace(noise):
        assert len(middle.visits) == 3
        model.output.save()


def test_what_a_call_gives_is_what_the_next_is_given() -> None:
    """Several steps in one request: the sample stays where the model is."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Tanh(), nn.Conv2d(8, 3, 3, padding=1))
    noise = images(1, 8)
    with torch.no_grad():
        wanted = noise
        for _ in range(3):
            wanted = wanted - 0.1 * network(wanted)
    model = polytrace.load(network)
    sample: Any = noise
    with model.trace() as tracer:
        for _ in range(3):
            with tracer.invoke(sample):
                sample = model.input - 0.1 * model.output
        result = sample.save()
    assert torch.equal(result, wanted)
    assert len(tracer.receipt.passes) == 3

    plain, _, call, _ = KINDS["bert"]()
    with torch.no_grad():
        embedded = plain.embeddings.word_embeddings(call["input_ids"]) * 2
        wanted = plain(inputs_embeds=embedded, attention_mask=call["attention_mask"])[0]
    model = polytrace.load(plain)
    with model.trace() as tracer:
        with tracer.invoke(**call):
            words = 2 * model.embeddings.word_embeddings.output
            with pytest.raises(GraphError, match="may follow from integers"):
                tracer.invoke(input_ids=model.input)
        with tracer.invoke(inputs_embeds=words, attention_mask=call["attention_mask"]):
            result = model.output[0].save()
    assert torch.equal(result, wanted)


def test_every_visit_of_a_shared_module_is_read_and_written() -> None:
    plain, _, call, _ = KINDS["module"]()
    seen: list[Tensor] = []

    def hook(_module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor] | None:
        seen.append(args[0].clone())
        return (args[0] + 1,) if len(seen) == 3 else None

    handle = plain.get_submodule("shared").register_forward_pre_hook(hook)
    with torch.no_grad():
        wanted = plain(**call)
    handle.remove()

    model = polytrace.load(plain)
    with model.trace(**call):
        first = model.shared.input.save()
        model.shared.visits[2].input = model.shared.visits[-1].input + 1
        result, total = model.output["y"].save(), model.output["hidden"][1].save()
    assert torch.equal(first, seen[0])
    assert torch.equal(result, wanted["y"])
    assert torch.equal(total, wanted["hidden"][1])
    with pytest.raises(GraphError, match="shared is called 3 times in this forward"), model.trace(**call):
        model.shared.visits[3].output.save()


def test_values_flow_through_calls_of_other_shapes() -> None:
    plain, _, call, _ = KINDS["module"]()
    small, large = call["x"], torch.randn(5, 4)
    with torch.no_grad():
        first, other = torch.relu(plain.first(small)), torch.relu(plain.first(large))
        other[:3] += plain.shared(first)  # what the large call gets at its first visit of `shared`
        moved = torch.tanh(plain.shared(other))[:3]
        hidden = moved
        for _ in range(2):
            hidden = torch.tanh(plain.shared(hidden))
        wanted = plain.last(hidden)

    model = polytrace.load(plain)
    with model.trace() as tracer:
        with tracer.invoke(small):
            given = model.shared.output
        with tracer.invoke(large):
            model.shared.input[:3] += given
            back = torch.tanh(model.shared.output)[:3]
        with tracer.invoke(small):
            model.shared.visits[1].input = back
            result = model.output["y"].save()
    assert torch.allclose(result, wanted, rtol=0, atol=1e-6)


def test_two_calls_wait_for_each_other() -> None:
    plain, _, call, other = KINDS["module"]()
    x, y = call["x"], other["x"]
    model = polytrace.load(plain)
    with model.trace() as tracer:
        with tracer.invoke(x):
            mine = model.first.output
        with tracer.invoke(y):
            theirs = model.shared.output
            model.shared.input = mine
            result_y = model.output["y"].save()
        with tracer.invoke(x):
            model.shared.visits[1].input = theirs
            result_x = model.output["y"].save()
    with torch.no_grad():
        hidden = plain.first(x)
        given = plain.shared(hidden)
        for _ in range(3):
            hidden = torch.tanh(plain.shared(hidden))
        wanted_y = plain.last(hidden)
        hidden = given
        for _ in range(2):
            hidden = torch.tanh(plain.shared(hidden))
        wanted_x = plain.last(hidden)
    assert torch.equal(result_y, wanted_y)
    assert torch.equal(result_x, wanted_x)
    assert len(tracer.receipt.passes) == 1


def test_a_value_that_is_needed_earlier_opens_another_pass() -> None:
    plain, _, call, other = KINDS["bert"]()
    with torch.no_grad():
        later = plain(**other).last_hidden_state
    _, wanted = plain_run(plain, "encoder.layer.0", call, lambda tensor: later)
    model = polytrace.load(plain)
    with model.trace() as tracer:
        with tracer.invoke(**call):
            before = model.encoder.layer[0].output.save()
        with tracer.invoke(**other):
            last = model.encoder.layer[1].output
        with tracer.invoke(**call):
            model.encoder.layer[0].output = last
            result = model.output[0].save()
        with tracer.invoke(**call):
            model.embeddings.output = model.embeddings.output + 0 * last
            again = model.encoder.layer[0].output.save()
    assert torch.equal(result, wanted)
    assert torch.equal(again, before)
    assert len(tracer.receipt.passes) == 2
    assert model.validate(tracer).passes == 2


def test_images_and_sound_go_through_the_models_own_processor(tmp_path: Path) -> None:
    pytest.importorskip("PIL")
    plain = KINDS["vit"]()[0]
    plain.save_pretrained(tmp_path / "vit")
    transformers.ViTImageProcessorPil(size={"height": 8, "width": 8}).save_pretrained(tmp_path / "vit")
    model = polytrace.load(str(tmp_path / "vit"))
    made = model.processor(images=np.full((20, 30, 3), 200, np.uint8), return_tensors="pt")
    with model.trace(**made):
        logits = model.output.logits.save()
    with torch.no_grad():
        assert torch.equal(logits, plain(**made).logits)

    plain = KINDS["whisper"]()[0]
    plain.save_pretrained(tmp_path / "whisper")
    sizes = {"feature_size": 8, "hop_length": 400, "chunk_length": 1, "n_fft": 800}
    transformers.WhisperFeatureExtractor(**sizes).save_pretrained(tmp_path / "whisper")
    model = polytrace.load(str(tmp_path / "whisper"))
    sound = np.sin(np.arange(16_000) / 9).astype(np.float32)
    made = model.processor.feature_extractor(sound, sampling_rate=16_000, return_tensors="pt")
    with model.trace(**made, decoder_input_ids=np.array([[1, 5]])):
        hidden = model.model.encoder.output.last_hidden_state.save()
    with torch.no_grad():
        assert torch.equal(hidden, plain.model.encoder(**made).last_hidden_state)


def test_calls_go_one_at_a_time_where_values_go_one_way() -> None:
    plain, _, call, other = KINDS["module"]()
    model = polytrace.load(plain)
    with model.trace(run=False) as tracer:
        with tracer.invoke(**call):
            model.shared.input = 2 * model.shared.input
            last = model.shared.visits[2].output
            (last.sum() + 1).save()
        with tracer.invoke(**other):
            model.first.output = 0 * model.first.output
            first = model.shared.output
        with tracer.invoke(**call):
            model.shared.visits[2].output = first + last
            model.output["y"].save()
    backend: Any = model.backend
    program = backend.work_out(tracer.built_request())
    assert [turn.invokes for turn in turns_of(program, 0)] == [(0,), (1,), (2,)]
    run = [node for turn in turns_of(program, 0) for fragment in turn.fragments for node in fragment.nodes]
    assert sorted(run) == sorted(node for one in program.waves[0].stages[0].fragments for node in one.nodes)


@pytest.mark.parametrize("kind", ["bert", "whisper", "llava"])
def test_reading_every_site_changes_no_bit(kind: str) -> None:
    plain, _, call, _ = KINDS[kind]()
    with torch.no_grad():
        wanted = first_tensor(plain(**call))
    model = polytrace.load(plain)
    with model.trace(**call) as tracer:
        sites = [site for site in model._index.leaves if site.port is not Port.INPUTS]
        for site in sites:
            visit = model.get_submodule(site.module).visits[site.visit]
            visit._port(site.port.value).read_leaf(site.selector).save()
        result = first_of(model.output).save()
    assert torch.equal(result, wanted)
    assert len(sites) > 50
    assert {event.site for event in tracer.receipt.fired} == set(map(str, sites))


def test_shapes_are_known_before_anything_runs() -> None:
    plain, _, call, _ = KINDS["bert"]()
    model = polytrace.load(plain)
    with model.trace(**call, run=False) as tracer:
        hidden = model.encoder.layer[1].output
        assert (hidden.shape, hidden.dtype) == ((2, 5, 16), torch.float32)
        called = model.pooler.dense(hidden[:, 0])
        assert called.shape == (2, 16)
        called.save()
    certificate = model.validate(tracer)
    assert certificate.result_bytes == 2 * 16 * 4
    assert certificate.passes == 1
    with model.scan(**call) as tracer:
        hidden = model.encoder.layer[1].output
    assert hidden.shape == (2, 5, 16)
    assert tracer.certificate is not None


def test_an_encoder_in_a_folder_is_loaded_and_called_as_it_is(tmp_path: Path) -> None:
    plain, path, call, _ = KINDS["bert"]()
    plain.save_pretrained(tmp_path)
    model = polytrace.load(str(tmp_path))
    assert model.config.hidden_size == 16
    seen, wanted = plain_run(plain, path, call, lambda tensor: 2 * tensor)
    with model.trace(**call):
        hidden = model.encoder.layer[0].output.save()
        model.encoder.layer[0].output = 2 * model.encoder.layer[0].output
        result = model.output.last_hidden_state.save()
    assert torch.equal(hidden, seen)
    assert torch.equal(result, wanted)


def test_mistakes_are_told_with_the_users_line() -> None:
    plain, _, call, _ = KINDS["bert"]()
    model = polytrace.load(plain)
    here = r"\(test_any_model.py:\d+\)"

    with (
        pytest.raises(GraphError, match=rf"has shape \[2, 5, 16\] and the value written to it \[2, 2, 16\].*{here}"),
        model.trace(**call),
    ):
        model.encoder.layer[0].output = model.encoder.layer[0].output[:, :2]
        model.output[0].save()
    with (
        pytest.raises(GraphError, match=f"BertModel does not take these arguments: RuntimeError: .*{here}"),
        model.trace(input_ids=call["input_ids"].float()),
    ):
        model.output[0].save()
    taken = r"given: 1 without a name, ids; forward takes input_ids, attention_mask, [\w, ]+"
    with pytest.raises(GraphError, match=f"does not take these arguments: .*; {taken} {here}"):
        model.trace(None, ids=call["input_ids"])
    with pytest.raises(GraphError, match=rf"does not take these arguments: [^;]*{here}"):  # names are not to blame
        model.trace(attention_mask=call["attention_mask"])
    with pytest.raises(GraphError, match=f"belongs to a call: .*{here}"), model.trace():
        model.encoder.layer[0].output.save()
    with pytest.raises(GraphError, match=f"belongs to another trace.*{here}"), model.trace(**call):
        model.trace(inputs_embeds=model.output[0])
    with (
        pytest.raises(GraphError, match=f"BertModel is called with arguments, not with prompts.*{here}"),
        model.trace(**call),
    ):
        model.output[0].at(-1)
    for value, told in [(object(), "argument 0 is a object"), ({1: 2}, "keys that are no texts")]:
        with pytest.raises(GraphError, match=f"{told}.*{here}"):
            model.trace(value)
    with pytest.raises(GraphError, match="a call needs arguments"), model.trace() as tracer:
        tracer.invoke()
    with pytest.raises(GraphError, match=r"model\.generate is not there for such models"):
        model.generate("x")
    with pytest.raises(GraphError, match=rf"module\.source is not there for such models.*{here}"), model.trace(**call):
        model.encoder.layer[0].source  # noqa: B018
    with pytest.raises(GraphError, match=rf"methods are of language models, and BertModel is called as it is.*{here}"):
        methods.logit_lens(model, [[1, 2, 3]])
    with pytest.raises(GraphError, match="a module that is there runs as it is"):
        polytrace.load(plain, dtype="bfloat16")
    with pytest.raises(GraphError, match="offload_gib is for language models"):
        polytrace.load(plain, offload_gib=1.0)
    with pytest.raises(GraphError, match="no dtype, device, threads, random weights or whole are for it"):
        polytrace.load(plain, whole=False)
    with pytest.raises(GraphError, match=rf"or a torch\.nn\.Module, not something of type int {here}"):
        polytrace.load(3)
    scripted = torch.jit.ScriptModule()
    for own, path in ((scripted, "the module"), (nn.Sequential(nn.Tanh(), scripted), "1")):
        with pytest.raises(GraphError, match=f"{path} is a ScriptModule of TorchScript.*load the module.*{here}"):
            polytrace.load(own)


def test_a_models_own_modules_have_their_names() -> None:
    """Names that every decoder has are none here, and what the model itself has is called so."""

    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mlps = nn.ModuleList([nn.Linear(2, 2)])

        def forward(self, x: Tensor) -> Tensor:
            made: Tensor = self.mlps[0](x)
            return made

    model = polytrace.load(Named())
    with model.trace(torch.ones(2)):
        result = model.mlps[0].output.save()
        assert not hasattr(model, "layers_output")
        with pytest.raises(GraphError, match=r"the model \(Named\) has no 'attentions'"):
            model.attentions[0].save()
    assert result.shape == (2,)
    with pytest.raises(GraphError, match=r"model\.support is not there for such models"):
        model.support()
    assert "(mlps)" in repr(model)


def test_a_call_that_fails_fails_its_request_alone() -> None:
    plain, _, call, _ = KINDS["bert"]()
    model = polytrace.load(plain)
    with (
        pytest.raises(RunError, match=r"BertModel raised IndexError: index out of range.*\(test_any_model.py:\d+\)"),
        model.trace(input_ids=call["input_ids"] + 100),
    ):
        model.output[0].save()
    with model.trace(**call):
        result = model.output[0].save()
    with torch.no_grad():
        assert torch.equal(result, plain(**call)[0])


class Either(nn.Module):
    """Calls its modules in one order or in the other."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(2, 2), nn.Linear(2, 2)

    def forward(self, x: Tensor, swap: bool = False) -> Tensor:
        made: Tensor = self.b(torch.relu(self.a(x))) if not swap else self.a(torch.relu(self.b(x)))
        return made


def test_values_flow_between_calls_that_visit_modules_in_another_order() -> None:
    plain, x = seeded(Either), torch.ones(3, 2)
    with torch.no_grad():
        straight = plain(x)
        wanted = plain.a(torch.relu(plain.b(x) + straight))
    model = polytrace.load(plain)
    with model.trace() as tracer:
        with tracer.invoke(x):
            given = model.output
        with tracer.invoke(x, swap=True):
            model.b.output = model.b.output + given
            result = model.output.save()
    assert torch.equal(result, wanted)


def test_a_call_that_is_too_large_is_refused_before_memory_is_taken() -> None:
    plain = seeded(Either)
    calls = CallSites(plain, max_tensor_bytes=1 << 20)
    huge = RawTensor(dtype="float32", shape=(1 << 40, 2), data=memoryview(b""))
    call = Inputs(args=(Given("x"),), kwargs={})
    with pytest.raises(TooLargeError, match=r"a tensor of 8796093022208 bytes .*; the limit is 1048576"):
        calls.of(call, {"x": huge})


def test_a_diffusion_model_in_a_folder_is_called_as_it_is(tmp_path: Path) -> None:
    pytest.importorskip("diffusers")
    plain, path, call, _ = unet()
    saved: Any = plain
    saved.save_pretrained(tmp_path)
    model = polytrace.load(str(tmp_path))
    seen, wanted = plain_run(plain, path, call)
    with model.trace(**call):
        middle, result = model.mid_block.output.save(), model.output.sample.save()
    assert torch.equal(middle, seen)
    assert torch.equal(result, wanted)


class Choosing(nn.Module):
    """Goes by values of its arguments, which it changes on the way."""

    def __init__(self) -> None:
        super().__init__()
        self.few, self.many = nn.Linear(2, 2), nn.Linear(2, 2)
        self.table = torch.arange(8.0).view(4, 2)  # neither a parameter nor a buffer

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        ids[ids < 0] = 0
        rows = self.table[ids] + x
        x.zero_()
        way = self.many if int(ids.sum()) > 3 else self.few
        made: Tensor = way(rows) if float(rows.sum()) < 100 else rows
        return made


def test_a_model_may_go_by_values_and_change_its_arguments() -> None:
    plain = seeded(Choosing)
    model = polytrace.load(plain)
    for ids, name in [([3, -1, 3], "many"), ([1, -1, 1], "few")]:
        x, chosen = torch.ones(3, 2), torch.tensor(ids)
        with torch.no_grad():
            wanted = plain(x.clone(), chosen.clone())
        for _ in range(2):
            with model.trace(x, chosen):
                rows = getattr(model, name).input.save()
                result = model.output.save()
            assert torch.equal(result, wanted)
            assert torch.equal(rows, plain.table[chosen.clamp(min=0)] + 1)
    with model.trace(torch.full((3, 2), 90.0), chosen):
        assert model.output.save().shape == (3, 2)
        with pytest.raises(GraphError, match="few has no output: in this model's forward it is not called"):
            model.few.output.save()


def test_a_site_that_a_call_does_not_come_to_is_an_error_and_no_number() -> None:
    model = polytrace.load(seeded(Choosing))
    told = r"this call did not come to few\.output: what it visits depends on its values \(test_any_model.py:\d+\)"
    with pytest.raises(RunError, match=told), model.trace(torch.ones(3, 2), torch.tensor([1, 0, 0])):
        model.input = model.input + 90
        model.few.output.save()


def test_neither_arguments_nor_weights_change() -> None:
    """In-place code on an input reaches the model's own copy of it; a weight that a module hands out is refused."""

    class Handing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3))

        def forward(self) -> Tensor:
            return self.weight

    class Adding(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.handing = Handing()

        def forward(self, x: Tensor) -> Tensor:
            return x.add_(self.handing())

    plain, x = Adding(), torch.zeros(3)
    model = polytrace.load(plain)
    with model.trace(x):
        model.input += 2
        result = model.output.save()
    assert result.tolist() == [3.0, 3.0, 3.0]
    assert x.tolist() == [0.0, 0.0, 0.0]
    with pytest.raises(GraphError, match="it is a parameter of the model itself"), model.trace(x):
        model.handing.output[0] = 5
        model.output.save()
    with model.trace(x):
        model.handing.output = 2 * model.handing.output
        result = model.output.save()
    assert result.tolist() == [2.0, 2.0, 2.0]
    assert plain.handing.weight.tolist() == [1.0, 1.0, 1.0]
