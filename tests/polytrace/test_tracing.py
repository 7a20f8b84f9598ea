"""What a trace records, refuses and hands out."""

from __future__ import annotations

import contextlib
import copy
import inspect
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from polytrace.errors import GraphError, RunError, TooLargeError
from polytrace.graph import Call, Constant, Mask, Op, Parameter, Read, Request, Save, Sharing
from polytrace.model import Model
from polytrace.wire import decode_request, encode_request

Program = Callable[[Any, Any], Any]  # (model, hidden states of layer 1)


def recorded(model: Model, program: Program, prompts: Any = (1, 2, 3)) -> Request:
    """The request of a program that also saves the hidden states it was given."""
    with model.trace(list(prompts), run=False) as tracer:
        hidden = model.model.layers[1].output[0]
        hidden.save()
        program(model, hidden)
    assert tracer.request is not None
    back = decode_request(b"".join(encode_request(tracer.request)))
    assert repr(back.graph) == repr(tracer.request.graph)
    return tracer.request


def line_of(program: Callable[..., Any], offset: int = 1) -> str:
    return f"test_tracing.py:{inspect.getsourcelines(program)[1] + offset}"


def ops(request: Request) -> list[str]:
    return [node.name for node in request.graph.nodes if isinstance(node, Op)]


# --- results


def test_a_saved_value_becomes_the_plain_tensor(model: Model, backend: Any) -> None:
    backend.results = {"0": torch.arange(6.0).reshape(2, 3).bfloat16(), "1": torch.tensor(3)}
    with model.trace([1, 2, 3]) as tracer:
        hidden = model.model.layers[1].output[0].save()
        held = [hidden]
        top = {"best": model.lm_head.output.argmax().save()}
        assert isinstance(hidden, torch.Tensor)
    assert type(hidden) is torch.Tensor
    assert held[0] is hidden
    assert hidden.shape == (2, 3) and hidden.dtype is torch.bfloat16
    assert hidden[1].tolist() == [3, 4, 5]
    assert int(top["best"]) == 3
    assert tracer.receipt is not None and tracer.receipt.model == "tiny"


def test_two_names_of_one_value_are_saved_once_and_returned_twice(model: Model, backend: Any) -> None:
    with model.trace([1, 2, 3]):
        output = model.model.layers[1].output
        a, b = output.save(), output[0].save()
        a.save()
    assert sum(isinstance(node, Save) for node in backend.requests[0].graph.nodes) == 1
    assert torch.equal(a, b)
    a += 1
    assert not torch.equal(a, b)


def test_a_saved_value_follows_in_place_code_after_the_save(model: Model) -> None:
    def program(model: Any, hidden: Any) -> None:
        kept = (hidden * 2).save()
        kept[:, 0] = 0

    request = recorded(model, program)
    save = request.graph.nodes[-1]
    assert isinstance(save, Save)
    saved = request.graph.nodes[save.value.node]
    assert isinstance(saved, Op) and saved.name == "setitem"


def test_what_nothing_needs_is_not_sent(model: Model) -> None:
    def program(model: Any, hidden: Any) -> None:
        _ = model.lm_head.output.softmax(-1) @ torch.ones(32, 2)

    request = recorded(model, program)
    assert len(request.graph.nodes) == 2
    assert request.constants == {}


def test_an_exception_in_the_block_propagates_and_nothing_is_sent(model: Model, backend: Any) -> None:
    hidden: Any = None
    with contextlib.suppress(ZeroDivisionError), model.trace([1, 2, 3]):
        hidden = model.model.layers[1].output.save()
        _ = 1 / 0
    assert backend.requests == []
    with pytest.raises(GraphError, match="ended with ZeroDivisionError"):
        hidden.sum()
    with model.trace([1, 2, 3]):  # the next one begins afresh
        model.lm_head.output.save()


def test_a_failed_run_says_so_and_its_values_stay_dead(model: Model, backend: Any) -> None:
    backend.results = RunError("overflow", where="a.py:3")
    hidden: Any = None
    with pytest.raises(RunError, match=r"overflow \(a.py:3\)"), model.trace([1, 2, 3]):
        hidden = model.model.layers[1].output.save()
    with pytest.raises(GraphError, match="failed"):
        hidden.sum()


def test_threads_have_traces_of_their_own(model: Model, backend: Any) -> None:
    together = threading.Barrier(4)
    failures: list[BaseException] = []

    def work(token: int) -> None:
        try:
            for _ in range(5):
                together.wait()
                with model.trace([token]):
                    value = model.model.layers[1].output.save()
                assert type(value) is torch.Tensor
        except BaseException as error:
            failures.append(error)
            raise

    threads = [threading.Thread(target=work, args=(token,)) for token in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert sorted(request.invokes[0].sequences[0][0] for request in backend.requests) == sorted([*range(4)] * 5)


# --- prompts and invokes


def test_values_flow_between_invokes(model: Model, backend: Any) -> None:
    with model.trace() as tracer:
        with tracer.invoke("the Eiffel") as clean:
            assert tracer.lengths == clean.lengths == (3,)
            h = model.model.layers[1].output[0][:, -1]
        with tracer.invoke(["Paris", "a b"]):
            assert tracer.lengths == (2, 3)
            assert tracer.tokens == (("<s>", "Paris"), ("<s>", "a", "b"))
            model.model.layers[1].output[0][:, -1] = h
            model.lm_head.output.save()
    request = backend.requests[0]
    assert [invoke.sequences for invoke in request.invokes] == [((0, 2, 3),), ((0, 7), (0, 8, 9))]
    assert [node.invoke for node in request.graph.nodes if isinstance(node, Read)] == [0, 1, 1]
    assert tracer.lengths == (3, 2, 3)


def test_a_tokenizer_that_would_cut_does_not(model: Model) -> None:
    assert model.trace("a b c a b c").lengths == (7,)
    assert model.tokenizer.encode("a b").ids == [0, 8, 9]


@pytest.mark.parametrize(
    ("prompts", "sequences"),
    [
        ("a b", ((0, 8, 9),)),
        (["a", "b c"], ((0, 8), (0, 9, 10))),
        ([1, 2], ((1, 2),)),
        ([[1, 2], [3]], ((1, 2), (3,))),
        (torch.tensor([1, 2]), ((1, 2),)),
        (np.array([[1, 2], [3, 4]], np.int32), ((1, 2), (3, 4))),
        ([torch.tensor([1, 2]), [3]], ((1, 2), (3,))),
        ([np.int64(4), torch.tensor(5).item()], ((4, 5),)),
        (
            {"input_ids": torch.tensor([[0, 7], [5, 6]]), "attention_mask": torch.tensor([[0, 1], [1, 1]])},
            ((7,), (5, 6)),
        ),
        (range(3), ((0, 1, 2),)),
    ],
)
def test_prompts_come_in_many_forms(model: Model, backend: Any, prompts: Any, sequences: Any) -> None:
    with model.trace(prompts):
        model.lm_head.output.save()
    assert backend.requests[0].invokes[0].sequences == sequences


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([], "there are no prompts"),
        ([[]], "prompt 0 has no tokens"),
        ([[1], []], "prompt 1 has no tokens"),
        (["a", 1], "all strings or all token ids"),
        ([1, [2]], "a token id is an integer, not a list"),
        (3.5, "not a float"),
        ([1.5], "a token id is an integer, not a float"),
        (torch.zeros(2), "integers, not torch.float32"),
        (torch.zeros(1, 1, 1, dtype=torch.long), "1-D or 2-D"),
        ([32], "token 32; ids are 0-31"),
        ([-1], "token -1"),
        ({"ids": [1]}, "a batch needs input_ids"),
    ],
)
def test_what_is_no_prompt_is_refused(model: Model, prompts: Any, message: str) -> None:
    with pytest.raises(GraphError, match=message) as caught:
        model.trace(prompts)
    assert caught.value.where is not None and caught.value.where.startswith("test_tracing.py:")


def test_a_prompt_beyond_the_context_is_refused_with_the_numbers(model: Model) -> None:
    with pytest.raises(TooLargeError, match="prompt 1 has 17 tokens; this model takes 16"):
        model.trace([[1], [1] * 17])


def test_sites_belong_to_an_invoke(model: Model) -> None:
    tracer = model.trace()
    with (
        pytest.raises(GraphError, match=r"model.layers.1.output belongs to prompts: use it inside `with tracer.invoke"),
        tracer,
    ):
        model.model.layers[1].output.save()
    with pytest.raises(GraphError, match="has its prompts"), model.trace([1]) as tracer:
        tracer.invoke([1])


def test_a_trace_of_parameters_needs_no_prompts(model: Model, backend: Any) -> None:
    with model.trace():
        (model.lm_head.weight[3] - model.lm_head.weight[4]).save()
    request = backend.requests[0]
    assert request.invokes == ()
    assert sum(isinstance(node, Parameter) for node in request.graph.nodes) == 1


def test_traces_do_not_nest_nor_repeat(model: Model) -> None:
    nested = r"a trace is open already, since test_tracing.py:\d+"
    with pytest.raises(GraphError, match=nested), model.trace([1]), model.trace([2]):
        pass
    with model.trace([1]) as tracer:
        model.lm_head.output.save()
    with pytest.raises(GraphError, match="this trace has been used"):
        tracer.__enter__()


def test_options_are_checked(model: Model, backend: Any) -> None:
    with model.trace([1], seed=7, sharing="off"):
        torch.randn_like(model.lm_head.output).save()
    assert backend.requests[0].options.seed == 7
    assert backend.requests[0].options.sharing is Sharing.OFF
    with pytest.raises(GraphError, match="sharing is 'tenant' or 'off', not 'all'"):
        model.trace([1], sharing="all")
    with pytest.raises(GraphError, match="seed"):
        model.trace([1], seed=-1)


def test_validate_works_inside_the_block_and_after_a_trace_that_does_not_run(model: Model, backend: Any) -> None:
    with model.trace([1, 2], run=False) as tracer:
        hidden = model.model.layers[1].output.save()
        assert model.validate(tracer).tokens == 3
        model.lm_head.output.save()
    model.validate(tracer)
    assert backend.requests == []
    assert [sum(isinstance(node, Save) for node in request.graph.nodes) for request in backend.validated] == [1, 2]
    with pytest.raises(GraphError, match="run=False"):
        hidden.sum()


# --- refusals


def by_if(model: Any, hidden: Any) -> Any:
    return 1 if hidden.sum() > 0 else 2


def by_float(model: Any, hidden: Any) -> Any:
    return float(hidden.mean())


def by_item(model: Any, hidden: Any) -> Any:
    return hidden.mean().item()


def by_range(model: Any, hidden: Any) -> Any:
    return list(range(hidden.argmax()))


def by_tolist(model: Any, hidden: Any) -> Any:
    return hidden.tolist()


def by_numpy(model: Any, hidden: Any) -> Any:
    return np.asarray(hidden)


def by_client_setitem(model: Any, hidden: Any) -> Any:
    torch.zeros(3)[0] = hidden.mean()


def by_client_iadd(model: Any, hidden: Any) -> Any:
    mine = torch.zeros(1, 3, 8)
    mine += hidden


def by_client_copy(model: Any, hidden: Any) -> Any:
    torch.zeros(1, 3, 8).copy_(hidden)


def by_numpy_setitem(model: Any, hidden: Any) -> Any:
    np.zeros((1, 3, 8))[...] = hidden


def by_out(model: Any, hidden: Any) -> Any:
    torch.add(hidden, 1, out=torch.zeros(1))


def by_unknown_op(model: Any, hidden: Any) -> Any:
    return torch.special.airy_ai(hidden)


def by_misspelt_argument(model: Any, hidden: Any) -> Any:
    return hidden.sum(dims=1)


def by_backward(model: Any, hidden: Any) -> Any:
    hidden.backward()


def by_grad(model: Any, hidden: Any) -> Any:
    return hidden.grad


def by_copy(model: Any, hidden: Any) -> Any:
    return copy.deepcopy(hidden)


def by_layer_int(model: Any, hidden: Any) -> Any:
    return model.model.layers[1].output[1]


def by_layer_tuple(model: Any, hidden: Any) -> Any:
    return model.model.layers[1].output[0, -1]


def by_hidden_int(model: Any, hidden: Any) -> Any:
    return hidden[0]


def by_hidden_int_set(model: Any, hidden: Any) -> Any:
    hidden[0, -1] = 0


def by_layer_unpack(model: Any, hidden: Any) -> Any:
    (states,) = model.model.layers[1].output
    return states


def by_scalar_edge(model: Any, hidden: Any) -> Any:
    model.model.layers[1].mlp.output = 0.0


def by_read_only_site(model: Any, hidden: Any) -> Any:
    model.model.embed_tokens.input = hidden


def by_layer_out_of_range(model: Any, hidden: Any) -> Any:
    return model.model.layers[96].output


def by_unknown_module(model: Any, hidden: Any) -> Any:
    return model.model.layers[0].self_atn


def by_uncalled_module(model: Any, hidden: Any) -> Any:
    return model.model.rotary_emb.output


def by_list_output(model: Any, hidden: Any) -> Any:
    return model.model.layers.output


def by_uncallable(model: Any, hidden: Any) -> Any:
    return model.model.layers[0].self_attn(hidden)


def by_parameter_write(model: Any, hidden: Any) -> Any:
    model.lm_head.weight = hidden


def by_member(model: Any, hidden: Any) -> Any:
    return model.output.logit


def by_member_index(model: Any, hidden: Any) -> Any:
    return model.model.layers[0].self_attn.output[2]


def by_position(model: Any, hidden: Any) -> Any:
    return hidden.at(3)


def by_shape(model: Any, hidden: Any) -> Any:
    return (hidden @ torch.ones(3, 3)).shape


def by_dtype(model: Any, hidden: Any) -> Any:
    return hidden.to(torch.float8_e4m3fn)


def by_object(model: Any, hidden: Any) -> Any:
    return hidden[{"a"}]


REFUSALS = {
    by_if: "torch.where",
    by_float: r"float\(\) cannot have its number",
    by_item: r"\.item\(\) cannot have",
    by_range: "an index or a range",
    by_tolist: r"\.tolist\(\)",
    by_numpy: r"results.append\(value.save\(\)\)",
    by_client_setitem: r"results.append\(value.save\(\)\)",
    by_client_copy: r"results.append\(value.save\(\)\)",
    by_numpy_setitem: r"results.append\(value.save\(\)\)",
    by_out: r"results.append\(value.save\(\)\)",
    by_unknown_op: "no operation 'special_airy_ai'",
    by_misspelt_argument: "sum takes no argument 'dims' here; did you mean dim",
    by_backward: r"gradients are of one number: reduce it with \.sum\(\)",
    by_grad: r"has no gradient yet: call loss\.backward\(\) before",
    by_copy: r"\.clone\(\)",
    by_layer_int: r"output\[i:i\+1\]` for sequence i, `output\[:, -1\]`",
    by_layer_tuple: r"output\[:, -1\]",
    by_hidden_int: r"`output\[0\]\[i:i\+1\]` for sequence i, `output\[0\]\[:, -1\]`",
    by_hidden_int_set: r"`output\[0\]\[:, -1\]`",
    by_layer_unpack: "not a tuple to unpack",
    by_scalar_edge: r"`site\[...\] = value`",
    by_read_only_site: "cannot be written: token ids are the prompt",
    by_layer_out_of_range: r"no model.layers\[96\]; this model has layers 0-3",
    by_unknown_module: "has no 'self_atn'; did you mean self_attn",
    by_uncalled_module: "it is not called, or handed no tensors",
    by_list_output: r"index it, as in model.layers\[0\].output",
    by_uncallable: "cannot be called on a value: it needs positions",
    by_parameter_write: "never the model itself",
    by_member: "output has no 'logit': take one of its tensors first, .*it has 'logits'",
    by_member_index: r"self_attn.output has no 2; it has 0",
    by_position: r"no position 3 in this prompt, which has 3 tokens \(0-2\)",
    by_dtype: "no dtype 'float8_e4m3fn'",
    by_object: "a set cannot be part of a trace",
}


@pytest.mark.parametrize(("program", "message"), REFUSALS.items(), ids=lambda part: getattr(part, "__name__", ""))
def test_what_cannot_be_recorded_is_refused_at_the_user_s_line(model: Model, program: Program, message: str) -> None:
    with pytest.raises(GraphError, match=message) as caught:
        recorded(model, program)
    assert caught.value.where == line_of(program)


def test_a_client_tensor_added_in_place_is_refused_at_its_line(model: Model) -> None:
    with pytest.raises(GraphError, match="list") as caught:
        recorded(model, by_client_iadd)
    assert caught.value.where == line_of(by_client_iadd, 2)


def test_a_shape_error_names_the_op_s_line(model: Model) -> None:
    with pytest.raises(GraphError, match="matmul: ") as caught:
        recorded(model, by_shape)
    assert caught.value.where == line_of(by_shape)


def test_python_sees_absent_names_as_absent(model: Model) -> None:
    assert not hasattr(model.model.layers[0], "cross_attn")
    assert hasattr(model.model.layers[0], "mlp")
    with pytest.raises(IndexError):
        model.model.layers[4]


def test_outside_a_trace_there_are_no_values(model: Model) -> None:
    for use in (lambda: model.lm_head.output, lambda: model.lm_head.weight, lambda: model.lm_head(1)):
        with pytest.raises(GraphError, match=r"exists inside a trace: `with model.trace\(prompt\):`"):
            use()
    with pytest.raises(GraphError, match="exists inside a trace"):
        model.lm_head.output = 1


def test_an_unsaved_value_says_how_to_save_it(model: Model) -> None:
    with model.trace([1, 2, 3]):
        model.lm_head.output.save()
        lost = model.model.layers[1].output
    with pytest.raises(
        GraphError, match=r"was not saved.*\.save\(\) on it inside the trace; it was made at test_tracing"
    ):
        lost.sum()


def test_saving_nothing_is_refused(model: Model, backend: Any) -> None:
    with pytest.raises(GraphError, match="saves nothing"), model.trace([1]):
        model.lm_head.output[...] = 0
    assert backend.requests == []


def test_a_value_of_another_trace_is_refused(model: Model) -> None:
    with model.trace([1]):
        model.lm_head.output.save()
        stale = model.lm_head.output
    with pytest.raises(GraphError, match="was not saved"), model.trace([1]):
        (model.lm_head.output + stale).save()


def test_another_model_s_trace_is_refused(model: Model, other_model: Model) -> None:
    with pytest.raises(GraphError, match="the open trace is on another model"), other_model.trace([1]):
        model.lm_head.output.save()


# --- values


def test_facts_are_concrete_while_recording(model: Model) -> None:
    def program(model: Any, hidden: Any) -> None:
        assert hidden.shape == torch.Size([1, 3, 8])
        assert (hidden.ndim, hidden.dim(), hidden.size(-1), len(hidden), hidden.numel()) == (3, 3, 8, 1, 24)
        assert hidden.dtype is torch.float32 and hidden.device.type == "cpu" and hidden.is_floating_point()
        batch, tokens, width = hidden.shape
        assert hidden.view(batch, tokens, 2, width // 2).transpose(1, 2).shape == (1, 2, 3, 4)
        assert hidden.bfloat16().mean((0, 1)).dtype is torch.bfloat16
        assert (hidden + hidden[:, :1]).shape == (1, 3, 8)
        assert (hidden > 0).dtype is torch.bool
        assert (hidden.double() * hidden).dtype is torch.float64
        assert hidden.topk(2).indices.dtype is torch.int64
        assert torch.cat([hidden, hidden], -1).shape == (1, 3, 16)
        assert torch.einsum("btd,btd->bt", hidden, hidden).shape == (1, 3)
        assert hidden[torch.tensor([[True, False, True]])].shape == (2, 8)
        assert hidden.max(-1).values.shape == (1, 3)
        assert hidden.max().shape == ()
        assert model.model.embed_tokens.input.dtype is torch.int64
        assert model.lm_head.weight.T.shape == (8, 32)
        assert "model.layers.1.output" in repr(hidden) and f"{hidden}" == repr(hidden)

    recorded(model, program)


def test_a_long_chain_knows_its_shape(model: Model) -> None:
    def program(model: Any, hidden: Any) -> None:
        for _ in range(3000):
            hidden = hidden + 1
        assert hidden.shape == (1, 3, 8)

    recorded(model, program)


def test_the_shape_of_a_called_module_is_asked_once(model: Model, backend: Any) -> None:
    for _ in range(3):
        with model.trace([1, 2, 3]):
            logits = model.lm_head(model.model.norm(model.model.layers[1].output))
            assert logits.shape == (1, 3, 32)
            assert logits.softmax(-1).shape == (1, 3, 32)
            logits.save()
    assert len(backend.validated) == 1
    assert [node.module for node in backend.requests[0].graph.nodes if isinstance(node, Call)] == [
        "model.norm",
        "lm_head",
    ]


def test_client_tensors_become_constants_once_each(model: Model) -> None:
    vector = torch.ones(8)

    def program(model: Any, hidden: Any) -> None:
        a = hidden + vector + vector + torch.ones(8) + np.ones(8, np.float32)
        vector.mul_(2)
        (a + vector + torch.ones(8, dtype=torch.bfloat16)).save()

    request = recorded(model, program)
    assert sum(isinstance(node, Constant) for node in request.graph.nodes) == 3
    assert sorted((raw.dtype, raw.data.nbytes) for raw in request.constants.values()) == [
        ("bfloat16", 16),
        ("float32", 32),
        ("float32", 32),
    ]
    assert bytes(request.constants["c1"].data) == torch.full((8,), 2.0).numpy().tobytes()


def test_a_single_element_of_a_larger_tensor_becomes_a_constant(model: Model) -> None:
    column = torch.arange(12.0).reshape(1, 3, 4)[:, :1, 2]  # counts as contiguous, with a stride of its own
    request = recorded(model, lambda model, hidden: (hidden * column.squeeze(0)).save())
    assert [bytes(raw.data) for raw in request.constants.values()] == [torch.tensor(2.0).numpy().tobytes()]


def test_numbers_stay_literals(model: Model) -> None:
    def program(model: Any, hidden: Any) -> None:
        value = hidden * np.float32(0.5) + float("inf") - np.int64(2) ** 2
        (value[:, np.int64(1) : 2] if value.ndim else value).save()

    request = recorded(model, program)
    assert request.constants == {}
    mul, add, sub, getitem = (node for node in request.graph.nodes if isinstance(node, Op))
    assert (mul.args[1], add.args[1], sub.args[1]) == (0.5, float("inf"), 4)
    assert getitem.args[1] == (slice(None), slice(1, 2, None))


def test_client_arrays_on_the_left_are_operands(model: Model) -> None:
    def program(model: Any, hidden: Any) -> None:
        (np.ones(8, np.float32) * hidden).save()
        (torch.ones(8) - hidden).save()
        (1 / hidden).save()
        (2 - hidden).save()
        (torch.ones(3, 3) @ hidden).save()
        torch.arange(20)[model.lm_head.output.argmax(-1)].save()

    assert ops(recorded(model, program)) == ["mul", "sub", "rdiv", "rsub", "matmul", "argmax", "getitem"]


def test_torch_s_ways_to_say_one_thing_are_one_op(model: Model) -> None:
    def program(model: Any, hidden: Any) -> None:
        import torch.nn.functional as F

        values = [
            F.softmax(hidden, dim=-1),
            torch.softmax(hidden, -1),
            hidden.softmax(dim=-1),
            torch.sum(input=hidden, dim=1, keepdim=True),
            hidden.sum(axis=1, keepdims=True),
            F.relu(hidden, inplace=False),
            F.layer_norm(hidden, (8,)),
            F.normalize(hidden, dim=-1),
            F.gelu(hidden, approximate="tanh"),
            torch.linalg.norm(hidden, dim=-1),
            hidden.norm(dim=-1),
            hidden.to("cpu", torch.float64),
            hidden.type(torch.float64),
            hidden.reshape(3, 8),
            torch.nn.Linear(8, 2)(hidden),
        ]
        for value in values:
            value.save()
        assert hidden.cpu() is hidden and hidden.to("cuda") is hidden
        assert hidden.to("int32").dtype is torch.int32, "a dtype's name is no device"

    expected = ["softmax"] * 3 + ["sum"] * 2 + ["relu", "layer_norm", "normalize", "gelu", "linalg_norm", "norm"]
    assert ops(recorded(model, program)) == [*expected, "to", "to", "reshape", "linear"]


def test_einops_works_on_recorded_values(model: Model) -> None:
    einops = pytest.importorskip("einops")

    def program(model: Any, hidden: Any) -> None:
        heads = einops.rearrange(hidden, "b t (h d) -> b h t d", h=2)
        assert heads.shape == (1, 2, 3, 4)
        einops.einsum(heads, heads, "b h q d, b h k d -> b h q k").save()

    recorded(model, program)


def test_results_of_several_values_are_named_and_unpacked(model: Model) -> None:
    def program(model: Any, hidden: Any) -> None:
        values, indices = hidden.topk(2, -1)
        best = hidden.max(-1)
        left, right = hidden.chunk(2, dim=-1)
        (values + best.values[..., None] + left[..., :2] + indices).save()
        torch.stack(list(hidden.unbind(1))).save()
        torch.stack(list(hidden.sort(-1))).save()
        right.save()

    request = recorded(model, program)
    assert sum(name == "item" for name in ops(request)) == 10


def test_positions_are_counted_in_each_prompt(model: Model, backend: Any) -> None:
    with model.trace([[1, 2, 3], [4]]) as tracer:
        logits = model.lm_head.output
        assert logits.at(0).shape == (2, 32)
        assert logits.at([-1, 0]).shape == (2, 2, 32)
        for value in (logits.at(-1), logits.at(0), logits.at([-1]), logits.at([0, -1]), tracer.mask):
            value.save()
    nodes = backend.requests[0].graph.nodes
    assert [node.args[1] for node in nodes if isinstance(node, Op)] == [
        (slice(None), 2),
        ([0, 1], [0, 2]),
        (slice(None), [2]),
        ([[0], [1]], [[0, 2], [2, 2]]),
    ]
    assert any(isinstance(node, Mask) for node in nodes)
    assert tracer.lengths == (3, 1)


def test_positions_need_the_token_dimension(model: Model) -> None:
    with (
        pytest.raises(GraphError, match=r"\[sequences, tokens, ...\] = \[1, 3\]; this one is \[1, 8\]"),
        model.trace([1, 2, 3]),
    ):
        model.model.layers[1].output[:, -1].at(0)
    with pytest.raises(GraphError, match="has no prompts of its own"), model.trace([1, 2, 3]):
        model.lm_head.weight.at(0)


# --- the tree


def test_the_tree_is_what_hugging_face_shows(model: Model) -> None:
    layers = model.model.layers
    assert len(layers) == 4 and len(list(layers)) == 4
    assert [layer == layers[i] for i, layer in enumerate(layers)] == [True] * 4
    assert layers[-1] == layers[3] and layers[np.int64(1)] == layers[1]
    assert layers[1:3] == [layers[1], layers[2]]
    assert {"self_attn", "mlp", "output", "input"} <= set(dir(layers[0]))
    assert "weight" in dir(layers[0].mlp)
    assert model.get_submodule("model.layers.2.mlp") == layers[2].mlp
    assert "(0-3): 4 x LlamaDecoderLayer(" in repr(model)
    assert repr(layers[0].mlp) == "LlamaMLP()"
    assert model.config.num_hidden_layers == model.config["num_hidden_layers"] == 4
    assert model.config.rope_parameters.rope_theta == 10.0
    with pytest.raises(AttributeError, match="did you mean num_hidden_layers"):
        _ = model.config.num_layers


def test_model_outputs_are_read_by_name_key_and_place(model: Model) -> None:
    with model.trace([1, 2, 3], run=False) as tracer:
        output = model.output
        assert output.keys() == ["logits"] and list(output) == ["logits"] and "logits" in output
        for value in (output.logits, output["logits"], output[0]):
            value.save()
        (states,) = model.model.layers[1].self_attn.output
        states.save()
    assert tracer.request is not None
    reads = [str(node.site) for node in tracer.request.graph.nodes if isinstance(node, Read)]
    assert reads == ["output.logits"] * 3 + ["model.layers.1.self_attn.output[0]"]


def test_a_closed_model_gives_its_backend_back(backend: Any) -> None:
    with Model(backend):
        pass
    assert backend.closed
