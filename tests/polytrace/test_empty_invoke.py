"""`tracer.invoke()` without prompts: all prompts so far, against the same prompts run one by one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from small import IDS, OTHER, close, loaded, logits_of, small_llama
from torch import Tensor

from polytrace.errors import GraphError
from polytrace.grammar import check_graph
from polytrace.graph import Graph, Invoke, Node, NodeId, Op, Parameter, Port, Read, Ref, Request, Save, Site

THIRD = [9, 2, 33, 40, 1]


@pytest.fixture(scope="module")
def plain() -> Any:
    return small_llama()


@pytest.fixture(scope="module")
def model(plain: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with loaded(plain, tmp_path_factory.mktemp("llama")) as made:
        yield made


def padded(values: list[Tensor]) -> Tensor:
    """`[1, tokens, ...]` each, left-padded with zeros into one."""
    longest = max(value.shape[1] for value in values)
    return torch.cat([torch.cat([torch.zeros(1, longest - v.shape[1], *v.shape[2:]), v], 1) for v in values])


def test_it_sees_all_prompts_with_what_earlier_invokes_changed(plain: Any, model: Any) -> None:
    with model.trace() as tracer:
        with tracer.invoke(IDS):
            model.model.layers[1].output[0][:, -1] += 2.0
            first = model.lm_head.output.save()
        with tracer.invoke([OTHER, THIRD]):
            others = model.lm_head.output.save()
        with tracer.invoke() as everyone:
            logits = model.lm_head.output.save()
            lengths = tracer.lengths
            mask = tracer.mask.save()
            third = model.model.layers[2].output[0].at(-2).save()
            pattern = model.model.layers[0].self_attn.pattern.save()
    assert everyone.lengths == lengths == (len(IDS), len(OTHER), len(THIRD))
    assert torch.equal(logits, padded([first, others[:1, -len(OTHER) :], others[1:]]))
    close(logits[1:2, -len(OTHER) :], logits_of(plain, OTHER))
    assert (logits[:1] - logits_of(plain, IDS)).abs().max() > 0.1
    assert mask.sum(1).tolist() == list(lengths) and mask[1].tolist() == [False] * 3 + [True] * 4
    assert third.shape == (3, 32) and pattern.shape == (3, 4, 7, 7)
    assert pattern[1, :, :3].abs().max() == 0 and pattern[1, 0, 3, 3] == 1


def test_scores_there_are_those_of_a_list_of_the_prompts(model: Any) -> None:
    """Where a query sees no key they are -inf, at keys of pads too; queries of pads read 0."""
    with model.trace([IDS, OTHER, THIRD]):
        listed = model.model.layers[1].self_attn.scores.save()
    with model.trace() as tracer:
        with tracer.invoke(IDS):
            pass
        with tracer.invoke([OTHER, THIRD]):
            pass
        with tracer.invoke():
            joined = model.model.layers[1].self_attn.scores.save()
    assert torch.equal(joined, listed)
    assert (joined[1, :, 3:, :3] == -torch.inf).all() and not joined[1, :, :3].any()


def test_what_is_written_there_reaches_every_prompt(plain: Any, model: Any) -> None:
    def steer(module: Any, args: Any, output: Tensor) -> Tensor:
        output = output * 0.5
        output[:, -1] += 1.0
        return output

    with model.trace() as tracer:
        with tracer.invoke(IDS):
            first = model.lm_head.output.save()
        with tracer.invoke(OTHER):
            second = model.lm_head.output.save()
        with tracer.invoke():
            hidden = model.model.layers[1].output
            model.model.layers[1].output = hidden * 0.5
            model.model.layers[1].output[:, -1] += 1.0
        with tracer.invoke(THIRD):
            later = model.lm_head.output.save()
    close(later, logits_of(plain, THIRD))
    handle = plain.model.layers[1].register_forward_hook(steer)
    close(first, logits_of(plain, IDS))
    close(second, logits_of(plain, OTHER))
    handle.remove()
    assert (first - logits_of(plain, IDS)).abs().max() > 0.1


def test_what_is_taken_from_the_end_is_all_that_runs(model: Any) -> None:
    with model.trace() as tracer:
        with tracer.invoke(IDS):
            pass
        with tracer.invoke([OTHER, THIRD]):
            pass
        with tracer.invoke():
            logits = model.lm_head.output
            hidden = model.model.layers[2].output[0]
            found = [logits[:, -1], logits[:, -3:, :5], logits[:, 5], hidden[:, 4:], hidden[:, 1], hidden[:, :-2]]
            saved = [value.save() for value in found]
            whole = [logits.save(), hidden.save()]
    with model.trace() as narrow:
        with narrow.invoke(IDS):
            pass
        with narrow.invoke(OTHER):
            pass
        with narrow.invoke():
            last = model.lm_head.output[:, -1].save()
    expected = [whole[0][:, -1], whole[0][:, -3:, :5], whole[0][:, 5], *(whole[1][:, i] for i in (slice(4, None), 1))]
    assert all(map(torch.equal, saved, [*expected, whole[1][:, :-2]]))
    assert torch.equal(last, whole[0][:2, -1])
    assert narrow.receipt.read_bytes == 2 * 64 * 4  # of each prompt one row of logits


def test_a_reduction_over_its_tokens_wants_the_mask_as_everywhere(plain: Any, model: Any) -> None:
    with pytest.raises(GraphError, match="prompts of different lengths"), model.trace() as tracer:
        with tracer.invoke(IDS):
            pass
        with tracer.invoke(OTHER):
            pass
        with tracer.invoke():
            model.model.layers[1].output[0].mean(1).save()
    with model.trace() as tracer:
        with tracer.invoke(IDS):
            own = model.model.layers[1].output[0].mean(1).save()
        with tracer.invoke(OTHER):
            pass
        with tracer.invoke():
            hidden, mask = model.model.layers[1].output[0], tracer.mask[..., None]
            mean = ((hidden * mask).sum(1) / mask.sum(1)).save()
    close(mean[:1], own)


def test_in_a_trace_with_its_prompts_it_means_these(model: Any) -> None:
    with model.trace([IDS, OTHER]) as tracer:
        late = model.model.layers[3].output[0].save()
        with tracer.invoke():
            again = model.model.layers[3].output[0].save()
            early = model.model.layers[0].output[0].save()
        last = model.lm_head.output[:, -1].save()
    assert torch.equal(late, again) and early.shape == late.shape and last.shape == (2, 64)


def test_layers_are_skipped_for_all_and_caches_are_of_all(model: Any) -> None:
    with model.trace() as tracer:
        with tracer.invoke(IDS):
            first = model.lm_head.output.save()
        with tracer.invoke(OTHER):
            pass
        with tracer.invoke():
            cache = tracer.cache(modules=[model.model.layers[2], "lm_head"], select=lambda h: h[:, -1])
            model.model.layers[2].skip(model.model.layers[2].input)
    with model.trace(IDS):
        model.model.layers[2].skip(model.model.layers[2].input)
        alone = model.lm_head.output.save()
    assert torch.equal(first, alone) and cache["lm_head"].output.shape == (2, 64)
    assert torch.equal(cache["lm_head"].output[:1], alone[:, -1])
    assert tracer.receipt.passes[0].layer_rows == (11, 11, 0, 11)


def test_it_is_refused_where_it_means_nothing_or_would_not_fit(model: Any) -> None:
    with pytest.raises(GraphError, match="there are none yet"), model.trace() as tracer, tracer.invoke():
        pass
    for shape in ([2, 6, 32], [3, 7, 32], [1, 7, 32]):
        with pytest.raises(GraphError, match="exact shape"), model.trace() as tracer:
            with tracer.invoke(IDS):
                pass
            with tracer.invoke(OTHER):
                pass
            with tracer.invoke():
                model.model.layers[1].output = torch.zeros(shape)
    with pytest.raises(GraphError, match=r"read model\.layers\.1\.output again"), model.trace() as tracer:
        with tracer.invoke(IDS):
            own = model.model.layers[1].output
        with tracer.invoke(OTHER):
            pass
        with tracer.invoke():
            model.model.layers[1].output[:, -1] += 1.0
        own[:, 0] = 0.0


def test_a_graph_that_puts_views_together_as_no_client_does_is_refused(model: Any) -> None:
    def graph(*args: Any, **kwargs: Any) -> Request:
        site = Site(module="model.layers.0", port=Port.OUTPUT)
        nodes: tuple[Node, ...] = (
            Read(site=site, invoke=0, where="a.py:1"),
            Parameter(path="model.norm.weight", where="a.py:2"),
            Op(name="left_pad", args=args, kwargs=kwargs, where="a.py:3"),
            Save(name="0", value=Ref(NodeId(2)), where="a.py:4"),
        )
        return Request(graph=Graph(nodes=nodes), invokes=(Invoke(sequences=((1, 2),)),), constants={})

    read, weight = Ref(NodeId(0)), Ref(NodeId(1))
    for args in ((), (read, (1,)), ([], (1,)), ([1], (1,)), ([read], (0,)), ([read], [1]), ([read], (1,), 2)):
        with pytest.raises(GraphError, match=r"left_pad|positional arguments"):
            check_graph(graph(*args).graph, num_invokes=1, constants=())
    for dims, unseen in (((1,), (1,)), ((2, 3), (-1,)), ((2, 3), ("1",)), ((2, 3), 1.0)):
        with pytest.raises(GraphError, match="left_pad"):
            check_graph(graph([read], dims, unseen=unseen).graph, num_invokes=1, constants=())
    for args in (([weight], (1,)), ([read, weight], (1,)), ([read], (2, 3))):
        check_graph(graph(*args).graph, num_invokes=1, constants=())
        with pytest.raises(GraphError) as error:
            model.backend.validate(graph(*args))
        assert error.value.where == "a.py:3"
