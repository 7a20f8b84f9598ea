"""What `loss.backward()` and `.grad` record: which node a gradient is of, what accumulates, what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import polytrace
from polytrace.errors import GraphError
from polytrace.graph import Backward, Constant, Grad, GradWrite, Node, NodeId, Op, Read, Request, Save, Write
from polytrace.model import Model


def sent(tracer: Any) -> tuple[Node, ...]:
    assert isinstance(tracer.request, Request)
    return tracer.request.graph.nodes


def of_kind(nodes: tuple[Node, ...], kind: type[Any]) -> list[Any]:
    return [node for node in nodes if isinstance(node, kind)]


def terms(nodes: tuple[Node, ...], save: Save) -> list[Grad]:
    """The gradients that a saved sum has."""
    waiting, found = [save.value.node], []
    while waiting:
        node = nodes[waiting.pop()]
        if isinstance(node, Grad):
            found.append(node)
        else:
            assert isinstance(node, Op)
            assert node.name == "add"
            waiting += [arg.node for arg in node.args]  # type: ignore[union-attr]
    return found


def layer(model: Model, number: int) -> Any:
    return model.model.layers[number].output[0]


# --- what a gradient is of


def test_a_block_gives_a_values_gradient_of_its_backward(model: Model) -> None:
    with model.trace([1, 2, 3], run=False) as tracer:
        hidden = layer(model, 1)
        loss = model.lm_head.output.sum()
        with loss.backward():
            grad = hidden.grad.save()
        assert (grad.shape, grad.dtype) == ((1, 3, 8), torch.float32)
    nodes = sent(tracer)
    (backward,), (found,) = of_kind(nodes, Backward), of_kind(nodes, Grad)
    assert isinstance(nodes[found.of.node], Read)
    assert nodes[found.backward.node] is backward
    assert backward.gradient is None
    assert backward.where.startswith("test_gradient_recording.py:")


def test_a_site_that_is_read_again_in_the_block_is_the_same_tensor(model: Model) -> None:
    with model.trace([1, 2, 3], run=False) as tracer:
        hidden = layer(model, 1)
        loss = hidden.pow(2).sum() + model.lm_head.output.sum()
        with loss.backward():
            layer(model, 1).grad.save()
            hidden.grad.save()
            layer(model, 0).grad.save()  # was not read before
    nodes = sent(tracer)
    assert [nodes[grad.of.node].site.module for grad in of_kind(nodes, Grad)] == ["model.layers.1", "model.layers.0"]
    assert len(of_kind(nodes, Read)) == 3


def test_a_site_that_was_changed_in_place_has_the_gradient_of_what_it_became(model: Model) -> None:
    with model.trace([1, 2, 3], run=False) as tracer:
        before = layer(model, 1)
        hidden = layer(model, 1)
        hidden[:, -1] = 0
        loss = model.lm_head.output.sum()
        with loss.backward():
            hidden.grad.save()
            layer(model, 1).grad.save()
            before.grad.save()
    nodes = sent(tracer)
    (write,) = of_kind(nodes, Write)
    assert [grad.of.node for grad in of_kind(nodes, Grad)] == [write.value.node, 0]


def test_what_was_assigned_has_its_own_gradient(model: Model) -> None:
    with model.trace([1, 2, 3], run=False) as tracer:
        new = layer(model, 1) * 2
        model.model.layers[1].output = new
        loss = model.lm_head.output.sum()
        with loss.backward():
            new.grad.save()
    nodes = sent(tracer)
    (grad,), (write,) = of_kind(nodes, Grad), of_kind(nodes, Write)
    assert grad.of == write.value


def test_views_over_all_prompts_have_the_gradients_of_each(model: Model) -> None:
    with model.trace(run=False) as tracer:
        with tracer.invoke([1, 2, 3]):
            pass
        with tracer.invoke([4, 5]):
            pass
        with tracer.invoke():
            hidden = layer(model, 1)
            loss = model.lm_head.output[:, -1].sum()
            with loss.backward(), pytest.raises(GraphError, match="in the invoke of each"):
                hidden.grad[0] = 0
            with loss.backward():
                hidden.grad = torch.ones(2, 3, 8)
                grad = hidden.grad.save()
                layer(model, 0).grad.save()
        assert grad.shape == (2, 3, 8)
    nodes = sent(tracer)
    grads, changes = of_kind(nodes, Grad), of_kind(nodes, GradWrite)
    assert [nodes[one.of.node].invoke for one in grads] == [0, 1]
    assert [nodes[one.of.node].invoke for one in changes] == [0, 1]
    parts = [nodes[one.value.node] for one in changes]
    assert [part.args[1] for part in parts] == [(slice(0, 1), slice(0, None)), (slice(1, 2), slice(1, None))]  # type: ignore[union-attr]


# --- changes of gradients


def test_a_change_in_a_block_is_what_goes_on_backwards(model: Model) -> None:
    with model.trace([1, 2, 3], run=False) as tracer:
        first, hidden = layer(model, 0), layer(model, 1)
        loss = model.lm_head.output.sum()
        with loss.backward():
            hidden.grad[:, 0] = 0
            hidden.grad *= 2
            hidden.grad.save()
            first.grad.save()
    nodes = sent(tracer)
    (change,) = of_kind(nodes, GradWrite)
    saved = of_kind(nodes, Save)
    assert change.value == saved[0].value, "the gradient that is saved is what it became"
    doubled = nodes[change.value.node]
    assert isinstance(doubled, Op)
    assert doubled.name == "setitem"
    assert len(of_kind(nodes, Grad)) == 2


def test_an_assigned_gradient_needs_no_other(model: Model) -> None:
    with model.trace([1, 2, 3], run=False) as tracer:
        hidden = layer(model, 1)
        with model.lm_head.output.sum().backward():
            hidden.grad = torch.ones(1, 3, 8)
            layer(model, 0).grad.save()
    nodes = sent(tracer)
    (change,), (grad,) = of_kind(nodes, GradWrite), of_kind(nodes, Grad)
    assert isinstance(nodes[change.value.node], Constant)
    assert nodes[grad.of.node].site.module == "model.layers.0"


def test_a_change_that_reaches_no_gradient_is_refused(model: Model) -> None:
    with pytest.raises(GraphError, match=r"reaches nothing.*recording\.py"), model.trace([1, 2, 3], run=False):
        hidden = layer(model, 1).save()
        with model.lm_head.output.sum().backward():
            hidden.grad[...] = 0


def test_a_backward_that_nobody_looks_at_is_not_sent(model: Model) -> None:
    with model.trace([1, 2, 3], run=False) as tracer:
        loss = model.lm_head.output.sum()
        loss.backward()
        loss.save()
    assert not of_kind(sent(tracer), Backward)


# --- what accumulates


def test_gradients_add_up_outside_of_blocks(model: Model) -> None:
    with model.trace([1, 2, 3], run=False) as tracer:
        hidden, logits = layer(model, 1), model.lm_head.output
        logits[:, 0].sum().backward(retain_graph=True)
        one = hidden.grad.save()
        loss = logits[:, 1].sum()
        with loss.backward():
            own = hidden.grad.save()
        two = hidden.grad.save()
        del hidden.grad
        assert hidden.grad is None
        logits[:, 2].sum().backward()
        three = hidden.grad.save()
        assert [value.shape for value in (one, own, two, three)] == [(1, 3, 8)] * 4
    nodes, saves = sent(tracer), of_kind(sent(tracer), Save)
    backwards = [NodeId(place) for place, node in enumerate(nodes) if isinstance(node, Backward)]
    found = [sorted(grad.backward.node for grad in terms(nodes, save)) for save in saves]
    assert found == [backwards[:1], backwards[1:2], backwards[:2], backwards[2:]]


def test_a_change_outside_of_blocks_is_of_the_sum_alone(model: Model) -> None:
    with model.trace([1, 2, 3], run=False) as tracer:
        hidden, logits = layer(model, 1), model.lm_head.output
        logits[:, 0].sum().backward()
        hidden.grad.zero_()
        logits[:, 1].sum().backward()
        assert hidden.grad.save().shape == (1, 3, 8)
        layer(model, 0).grad.mul_(0)  # nobody looks at it again: no error, as in torch
    nodes = sent(tracer)
    assert not of_kind(nodes, GradWrite)
    added = nodes[of_kind(nodes, Save)[0].value.node]
    assert isinstance(added, Op)
    assert added.name == "add"
    zeroed, second = (nodes[arg.node] for arg in added.args)  # type: ignore[union-attr]
    assert isinstance(zeroed, Op)
    assert zeroed.name == "setitem"
    assert isinstance(second, Grad)


def test_values_have_no_gradient_of_losses_that_they_have_nothing_to_do_with(model: Model) -> None:
    with model.trace(run=False) as tracer:
        saved = []
        for prompt in ([1, 2], [3, 4], [5, 6]):
            with tracer.invoke(prompt):
                hidden = layer(model, 1)
                model.lm_head.output.sum().backward()
                saved.append(hidden.grad.save())
    nodes = sent(tracer)
    assert [nodes[grad.of.node].invoke for grad in of_kind(nodes, Grad)] == [0, 1, 2]


def test_a_gradient_goes_through_writes_to_other_prompts(model: Model) -> None:
    with model.trace(run=False) as tracer:
        with tracer.invoke([1, 2]):
            source = layer(model, 1)
            never = layer(model, 2)
        with tracer.invoke([3, 4]):
            model.model.layers[1].output = source
            model.lm_head.output.sum().backward()
        source.grad.save()
        with pytest.raises(GraphError, match="does not depend on this value"):
            _ = never.grad
    assert of_kind(sent(tracer), Grad)[0].of.node == 0


def test_inputs_say_who_accumulates(model: Model) -> None:
    with model.trace([1, 2, 3], run=False) as tracer:
        first, second, logits = layer(model, 0), layer(model, 1), model.lm_head.output
        logits[:, 0].sum().backward(inputs=[first])
        first.grad.save()
        with pytest.raises(GraphError, match=r"does not depend"):
            _ = second.grad
    assert len(of_kind(sent(tracer), Grad)) == 1


# --- what is learnt


def test_a_learnt_value_has_the_gradient_of_each_step_alone(model: Model) -> None:
    with model.trace(run=False) as tracer:
        vector = tracer.value(torch.zeros(8))
        for _ in range(3):
            with tracer.invoke([1, 2, 3]):
                layer(model, 1)[:, -1] += vector
                loss = model.lm_head.output.pow(2).sum()
            loss.backward()
            vector = vector - 0.1 * vector.grad
        vector.save()
    nodes = sent(tracer)
    grads = of_kind(nodes, Grad)
    assert len(grads) == 3
    assert isinstance(nodes[grads[0].of.node], Constant)
    assert [nodes[grad.of.node].name for grad in grads[1:]] == ["sub", "sub"]


def test_in_place_steps_under_no_grad_are_those_of_torch(model: Model) -> None:
    with model.trace(run=False) as tracer:
        vector = tracer.value(torch.zeros(8)).requires_grad_()
        assert vector.requires_grad
        for _ in range(3):
            with tracer.invoke([1, 2, 3]):
                layer(model, 1)[:, -1] += vector
                loss = model.lm_head.output.pow(2).sum()
            loss.backward()
            with torch.no_grad():
                vector -= 0.1 * vector.grad
            vector.grad = None
        vector.save()
    nodes = sent(tracer)
    assert [type(nodes[grad.of.node]).__name__ for grad in of_kind(nodes, Grad)] == ["Constant", "Op", "Op"]
    assert [nodes[grad.of.node].name for grad in of_kind(nodes, Grad)[1:]] == ["detach", "detach"]
    before = [node for node in of_kind(nodes, Op) if node.name == "detach"]
    assert len(before) == 2, "the last value is saved as it is"


def test_each_value_that_is_brought_has_a_gradient_of_its_own(model: Model) -> None:
    with model.trace([1, 2, 3], run=False) as tracer:
        zeros = torch.zeros(8)
        one, two = tracer.value(zeros), tracer.value(zeros)
        layer(model, 0)[:, -1] += one
        layer(model, 1)[:, -1] += two
        model.lm_head.output.sum().backward()
        one.grad.save()
        two.grad.save()
    grads = of_kind(sent(tracer), Grad)
    assert grads[0].of != grads[1].of
    assert len(tracer.request.constants) == 1, "its content travels once"


def test_optimisers_take_the_steps_of_torch() -> None:
    for ours, theirs, more in (
        (polytrace.optim.SGD(lr=0.1), torch.optim.SGD, {"lr": 0.1}),
        (polytrace.optim.SGD(lr=0.1, momentum=0.9), torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}),
        (polytrace.optim.Adam(lr=0.1), torch.optim.Adam, {"lr": 0.1}),
        (
            polytrace.optim.Adam(lr=0.05, betas=(0.8, 0.9), eps=1e-3),
            torch.optim.Adam,
            {"lr": 0.05, "betas": (0.8, 0.9), "eps": 1e-3},
        ),
    ):
        generator = torch.Generator().manual_seed(0)
        params = [torch.randn(3, generator=generator), torch.randn(2, 2, generator=generator)]
        theirs_own = [param.clone() for param in params]
        optimiser = theirs(theirs_own, **more)  # type: ignore[operator]
        for _ in range(5):
            grads = [torch.randn(param.shape, generator=generator) for param in params]
            params = ours.step(params, grads)
            for param, grad in zip(theirs_own, grads, strict=True):
                param.grad = grad
            optimiser.step()
            for own, other in zip(params, theirs_own, strict=True):
                assert (own - other).abs().max() <= 1e-6  # fp32


def test_an_optimiser_in_a_trace_remembers_values(model: Model) -> None:
    with model.trace(run=False) as tracer:
        optimiser = polytrace.optim.Adam(lr=0.1)
        vector = tracer.value(torch.zeros(8))
        for _ in range(2):
            with tracer.invoke([1, 2, 3]):
                layer(model, 1)[:, -1] += vector
                model.lm_head.output.pow(2).sum().backward()
            (vector,) = optimiser.step([vector], [vector.grad])
        vector.save()
        with pytest.raises(GraphError, match="1 values and 2 gradients"):
            optimiser.step([vector], [vector, vector])
        with pytest.raises(GraphError, match=r"gradient 0 is of shape \[3\]"):
            optimiser.step([vector], [torch.zeros(3)])
    assert len(of_kind(sent(tracer), Grad)) == 2


# --- torch's functions


def test_autograd_grad_gives_values_and_accumulates_nothing(model: Model) -> None:
    with model.trace([1, 2, 3], run=False) as tracer:
        first, second, logits = layer(model, 0), layer(model, 1), model.lm_head.output
        one, two = torch.autograd.grad(logits.sum(), [first, second])
        (weighed,) = torch.autograd.grad(logits, first, grad_outputs=torch.ones(1, 3, 32))
        (both,) = torch.autograd.grad([logits[:, 0].sum(), logits[:, 1]], [first], [None, torch.ones(1, 32)])
        unrelated = tracer.value(torch.zeros(2))
        assert torch.autograd.grad(logits.sum(), [unrelated], allow_unused=True) == (None,)
        (zeros,) = torch.autograd.grad(logits.sum(), [unrelated], materialize_grads=True)
        assert zeros.shape == (2,)
        with pytest.raises(GraphError, match="do not depend on input 0"):
            torch.autograd.grad(logits.sum(), [unrelated])
        for value in (one, two, weighed, both):
            assert value.save().shape == (1, 3, 8)
        with pytest.raises(GraphError, match="has no gradient yet"):
            _ = first.grad
    assert [backward.gradient is not None for backward in of_kind(sent(tracer), Backward)] == [False, True, False]


def test_autograd_backward_of_several_losses_is_of_their_sum(model: Model) -> None:
    with model.trace([1, 2, 3], run=False) as tracer:
        hidden, logits = layer(model, 0), model.lm_head.output
        torch.autograd.backward([logits[:, 0].sum(), logits[:, 1].sum()])
        hidden.grad.save()
    assert len(of_kind(sent(tracer), Backward)) == 1


def test_tensors_that_require_gradients_have_them_when_the_block_ends(model: Model, backend: Any) -> None:
    def in_order(request: Request) -> dict[str, torch.Tensor]:
        saves = of_kind(request.graph.nodes, Save)
        return {save.name: torch.full((8,), float(number)) for number, save in enumerate(saves)}

    backend.results = in_order
    half = torch.zeros(8, requires_grad=True)
    whole = half * 2  # not a leaf: its gradient goes on to `half`
    other = torch.zeros(8, requires_grad=True)
    frozen = torch.zeros(8)
    with model.trace([1, 2, 3]):
        layer(model, 0)[:, -1] += other
        layer(model, 1)[:, -1] += whole
        layer(model, 2)[:, -1] += frozen
        model.lm_head.output.sum().backward()
    assert frozen.grad is None
    assert len(of_kind(backend.requests[0].graph.nodes, Grad)) == 2
    assert half.grad is not None
    assert other.grad is not None
    assert torch.equal(other.grad, torch.zeros(8))
    assert torch.equal(half.grad, torch.full((8,), 2.0))


def test_torch_modules_of_the_users_own_are_trained(model: Model, backend: Any) -> None:
    def ones(request: Request) -> dict[str, torch.Tensor]:
        nodes = request.graph.nodes
        pairs = [(save.name, nodes[nodes[save.value.node].of.node].name) for save in of_kind(nodes, Save)]
        return {name: torch.ones(request.constants[constant].shape) for name, constant in pairs}

    backend.results = ones
    probe = torch.nn.Linear(8, 2)
    with model.trace([1, 2, 3]):
        probe(layer(model, 1)).pow(2).mean().backward()
    assert torch.equal(probe.weight.grad, torch.ones(2, 8))  # type: ignore[arg-type]
    assert torch.equal(probe.bias.grad, torch.ones(2))  # type: ignore[arg-type]


# --- no gradients


def test_what_is_recorded_under_no_grad_is_detached(model: Model) -> None:
    with model.trace([1, 2, 3], run=False) as tracer:
        hidden = layer(model, 1)
        with torch.no_grad():
            weights = (hidden * 2).softmax(-1)
        (weights * hidden).sum().backward()
        hidden.grad.save()
    nodes = sent(tracer)
    names = [node.name for node in of_kind(nodes, Op)]
    assert names == ["mul", "softmax", "detach", "mul", "sum"]
    product = of_kind(nodes, Op)[3]
    assert nodes[product.args[0].node].name == "detach"


def test_programs_without_gradients_are_the_same_under_no_grad(model: Model) -> None:
    with torch.no_grad(), model.trace([1, 2, 3], run=False) as tracer:
        (layer(model, 1) * 2).save()
    assert [node.name for node in of_kind(sent(tracer), Op)] == ["mul"]


def test_a_loss_without_gradients_says_so(model: Model) -> None:
    with torch.no_grad(), model.trace([1, 2, 3], run=False):
        hidden = layer(model, 1)
        hidden.sum().backward()
        with pytest.raises(GraphError, match=r"torch\.set_grad_enabled\(False\)"):
            _ = hidden.grad
        hidden.save()


def test_detached_values_hand_nothing_on(model: Model) -> None:
    with model.trace([1, 2, 3], run=False):
        hidden = layer(model, 1)
        stopped = hidden.detach()
        (stopped * 2).sum().backward()
        stopped.grad.save()
        with pytest.raises(GraphError, match="does not depend on this value"):
            _ = hidden.grad


def test_detach_survives_a_write(model: Model) -> None:
    with model.trace([1, 2, 3], run=False) as tracer:
        first, scale = layer(model, 0), layer(model, 1)
        model.model.layers[1].output = scale.detach()
        model.lm_head.output.sum().backward()
        first.grad.save()  # the service knows that nothing comes back: here sites alone are known
    (write,) = of_kind(sent(tracer), Write)
    written = sent(tracer)[write.value.node]
    assert isinstance(written, Op)
    assert written.name == "detach"


# --- refusals


def test_losses_that_have_no_gradients_are_refused(model: Model) -> None:
    with model.trace([1, 2, 3], run=False):
        logits = model.lm_head.output.save()
        for loss, told in (
            (lambda: logits.backward(), r"shape \[1, 3, 32\].*backward\(gradient=weights\)"),
            (lambda: logits.argmax(-1).sum().backward(), "this loss is int64"),
            (lambda: logits.backward(torch.ones(3)), r"gradient is float32 \[3\], and the loss float32 \[1, 3, 32\]"),
            (lambda: logits.sum().backward(2.0), "not a float"),
            (lambda: logits.sum().backward(create_graph=True), "gradients of gradients"),
            (lambda: torch.autograd.grad(logits.sum(), [logits], create_graph=True), "gradients of gradients"),
        ):
            with pytest.raises(GraphError, match=told) as raised:
                loss()
            assert "test_gradient_recording.py:" in str(raised.value)


def test_values_that_have_no_gradients_are_refused(model: Model) -> None:
    with model.trace([1, 2, 3], run=False) as tracer:
        hidden, weight = layer(model, 1), model.lm_head.weight
        with pytest.raises(GraphError, match=r"has no gradient yet: call loss\.backward"):
            _ = hidden.grad
        loss = (hidden @ weight.T).sum()
        loss.backward()
        with pytest.raises(GraphError, match=r"lm_head\.weight is a weight of the model, and weights are frozen"):
            _ = weight.grad
        with pytest.raises(GraphError, match="this one is int64"):
            _ = hidden.argmax(-1).grad
        with pytest.raises(GraphError, match="this one is bool"):
            _ = tracer.mask.grad
        with pytest.raises(GraphError, match=r"does not depend on this value.*value\.grad"):
            _ = hidden[:, -1].grad
        with pytest.raises(GraphError, match="a gradient has no gradient"):
            hidden.grad.clone().sum().backward()
            _ = hidden.grad.grad
        with pytest.raises(GraphError, match="but for gradients that it is made of"):
            other = layer(model, 2)
            hidden.grad = None
            (torch.autograd.grad(loss, hidden)[0] * 2).sum().backward(inputs=[other])
            _ = other.grad
        with pytest.raises(GraphError, match="detach"):
            hidden.requires_grad = False
        hidden.save()


def test_weights_and_hooks_say_what_to_write_instead(model: Model) -> None:
    with pytest.raises(AttributeError, match="weights are frozen"):
        model.zero_grad()
    with model.trace([1, 2, 3], run=False):
        hidden = layer(model, 1).save()
        with pytest.raises(GraphError, match=r"change `value\.grad` inside"):
            hidden.register_hook(print)
        with pytest.raises(GraphError, match=r"polytrace\.optim\.Adam\(lr=\.\.\.\)\.step"):
            torch.optim.SGD([hidden], lr=0.1)


def test_generations_edits_and_maps_have_no_gradients(model: Model) -> None:
    with model.generate([1, 2, 3], max_new_tokens=3, run=False):
        loss = model.lm_head.output.sum()
        with pytest.raises(GraphError, match="a generation has no gradients"):
            loss.backward()
    with model.edit():
        hidden = layer(model, 1)
        hidden += 1
        with pytest.raises(GraphError, match="an edit has no gradients of its own"):
            hidden.sum().backward()


def test_a_side_of_a_choice_changes_no_gradient_from_outside(model: Model) -> None:
    with model.trace([1, 2, 3], run=False):
        hidden, logits = layer(model, 1), model.lm_head.output
        with logits.sum().backward():
            grad = hidden.grad

            def zeroed() -> Any:
                grad[...] = 0
                return grad

            with pytest.raises(GraphError, match="would act whichever side is taken"):
                polytrace.cond(logits.sum() > 0, zeroed, grad)
            grad.save()


def test_a_gradient_that_was_looked_at_stays_what_it_was(model: Model, backend: Any) -> None:
    backend.results = lambda request: {save.name: torch.ones(1, 3, 8) for save in of_kind(request.graph.nodes, Save)}
    with model.trace([1, 2, 3], peek=True):
        hidden, last = layer(model, 1), layer(model, 2)
        with model.lm_head.output.sum().backward():
            last.grad[:, 0] = 0
            assert hidden.grad.numpy()[0, 0, 0] == 1
            looked = backend.requests[0].graph.nodes
            assert len(of_kind(looked, GradWrite)) == 1, "what was changed before is part of the look"
            with pytest.raises(GraphError, match="was looked at"):
                last.grad[:, 1] = 0


def test_shapes_of_what_is_computed_from_gradients_need_no_backward(model: Model, backend: Any) -> None:
    with model.trace([1, 2, 3], run=False):
        hidden = layer(model, 1)
        with model.lm_head.output.sum().backward():
            assert model.lm_head(hidden.grad).shape == (1, 3, 32)  # the service is asked
        hidden.save()
    asked = backend.validated[0].graph.nodes
    assert [type(node).__name__ for node in asked] == ["Read", "Op", "Call", "Save"]
