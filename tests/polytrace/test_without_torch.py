"""The client where torch is not installed: in a process of its own, where importing torch fails."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

PROLOGUE = """
import sys
for name in ("torch", "transformers", "ray"):
    sys.modules[name] = None
import numpy as np
from conftest import FakeBackend
from polytrace import functions
from polytrace.certificate import ValueShape
from polytrace.errors import GraphError
from polytrace.graph import Op, Write
from polytrace.model import Model

backend = FakeBackend()
model = Model(backend)
layer = model.model.layers[1]

def refused(use, *words):
    try:
        use()
    except GraphError as error:
        assert all(word in str(error) for word in words), str(error)
    else:
        raise AssertionError("not refused")

def ops():
    return [node.name for node in backend.requests[-1].graph.nodes if isinstance(node, Op)]
"""


def run(program: str) -> None:
    """Runs a program behind the prologue; its asserts are the test's."""
    here = Path(__file__).parent
    environment = {"PYTHONPATH": f"{here}:{here.parents[1]}", "PATH": "/usr/bin:/bin"}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", PROLOGUE + program],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr


def test_mistakes_are_told_without_torch() -> None:
    run(
        """
with model.trace([1, 2, 3]) as tracer:
    hidden = layer.output
    refused(lambda: layer + 1, "is a module, not a value", "`.output`")
    refused(lambda: layer[:, -1], "is a module, not a value")
    refused(lambda: layer.mean(-1), "'mean'", "`.output.mean`")
    refused(lambda: hidden + layer, "is a module, not a value")
    refused(lambda: layer.self_attn.output + 1, "tuple", "`.output[0]`")
    refused(lambda: hidden.meen(-1), "'meen'", "did you mean mean")
    refused(lambda: hidden.grad, "loss.backward()")
    refused(lambda: tracer.receipt, "when its block ends")
    refused(lambda: tracer.output, "model.logits.save()")
    refused(lambda: model.trace(hidden), "prompts are known before")
    hidden.save()
"""
    )


def test_values_record_and_become_arrays() -> None:
    run("""
backend.results = {"0": np.arange(6, dtype=np.float32).reshape(2, 3), "1": np.array(2.0)}
with model.trace("the Eiffel Tower") as tracer:
    hidden = layer.output[0].save()
    layer.output[0][:, -1] += np.ones(8, np.float32)
    logits = model.lm_head(model.model.norm(hidden * 2 - 1))
    best = (np.float32(1) - functions.softmax(logits, dim=-1).mean(-1).to("float64")).save()
    assert hidden.shape == (1, 4, 8) and hidden.dtype == "float32" and len(hidden) == 1
    assert "model.layers.1.output" in repr(hidden)
assert ops() == ["getitem", "add", "setitem", "mul", "sub", "softmax", "mean", "to", "rsub"], ops()
assert sum(isinstance(node, Write) for node in backend.requests[-1].graph.nodes) == 1
assert type(hidden.value) is np.ndarray and hidden.shape == (2, 3) and hidden.mean() == 2.5
assert np.array_equal(hidden, np.arange(6).reshape(2, 3))
assert np.stack([hidden, hidden]).shape == (2, 2, 3)
assert ((hidden + 1) * hidden)[0, 1] == 2 and (1 - hidden)[1, 2] == -4 and (hidden == 3).sum() == 1
assert float(best) == 2.0 and np.exp(best) > 7 and [row.sum() for row in hidden] == [3, 12]
assert tracer.receipt.tokens == 3 and tracer.tokens[0][0] == "<s>"
""")


def test_in_place_code_is_recorded() -> None:
    run("""
with model.trace([1, 2, 3]):
    h = layer.mlp.output
    h[:, 0] = 0
    h.mul_(2)
    last = h[:, -1]
    last -= 1
    last.zero_()
    h.at(0).fill_(3)
    h.save()
assert ops().count("setitem") == 4, ops()
assert sum(isinstance(node, Write) for node in backend.requests[-1].graph.nodes) == 5
""")


def test_shapes_are_asked_of_the_service_once() -> None:
    run("""
backend.shape = ValueShape(shape=(1, 3, 32), dtype="bfloat16")
for _ in range(3):
    with model.trace([1, 2, 3]):
        value = model.lm_head.output * 2
        assert value.shape == (1, 3, 32) and value.dtype == "bfloat16"
        left, right = value.chunk(2, dim=-1)
        first, *_ = value.unbind(1)
        left.save()
assert len(backend.validated) == 1
""")


def test_blocks_offer_the_same() -> None:
    run("""
import contextlib, io
import polytrace
told = io.StringIO()
with contextlib.redirect_stdout(told), model.trace([1, 2, 3]) as tracer:
    cache = tracer.cache(modules=["model.layers.0", "model.layers.2.mlp"], select=lambda h: h[:, -1])
    layer.skip(layer.input)
    refused(lambda: layer.mlp.output, "model.layers.1 is skipped")
    backend.shape = ValueShape(shape=(1, 2), dtype="float32")
    tracer.log(model.lm_head.output[0, -1, :2], "logits")
    kept = polytrace.save([])
    kept.append(model.lm_head.output)
    tracer.stop()
assert cache["model.layers.0"].output.shape == (1, 2) and kept[0].shape == (1, 2)
assert told.getvalue().startswith("logits: [[0. 0.]]") and tracer.logs[0].value.shape == (1, 2)

ran = len(backend.requests)
backend.shape = ValueShape(shape=(1, 3, 8), dtype="float32")
with model.scan([1, 2, 3]) as tracer:
    doubled = layer.output * 2
assert len(backend.requests) == ran and doubled.shape == (1, 3, 8) and doubled.dtype == "float32"
refused(lambda: doubled + 1, "was scanned")

with model.trace() as tracer:
    with tracer.invoke([1, 2, 3]):
        pass
    with tracer.invoke([4, 5]):
        pass
    with tracer.invoke():
        last = layer.output[:, -1].save()
assert ops() == ["getitem", "getitem", "cat"], ops()
refused(lambda: model.trace([{"role": "user", "content": "x"}]), "without a chat template")
""")


def test_refusals_are_the_same() -> None:
    run("""
with model.trace([1, 2, 3]):
    h = layer.output[0].save()
    refused(lambda: bool(h), "torch.where")
    refused(lambda: float(h), "float()")
    refused(lambda: h.item(), ".item()")
    refused(lambda: h.softmux(-1), "did you mean softmax")
    refused(lambda: h.sum(dims=1), "did you mean dim")
    refused(lambda: h[0], "output[0][:, -1]")
    refused(lambda: np.asarray(h), "results.append")
    refused(lambda: functions.airy(h), "no operation 'airy'")
    refused(lambda: functions.exp(1), "none among these")
    unsaved = h + 1
refused(lambda: unsaved + 1, "was not saved")
""")


def test_results_decode_to_arrays_with_bfloat16_widened() -> None:
    run("""
from polytrace.kinds import value_kind
from polytrace.tensors import RawTensor
decode = value_kind().decode
bits = np.array([0x3F80, 0xC000], np.uint16)
wide = decode(RawTensor(dtype="bfloat16", shape=(2,), data=memoryview(bits.tobytes())))
assert wide.dtype == np.float32 and wide.tolist() == [1.0, -2.0]
buffer = np.array([[1, 2]], np.int64).tobytes()
assert decode(RawTensor(dtype="int64", shape=(1, 2), data=memoryview(buffer))).tolist() == [[1, 2]]
""")


def test_a_map_gives_arrays() -> None:
    run("""
import polytrace
from polytrace.backend import Result
from polytrace.graph import Save
from conftest import receipt

def values(request):
    numbers = [invoke.sequences[0][0] for invoke in request.invokes]
    total = np.full(8, float(sum(numbers)))
    saves = [node.name for node in request.graph.nodes if isinstance(node, Save)]
    made = {"sum:sum": total, "mean:sum": total, "mean:count": np.array(len(numbers))}
    return {name: made[name] if name in made else np.full((1, 8), numbers[int(name.split("/")[1])]) for name in saves}

backend.run = lambda request, tell=None: Result(values=values(request), receipt=receipt())
backend.shape = ValueShape(shape=(1, 8), dtype="float32")

def body():
    last = layer.mlp.output
    return {"last": last, "sum": polytrace.sum(last), "mean": polytrace.mean(last * 2)}

mapping = model.map([[number, 1] for number in range(1, 7)], body)
(part,) = mapping
assert type(part["last"]) is np.ndarray and part["last"][:, 0].tolist() == [1, 2, 3, 4, 5, 6]
assert [row.shape for row in part.rows("last")] == [(8,)] * 6
assert mapping.results["sum"].tolist() == [21.0] * 8 and mapping.results["mean"].tolist() == [3.5] * 8
assert mapping.results["sum"].dtype == np.float64
refused(lambda: model.map([[1, 2]] * 3, lambda: {"x": layer.mlp.output.softmax(0), "y": polytrace.max(1)}).run(), "max")
""")


def test_importing_polytrace_imports_nothing_heavy() -> None:
    program = (
        "import sys, polytrace; print(sorted({'torch', 'numpy', 'httpx', 'transformers', 'ray'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_sessions_looks_edits_and_adapters_need_no_torch() -> None:
    run("""
import json, struct, tempfile
from pathlib import Path
import polytrace

with model.edit("happy") as edited:
    layer.output[0].at(1)[:, :4] += np.ones(4, np.float32)
    assert layer.output[0].shape[-1] == 8
    refused(lambda: layer.output[0].shape[0], "later traces")
with edited.session() as session:
    with edited.trace([1, 2, 3]):
        carried = layer.output[0][:, -1]
    refused(lambda: float(carried), "this session sends when its block ends", "peek=True")
    with model.trace([4, 5], edits=["happy"]):
        model.model.layers[2].output[0][:, -1] = carried
        model.lm_head.output.save()
assert session.request.options.edits == ("happy@1",), session.request.options
assert sum(isinstance(node, Write) for node in session.request.graph.nodes) == 3

backend.results = {"0": np.array(3.0)}
with model.trace([1, 2, 3], peek=True) as tracer:
    norm = layer.output[0].norm()
    assert norm.item() == 3.0 and int(norm) == 3 and bool(norm) and f"{norm:.1f}" == "3.0" and norm.tolist() == 3.0
    assert norm.numpy() == np.asarray(norm) == 3.0
    norm.save()
assert len(tracer.peeks) == 1

folder = Path(tempfile.mkdtemp())
name = "base_model.model.lm_head.lora_"
header = json.dumps({
    name + "A.weight": {"dtype": "F32", "shape": [2, 8], "data_offsets": [0, 64]},
    name + "B.weight": {"dtype": "F32", "shape": [32, 2], "data_offsets": [64, 320]},
}).encode()
(folder / "adapter_model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(320))
config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4}
(folder / "adapter_config.json").write_text(json.dumps(config))
try:
    model.edited(polytrace.lora(folder))
except GraphError as error:
    assert "lm_head" in str(error), error  # the description by hand has no input of it
""")


def test_standard_names_need_no_torch() -> None:
    run("""
from dataclasses import replace
from polytrace.description import PointInfo
from polytrace.graph import Port, Site
points = [
    PointInfo(module=f"model.layers.{n}", name="resid_post", site=Site(module=f"model.layers.{n}", port=Port.OUTPUT))
    for n in range(4)
]
points.append(PointInfo(module="", name="logits", site=Site(module="", port=Port.OUTPUT, selector=("logits",))))
backend.description = replace(
    backend.description, points=tuple(points), standard={"ln_final": "model.norm", "lm_head": "lm_head"}
)
model = Model(backend)
with model.trace([1, 2, 3]):
    mask = model.attention_mask.save()
    model.steer([1, -1], np.ones(8, np.float32), factor=2.0, positions=np.array([0, -1]))
    probabilities = model.next_token_probs.save()
    vocabulary = model.project_on_vocab(model.layers_output[2][:, -1]).save()
written = [node.site.module for node in backend.requests[-1].graph.nodes if isinstance(node, Write)]
assert written == ["model.layers.1", "model.layers.3"], written
assert "softmax" in ops() and "setitem" in ops(), ops()
assert "layers_output[0-3]: [sequence, token, feature]" in repr(model)
refused(lambda: setattr(model, "attention_mask", 1), "attention_probabilities[i]")
""")


def test_transformer_lens_habits_say_that_they_need_torch() -> None:
    run(
        """
from polytrace.methods import HookedModel
refused(lambda: HookedModel(model), "HookedModel computes with torch", "pip install torch")
"""
    )


def test_a_loop_gives_arrays_and_a_body_that_is_recorded_once_a_sequence_of_them() -> None:
    run(
        """
import polytrace
from polytrace.certificate import Generated
from polytrace.graph import Last, Stop

backend.shape = ValueShape(shape=(1, 8), dtype="float32")
backend.results = {f"{name}@{step}": np.full((1, 2), step, np.float32) for name in "01" for step in range(2)}
backend.results["2"] = np.ones(2, np.float32)
with model.generate([1, 2, 3], max_new_tokens=3) as tracer:
    found, total = [], 0.0
    for step in tracer.iter[:]:
        hidden = layer.output[0][:, -1]
        total = total + hidden
        found.append(hidden.save())
        if step == 2:
            tracer.token = 5
    with tracer.all():
        looped = model.lm_head.output.save()
        tracer.stop(when=tracer.token == 7)
    mean = functions.stack(found).mean(0).save()
nodes = backend.requests[-1].graph.nodes
assert [len(node.values) for node in nodes if isinstance(node, Last)] == [1, 1, 1]
assert [node.num_steps for node in nodes if isinstance(node, Stop)] == [3]
assert len(polytrace.came(found)) == 2 and float(found[1][0, 0]) == 1.0
assert found[0].steps.stack().shape == (2, 1, 2)
assert len(looped) == 2 and looped.stack().shape == (2, 1, 2) and float(looped[-1][0, 1]) == 1.0
assert mean.shape == (2,)
refused(lambda: found[2] + 1, "step 2 never came")
refused(lambda: np.asarray(looped), "one tensor for each step that came")
refused(lambda: model.generate([1], max_new_token=2), "did you mean max_new_tokens")

questions = len(backend.validated)
with model.generate([1, 2, 3], max_new_tokens=3, run=False) as tracer:
    for _ in tracer.iter[:]:
        assert (layer.output[0] * 2).shape == (1, 8)
prompts = [one.sequences for question in backend.validated[questions:] for one in question.invokes]
assert prompts == [((1, 2, 3),), ((3,),)], prompts
"""
    )


def test_gradients_are_recorded_without_torch() -> None:
    run(
        """
from polytrace import optim
from polytrace.graph import Backward, Grad, GradWrite
backend.shape = ValueShape(shape=(), dtype="float32")
with model.trace() as tracer:
    vector, optimiser = tracer.value(np.zeros(8, np.float32)), optim.Adam(lr=0.1)
    for _ in range(2):
        with tracer.invoke([1, 2, 3]):
            hidden = layer.output
            hidden[:, -1] += vector
            loss = model.lm_head.output[:, -1, 7].sum()
            with loss.backward():
                hidden.grad[:, 0] = 0
                grad = model.model.layers[0].output[0].grad.save()
        refused(lambda: model.lm_head.weight.grad, "weights are frozen")
        assert vector.requires_grad_() is vector
        (vector,) = optimiser.step([vector], [vector.grad])
    vector.save()
nodes = backend.requests[-1].graph.nodes
kinds = [type(node) for node in nodes]
assert (kinds.count(Backward), kinds.count(Grad), kinds.count(GradWrite)) == (2, 6, 2), kinds
assert not any(isinstance(node, Backward) for one in backend.validated for node in one.graph.nodes)
"""
    )
