"""What a generation may be asked for, in numbers: checked where it is recorded and where a request is decoded."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

from polytrace.errors import GraphError, TooLargeError
from polytrace.graph import Backward, Generation, Graph, Invoke, Last, Port, Read, Save, Stop, Write, name_at
from polytrace.timing import ENDING, When, time_of

MAX_NEW_TOKENS = 1 << 20  # of one sequence; the model's own context is shorter
MAX_SEQUENCES = 1 << 16  # that go on, of one request: its prompts x samples
MAX_EOS = 64
MAX_STOPS = 16
MAX_STOP_CHARS = 256
MAX_LIKELIEST = 20
MAX_SEED = 1 << 63
NO_GRADIENTS = "a generation has no gradients: write model.trace(...) of the prompts with their new tokens"


def refusals(generation: Generation) -> Iterator[str]:
    """What of its numbers cannot be."""
    sampling = generation.sampling
    if not 1 <= generation.max_new_tokens <= MAX_NEW_TOKENS:
        yield f"max_new_tokens is from 1 to {MAX_NEW_TOKENS}, not {generation.max_new_tokens}"
    if not (math.isfinite(sampling.temperature) and sampling.temperature > 0):
        yield f"temperature is a number above 0, not {sampling.temperature}; do_sample=False takes the likeliest token"
    if not 0 <= sampling.top_k < 1 << 31:
        yield f"top_k is a number of tokens, 0 for all, not {sampling.top_k}"
    if not 0 < sampling.top_p <= 1:
        yield f"top_p is above 0 and at most 1, not {sampling.top_p}"
    if not 0 <= sampling.min_p <= 1:
        yield f"min_p is from 0 to 1, not {sampling.min_p}"
    if not (math.isfinite(sampling.repetition_penalty) and sampling.repetition_penalty > 0):
        yield f"repetition_penalty is a number above 0, not {sampling.repetition_penalty}"
    if not 0 <= sampling.seed < MAX_SEED:
        yield f"the seed is an integer from 0 to 2**63 - 1, not {sampling.seed}"
    if len(generation.eos) > MAX_EOS or not all(0 <= token < 1 << 31 for token in generation.eos):
        yield f"eos is at most {MAX_EOS} token ids"
    if len(generation.stop) > MAX_STOPS or not all(0 < len(text) <= MAX_STOP_CHARS for text in generation.stop):
        yield f"stop is at most {MAX_STOPS} texts of 1 to {MAX_STOP_CHARS} characters"
    if generation.logprobs is not None and not 0 <= generation.logprobs <= MAX_LIKELIEST:
        yield f"logprobs is a number of tokens from 0 to {MAX_LIKELIEST}, not {generation.logprobs}"


def check_stop_texts(invokes: Sequence[Invoke], has_tokenizer: Callable[[], bool], where: str | None = None) -> None:
    """Raises GraphError where texts end a sequence, and there is nothing to know a token's text by."""
    if any(one.generation.stop for one in invokes if one.generation is not None) and not has_tokenizer():
        told = "texts that end a generation need a tokenizer, and this model came without one: give eos=(ids, ...)"
        raise GraphError(told, where=where)


def num_steps(invoke: Invoke) -> int:
    """Steps that an invoke may have, the prompt's among them: each but the last one's token is read again."""
    return invoke.generation.max_new_tokens if invoke.generation is not None else 1


def new_tokens(invokes: Sequence[Invoke]) -> int:
    """Tokens that may come, of all sequences."""
    return sum(len(one.sequences) * one.generation.max_new_tokens for one in invokes if one.generation is not None)


def check_generation(graph: Graph, invokes: Sequence[Invoke], *, max_nodes: int) -> None:
    """Raises GraphError at a node whose steps cannot be, TooLargeError where all steps together have too many nodes."""
    if all(one.generation is None for one in invokes):
        _check_without(graph)
        return
    going_on = sum(len(one.sequences) for one in invokes if one.generation is not None)
    if going_on > MAX_SEQUENCES:
        told = f"this request has {going_on} sequences that go on (prompts x samples); {MAX_SEQUENCES} is the most"
        raise TooLargeError(f"{told}: send it in several requests")
    if (total := new_tokens(invokes)) > max_nodes:
        raise TooLargeError(f"this request may have {total} new tokens in all; {max_nodes} is the most")
    limits = [num_steps(one) for one in invokes]
    whens: list[When] = []
    names: dict[str, bool] = {}  # of saves, and whether they are of steps
    results: set[str] = set()
    unfolded = 0
    for node in graph.nodes:
        if isinstance(node, (Read, Write, Stop)):
            _check_range(node, limits[node.invoke])
            if not isinstance(node, Stop) and node.site.port is Port.TOKEN:
                _check_token(node, invokes[node.invoke])
        elif isinstance(node, Save) and node.step is not None:
            _check_range(node, max(limits))
        elif isinstance(node, Backward):
            raise GraphError(NO_GRADIENTS, where=node.where)
        when = time_of(node, lambda operand: whens[operand])
        if isinstance(node, Last) and any(whens[value.node] == ENDING for value in node.values):
            raise GraphError("a value of the end of a generation is no value of one of its steps", where=node.where)
        whens.append(when)
        unfolded += when.num_steps
        if unfolded > max_nodes:
            raise TooLargeError(f"the steps have more than {max_nodes} nodes in all", where=node.where)
        if isinstance(node, Save):
            _check_save(node, when, names, results)


def _check_save(node: Save, when: When, names: dict[str, bool], results: set[str]) -> None:
    is_stepped = node.step is not None
    if names.setdefault(node.name, is_stepped) != is_stepped:
        raise GraphError(f"{node.name!r} is saved at steps, and once too", where=node.where)
    if not is_stepped and when.is_loop:
        raise GraphError(f"{node.name!r} is a value of {when} and is saved once", where=node.where)
    for step in range(when.step, when.step + when.num_steps) if is_stepped else (0,):
        name = name_at(node.name, step) if is_stepped else node.name
        if name in results:
            raise GraphError(f"two values are saved as {name!r}", where=node.where)
        results.add(name)


def _check_range(node: Read | Write | Stop | Save, limit: int) -> None:
    step = node.step or 0
    if step < 0 or node.num_steps < 1 or step + node.num_steps > limit:
        raise GraphError(
            f"{When(step, node.num_steps)}: there are {limit}, 0-{limit - 1}, where at most {limit} tokens are new",
            where=node.where,
        )


def _check_token(node: Read | Write, invoke: Invoke) -> None:
    if invoke.generation is None:
        raise GraphError("this prompt does not go on, so it has no next token", where=node.where)


def _check_without(graph: Graph) -> None:
    for node in graph.nodes:
        is_of_steps = isinstance(node, (Stop, Last)) or (isinstance(node, Save) and node.step is not None)
        if isinstance(node, (Read, Write)):
            is_of_steps = (node.step, node.num_steps) != (0, 1) or node.site.port is Port.TOKEN
        if is_of_steps:
            raise GraphError("no prompt of this request goes on, so it has one step", where=node.where)
