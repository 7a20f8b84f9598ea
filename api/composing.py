"""From what an OpenAI client asks for to a request: prompts as token ids, how they go on, and the graph that acts.

Each prompt is an invoke of its own, its samples are equal sequences of it: what is drawn for a prompt does not depend
on the prompts beside it. The request is checked like one that was uploaded.
"""

from __future__ import annotations

import base64
import binascii
import math
import secrets
from array import array
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from api.rendering import rendered
from api.wishes import ChatWish, CompletionWish, Steer, WishError, about, sampling_temperature
from polytrace.description import Leaf, ModelDescription
from polytrace.errors import ContextError, GraphError, TooLargeError, WireError
from polytrace.generation import MAX_SEED
from polytrace.graph import (
    Constant,
    Generation,
    Graph,
    Invoke,
    Node,
    NodeId,
    Op,
    Options,
    Port,
    Read,
    Ref,
    Request,
    Sampling,
    Site,
    Write,
)
from polytrace.tensors import RawTensor
from polytrace.wire import decode_request

CHARS_A_TOKEN = 32  # of a text for which the context could have room, generously
LEAST_TEXT_CHARS = 1 << 20  # that are taken of any model: to encode them takes one or two seconds and 170 MiB
_NODES_OF_STEER = 7  # of one vector and one prompt, at most


def compose(
    wish: CompletionWish | ChatWish, description: ModelDescription, tokenizer: Any, *, max_text_chars: int | None = None
) -> Request:
    """The request of a call. Raises WishError, or FieldError with another UserError.

    `max_text_chars` are characters of one prompt; None: CHARS_A_TOKEN of the model's context, or LEAST_TEXT_CHARS.
    """
    extension = wish.polytrace
    recorded = None if extension is None or extension.request is None else _file(extension.request, description)
    if recorded is not None:
        wish = wish.model_copy(update={"max_tokens": _recorded_max_tokens(recorded, wish)})
    with about(wish.source):
        prompts = _prompts(wish, description, Encoder(tokenizer, description, max_text_chars))
        seed = secrets.randbelow(MAX_SEED) if wish.seed is None else wish.seed % MAX_SEED
        invokes = tuple(
            Invoke(sequences=(prompt,) * wish.samples, generation=_generation(wish, len(prompt), seed, description))
            for prompt in prompts
        )
    if recorded is not None:
        return replace(recorded, invokes=_with_prompts_replaced(recorded.invokes, invokes))
    steers = extension.steers if extension is not None else []
    with about("polytrace"):
        nodes, constants = _steering(steers, invokes, description)
    return Request(graph=Graph(nodes=nodes), invokes=invokes, constants=constants, options=Options(seed=seed))


def prompts_of(request: Request) -> dict[int, tuple[int, ...]]:
    """Invokes that go on, and their prompts: of a call's, each sample has the same."""
    return {place: invoke.sequences[0] for place, invoke in enumerate(request.invokes) if invoke.generation is not None}


class Encoder:
    """Prompts as token ids that the model has, each within what its context can take."""

    def __init__(self, tokenizer: Any, description: ModelDescription, max_text_chars: int | None) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = description.vocab_size
        context = description.limits.max_sequence_tokens
        self._max_chars = max_text_chars or max(LEAST_TEXT_CHARS, CHARS_A_TOKEN * context)

    def encoded(self, text: str, param: str, *, is_plain: bool = True) -> tuple[int, ...]:
        """A text, unless it is so long that to encode it would cost the worker its memory and others their time."""
        if self._tokenizer is None:
            raise WishError("this model came without a tokenizer: send token ids as prompt", param)
        if len(text) > self._max_chars:
            raise ContextError(f"a prompt of {len(text)} characters is too long; at most {self._max_chars} are taken")
        ids = tuple(self._tokenizer.encode(text, add_special_tokens=is_plain).ids)
        if not ids:
            raise WishError("a prompt has no tokens", param)
        return ids

    def checked(self, ids: Sequence[int], param: str) -> tuple[int, ...]:
        """Ids that came as such."""
        wrong = next((token for token in ids if token >= self._vocab_size), None)
        if wrong is not None:
            raise WishError(f"there is no token {wrong}; this model's ids are 0-{self._vocab_size - 1}", param)
        return tuple(ids)


def _prompts(wish: CompletionWish | ChatWish, description: ModelDescription, encoder: Encoder) -> list[tuple[int, ...]]:
    encoder.checked(wish.stop_token_ids or (), "stop_token_ids")
    if isinstance(wish, ChatWish):
        chat: dict[str, Any] = dict(wish.chat_template_kwargs or {})
        if wish.add_generation_prompt is not None:
            chat["add_generation_prompt"] = wish.add_generation_prompt
        if wish.continue_final_message:
            chat["continue_final_message"] = True
        text = rendered(description.chat, wish.messages, chat)
        return [encoder.encoded(text, "messages", is_plain=False)]  # it writes its special tokens itself
    if isinstance(wish.prompt, str):
        return [encoder.encoded(wish.prompt, "prompt")]
    prompts = []
    for one in [wish.prompt] if isinstance(wish.prompt[0], int) else wish.prompt:
        prompts.append(encoder.encoded(one, "prompt") if isinstance(one, str) else encoder.checked(one, "prompt"))
    return prompts


def _generation(wish: CompletionWish | ChatWish, length: int, seed: int, description: ModelDescription) -> Generation:
    room = description.limits.max_sequence_tokens - length
    most = room if wish.most_tokens is None else wish.most_tokens
    if most > room or room < 1:
        limit = description.limits.max_sequence_tokens
        wanted = "" if wish.most_tokens is None else f" and {most} new ones"
        raise ContextError(f"a prompt of {length} tokens{wanted} are more than this model's context of {limit}")
    temperature = sampling_temperature(wish)
    sampling = Sampling(seed=seed, repetition_penalty=wish.repetition_penalty or 1.0)
    if temperature > 0:
        sampling = replace(
            sampling,
            do_sample=True,
            temperature=temperature,
            top_k=max(0, wish.top_k or 0),
            top_p=1.0 if wish.top_p is None else wish.top_p,
            min_p=wish.min_p or 0.0,
        )
    ends = (*(() if wish.ignore_eos else description.eos), *(wish.stop_token_ids or ()))
    return Generation(
        max_new_tokens=most,
        sampling=sampling,
        eos=tuple(dict.fromkeys(ends)),
        stop=wish.stops,
        logprobs=wish.likeliest,
    )


def _file(text: str, description: ModelDescription) -> Request:
    """The request of a file, whose prompts are to be replaced."""
    try:
        return decode_request(base64.b64decode(text, validate=True), max_nodes=description.limits.max_nodes)
    except binascii.Error as error:
        raise WishError(f"polytrace.request is not base64: {error}", "polytrace") from error
    except WireError as error:
        raise WishError(f"polytrace.request is no request file: {error.message}", "polytrace") from error


def _with_prompts_replaced(recorded: Sequence[Invoke], invokes: Sequence[Invoke]) -> tuple[Invoke, ...]:
    """The invokes of a file with the call's instead of those that go on; of all, when none was recorded to go on."""
    goes_on = [one.generation is not None for one in recorded]
    places = [place for place, is_own in enumerate(goes_on) if is_own or not any(goes_on)]
    if len(places) != len(invokes):
        told = f"polytrace.request has {len(places)} prompts to be gone on with, and the call {len(invokes)}"
        raise WishError(told, "polytrace")
    own = dict(zip(places, invokes, strict=True))
    return tuple(own.get(place, one) for place, one in enumerate(recorded))


def _recorded_max_tokens(recorded: Request, wish: CompletionWish | ChatWish) -> int | None:
    """New tokens: as many as the graph was recorded for, whose loops may have a body for each."""
    said = {"max_tokens", "max_completion_tokens"} & wish.model_fields_set
    own = {invoke.generation.max_new_tokens for invoke in recorded.invokes if invoke.generation is not None}
    if not own:
        return wish.most_tokens
    if len(own) > 1 or (said and wish.most_tokens not in own):
        told = f"polytrace.request was recorded for {', '.join(map(str, sorted(own)))} new tokens"
        raise WishError(f"{told}, and the call asks for {wish.most_tokens}", "max_tokens")
    return own.pop()


def _steering(
    steers: Sequence[Steer], invokes: Sequence[Invoke], description: ModelDescription
) -> tuple[tuple[Node, ...], dict[str, RawTensor]]:
    """The nodes that add the vectors, at the prompt and at every later step."""
    if _NODES_OF_STEER * len(steers) * len(invokes) > description.limits.max_nodes:
        raise TooLargeError(f"{len(steers)} vectors for {len(invokes)} prompts are too many; send fewer prompts")
    nodes: list[Node] = []
    constants: dict[str, RawTensor] = {}
    for number, steer in enumerate(steers):
        where = f"polytrace.steer[{number}]"
        site, leaf = _residual(steer.layer, description)
        if len(steer.vector) != description.hidden_size:
            told = f"{where} has {len(steer.vector)} numbers; this model's hidden size is {description.hidden_size}"
            raise WishError(told, "polytrace")
        name = f"steer{number}"
        data = array("f", [steer.scale * one for one in steer.vector])
        if not all(map(math.isfinite, data)):
            raise WishError(f"{where}: scale x vector is beyond what float32 can say", "polytrace")
        constants[name] = RawTensor(dtype="float32", shape=(len(data),), data=memoryview(data).cast("B"))
        vector = Ref(NodeId(len(nodes)))
        nodes.append(Constant(name=name, where=where))
        for place, invoke in enumerate(invokes):
            assert invoke.generation is not None
            later = invoke.generation.max_new_tokens - 1
            for step, count in ((0, steer.positions != "generated"), (1, later * (steer.positions != "prompt"))):
                if count:
                    nodes += _added(site, leaf, vector, len(nodes), place, step, int(count), where)
    return tuple(nodes), constants


def _added(
    site: Site, leaf: Leaf, vector: Ref, first: int, invoke: int, step: int, count: int, where: str
) -> tuple[Node, ...]:
    return (
        Read(site=site, invoke=invoke, where=where, step=step, num_steps=count),
        Op(name="add", args=(Ref(NodeId(first)), vector), where=where),
        Write(
            site=site,
            invoke=invoke,
            value=Ref(NodeId(first + 1)),
            in_place=leaf.in_place_refusal is None,
            where=where,
            step=step,
            num_steps=count,
        ),
    )


def _residual(layer: int, description: ModelDescription) -> tuple[Site, Leaf]:
    """The hidden states that a decoder layer returns."""
    if layer >= description.num_layers:
        told = f"there is no layer {layer}; this model has layers 0-{description.num_layers - 1}"
        raise WishError(told, "polytrace")
    module = f"{description.layers}.{layer}"
    for info in description.sites:
        if info.module == module and info.port is Port.OUTPUT:
            for leaf in info.leaves:
                if leaf.selector in ((), (0,)):
                    return Site(module=module, port=Port.OUTPUT, selector=leaf.selector, visit=info.visit), leaf
    raise GraphError(f"{module} has no output that could be steered")
