"""A request that is like one before has the program that it would have by itself."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from services import make_model

from cluster import known_programs
from cluster.intake import Intake
from cluster.requests import Claimed, ResultPlace
from engine.loading import meta_model
from engine.local import LocalBackend
from engine.shapes import infer
from polytrace.codec import to_json
from polytrace.graph import (
    Constant,
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
    Save,
    Site,
    Write,
)
from polytrace.tensors import RawTensor
from polytrace.wire import encode_request
from scheduling.plan import Program, RequestId

WHERE = "experiment.py:12"
PROMPT, OTHER = (1, 2, 3, 4, 5, 6), (9, 9, 2, 7, 1, 8)
SITE, LATER = (Site(module=f"model.layers.{layer}", port=Port.OUTPUT) for layer in (1, 2))


class Desk:
    """An intake over requests in a folder."""

    def __init__(self, folder: Path, backend: LocalBackend) -> None:
        self._folder = folder
        self._description = backend.description
        self._meta = meta_model(backend.source)
        self._count = 0
        self.intake = self._new_intake()

    def _new_intake(self) -> Intake:
        return Intake(self, self._description, print, max_active=9)  # type: ignore[arg-type]

    def place_result(self, request: RequestId, room: int, data_bytes: int) -> ResultPlace:
        return ResultPlace(path=self._folder / f"{request}-{room}-{data_bytes}", start=room)

    def claimed(self, request: Request, owner: str = "lab~ada") -> Claimed:
        self._count += 1
        path = self._folder / str(self._count)
        path.write_bytes(b"".join(bytes(part) for part in encode_request(request)))
        facts = json.dumps(to_json(infer(self._description, request, self._meta))).encode()
        return Claimed(
            request=RequestId(path.name),
            path=path,
            facts=facts,
            accepted=0.0,
            work=1,
            contents=self._folder / owner,
            states={},
            tenant=owner.partition("~")[0],
            is_interactive=True,
            is_suspect=False,
        )

    def both(self, claimed: Claimed) -> tuple[Program, Program]:
        """The program of the intake that has had others before, and that of a new one."""
        return self.intake._program(claimed), self._new_intake()._program(claimed)

    def limit_passes(self, tokens: int) -> None:
        self.intake.limit_passes(tokens)
        limits = replace(self._description.limits, pass_tokens=tokens)
        self._description = replace(self._description, limits=limits)

    def take_all(self, requests: Sequence[Request], owner: str = "lab~ada") -> list[Program]:
        """Their programs, each of which is what it would be by itself."""
        pairs = [self.both(self.claimed(request, owner)) for request in requests]
        assert [known for known, _ in pairs] == [alone for _, alone in pairs]
        return [known for known, _ in pairs]

    @property
    def num_known(self) -> int:
        return len(self.intake._known._known)


@pytest.fixture(scope="module")
def backend(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalBackend]:
    backend = LocalBackend(str(make_model(tmp_path_factory.mktemp("known") / "model")), name="m", threads=1)
    yield backend
    backend.close()


@pytest.fixture
def desk(tmp_path: Path, backend: LocalBackend) -> Desk:
    return Desk(tmp_path, backend)


def asked(*nodes: Node, prompts: tuple[tuple[int, ...], ...] = (PROMPT,), seed: int = 0, **given: RawTensor) -> Request:
    return Request(
        graph=Graph(nodes=nodes),
        invokes=tuple(Invoke(sequences=(prompt,)) for prompt in prompts),
        constants=given,
        options=Options(seed=seed),
    )


def read(prompt: tuple[int, ...] = PROMPT, seed: int = 0) -> Request:
    return asked(
        Read(site=SITE, invoke=0, where=WHERE),
        Save(name="out", value=Ref(NodeId(0)), where=WHERE),
        prompts=(prompt,),
        seed=seed,
    )


def scaled(vector: float, prompt: tuple[int, ...] = PROMPT) -> Request:
    """Reads only: what a constant does to a value changes no row."""
    return asked(
        Read(site=SITE, invoke=0, where=WHERE),
        Constant(name="v", where=WHERE),
        Op(name="mul", args=(Ref(NodeId(0)), Ref(NodeId(1))), where=WHERE),
        Save(name="out", value=Ref(NodeId(2)), where=WHERE),
        prompts=(prompt,),
        v=floats(vector),
    )


def steered(vector: float, prompt: tuple[int, ...] = PROMPT, seed: int = 0) -> Request:
    return asked(
        Read(site=SITE, invoke=0, where=WHERE),
        Constant(name="v", where=WHERE),
        Op(name="add", args=(Ref(NodeId(0)), Ref(NodeId(1))), where=WHERE),
        Write(site=SITE, invoke=0, value=Ref(NodeId(2)), in_place=False, where=WHERE),
        Read(site=LATER, invoke=0, where=WHERE),
        Save(name="out", value=Ref(NodeId(4)), where=WHERE),
        prompts=(prompt,),
        seed=seed,
        v=floats(vector),
    )


def chosen(*places: int) -> Request:
    """Columns by an integer constant: which rows run follows from its values."""
    return asked(
        Read(site=SITE, invoke=0, where=WHERE),
        Constant(name="places", where=WHERE),
        Op(name="index_select", args=(Ref(NodeId(0)), 1, Ref(NodeId(1))), where=WHERE),
        Save(name="out", value=Ref(NodeId(2)), where=WHERE),
        places=RawTensor(
            dtype="int64", shape=(len(places),), data=memoryview(struct.pack(f"<{len(places)}q", *places))
        ),
    )


def masked(*values: float) -> Request:
    """Columns by the signs of a constant."""
    data = struct.pack(f"<{len(values)}f", *values)
    return asked(
        Read(site=SITE, invoke=0, where=WHERE),
        Constant(name="values", where=WHERE),
        Op(name="gt", args=(Ref(NodeId(1)), 0), where=WHERE),
        Op(name="getitem", args=(Ref(NodeId(0)), (slice(None), Ref(NodeId(2)))), where=WHERE),
        Save(name="out", value=Ref(NodeId(3)), where=WHERE),
        values=RawTensor(dtype="float32", shape=(len(values),), data=memoryview(data)),
    )


def floats(value: float) -> RawTensor:
    return RawTensor(dtype="float32", shape=(32,), data=memoryview(struct.pack("<32f", *[value] * 32)))


def test_what_only_reads_is_worked_out_once_for_all_prompts_vectors_and_seeds(desk: Desk) -> None:
    programs = desk.take_all([read(), read(OTHER), read(seed=7)])
    assert desk.num_known == 1
    assert [one.invokes[0].sequences[0] for one in programs] == [PROMPT, OTHER, PROMPT] and programs[2].seed == 7
    desk.take_all([scaled(1.0), scaled(2.0), scaled(2.0, OTHER)])
    assert desk.num_known == 2


def test_what_writes_is_worked_out_once_only_where_all_of_it_is_the_same(desk: Desk) -> None:
    requests = [steered(1.0), steered(2.0), steered(1.0, OTHER), steered(1.0, seed=7)]
    first = desk.take_all(requests)
    edits = {one.waves[0].cones[0][0].edits for one in first}
    assert len(edits) == 3, "of the vector and the prompt; a seed changes nothing that is written here"
    assert desk.num_known == len(requests)
    desk.take_all(requests)
    assert desk.num_known == len(requests)


def test_what_a_program_follows_from_makes_another_one(desk: Desk) -> None:
    unlike = [chosen(0, 1), chosen(4, 5), chosen(5), read(), read(PROMPT[:5]), masked(1, 1, 1, -1, -1, 1)]
    programs = desk.take_all([*unlike, masked(1, -1, 1, -1, -1, -1)])
    assert desk.num_known == len(programs)
    desk.take_all([masked(1, -1, -1, 1, -1, -1)])  # as many columns as another one, and others of them


def test_passes_that_are_smaller_now_make_another_one(desk: Desk) -> None:
    request = chosen(0, 5)
    (before,) = desk.take_all([request])
    desk.limit_passes(4)
    (after,) = desk.take_all([request])
    assert desk.num_known == 2 and len(after.waves) >= len(before.waves)


def test_another_owners_are_apart(desk: Desk) -> None:
    (mine,) = desk.take_all([read()])
    (theirs,) = desk.take_all([read()], owner="other~bob")
    assert desk.num_known == 2 and mine.tenant == "lab" and theirs.tenant == "other"


def test_several_prompts_are_worked_out_each_time(desk: Desk) -> None:
    nodes = (
        Read(site=SITE, invoke=0, where=WHERE),
        Read(site=SITE, invoke=1, where=WHERE),
        Save(name="a", value=Ref(NodeId(0)), where=WHERE),
        Save(name="b", value=Ref(NodeId(1)), where=WHERE),
    )
    desk.take_all([asked(*nodes, prompts=(PROMPT, PROMPT)), asked(*nodes, prompts=(PROMPT, OTHER))])
    assert desk.num_known == 0


def test_what_is_remembered_is_bounded(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(known_programs, "_MOST_BYTES", 4000)
    desk.take_all([steered(float(value)) for value in range(9)])
    assert 0 < desk.num_known < 9
    desk.take_all([steered(8.0), steered(0.0)])
