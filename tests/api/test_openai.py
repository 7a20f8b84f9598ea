"""OpenAI's own client against the gateway: what it sends becomes requests, and tokens become what it reads.

The test is the controller here and says which tokens come; test_generation_over_http.py has a whole service.
"""

from __future__ import annotations

import base64
import struct
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import openai
import pytest
from gateways import GatewayService, wait_until
from pydantic import ValidationError

import api.idempotency
import api.rendering
from api.composing import compose, prompts_of
from api.events import tokens_of
from api.rendering import rendered
from api.wishes import ChatWish, CompletionWish, FieldError, WishError
from api.worker import Composed, Verdict
from bench.tinyworld import FOLDER
from engine.local import LocalBackend
from polytrace.certificate import Generated
from polytrace.description import ChatFormat, ModelDescription
from polytrace.errors import ContextError, RunError, UserError
from polytrace.graph import (
    Constant,
    Generation,
    Graph,
    Invoke,
    NodeId,
    Op,
    Options,
    Port,
    Read,
    Ref,
    Request,
    Save,
    Site,
    Write,
)
from polytrace.tokenizer import load_tokenizer
from polytrace.wire import decode_request, encode_request

KEY = "sesame"
EOS = 1
TOKENIZER_JSON = (FOLDER / "tokenizer.json").read_bytes()
TOKENIZER = load_tokenizer(TOKENIZER_JSON)
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    "{{ '[a]' if add_generation_prompt }}"
)
CHAT = ChatFormat(templates={"default": TEMPLATE}, special_tokens={"bos_token": "<bos>", "eos_token": "<eos>"})
HELLO = [{"role": "user", "content": "The Eiffel Tower"}]


class Composer:
    """Makes requests as the real workers do, and checks nothing more of them."""

    def __init__(self, description: ModelDescription) -> None:
        self.description = description

    def start(self) -> None: ...
    def close(self) -> None: ...
    async def warm(self, model: str, version: str) -> None: ...
    async def compose(
        self, model: str, version: str, path: Path, wish: CompletionWish | ChatWish, *, contents: Path
    ) -> Composed:
        try:
            request = compose(wish, self.description, TOKENIZER)
        except FieldError as found:
            return Composed(verdict=Verdict(error=found.error.to_fields()), param=found.param)
        except WishError as error:
            return Composed(verdict=Verdict(error=error.to_fields()), param=error.param)
        path.write_bytes(b"".join(encode_request(request)))
        return Composed(verdict=Verdict(facts=b"[]"), prompts=prompts_of(request))


@pytest.fixture(scope="module")
def description() -> ModelDescription:
    backend = LocalBackend(str(FOLDER), name="m", threads=1)
    description = replace(backend.describe(), chat=CHAT)
    backend.close()
    return description


@pytest.fixture(scope="module")
def service(description: ModelDescription, tmp_path_factory: pytest.TempPathFactory) -> Iterator[GatewayService]:
    folder = tmp_path_factory.mktemp("openai") / "store"
    service = GatewayService(folder, Composer(description), description, TOKENIZER_JSON, KEY)  # type: ignore[arg-type]
    yield service
    service.close()


@pytest.fixture(scope="module")
def client(service: GatewayService) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{service.url}/v1", api_key=KEY, max_retries=0, timeout=20) as client:
        yield client


def ids(text: str) -> tuple[int, ...]:
    return tuple(TOKENIZER.encode(text, add_special_tokens=False).ids)


def answered(service: GatewayService, call: Callable[[], Any], generated: Sequence[Generated]) -> tuple[Request, Any]:
    """What a call became, and its answer when its sequences go on like this."""
    found: list[Any] = []

    def run() -> None:
        try:
            found.append(call())
        except openai.OpenAIError as error:
            found.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    request_id = service.claim()
    request = decode_request(service.store.request_path(request_id).read_bytes())
    tokens = tokens_of(generated)
    for token in tokens[: len(tokens) // 2]:
        service.tell(request_id, token)
    service.finish(request_id, generated)
    thread.join(timeout=20)
    if isinstance(found[0], openai.OpenAIError):
        raise found[0]
    return request, found[0]


def one(text: str, finish: str = "length", *more: int, sequence: int = 0, invoke: int = 0) -> Generated:
    return Generated(invoke=invoke, sequence=sequence, ids=(*ids(text), *more), finish=finish)


# --- what becomes of a call


def test_a_completion_is_a_request_and_its_tokens_are_its_text(service: GatewayService, client: openai.OpenAI) -> None:
    request, answer = answered(
        service,
        lambda: client.completions.create(model="m", prompt="The Eiffel Tower", max_tokens=7, temperature=0, seed=5),
        [one(" is in the city", "eos", EOS)],
    )
    assert answer.choices[0].text == " is in the city" and answer.choices[0].finish_reason == "stop"
    assert answer.object == "text_completion" and answer.model == "m" and answer.id.startswith("cmpl-")
    length = len(ids(" is in the city")) + 1
    assert request.invokes[0].sequences == (tuple(TOKENIZER.encode("The Eiffel Tower").ids),)
    assert answer.usage.completion_tokens == length
    assert answer.usage.prompt_tokens == len(request.invokes[0].sequences[0])
    way = request.invokes[0].generation
    assert way is not None and way.max_new_tokens == 7 and way.eos == (EOS,) and way.logprobs is None
    assert not way.sampling.do_sample and way.sampling.seed == 5
    assert request.graph.nodes == ()


def test_sampling_is_what_was_asked_for_and_by_default_openais(service: GatewayService, client: openai.OpenAI) -> None:
    request, _ = answered(service, lambda: client.completions.create(model="m", prompt="a"), [one("b")])
    first = request.invokes[0].generation
    assert first is not None and first.sampling.do_sample
    assert (first.sampling.temperature, first.sampling.top_p, first.sampling.top_k) == (1.0, 1.0, 0)
    assert first.max_new_tokens == 16
    request, _ = answered(
        service,
        lambda: client.completions.create(
            model="m",
            prompt="a",
            temperature=0.7,
            top_p=0.9,
            seed=-3,
            stop=["x", "y"],
            extra_body={
                "top_k": 40,
                "min_p": 0.1,
                "repetition_penalty": 1.2,
                "stop_token_ids": [9],
                "ignore_eos": True,
            },
        ),
        [one("b")],
    )
    second = request.invokes[0].generation
    assert second is not None
    told = second.sampling
    assert (told.temperature, told.top_p, told.top_k, told.min_p) == (0.7, 0.9, 40, 0.1)
    assert told.repetition_penalty == 1.2 and told.seed == 2**63 - 3
    assert second.eos == (9,) and second.stop == ("x", "y")
    assert first.sampling.seed != told.seed


def test_several_prompts_and_samples_are_choices_in_openais_order(
    service: GatewayService, client: openai.OpenAI
) -> None:
    texts = [" Rome", " Paris", " Oslo", " Bern"]
    generated = [one(text, invoke=place // 2, sequence=place % 2) for place, text in enumerate(texts)]
    for prompt in (["a", "b c"], [[5, 6], [7]]):
        request, answer = answered(
            service, lambda prompt=prompt: client.completions.create(model="m", prompt=prompt, n=2), generated
        )
        assert [choice.text for choice in answer.choices] == texts
        assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
        assert [len(set(invoke.sequences)) for invoke in request.invokes] == [1, 1]
        assert [len(invoke.sequences) for invoke in request.invokes] == [2, 2]
    assert request.invokes[0].sequences[0] == (5, 6)
    request, _ = answered(service, lambda: client.completions.create(model="m", prompt=[5, 6, 7]), [one("a")])
    assert request.invokes[0].sequences == ((5, 6, 7),)


def test_a_conversation_is_rendered_with_the_models_template(service: GatewayService, client: openai.OpenAI) -> None:
    request, answer = answered(
        service, lambda: client.chat.completions.create(model="m", messages=HELLO), [one(" is tall", "eos", EOS)]
    )
    text = TOKENIZER.decode(list(request.invokes[0].sequences[0]), skip_special_tokens=False)
    assert text == "<bos>[user]The Eiffel Tower[a]"
    assert answer.choices[0].message.content == " is tall" and answer.choices[0].message.role == "assistant"
    assert answer.object == "chat.completion" and answer.choices[0].finish_reason == "stop"
    way = request.invokes[0].generation
    assert way is not None
    assert way.max_new_tokens == 512 - len(request.invokes[0].sequences[0]), "as far as the context goes"
    parts = [{"role": "user", "content": [{"type": "text", "text": "The"}, {"type": "text", "text": "Tower"}]}]
    request, _ = answered(
        service,
        lambda: client.chat.completions.create(
            model="m",
            messages=[*parts, {"role": "assistant", "content": "is"}],
            max_completion_tokens=3,
            extra_body={"continue_final_message": True},
        ),
        [one(" tall")],
    )
    text = TOKENIZER.decode(list(request.invokes[0].sequences[0]), skip_special_tokens=False)
    assert text == "<bos>[user]The\nTower[assistant]is"


# --- streams


@pytest.mark.parametrize("stop", [None, " city"])
def test_a_stream_says_what_the_answer_says_piece_by_piece(
    service: GatewayService, client: openai.OpenAI, stop: str | None
) -> None:
    generated = [
        one(" is in the city of Paris", "stop" if stop else "length"),
        one(" ist 300 m hoch, schön 😀", "eos", EOS, sequence=1),
    ]
    wish = {"model": "m", "prompt": "The Eiffel Tower", "n": 2, "stop": stop}
    _, whole = answered(service, lambda: client.completions.create(**wish), generated)
    _, chunks = answered(
        service,
        lambda: [*client.completions.create(**wish, stream=True, stream_options={"include_usage": True})],
        generated,
    )
    *pieces, last = chunks
    assert last.choices == [] and last.usage == whole.usage
    for choice in whole.choices:
        own = [piece.choices[0] for piece in pieces if piece.choices[0].index == choice.index]
        assert "".join(piece.text for piece in own) == choice.text
        assert [piece.finish_reason for piece in own][-1] == choice.finish_reason
        assert all(piece.finish_reason is None for piece in own[:-1]) and len(own) > 3
    assert whole.choices[0].text == (" is in the" if stop else " is in the city of Paris")
    assert whole.choices[1].text == " ist 300 m hoch, schön 😀"
    assert all("�" not in piece.choices[0].text for piece in pieces)


def test_a_chat_streams_while_it_runs(service: GatewayService, client: openai.OpenAI) -> None:
    generated = [one(" is in the city of Paris")]
    tokens = tokens_of(generated)
    stream = client.chat.completions.create(model="m", messages=HELLO, stream=True)
    request = service.claim()
    service.tell(request, tokens[0])
    assert next(stream).choices[0].delta.role == "assistant"
    assert next(stream).choices[0].delta.content == TOKENIZER.decode([tokens[0].id]), "before it has ended"
    service.finish(request, generated)
    rest = [chunk.choices[0] for chunk in stream]
    assert (
        "".join(choice.delta.content or "" for choice in rest)
        == " is in the city of Paris"[len(TOKENIZER.decode([tokens[0].id])) :]
    )
    assert rest[-1].finish_reason == "length"


def test_who_leaves_a_stream_or_an_answer_cancels_it(service: GatewayService, client: openai.OpenAI) -> None:
    stream = client.completions.create(model="m", prompt="a", stream=True)
    streaming = service.claim()
    service.tell(streaming, *tokens_of([one(" b c")])[:1])
    next(stream)
    stream.close()
    wait_until(lambda: streaming in service.store.cancellations("m"))
    impatient = client.with_options(timeout=4.0, max_retries=0)
    with ThreadPoolExecutor(1) as threads:
        answer = threads.submit(lambda: impatient.completions.create(model="m", prompt="a"))
        waiting = service.claim()
        with pytest.raises(openai.APITimeoutError):
            answer.result()
    wait_until(lambda: waiting in service.store.cancellations("m"))


def test_a_call_that_is_sent_again_with_its_key_is_one_request_with_one_answer(
    service: GatewayService, client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(api.idempotency, "GRACE_S", 1.0)
    keyed = {"Idempotency-Key": "one-key"}

    def call(prompt: str = "a", **more: Any) -> Any:
        return client.completions.create(model="m", prompt=prompt, extra_headers=keyed, **more)

    stream = call(stream=True)
    request = service.claim()
    service.tell(request, *tokens_of([one(" b c")])[:1])
    begun = next(stream)
    stream.close()  # the connection breaks
    again = call(stream=True)
    assert next(again) == begun, "from the beginning"
    time.sleep(1.2)  # the grace of the first one would be over
    assert request not in service.store.cancellations("m")
    service.finish(request, [one(" b c")])
    rest = list(again)
    assert begun.choices[0].text + "".join(chunk.choices[0].text for chunk in rest) == " b c"
    before = service.store.open_requests()
    with pytest.raises(openai.ConflictError, match="was sent with another request before"):
        call("b", stream=True)
    with pytest.raises(openai.ConflictError):
        call()
    service.store.draining.begin("default/default")
    assert [chunk.choices[0].text for chunk in call(stream=True)] == [begun.choices[0].text] + [
        chunk.choices[0].text for chunk in rest
    ]
    service.store.draining.end()
    keyed["Idempotency-Key"] = "another"
    _, whole = answered(service, call, [one(" b c")])
    assert call() == whole
    assert service.store.open_requests() == before


def test_who_leaves_with_a_key_and_does_not_come_back_has_his_request_cancelled(
    service: GatewayService, client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(api.idempotency, "GRACE_S", 0.3)
    stream = client.completions.create(model="m", prompt="a", stream=True, extra_headers={"Idempotency-Key": "gone"})
    request = service.claim()
    service.tell(request, *tokens_of([one(" b c")])[:1])
    next(stream)
    stream.close()
    wait_until(lambda: request in service.store.cancellations("m"))


def test_an_error_in_the_middle_of_a_stream_is_an_error_of_the_client(
    service: GatewayService, client: openai.OpenAI
) -> None:
    stream = client.completions.create(model="m", prompt="a", stream=True)
    request = service.claim()
    service.tell(request, *tokens_of([one(" b c")])[:1])
    service.finish(request, error=RunError("index 9 is out of range", where="polytrace.steer[0]"))
    with pytest.raises(openai.APIError, match="index 9 is out of range"):
        list(stream)


# --- log-probabilities and echo


def test_log_probabilities_are_where_openais_client_looks(service: GatewayService, client: openai.OpenAI) -> None:
    new = ids(" is in")
    likeliest = (((new[0], -0.5), (7, -2.0)), ((8, -0.25), (new[1], -1.5)))
    generated = [Generated(invoke=0, sequence=0, ids=new, finish="length", logprobs=(-0.5, -1.5), likeliest=likeliest)]
    request, answer = answered(service, lambda: client.completions.create(model="m", prompt="a", logprobs=2), generated)
    assert request.invokes[0].generation is not None and request.invokes[0].generation.logprobs == 2
    told = answer.choices[0].logprobs
    assert told.tokens == [" is", " in"] and told.token_logprobs == [-0.5, -1.5] and told.text_offset == [0, 3]
    assert told.top_logprobs[1] == {TOKENIZER.decode([8]): -0.25, " in": -1.5}
    _, chat = answered(
        service,
        lambda: client.chat.completions.create(model="m", messages=HELLO, logprobs=True, top_logprobs=2),
        generated,
    )
    content = chat.choices[0].logprobs.content
    assert [(entry.token, entry.logprob, bytes(entry.bytes)) for entry in content] == [
        (" is", -0.5, b" is"),
        (" in", -1.5, b" in"),
    ]
    assert [other.logprob for other in content[1].top_logprobs] == [-0.25, -1.5]
    _, chunks = answered(
        service,
        lambda: [
            *client.chat.completions.create(model="m", messages=HELLO, logprobs=True, top_logprobs=2, stream=True)
        ],
        generated,
    )
    pieces = [chunk.choices[0].logprobs for chunk in chunks if chunk.choices[0].logprobs]
    assert [entry for piece in pieces for entry in piece.content] == content


def test_a_prompt_is_echoed(service: GatewayService, client: openai.OpenAI) -> None:
    for stream in (False, True):
        _, answer = answered(
            service,
            lambda stream=stream: (
                [*client.completions.create(model="m", prompt="The Eiffel", echo=True, stream=True)]
                if stream
                else [client.completions.create(model="m", prompt="The Eiffel", echo=True)]
            ),
            [one(" Tower")],
        )
        assert "".join(chunk.choices[0].text for chunk in answer) == "The Eiffel Tower"


# --- steering and graphs


def test_a_vector_is_added_behind_its_layer_at_the_prompt_and_at_every_step(
    service: GatewayService, client: openai.OpenAI, description: ModelDescription
) -> None:
    vector = [0.5] * description.hidden_size

    def steered(**more: Any) -> Request:
        steer = {"layer": 3, "vector": vector, "scale": -2.0} | more
        return answered(
            service,
            lambda: client.completions.create(
                model="m", prompt=["a", "b"], max_tokens=9, extra_body={"polytrace": {"steer": steer}}
            ),
            [one("b"), one("c", invoke=1)],
        )[0]

    request = steered()
    assert struct.unpack("f", bytes(request.constants["steer0"].data[:4])) == (-1.0,)
    writes = [node for node in request.graph.nodes if isinstance(node, Write)]
    assert [(node.invoke, node.step, node.num_steps) for node in writes] == [(0, 0, 1), (0, 1, 8), (1, 0, 1), (1, 1, 8)]
    assert {str(node.site) for node in writes} == {"model.layers.3.output"}
    assert sum(isinstance(node, Constant) for node in request.graph.nodes) == 1
    for positions, steps in (("prompt", {0}), ("generated", {1})):
        request = steered(positions=positions)
        assert {node.step for node in request.graph.nodes if isinstance(node, Write)} == steps


def test_a_graph_comes_as_a_request_file_whose_prompts_are_replaced(
    service: GatewayService, client: openai.OpenAI
) -> None:
    site = Site(module="model.layers.2", port=Port.OUTPUT)
    nodes = (
        Read(site=site, invoke=0, where="mine.py:1"),
        Op(name="neg", args=(Ref(NodeId(0)),), where="mine.py:2"),
        Write(site=site, invoke=0, value=Ref(NodeId(1)), in_place=True, where="mine.py:3"),
        Save(name="h", value=Ref(NodeId(0)), where="mine.py:4"),
    )
    mine = Request(
        graph=Graph(nodes=nodes), invokes=(Invoke(sequences=((3, 4),)),), constants={}, options=Options(seed=8)
    )
    file = base64.b64encode(b"".join(encode_request(mine))).decode()
    body = {"polytrace": {"request": file}}
    request, answer = answered(
        service, lambda: client.completions.create(model="m", prompt=[5, 6, 7], extra_body=body), [one("b")]
    )
    assert request.graph == mine.graph and request.options.seed == 8
    assert request.invokes[0].sequences == ((5, 6, 7),) and request.invokes[0].generation is not None
    assert answer.polytrace["request"] == answer.id.removeprefix("cmpl-")
    goes_on = Invoke(sequences=((3, 4),), generation=Generation(max_new_tokens=5))
    patched = replace(mine, invokes=(Invoke(sequences=((8, 9),)), goes_on))
    body = {"polytrace": {"request": base64.b64encode(b"".join(encode_request(patched))).decode()}}
    request, answer = answered(
        service,
        lambda: client.completions.create(model="m", prompt=[5, 6, 7], extra_body=body),
        [one("b", invoke=1)],
    )
    assert request.invokes[0] == patched.invokes[0], "a prompt that does not go on is the graph's own"
    assert request.invokes[1].sequences == ((5, 6, 7),) and answer.choices[0].text == "b"
    assert request.invokes[1].generation is not None and request.invokes[1].generation.max_new_tokens == 5
    body = {"polytrace": {"request": file}}
    for wrong, told in (("###", "not base64"), (base64.b64encode(b"{}").decode(), "no request file")):
        with pytest.raises(openai.BadRequestError, match=told):
            client.completions.create(model="m", prompt="a", extra_body={"polytrace": {"request": wrong}})
    with pytest.raises(openai.BadRequestError, match="has 1 prompts to be gone on with, and the call 2"):
        client.completions.create(model="m", prompt=["a", "b"], extra_body=body)


# --- refusals


def test_what_cannot_be_honoured_is_refused_as_openai_does(
    service: GatewayService, client: openai.OpenAI, description: ModelDescription
) -> None:
    requests = service.store.folder / "requests"
    before = set(requests.iterdir())
    chat = client.chat.completions.create
    vector = [1.0] * description.hidden_size
    refused: list[tuple[dict[str, Any], str | None]] = [
        ({"presence_penalty": 0.5}, "presence_penalty"),
        ({"frequency_penalty": 0.5}, "frequency_penalty"),
        ({"logit_bias": {"5": 1}}, "logit_bias"),
        ({"suffix": "x"}, "suffix"),
        ({"best_of": 3}, "best_of"),
        ({"echo": True, "logprobs": 1}, "echo"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"temperature": 2.5}, "temperature"),
        ({"n": 0}, "n"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [5, description.vocab_size]}, "prompt"),
        ({"prompt": [[5], [description.vocab_size]]}, "prompt"),
        ({"prompt": [5, -1]}, "prompt"),
        ({"extra_body": {"stop_token_ids": [description.vocab_size]}}, "stop_token_ids"),
        ({"extra_body": {"colour": "red"}}, "colour"),
        ({"extra_body": {"polytrace": {"steer": {"layer": 99, "vector": vector}}}}, "polytrace"),
        ({"extra_body": {"polytrace": {"steer": {"layer": 1, "vector": [1.0]}}}}, "polytrace"),
        ({"extra_body": {"polytrace": {"steer": {"layer": 1, "vector": vector, "scale": 1e39}}}}, "polytrace"),
    ]
    for wish, param in refused:
        with pytest.raises(openai.BadRequestError) as caught:
            client.completions.create(**{"model": "m", "prompt": "a"} | wish)
        assert caught.value.type == "invalid_request_error" and caught.value.param == param, (wish, caught.value)
    with pytest.raises(openai.BadRequestError, match="tools is not possible"):
        chat(model="m", messages=HELLO, tools=[{"type": "function", "function": {"name": "f"}}])
    with pytest.raises(openai.BadRequestError, match="image_url"):
        chat(model="m", messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}])
    with pytest.raises(openai.BadRequestError, match="comes with the model"):
        chat(model="m", messages=HELLO, extra_body={"chat_template_kwargs": {"chat_template": "{{ 1 }}"}})
    with pytest.raises(openai.BadRequestError, match="max_tokens is 3 and max_completion_tokens 4"):
        chat(model="m", messages=HELLO, max_tokens=3, max_completion_tokens=4)
    with pytest.raises(openai.NotFoundError, match="there is no model 'x'") as unknown:
        client.completions.create(model="x", prompt="a")
    assert (unknown.value.code, unknown.value.param) == ("model_not_found", "model")
    assert set(requests.iterdir()) == before, "nothing is left of them"


def test_what_the_context_cannot_take_is_refused_as_openai_does_and_other_limits_by_their_own_names(
    service: GatewayService, client: openai.OpenAI, description: ModelDescription
) -> None:
    long = [{"role": "user", "content": "a b " * 600}]
    beyond: list[tuple[Callable[[], Any], str, str]] = [
        (lambda: client.completions.create(model="m", prompt="a", max_tokens=512), "context of 512", "prompt"),
        (lambda: client.completions.create(model="m", prompt=[5] * 600), "context of 512", "prompt"),
        (lambda: client.chat.completions.create(model="m", messages=long), "context of 512", "messages"),
        (lambda: client.completions.create(model="m", prompt="a" * 1_100_000), "1100000 characters", "prompt"),
    ]
    for call, told, param in beyond:
        with pytest.raises(openai.BadRequestError, match=told) as caught:
            call()
        assert (caught.value.code, caught.value.param) == ("context_length_exceeded", param)
    steer = [{"layer": 1, "vector": [1.0]}] * 250
    with pytest.raises(openai.APIStatusError, match="vectors for 2000 prompts") as many:
        client.completions.create(model="m", prompt=["a"] * 2000, extra_body={"polytrace": {"steer": steer}})
    assert (many.value.status_code, many.value.code, many.value.param) == (413, "too-large", "polytrace")


def test_a_text_is_measured_before_it_is_encoded(description: ModelDescription) -> None:
    class Untouched:
        def encode(self, text: str, *, add_special_tokens: bool) -> Any:
            raise AssertionError("nothing is encoded")

    wish = CompletionWish(model="m", prompt="x" * 41)
    with pytest.raises(FieldError, match="41 characters is too long; at most 40") as caught:
        compose(wish, description, Untouched(), max_text_chars=40)
    assert isinstance(caught.value.error, ContextError)
    large = replace(description, limits=replace(description.limits, max_sequence_tokens=1 << 20))
    with pytest.raises(AssertionError, match="nothing is encoded"):
        compose(CompletionWish(model="m", prompt="x" * (2 << 20)), large, Untouched())


def test_a_call_without_the_key_and_a_body_that_is_none_are_refused_in_openais_form(service: GatewayService) -> None:
    with pytest.raises(openai.AuthenticationError) as caught:
        openai.OpenAI(base_url=f"{service.url}/v1", api_key="wrong", max_retries=0).completions.create(
            model="m", prompt="a"
        )
    assert caught.value.code == "invalid_api_key"
    for content in (b"", b"{", b"[]", b'{"model": 3}', b"\xff"):
        answer = service.http.post("/v1/completions", content=content, headers={"Content-Type": "application/json"})
        assert answer.status_code == 400 and answer.json()["error"]["message"], answer.text
    large = service.http.post("/v1/completions", content=b"[" + b" " * (9 << 20) + b"]")
    assert large.status_code == 413 and large.json()["error"]["code"] == "too-large"


@pytest.mark.parametrize(
    "body",
    [
        {"prompt": [None] * 50_000},
        {"prompt": ["a", *[None] * 50_000]},
        {"prompt": [[5], *[[-1]] * 50_000]},
        {"prompt": [-1] * 50_000},
        {"prompt": "a", "stop": [None] * 50_000},
        {"prompt": "a", "stop_token_ids": [-1] * 50_000},
        {"prompt": "a", "polytrace": {"steer": {"layer": 0, "vector": [None] * 50_000}}},
        {"prompt": "a", "polytrace": {"steer": [None] * 50_000}},
        {"prompt": "a", "metadata": dict.fromkeys(map(str, range(50_000)), 1), "colour": "red"},
        {"prompt": "a"} | dict.fromkeys(map(str, range(50_000)), 1),
        {"messages": [None] * 50_000},
    ],
)
def test_a_body_of_many_wrong_values_is_one_error(body: dict[str, Any]) -> None:
    kind = ChatWish if "messages" in body else CompletionWish
    with pytest.raises(ValidationError) as caught:
        kind.model_validate({"model": "m"} | body)
    assert caught.value.error_count() == 1


def test_a_refusal_says_which_part_of_the_body_is_wrong(service: GatewayService) -> None:
    refused = {
        b"": "the body: ",
        b"[]": "the body: ",
        b"{": "the body is not JSON: ",
        b'{"model": "m", "prompt": []}': "prompt: a text, texts, token ids",
        b'{"model": "m", "prompt": ["a", 1]}': "prompt.texts.1: ",
        b'{"model": "m", "prompt": [[]]}': "prompt.lists.0: ",
        b'{"model": "m", "prompt": "a", "stop": [""]}': "stop.0: ",
        b'{"model": "m", "prompt": [1], "polytrace": {"steer": {"layer": -1}}}': "polytrace.steer.0.layer: ",
    }
    for body, told in refused.items():
        answer = service.http.post("/v1/completions", content=body, headers={"Content-Type": "application/json"})
        assert answer.status_code == 400 and answer.json()["error"]["message"].startswith(told), answer.text


def test_a_model_without_a_chat_template_is_asked_for_completions() -> None:
    with pytest.raises(UserError, match="send a prompt to /v1/completions"):
        rendered(None, HELLO, {})


def test_a_request_that_fails_is_an_error_with_its_reason(service: GatewayService, client: openai.OpenAI) -> None:
    found: list[BaseException] = []

    def call() -> None:
        try:
            client.completions.create(model="m", prompt="a")
        except openai.APIStatusError as error:
            found.append(error)

    thread = threading.Thread(target=call)
    thread.start()
    service.finish(service.claim(), error=RunError("index 9 is out of range", where="mine.py:3"))
    thread.join(timeout=10)
    assert isinstance(found[0], openai.UnprocessableEntityError) and "mine.py:3" in str(found[0])


def test_the_models_are_listed_as_openai_does(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["m"]


def test_the_interface_describes_both_routes(service: GatewayService) -> None:
    paths = service.http.get("/openapi.json").json()["paths"]
    for path in ("/v1/completions", "/v1/chat/completions"):
        told = paths[path]["post"]
        assert told["requestBody"]["content"]["application/json"]["schema"]
        assert "application/json" in told["responses"]["4XX"]["content"]
        assert "text/event-stream" in told["responses"]["200"]["content"]


# --- the template


def test_a_template_that_takes_too_long_or_reaches_out_of_its_sandbox_is_stopped(
    description: ModelDescription, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(api.rendering, "RENDER_S", 0.2)
    wish = ChatWish.model_validate({"model": "m", "messages": HELLO})

    def refusal(template: str) -> str:
        own = replace(description, chat=ChatFormat(templates={"default": template}, special_tokens={}))
        with pytest.raises(FieldError) as caught:
            compose(wish, own, TOKENIZER)
        return str(caught.value)

    loop = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    assert "longer than 0.2 s" in refusal(loop)
    assert "refuses this conversation" in refusal("{{ messages.__class__.__mro__ }}")
    monkeypatch.setattr(api.rendering, "MAX_CHARS", 100)
    assert "characters long" in refusal("{{ 'a' * 101 }}")
