"""What a block of `model.generate` becomes: nodes with steps, values behind loops, refusals with the user's line."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import polytrace
from polytrace.description import ChatFormat
from polytrace.errors import GraphError, PolytraceError, TooLargeError
from polytrace.graph import Generation, Node, Op, Port, Read, Ref, Sampling, Save, Stop, Write
from polytrace.model import Model
from polytrace.wire import decode_request, encode_request

IDS = [3, 4, 5]
HERE = "test_generation_recording.py"


def nodes_of(tracer: Any, kind: type[Any] = Node) -> list[Any]:  # type: ignore[assignment]
    """The nodes that would be sent, after their way over the wire and back."""
    request = tracer.request
    assert decode_request(b"".join(encode_request(request))) == request
    return [node for node in request.graph.nodes if kind is Node or isinstance(node, kind)]


def generate(model: Model, prompts: Any = IDS, **keywords: Any) -> Any:
    return model.generate(prompts, **{"max_new_tokens": 4, "run": False} | keywords)


def way_of(model: Model, **keywords: Any) -> Generation:
    with generate(model, **keywords) as tracer:
        pass
    way = tracer.request.invokes[0].generation
    assert way is not None
    return way


def test_options_have_transformers_and_openais_names(model: Model) -> None:
    assert way_of(model) == Generation(max_new_tokens=4)
    way = way_of(
        model, do_sample=True, temperature=0.5, top_k=7, top_p=0.9, min_p=0.1, repetition_penalty=1.2, seed=9,
        stop_strings="x", eos_token_id=[2, torch.tensor(3)], logprobs=True, pad_token_id=0, use_cache=True, remote=True,
    )  # fmt: skip
    sampling = Sampling(do_sample=True, temperature=0.5, top_k=7, top_p=0.9, min_p=0.1, repetition_penalty=1.2, seed=9)
    assert way == Generation(max_new_tokens=4, sampling=sampling, eos=(2, 3), stop=("x",), logprobs=0)
    assert way_of(model, stop=["a", "b"]).stop == ("a", "b")
    with generate(model, do_sample=True, num_return_sequences=3) as tracer:
        pass
    assert tracer.request.invokes[0].sequences == (tuple(IDS),) * 3


def test_eos_is_the_models_own_unless_said(model: Model) -> None:
    config: Any = model.description.config
    for own, expected in ((2, (2,)), ([2, 7], (2, 7)), (None, ())):
        config["eos_token_id"] = own
        assert way_of(model).eos == expected
    config["text_config"] = {"eos_token_id": 5}
    assert way_of(model).eos == (5,)
    assert way_of(model, eos=None).eos == () and way_of(model, eos=1).eos == (1,)


@pytest.mark.parametrize(
    ("keywords", "told"),
    [
        ({"max_new_token": 3}, "no keyword 'max_new_token'; did you mean max_new_tokens"),
        ({"max_new_tokens": None}, "say how many tokens may be new"),
        ({"max_new_tokens": 2.5}, "max_new_tokens is a whole number"),
        ({"max_new_tokens": 0}, "max_new_tokens is from 1"),
        ({"temperature": 0.5}, "means something where tokens are drawn: say do_sample=True"),
        ({"do_sample": True, "temperature": 0}, "temperature is a number above 0"),
        ({"do_sample": 1}, "do_sample is True or False"),
        ({"eos": "</s>"}, "eos is a whole number"),
        ({"stop": 5}, "token ids are eos="),
        ({"eos": 1, "eos_token_id": 2}, "another name of eos"),
        ({"n": 2}, "all be the same: say do_sample=True"),
        ({"num_beams": 4}, "only 1 can be"),
        ({"peek": True}, "look at the prompt in a trace of its own"),
        ({"seed": -1}, "the seed is an integer"),
        ({"stream": 3}, "stream is a function or True"),
        ({"max_new_tokens": 14}, "3 tokens and 14 new ones are 17; this model takes 16"),
    ],
)
def test_options_that_cannot_be_are_refused_with_the_line(model: Model, keywords: dict[str, Any], told: str) -> None:
    with pytest.raises(PolytraceError, match=told) as caught:
        generate(model, **keywords)
    assert caught.value.where is not None and caught.value.where.startswith(HERE)


def test_invokes_have_options_of_their_own(model: Model) -> None:
    with generate(model, None, seed=4) as tracer:
        with tracer.invoke(IDS, max_new_tokens=2, seed=7, do_sample=True):
            pass
        with tracer.invoke(IDS, generate=False):
            assert len([*tracer.iter[:]]) == 1
        with tracer.invoke(IDS, max_new_tokens=0):
            pass
        with tracer.invoke(IDS):
            model.lm_head.output.save()
        with pytest.raises(GraphError, match="no keyword 'max_tokens'"):
            tracer.invoke(IDS, max_tokens=4)
    ways = [invoke.generation for invoke in tracer.request.invokes]
    assert [way and way.max_new_tokens for way in ways] == [2, None, None, 4]
    assert ways[0] is not None and ways[0].sampling == Sampling(do_sample=True, seed=7)
    assert ways[3] is not None and ways[3].sampling.seed == 4


def test_conversations_go_on(model: Model) -> None:
    template = "{% for m in messages %}{{ m.content }} {% endfor %}{{ 'is' if add_generation_prompt }}"
    object.__setattr__(model.description, "chat", ChatFormat(templates={"default": template}, special_tokens={}))
    told = [{"role": "user", "content": "Tower"}]
    with generate(model, told) as tracer:
        pass
    with generate(model, None, max_new_tokens=2) as other, other.invoke(told, chat={"add_generation_prompt": False}):
        pass
    assert [tracer.request.invokes[0].sequences, other.request.invokes[0].sequences] == [((4, 5),), ((4,),)]
    assert tracer.request.invokes[0].generation.max_new_tokens == 4


def test_a_for_records_each_step_and_a_with_all_of_them_at_once(model: Model) -> None:
    with generate(model) as tracer:
        steps = []
        for step in tracer.iter[1:]:
            steps.append(step)
            model.model.layers[1].output[0][:] += 1.0
    assert steps == [1, 2, 3]
    assert [(node.step, node.num_steps) for node in nodes_of(tracer, Write)] == [(1, 3)]  # equal bodies are one
    for block in (lambda tracer: tracer.iter[1:], lambda tracer: tracer.iter[[1, 2, 3]]):
        with generate(model) as tracer, block(tracer):
            model.model.layers[1].output[0][:] += 1.0
        assert [(node.step, node.num_steps) for node in nodes_of(tracer, (Read, Write))] == [(1, 3)] * 2
    with generate(model) as tracer:
        assert [*tracer.iter] == [*tracer.all()] == [0, 1, 2, 3]
        assert [*tracer.iter[-1]] == [3] and [*tracer.iter[::2]] == [0, 2] and [*tracer.iter[9:]] == []
        with tracer.iter[2]:
            model.model.layers[1].output[0][:] += 1.0
    assert [(node.step, node.num_steps) for node in nodes_of(tracer, Write)] == [(2, 1)]


def spans(tracer: Any) -> list[tuple[int, int]]:
    return [(node.step, node.num_steps) for node in nodes_of(tracer, Write)]


def test_bodies_that_are_the_same_and_hand_nothing_on_are_one(model: Model) -> None:
    layer, other = model.model.layers[1], model.model.layers[2]
    with generate(model, max_new_tokens=9) as tracer:
        for step in tracer.iter[:]:
            layer.output[0][:, -1] += torch.ones(8)
            if step == 2:
                tracer.stop(when=layer.output[0].norm() > 3)
        for _ in tracer.iter[[1, 2, 4, 5]]:
            other.output[0][:, -1] *= 2.0
    assert spans(tracer) == [(0, 2), (2, 1), (3, 6), (1, 2), (4, 2)]
    with generate(model) as tracer:
        for step in tracer.iter[:]:
            layer.output[0][:, -1] *= 1 if step % 2 else True  # not the same to torch
    assert spans(tracer) == [(step, 1) for step in range(4)]
    with generate(model) as tracer:
        for step in tracer.iter[:]:
            other.output[0][:, -1] *= 2.0
            value = layer.output[0][:, -1]
            if step == 1:
                kept = value
        (kept * 1.0).save()
    assert spans(tracer) == [(0, 1), (1, 1), (2, 2)]
    with generate(model) as tracer:
        total = 0.0
        for _ in tracer.iter[:]:
            total = total + layer.output[0][:, -1]
            other.output[0][:, -1] += total
    assert spans(tracer) == [(step, 1) for step in range(4)]
    with generate(model) as tracer:
        for step in tracer.iter[:]:
            (layer.next().output[0] if step < 1 else layer.output[0]).save()
            if step == 3:
                layer.output[0].save()
    assert [(node.name, node.step, node.num_steps) for node in nodes_of(tracer, Save)] == [
        ("0", 1, 1), ("1", 1, 1), ("0", 2, 1), ("0", 3, 1), ("2", 3, 1),
    ]  # fmt: skip


def test_saves_of_a_line_have_one_name(model: Model) -> None:
    with generate(model) as tracer:
        for step in tracer.iter[:3]:
            model.lm_head.output.save()
            if step:
                model.model.norm.output.save()
        with tracer.all():
            model.model.layers[0].output.save()
        model.model.layers[1].output.save()
    found = [(node.name, node.step, node.num_steps) for node in nodes_of(tracer, Save)]
    assert found == [
        ("0", 0, 1), ("0", 1, 2), ("1", 1, 2), ("2", 0, 4), ("3", None, 1),
    ]  # fmt: skip


def refs(node: Any) -> list[int]:
    return [value.node for value in node.values]


def test_behind_a_loop_a_variable_is_what_it_was_at_the_last_step_that_came(model: Model) -> None:
    with generate(model) as tracer:
        total = model.model.layers[0].output[0][:, -1]
        before = len(tracer.recording.nodes) - 1
        listed = []
        for step in tracer.iter[:]:
            hidden = model.model.layers[2].output[0][:, -1]
            total = total + hidden
            listed.append(hidden * 2.0)
            if step < 2:
                early = hidden
        result = (total + 1.0).save()
        stacked = torch.stack(listed).save()
        (early * 1.0).save()
        (listed[1] * 1.0).save()
        (listed[-1] * 1.0).save()
        assert result.shape == (1, 8) and stacked.shape == (4, 1, 8)
    nodes = nodes_of(tracer)
    adds = [place for place, node in enumerate(nodes) if isinstance(node, Op) and node.name == "add"]
    sums, plus_one = adds[:4], nodes[adds[4]]
    assert nodes[sums[0]].args[0] == Ref(before)
    assert refs(nodes[plus_one.args[0].node]) == [*reversed(sums), before]
    (stack,) = [node for node in nodes if isinstance(node, Op) and node.name == "stack"]
    members = [nodes[member.node] for member in stack.args[0]]
    doubled = [place for place, node in enumerate(nodes) if isinstance(node, Op) and node.args[1:] == (2.0,)]
    assert [refs(member) for member in members] == [[place] for place in doubled]
    last = [refs(nodes[node.args[0].node]) for node in nodes if isinstance(node, Op) and node.args[1:] == (1.0,)][1:]
    hidden = [nodes[place].args[0].node for place in doubled]
    assert last == [[hidden[1], hidden[0]], [doubled[1]], [*reversed(doubled)]]


def test_earlier_steps_are_used_at_later_ones_and_never_the_other_way(model: Model) -> None:
    with generate(model) as tracer:
        for step in tracer.iter[:]:
            hidden = model.model.layers[1].output[0][:, -1]
            if step == 1:
                kept = hidden
            if step == 3:
                model.model.layers[2].output[0][:, -1] = kept
    (write,) = nodes_of(tracer, Write)
    assert write.step == 3
    with pytest.raises(GraphError, match=r"this write is at step 0, .* only at step 2"), generate(model) as tracer:
        late = model.model.layers[1].next(2).output[0][:, -1]
        model.model.layers[2].output[0][:, -1] = late
    with pytest.raises(GraphError, match="only at the end of the generation"), generate(model) as tracer:
        for _ in tracer.iter[:]:
            late = model.model.layers[1].output[0][:, -1]
        model.model.layers[2].output[0][:, -1] = late


def test_a_body_that_is_recorded_once_changes_nothing_from_outside(model: Model) -> None:
    def refused(told: str, body: Any) -> None:
        with pytest.raises(GraphError, match=told) as caught, generate(model) as tracer:
            body(tracer)
        assert caught.value.where is not None and caught.value.where.startswith(HERE)

    def rebinding(tracer: Any) -> None:
        total = model.model.layers[1].output[0][:, -1]
        with tracer.all():
            total = total + model.model.layers[2].output[0][:, -1]
        total.save()

    def counting(tracer: Any) -> None:
        total = 0
        with tracer.all():
            total = total + model.model.layers[2].output[0][:, -1]
        total.save()

    def adding(tracer: Any) -> None:
        total = torch.zeros(8)
        with tracer.all():
            total = total + model.model.layers[2].output[0][:, -1]
        total.save()

    def changing(tracer: Any) -> None:
        total = model.model.layers[1].output[0][:, -1].clone()
        with tracer.all():
            total += model.model.layers[2].output[0][:, -1]

    def using(tracer: Any) -> None:
        with tracer.all():
            hidden = model.model.layers[2].output[0][:, -1]
        (hidden + 1).save()

    def numbering(tracer: Any) -> None:
        with tracer.all() as step:
            if step == 2:
                raise AssertionError("there is no number")

    def meeting(tracer: Any) -> None:
        with tracer.iter[1:3]:
            hidden = model.model.layers[2].output[0]
        with tracer.iter[2:4]:
            model.model.layers[3].output[0][:] += hidden

    refused("`total` is from outside", rebinding)
    refused("`total` is from outside", counting)
    refused("`total` is from outside", adding)
    refused("cannot change a value from outside", changing)
    refused("recorded once for steps 0-3, so here it could be that of any", using)
    refused("so there is no number", numbering)
    refused("do not meet at any one step", meeting)

    with generate(model) as tracer:
        hidden = torch.zeros(8)  # of an earlier cell of a notebook: another thing of the same name
        outside = model.model.layers[1].output[0][:, -1]
        with tracer.all():
            hidden = model.model.layers[2].output[0][:, -1] + outside
            other = hidden * 2
        hidden.save()
        with tracer.all():  # the same steps: each with its own
            (other + model.model.layers[3].output[0][:, -1]).save()
    assert [(node.step, node.num_steps) for node in nodes_of(tracer, Save)] == [(0, 4)] * 2


def test_values_of_a_past_step_change_nothing_in_the_model(model: Model) -> None:
    with generate(model) as tracer:
        first = model.model.layers[1].output[0]
        for _ in tracer.iter[1:]:
            first += 1.0  # a tensor of step 0, which is over
            model.model.layers[2].output[0][:, -1] += first[:, -1]
    assert {(node.site.module, node.step) for node in nodes_of(tracer, Write)} == {
        ("model.layers.2", step) for step in (1, 2, 3)
    }
    with pytest.raises(GraphError, match="belongs to a step of the loop"), generate(model) as tracer:
        for _ in tracer.iter[:]:
            hidden = model.model.layers[1].output[0]
        hidden += 1.0


def test_a_write_of_all_steps_makes_what_was_read_before_old(model: Model) -> None:
    with pytest.raises(GraphError, match="was read before"), generate(model) as tracer:
        hidden = model.model.layers[1].output[0]
        with tracer.all():
            model.model.layers[1].output[0][:] += 1.0
        hidden += 1.0


def test_tokens_are_read_and_assigned(model: Model) -> None:
    with generate(model, [IDS, [6]]) as tracer:
        assert tracer.token.shape == (2,) and tracer.token.dtype is torch.int64
        for step in tracer.iter[1:3]:
            assert tracer.token.shape == (2,)
            tracer.token = torch.tensor([step, 9])
        with tracer.iter[3]:
            tracer.token[...] = 7
            tracer.token[0] = 8
    writes = nodes_of(tracer, Write)
    assert {(node.site.port, node.site.module) for node in writes} == {(Port.TOKEN, "")}
    assert [node.step for node in writes] == [1, 2, 3, 3]
    with (
        generate(model, None) as tracer,
        tracer.invoke(IDS, generate=False),
        pytest.raises(GraphError, match="no next token"),
    ):
        tracer.token.save()
    with pytest.raises(GraphError, match="steps of a generation"), model.trace(IDS, run=False) as plain:
        plain.token.save()


def test_stop_is_of_the_steps_that_it_stands_in(model: Model) -> None:
    with generate(model, [IDS, [6]]) as tracer:
        with tracer.all():
            tracer.stop(when=tracer.token == 3)
        for step in tracer.iter[:]:
            if step == 2:
                tracer.stop()
                tracer.stop(when=False)
    assert [(node.step, node.num_steps) for node in nodes_of(tracer, Stop)] == [(0, 4), (2, 1), (2, 1)]
    with pytest.raises(GraphError, match="a value of the trace or a truth"), generate(model) as tracer:
        tracer.stop(when="now")


def test_next_moves_modules_on(model: Model) -> None:
    with generate(model) as tracer:
        model.lm_head.output.save()
        model.lm_head.next().output.save()
        model.model.next(2)
        model.model.layers[0].mlp.output.save()
        tracer.next()
        model.lm_head.output.save()
        for _ in tracer.iter[0:2]:  # steps by their own numbers; next() in a body is for the rest of it
            model.model.embed_tokens.output.save()
            model.model.embed_tokens.next().output.save()
        model.model.norm.output.save()
    assert [node.step for node in nodes_of(tracer, Read)] == [0, 1, 2, 2, 0, 1, 1, 2, 3]
    with pytest.raises(GraphError, match="there is no step 4 here: at most 4 tokens are new"), generate(model):
        model.lm_head.next(4).output.save()
    with pytest.raises(GraphError, match=r"model\.generate\(prompt, max_new_tokens"), model.trace(IDS, run=False):
        model.lm_head.next()
    with generate(model, None) as tracer:
        with tracer.invoke(IDS):
            model.lm_head.next().output.save()
        with tracer.invoke(IDS):
            model.lm_head.output.save()
    assert [(node.invoke, node.step) for node in nodes_of(tracer, Read)] == [(0, 1), (1, 0)]


def test_shapes_of_steps(model: Model) -> None:
    with generate(model, [IDS, [6]]) as tracer:
        hidden = model.model.layers[0].output[0]
        assert hidden.shape == (2, 3, 8)
        for step in tracer.iter[:]:
            shape = (model.model.layers[0].output[0] * tracer.mask[..., None]).shape
            assert shape == (2, 3 if step == 0 else 1, 8)
            assert model.model.layers[0].output[0].at(-1).shape == (2, 8)
        with tracer.all():
            mixed = model.model.layers[0].output[0]
            assert repr(mixed.shape) == "[2, ?, 8]" and mixed[:, -1].shape == (2, 8)
            with pytest.raises(GraphError, match="follows from the step"):
                mixed.shape[1]
            with pytest.raises(GraphError, match="positions are not the same at each"):
                mixed.at(0)
            with pytest.raises(GraphError, match="whose mask is that of the prompts"):
                tracer.mask.sum()
        with tracer.iter[1:]:
            assert model.model.layers[0].output[0].shape == (2, 1, 8)


def test_called_modules_of_steps_are_asked_about_as_prompts_of_one_token(model: Model, backend: Any) -> None:
    with generate(model) as tracer:
        for _ in tracer.iter[:]:
            hidden = model.model.layers[0].output[0] * tracer.mask[..., None] + tracer.token[:, None, None]
            assert model.lm_head(hidden).shape == backend.shape.shape
    prompt, *columns = backend.validated  # the same question for all later steps, once the mask stands before them
    assert [invoke.sequences for invoke in prompt.invokes] == [(tuple(IDS),)]
    assert [[invoke.sequences for invoke in column.invokes] for column in columns] == [[((5,),)]] * 2
    for question in backend.validated:
        assert all(invoke.generation is None for invoke in question.invokes)
        assert not [node for node in question.graph.nodes if isinstance(node, Read) and node.step]


def test_draws_are_counted_anew_at_each_step(model: Model) -> None:
    with generate(model) as tracer:
        noise = torch.randn_like(model.model.layers[0].output[0])
        for _ in tracer.iter[:]:
            hidden = model.model.layers[1].output[0]
            hidden += torch.randn_like(hidden) + torch.rand_like(hidden)
        noise.save()
        with tracer.all():
            hidden = model.model.layers[2].output[0]
            hidden += torch.randn_like(hidden)
    draws = [node.kwargs["draw"] for node in nodes_of(tracer, Op) if "draw" in node.kwargs]
    assert draws == [0, 1, 2, 0, 1, 3]  # step 0 had one before; the other steps are one body


def test_edits_act_at_every_step_unless_they_name_places(model: Model) -> None:
    def steps(change: Any) -> list[tuple[int, int]]:
        with model.edit() as edited:
            change()
        with generate(edited) as tracer:
            pass
        return [(node.step, node.num_steps) for node in nodes_of(tracer, Write)]

    layer = model.model.layers[1]

    def whole() -> None:
        layer.output[0][:] += 1.0

    def last() -> None:
        layer.output[0][:, -1] += 1.0

    def newest() -> None:
        layer.output[0].at(-1)[:] += 1.0

    def begin() -> None:
        layer.output[0].at(0)[:] += 1.0

    def column() -> None:
        layer.output[0][:, 1] += 1.0

    assert steps(whole) == steps(last) == [(0, 4)]
    assert steps(newest) == [(0, 1), (1, 3)]
    assert steps(begin) == steps(column) == [(0, 1)]
    with model.edit() as masked:  # which is all true behind the prompts
        layer.output[0][:] += masked.mask[..., None] * 1.0
    with model.edit() as third:
        layer.output[0][:] += third.mask[:, 2:3, None] * 1.0
    for edited, expected in ((masked, [(0, 1), (1, 3)]), (third, [(0, 1)])):
        with generate(edited) as tracer:
            pass
        assert [(node.step, node.num_steps) for node in nodes_of(tracer, Write)] == expected


def test_what_has_no_steps_says_so(model: Model) -> None:
    def refused(told: str, body: Any, prompts: Any = IDS) -> None:
        with pytest.raises(PolytraceError, match=told), generate(model, prompts) as tracer:
            body(tracer)

    def nested(tracer: Any) -> None:
        for _ in tracer.iter[:]:
            with tracer.iter[1]:
                pass

    def invoking(tracer: Any) -> None:
        with tracer.invoke(IDS):
            for _ in tracer.iter[:]:
                tracer.invoke(IDS)

    def grouping(tracer: Any, moves: Any = lambda tracer: tracer.next()) -> None:
        for prompt in (IDS, [6]):
            with tracer.invoke(prompt):
                pass
        with tracer.invoke():
            moves(tracer)
            model.lm_head.output.save()

    def caching(tracer: Any) -> None:
        for _ in tracer.iter[:]:
            tracer.cache()

    def logging(tracer: Any) -> None:
        with tracer.all():
            tracer.log("norm", model.lm_head.output.norm())

    refused("a loop over steps is open already", nested)
    refused("prompts are given before the loop", invoking, None)
    refused("tracer.invoke.. without prompts is all prompts as one view", grouping, None)
    for loop in (lambda tracer: tracer.iter[:], lambda tracer: tracer.all(), lambda tracer: tracer.iter[0]):
        told = "all prompts as one view, at step 0: write the loop over steps in the invoke of each"
        refused(told, lambda tracer, loop=loop: grouping(tracer, loop), None)
    refused("a cache is of step 0", caching)
    refused("a log is printed once", logging)
    refused("belongs to prompts", lambda tracer: tracer.iter[0], None)
    refused("there is no step 4: with at most 4 new tokens", lambda tracer: tracer.iter[4])
    refused("steps come in their order", lambda tracer: tracer.iter[[2, 1]])
    refused("steps come in their order", lambda tracer: tracer.iter[::-1])
    refused("steps are whole numbers", lambda tracer: tracer.iter["all"])
    refused("one behind the other", lambda tracer: tracer.iter[::2].__enter__())
    refused("there are no such steps", lambda tracer: tracer.iter[9:].__enter__())
    refused(r"save it and decide after the block \(", lambda tracer: bool(tracer.token.sum()))
    refused("has no 'steps': what a line saves at each step is there when", lambda tracer: tracer.token.steps)
    with pytest.raises(GraphError, match="outside of it"), model.session(run=False):
        generate(model)
    with pytest.raises(GraphError, match=r"`tracer\.result`"), generate(model):
        model.generator  # noqa: B018


def test_a_loop_that_is_too_long_is_refused_at_its_first_step(model: Model) -> None:
    from dataclasses import replace

    limits = replace(model.description.limits, max_nodes=20)
    object.__setattr__(model.description, "limits", limits)
    with pytest.raises(TooLargeError, match="4 steps of 7 nodes are more than the 20"), generate(model) as tracer:
        for step in tracer.iter[:]:
            assert step == 0
            model.model.layers[1].output[0][:, -1] += 1.0
            model.lm_head.output.sum()


def test_what_came_is_handed_out(model: Model, backend: Any) -> None:
    ones = {f"{name}@{step}": torch.full((1, 2), float(step)) for name in "01" for step in range(3)}
    backend.results = ones | {"2": torch.zeros(3)}
    with model.generate(IDS, max_new_tokens=4) as tracer:
        kept, listed = polytrace.save([]), []
        for _ in tracer.iter[:]:
            listed.append(model.lm_head.output.save())
            kept.append(listed[-1])
        with tracer.all():
            looped = model.model.norm.output.save()
        never = model.lm_head.next(3).output.save()
        backend.results["2"] = torch.ones(2)
    assert [float(one[0, 0]) for one in polytrace.came(listed)] == [0.0, 1.0, 2.0]
    assert len(kept) == 3 and kept[0] is listed[0]
    assert type(listed[0]) is torch.Tensor and len(listed[0].steps) == 3 and listed[1].steps[1] is listed[1]
    assert looped.stack().shape == (3, 1, 2) and looped.numbers == (0, 1, 2)
    assert float(looped[-1][0, 0]) == 2.0 and len(looped) == 3 and next(iter(looped[1:])) is looped[1]
    with pytest.raises(GraphError, match="one tensor for each step that came"):
        looped + 1
    with pytest.raises(GraphError, match="no value of step 3: of this save's steps came 0-2"):
        looped.at(3)
    with pytest.raises(GraphError, match="step 3 never came"):
        listed[3].sum()
    with pytest.raises(GraphError, match="step 3 never came"):
        len(listed[3])
    assert torch.equal(never, torch.ones(2))
    backend.results = {f"0@{step}": torch.zeros(1, 3 - step) for step in range(2)}
    with model.generate(IDS, max_new_tokens=4) as tracer, tracer.all():
        ragged = model.lm_head.output.save()
    with pytest.raises(GraphError, match=r"have the shapes .* take \[1:\]"):
        ragged.stack()


def test_a_loop_in_little_is_small_on_the_wire(model: Model) -> None:
    def size(new: int, layers: int) -> int:
        with generate(model, max_new_tokens=new) as tracer:
            vector, total, found = torch.ones(8), 0.0, []
            for _ in tracer.iter[:]:
                for layer in model.model.layers[:layers]:
                    layer.output[0][:] += vector
                    total = total + layer.output[0][:, -1]
                found.append(model.lm_head.output[:, -1].save())
            total.save()
            torch.stack(found).save()
        return len(b"".join(encode_request(tracer.request)))

    assert size(13, 4) < size(2, 1) + 1_500 < 5_000
