"""Models that accelerate spreads over the host's memory and a disk, with the bits of plain transformers spread so.

The disk's weights are on the meta device, and come while their module runs: the same hooks that serve several GPUs.
"""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import tempfile
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from accelerate import dispatch_model
from called_by_hand import assert_three_interventions, first_of, plain_run
from model_kinds import KINDS, ids, seeded, unet
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from whole_gradients_by_hand import plain_gradients, weights_of

import polytrace
from engine.links import Solo
from engine.loading import ShardConfig
from engine.offload_folder import OffloadFolder
from engine.whole_loading import whole_class
from engine.whole_places import gpus_of, home_of, quiet_accelerate
from engine.whole_served import WholeServed, check_unmapped
from engine.whole_sites import CallSites
from polytrace.description import serve_the_same
from polytrace.errors import GraphError, RunError, UserError
from polytrace.graph import Given, Inputs
from polytrace.tensors import RawTensor

VIT = {
    "vit.embeddings": "disk",
    "vit.layers.0": "disk",
    "vit.layers.1": "cpu",
    "vit.layernorm": "disk",
    "classifier": "cpu",
}
CLIP = {
    "logit_scale": "cpu",
    "text_model": "disk",
    "vision_model.embeddings": "cpu",
    "vision_model.pre_layrnorm": "cpu",
    "vision_model.encoder.layers.0": "disk",
    "vision_model.encoder.layers.1": "cpu",
    "vision_model.post_layernorm": "disk",
    "visual_projection": "disk",
    "text_projection": "cpu",
}
SMALL = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
BERT = {"embeddings": "cpu", "encoder.layer.0": "disk", "encoder.layer.1": "disk", "pooler": "disk"}


def saved(kind: str, folder: Path) -> tuple[nn.Module, str, dict[str, Any], dict[str, Any]]:
    model, path, call, other = KINDS[kind]()
    model.save_pretrained(folder)
    return model, path, call, other


def spread_by_hand(folder: Path, kind: Any, device_map: dict[str, str]) -> nn.Module:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The following device_map keys do not match any submodules")  # tensors
        made: nn.Module = kind.from_pretrained(folder, device_map=device_map, offload_folder=folder / "plain")
    return made.eval()


@pytest.mark.parametrize(
    ("kind", "device_map"), [("vit", VIT), ("clip", CLIP), ("bert", BERT)], ids=["vit", "clip", "bert"]
)
def test_a_spread_model_has_the_bits_of_the_same_one_in_plain_transformers(
    kind: str, device_map: dict[str, str], tmp_path: Path
) -> None:
    whole, path, call, other = saved(kind, tmp_path)
    plain = spread_by_hand(tmp_path, type(whole), device_map)
    model: Any = polytrace.load(str(tmp_path), device_map=device_map)
    assert plain.get_submodule(path) is not None and next(plain.get_submodule(path).parameters()).is_meta
    assert_three_interventions(plain, path, call, other, model, shows=1e-3)
    _, wanted = plain_run(plain, path, call, lambda tensor: 2 * tensor)
    own: Any = polytrace.load(plain)  # a module that somebody else has spread
    with own.trace(**call):
        module = own.get_submodule(path)
        module.output = 2 * module.output
        result = first_of(own.output).save()
    assert torch.equal(result, wanted)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("vit")
    saved("vit", made)
    return made


@pytest.fixture(scope="module")
def vit(folder: Path) -> Any:
    return polytrace.load(str(folder), device_map=VIT)


@pytest.fixture(scope="module")
def plain() -> nn.Module:
    return KINDS["vit"]()[0]


@pytest.fixture(scope="module")
def call() -> dict[str, Any]:
    return KINDS["vit"]()[2]


def test_weights_modules_and_gradients_of_offloaded_parts_are_exact(
    vit: Any, folder: Path, plain: nn.Module, call: dict[str, Any]
) -> None:
    layer = plain.get_submodule("vit.layers.0")
    with vit.trace(**call):
        hidden = vit.vit.layers[1].output
        weight = vit.vit.layers[0].attention.q_proj.weight.save()
        again = vit.vit.layernorm(hidden).save()
        hidden = hidden.save()
    assert torch.equal(weight, layer.get_parameter("attention.q_proj.weight"))
    with torch.no_grad():
        assert torch.equal(again, plain.get_submodule("vit.layernorm")(hidden))

    def double(tensor: Tensor) -> None:
        tensor *= 2

    result, ((at_input, at_output),) = plain_gradients(plain, "vit.layers.0", call, double, 0.5, (1,))
    with vit.trace(**call) as tracer:
        got, own = vit.vit.layers[0].input, vit.vit.layers[0].output
        own[:] = 2 * own
        loss = (vit.output.logits * weights_of(result, 1)).sum()
        with loss.backward():
            back = [got.grad.save(), own.grad.clone().save()]
            own.grad *= 0.5
    for ours, theirs in zip(back, (at_input, at_output), strict=True):
        assert float((ours - theirs).abs().max()) <= 1e-6 * max(1.0, float(theirs.abs().max()))
        assert theirs.abs().max() > 1e-4
    whole: Any = polytrace.load(str(folder))
    with whole.trace(**call, run=False) as same:
        got, own = whole.vit.layers[0].input, whole.vit.layers[0].output
        own[:] = 2 * own
        loss = (whole.output.logits * weights_of(result, 1)).sum()
        with loss.backward():
            got.grad.save(), own.grad.clone().save()
            own.grad *= 0.5
    # what came from the disk for the call stays until its way back
    coming = sum(tensor.nbytes for name, tensor in layer.named_parameters() if name.endswith("weight"))
    assert vit.validate(tracer).tape_bytes >= whole.validate(same).tape_bytes + coming > 2 * coming


def test_a_call_that_ends_early_leaves_no_offloaded_weights_there(vit: Any, call: dict[str, Any]) -> None:
    with vit.trace(**call):
        vit.vit.embeddings.patch_embeddings.output.save()  # while the embeddings run, which have weights of their own
    module = vit.backend.shard.model
    assert all(tensor.is_meta for tensor in module.get_submodule("vit.embeddings").parameters())
    assert not any(tensor.is_meta for tensor in module.get_submodule("vit.layers.1").parameters())


def test_calls_at_each_others_pace_are_exact_or_refused(
    vit: Any, folder: Path, plain: nn.Module, call: dict[str, Any]
) -> None:
    other = {"pixel_values": 2 * call["pixel_values"]}
    theirs, _ = plain_run(plain, "vit.layers.0", call)
    given, _ = plain_run(plain, "vit.layers.1", other)

    def change(tensor: Tensor) -> Tensor:
        return 0.5 * tensor + 0.5 * given

    _, wanted = plain_run(plain, "vit.layers.1", call, change)
    places = VIT | {"vit.embeddings": "cpu", "vit.layers.1": "disk"}
    closed: Any = polytrace.load(str(folder), device_map=places)
    assert torch.equal(there_and_back(closed, call, other), wanted)
    assert theirs.shape == given.shape
    with pytest.raises(RunError, match=r"vit\.embeddings has its weights for one call at a time.*test_device_maps\.py"):
        there_and_back(vit, call, other)


def there_and_back(model: Any, call: dict[str, Any], other: dict[str, Any]) -> Tensor:
    """A call gives another one a value, and is given one by it."""
    with model.trace(run=False) as tracer:
        with tracer.invoke(**call):
            first = model.vit.layers[0].output
        with tracer.invoke(**other):
            model.vit.layers[0].output = model.vit.layers[0].output + 0 * first
            second = model.vit.layers[1].output
        with tracer.invoke(**call):
            model.vit.layers[1].output = 0.5 * model.vit.layers[1].output + 0.5 * second
            model.output.logits.save()
    request = tracer.built_request()
    nodes = [replace(node, invoke=0) if getattr(node, "invoke", None) == 2 else node for node in request.graph.nodes]
    joined = replace(request, graph=replace(request.graph, nodes=tuple(nodes)), invokes=request.invokes[:2])
    (logits,) = model.backend.run(joined).values.values()
    return torch.as_tensor(logits)


def test_calls_of_a_spread_model_are_one_call_too(folder: Path, plain: nn.Module, call: dict[str, Any]) -> None:
    model: Any = polytrace.load(str(folder), device_map=VIT, merges_calls=True)
    calls = [call["pixel_values"] + number for number in range(4)]
    rows = []
    with model.trace() as tracer:
        for pixels in calls:
            with tracer.invoke(pixel_values=pixels):
                model.vit.layers[0].output[:, 0] += 1.0
                rows.append(model.output.logits.save())
    assert tracer.receipt.passes[0].calls_merged == 4

    def add(tensor: Tensor) -> None:
        tensor[:, 0] += 1.0

    for pixels, row in zip(calls, rows, strict=True):
        wanted = plain_run(plain, "vit.layers.0", {"pixel_values": pixels}, add)[1]
        assert float((row - wanted).abs().max()) <= 1e-5 * max(1.0, float(wanted.abs().max()))
    with model.trace(pixel_values=calls[2]):
        model.vit.layers[0].output[:, 0] += 1.0
        alone = model.output.logits.save()
    assert torch.equal(alone, rows[2])


@pytest.mark.parametrize("device_map", ["auto", VIT, {"": "disk"}], ids=["auto", "mapping", "disk"])
def test_random_weights_are_spread_and_the_same(device_map: Any, folder: Path, call: dict[str, Any]) -> None:
    results = []
    for places in (None, device_map):
        model: Any = polytrace.load(str(folder), random_weights=3, device_map=places)
        with model.trace(**call):
            results.append(model.output.logits.save())
    assert torch.equal(*results)
    is_offloaded = any(tensor.is_meta for tensor in model.backend.shard.model.parameters())
    assert is_offloaded == (device_map != "auto"), "there is room for all in the host's memory"


def test_a_diffusion_model_lies_on_a_disk_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("diffusers")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    whole, path, call, _ = unet()
    whole.save_pretrained(tmp_path)
    places = {name: "disk" if name == "mid_block" else "cpu" for name, _ in whole.named_children()}
    with polytrace.load(str(tmp_path), device_map=places) as opened:
        model: Any = opened
        (made,) = tmp_path.glob("polytrace-offload-*")
        assert list(made.glob("mid_block*"))
        _, wanted = plain_run(whole, path, call, lambda tensor: 2 * tensor)
        with model.trace(**call):
            first_of(model.get_submodule(path).output)[:] *= 2
            result = first_of(model.output).save()
    assert torch.equal(result, wanted)
    assert not list(tmp_path.glob("polytrace-offload-*"))


def test_the_folder_of_a_process_that_was_killed_goes_with_the_next_one_that_is_made(tmp_path: Path) -> None:
    told = "import time; from engine.offload_folder import OffloadFolder as F; f = F(); print(f.path, flush=True); "
    environment = os.environ | {"TMPDIR": str(tmp_path), "PYTHONPATH": os.getcwd()}
    command = [sys.executable, "-c", told + "time.sleep(60)"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, text=True) as process:
        assert process.stdout is not None
        left = Path(process.stdout.readline().strip())
        living = subprocess.run([sys.executable, "-c", told], env=environment, check=True, capture_output=True)
        assert left.is_dir() and left.parent == tmp_path, "it is in use"
        assert not Path(living.stdout.decode().strip()).exists(), "it went with its process"
        process.send_signal(signal.SIGKILL)
    assert left.is_dir()
    subprocess.run([sys.executable, "-c", told], env=environment, check=True, capture_output=True)
    assert not left.exists()


def test_a_folder_goes_when_nobody_has_it() -> None:
    own = OffloadFolder()
    path = own.path
    assert path.is_dir() and own.path == path
    del own
    gc.collect()
    assert not path.exists()


@pytest.mark.parametrize(
    ("device_map", "told"),
    [
        (
            VIT | {"vit.layers.7": "cpu"},
            r"places vit\.layers\.7, which ViTForImageClassification does not have; did you",
        ),
        ({name: VIT[name] for name in VIT if name != "classifier"}, r"leaves out classifier\.weight, .*place all"),
        ({"vit.embedings": "cpu"}, r"places vit\.embedings, which ViT\w+ does not have; did you mean vit\.embeddings"),
        ({"vit.layers.0": "cpu"}, "leaves out vit.embeddings.cls_token, .* more of ViT.*place all"),
        ({"": 63}, "'cuda:63' is not there"),
        (VIT | {"classifier": 3}, r"names GPU 3, and there are \d GPUs here: place its parts on fewer, and"),
        ({"": "cpu", "vit.layers.0": "disk"}, "places the whole model and vit.layers.0, which is a part of it"),
        ({"vit": "cpu", "vit.layers.0": "disk"}, "places vit and vit.layers.0.*name the other parts of vit"),
        ({"vit": "cpu", "classifier": "tpu"}, "puts classifier on 'tpu': a device is"),
        ({"vit": True, "classifier": "cpu"}, "puts vit on True: a device is"),
        ({"vit": -1}, "puts vit on -1: GPUs have the numbers 0 to 63"),
        ({"vit": 10**6000}, "puts vit on a very large number"),
        ({"(a+)+$": "cpu"}, r"places '\(a\+\)\+\$': paths of modules"),
        ({3: "cpu"}, "places 3: paths of modules"),
        ({}, "the device map is empty"),
        ({f"a{number}": "cpu" for number in range(5000)}, "has 5000 entries; it has at most 4096"),
        ("gpu", "'gpu' is no device map: a device map is one of auto, balanced"),
        (1.5, "a float is no device map"),
    ],
)
def test_a_device_map_that_is_none_is_told_before_weights_are_read(device_map: Any, told: str, folder: Path) -> None:
    with pytest.raises(GraphError, match=told) as error:
        polytrace.load(str(folder), device_map=device_map)
    assert error.value.where is not None and error.value.where.startswith("test_device_maps.py")


def test_parts_that_are_all_on_one_device_are_a_device_map(
    folder: Path, plain: nn.Module, call: dict[str, Any]
) -> None:
    model: Any = polytrace.load(str(folder), device_map={"vit": "cpu", "classifier": "cpu"}, device="cpu")
    with model.trace(**call):
        result = model.output.logits.save()
    with torch.no_grad():
        assert torch.equal(result, plain(**call).logits)
    with pytest.raises(GraphError, match="'auto' takes the GPUs that there are: give one of them"):
        polytrace.load(str(folder), device_map="auto", device="cuda:1")


def test_a_tensor_beside_modules_lies_where_it_is_used(tmp_path: Path) -> None:
    saved("clip", tmp_path)
    with pytest.raises(GraphError, match=r"puts logit_scale on disk: it is a tensor beside modules.*on cpu"):
        polytrace.load(str(tmp_path), device_map=CLIP | {"logit_scale": "disk"})


def test_weights_that_are_one_lie_on_one_disk(tmp_path: Path) -> None:
    whole = seeded(lambda: transformers.BertForMaskedLM(transformers.BertConfig(**SMALL)))
    whole.save_pretrained(tmp_path)  # type: ignore[operator]
    with pytest.raises(GraphError, match=r"one of bert\.embeddings\.\S+ and cls\.\S+ on disk, and they are one tensor"):
        polytrace.load(str(tmp_path), device_map={"bert": "cpu", "cls": "disk"})
    words = {"input_ids": ids(2, 5)}
    places = {"bert.embeddings": "disk", "bert.encoder": "cpu", "cls": "disk"}
    model: Any = polytrace.load(str(tmp_path), device_map=places)
    _, wanted = plain_run(whole, "bert.encoder.layer.0", words, lambda tensor: 2 * tensor)
    with model.trace(**words):
        model.bert.encoder.layer[0].output = 2 * model.bert.encoder.layer[0].output
        result = model.output.logits.save()
    assert torch.equal(result, wanted)


def test_sites_are_found_of_a_model_on_two_gpus() -> None:
    """Of which there are none here: its tensors are fake ones, and that they lie there is all that is looked at."""
    model, _, call, _ = KINDS["vit"]()
    alone = sites_of(model, call)
    mode = FakeTensorMode()

    def moved(tensor: Tensor, gpu: int) -> nn.Parameter:
        return nn.Parameter(FakeTensor(mode, tensor.detach().to("meta"), torch.device("cuda", gpu)), False)

    for module in model.modules():
        gpu = int(module is not model and any(module is one for one in model.get_submodule("vit.layers.1").modules()))
        for name, tensor in list(module._parameters.items()):
            if tensor is not None:
                module._parameters[name] = moved(tensor, gpu)
    assert [one.index for one in gpus_of(model)] == [0, 1]
    assert home_of(model) == torch.device("cuda:0")
    assert sites_of(model, call) == alone


class Chain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.c(torch.tanh(self.b(torch.tanh(self.a(x)))))
        return made


@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")  # accelerate does, for tied weights
def test_what_a_request_has_of_two_devices_comes_together_and_goes_where_it_belongs() -> None:
    """The engine runs as it does, on fake tensors of two devices: torch refuses whatever would mix them."""
    places = {"a": "cpu:0", "b": "cpu:1", "c": "cpu:1"}
    mode, plain = FakeTensorMode(allow_non_fake_inputs=True), Chain().eval()
    with mode, quiet_accelerate():
        for path, device in places.items():
            module = plain.get_submodule(path)
            for name, tensor in list(module.named_parameters()):
                fake = FakeTensor(mode, tensor.detach().to("meta"), torch.device(device))
                module._parameters[name] = nn.Parameter(fake, requires_grad=False)
        dispatch_model(plain, places, main_device="cpu:0")
        with pytest.raises(RuntimeError, match="at least two devices"):
            plain.get_parameter("a.weight") + plain.get_parameter("b.weight")
    model: Any = polytrace.load(plain)
    vector = torch.ones(4, requires_grad=True)
    with model.trace(torch.randn(2, 4), run=False) as tracer:
        first, second = model.a.output, model.b.output
        model.b.output = first + second + vector
        model.c.input[:, 0] += first[:, 0]
        called = model.b(first) + first
        weights = model.b.weight + model.a.weight
        loss = model.output.sum() + called.sum() + weights.sum()
        loss.backward()
        (first.grad + second.grad + first).save()
        weights.save()
    with mode:
        values = model.backend.run(tracer.built_request()).values
    assert {tuple(tensor.shape) for tensor in values.values()} == {(2, 4), (4, 4), (4,)}, "the vector's gradient too"
    assert {tensor.device for tensor in values.values()} == {torch.device("cpu:0")}


def sites_of(model: nn.Module, call: dict[str, Any]) -> Any:
    ((name, tensor),) = call.items()
    raw = RawTensor(dtype="float32", shape=tuple(tensor.shape), data=memoryview(b""))
    return CallSites(model).of(Inputs(args=(), kwargs={name: Given(name)}), {name: raw})


def test_a_shard_says_where_its_weights_are_and_what_comes_and_goes(folder: Path) -> None:
    lines: list[Any] = []
    config = ShardConfig(source=str(folder), device_map=VIT)
    shard = WholeServed(config, Solo(), whole_class(str(folder)))
    shard.start(lines.append)
    description = shard.describe("vit", [shard.gate()])
    assert "vit.layers.0.attention.q_proj" in description.offloaded and "classifier" not in description.offloaded
    whole = WholeServed(replace(config, device_map=None), Solo(), whole_class(str(folder)))
    whole.start(lines.append)
    other = whole.describe("vit", [whole.gate()])
    assert description != other and serve_the_same(description, other)
    assert lines[-2].startswith("loaded ") and " on cpu, " in lines[-2] and lines[-2].endswith(" on disk")
    assert " on " not in lines[-1]
    shard.stop()
    whole.stop()


def test_a_language_model_has_no_device_map() -> None:
    check_unmapped("tiny", None)
    with pytest.raises(UserError, match=r"served as a language model.*stages, ranks and offload_bytes"):
        check_unmapped("tiny", "auto")
