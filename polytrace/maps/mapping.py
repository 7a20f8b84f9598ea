"""`model.map(prompts, body)`: one body over any number of prompts, a part of the result for each request.

Owns the loop: prompts are taken as they are needed (`cutting`), a few requests are under way at once, and
their parts come in the order of the dataset. Whoever reads slowly slows what is sent: nothing is asked of the dataset
or of the service beyond the requests that are under way. So memory does not grow with the dataset.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from polytrace.certificate import Certificate, Price, price_of
from polytrace.errors import GraphError
from polytrace.graph import Options
from polytrace.kinds import value_kind
from polytrace.lines import user_line
from polytrace.maps.assembly import Member
from polytrace.maps.bodies import Measured, Output
from polytrace.maps.cutting import Chunk, Cutter
from polytrace.maps.datasets import Datum, Encoding, items_of
from polytrace.maps.folders import open_folder
from polytrace.maps.index import Cut, Index, open_index
from polytrace.maps.members import EachItem, EachPrompt, Source, check_combined
from polytrace.maps.parts import Part, checksum_of, file_of, raw_of
from polytrace.maps.rowwise import MixesPromptsError
from polytrace.maps.running import Running, TopK, running
from polytrace.maps.together import all_at_once
from polytrace.maps.working import Worker
from polytrace.progress import showing_prompts
from polytrace.tracebacks import edge
from polytrace.wire import encode_tensors

if TYPE_CHECKING:
    from polytrace.model import Model

_TRIED = 16  # prompts that a body may fail for before it is to blame, where such are left out
_MAX_PROMPTS = 256  # of a part
_MAX_NODES = 100_000  # of a request
_PART_BYTES = 64 << 20  # of a part's values, about


@dataclass(frozen=True, slots=True, kw_only=True)
class Wishes:
    """How a map is run."""

    options: Options
    to: Any = None  # a folder or an address
    in_flight: int = 4  # requests that are under way at once; as many parts may wait to be read
    is_skipping: bool = False  # prompts that cannot be run are left out


class Map:
    """The parts of a result, once and in order: `for part in mapping`. `results` has what is combined.

    A loop that is left early sends nothing more; the few requests that are under way then end by themselves.
    """

    def __init__(self, model: Model, dataset: Any, body: Callable[..., Any], prompts: Any, wishes: Wishes) -> None:
        where = user_line()
        if not callable(body):
            raise GraphError(
                f"a map takes a function that returns its values, not a {type(body).__name__}", where=where
            )
        self.skipped: dict[int, str] = {}  # numbers of prompts that were left out so far, and why
        self._model = model
        self._body = body
        self._wishes = wishes
        self._items, self._total = items_of(dataset, where)
        self._prompt = prompts
        self._where = where
        self._running: dict[str, Running] = {}
        self._is_begun = False
        self._priced: list[Certificate] | None = None  # of its requests, where they are priced instead of run

    @property
    def results(self) -> dict[str, Any]:
        """Combined values of the parts so far; of the whole dataset once the loop has ended."""
        decode = value_kind().decode
        found: dict[str, Any] = {}
        for name, value in self._running.items():
            result = value.result()
            if isinstance(result, TopK):
                found[name] = TopK(*(decode(raw_of(member)) for member in result))
            elif result is not None:
                found[name] = decode(raw_of(result))
        return found

    def run(self) -> dict[str, Any]:
        """Runs to the end without looking at the parts; returns `results`."""
        for _ in self:
            pass
        return self.results

    def price(self) -> Price:
        """What the whole map would cost, whatever its folder has already. Nothing runs; the dataset is read through.

        For a map to be run, write `model.map(...)` again.
        """
        self._priced = []
        for _ in iter(self):
            raise AssertionError("a map that is priced has no parts")
        return price_of(self._priced)

    def __iter__(self) -> Iterator[Part]:
        if self._is_begun:
            raise GraphError(
                "a map runs once: write model.map(...) again; with the same folder it goes on there", where=user_line()
            )
        self._is_begun = True
        return self._parts()

    def _parts(self) -> Iterator[Part]:
        """Every part, with what is combined taken in before it is handed out."""
        with showing_prompts(self._model.description.name) as tell:
            tell(0, self._total)
            made = self._made()
            while (part := self._next(made)) is not None:
                for name, value in self._running.items():
                    for given in part.contributions(name):
                        value.take(given)
                self.skipped.update(part.skipped)
                tell(part.prompts.stop, self._total)
                yield part

    @edge
    def _next(self, made: Iterator[Part]) -> Part | None:
        return next(made, None)

    def _made(self) -> Iterator[Part]:
        encoding = Encoding(
            self._model.description, lambda: self._model.tokenizer, is_skipping=self._wishes.is_skipping
        )
        source, data = self._source(encoding)
        beginning: list[Datum] = []
        member, measured, failures = None, None, list[GraphError]()
        for datum in data:
            beginning.append(datum)
            if datum.problem is not None:
                continue
            try:
                member = source.member(datum)
                measured = source.measured(member)
                break
            except MixesPromptsError as mixed:
                yield from self._whole(itertools.chain(beginning, data), mixed)
                return
            except GraphError as error:
                failures.append(error)
                if not self._wishes.is_skipping or len(failures) == _TRIED:  # the body is to blame
                    raise
        if member is None or measured is None:
            if failures:
                raise failures[0]
            self.skipped.update((datum.number, datum.problem or "") for datum in beginning)
            return
        data = itertools.chain(beginning, data)
        self._begin(member.recorded.outputs, measured)
        worker = Worker(self._model.backend, measured, self._wishes.options, is_skipping=self._wishes.is_skipping)
        cut = self._cut(member)
        index = None
        if self._wishes.to is not None and self._priced is None:
            facts = self._facts(member, worker.probe(member))
            index = open_index(open_folder(self._wishes.to), facts, cut)
            cut = index.cut
        cutter = Cutter(source, measured, cut, index, is_skipping=self._wishes.is_skipping)
        if self._priced is not None:
            self._priced += [worker.certificate(chunk) for chunk in cutter.chunks(iter(data)) if chunk.members]
            return
        yield from self._pumped(cutter.chunks(iter(data)), worker, index)
        self._finish(index)

    def _source(self, encoding: Encoding) -> tuple[Source, Iterator[Datum]]:
        """What is recorded for each datum, and the data."""
        model, options = self._model, self._wishes.options
        if self._prompt is None:
            return EachPrompt(model, self._body, options), encoding.data(self._items)
        sequence = encoding.prompt(self._prompt)
        data = (Datum(number=number, item=item, sequence=sequence) for number, item in enumerate(self._items))
        return EachItem(model, self._body, options, sequence), data

    def _begin(self, outputs: Mapping[str, Output], measured: Measured) -> None:
        check_combined(outputs, measured)
        self._running = {
            name: running(name, output.combined) for name, output in outputs.items() if output.combined is not None
        }

    def _cut(self, member: Member) -> Cut:
        prompts = min(_MAX_PROMPTS, max(1, _MAX_NODES // (len(member.recorded.nodes) + len(member.recorded.outputs))))
        return Cut(
            tokens=self._model.description.limits.pass_tokens,
            prompts=1 if member.recorded.draws else prompts,  # what is drawn follows from the request's seed
            bytes=_PART_BYTES,
        )

    def _facts(self, member: Member, probe: str) -> dict[str, Any]:
        return {
            "model": self._model.description.fingerprint,
            "dtype": self._model.description.dtype,
            "first": list(member.sequence),
            "body": member.recorded.digest,
            "seed": self._wishes.options.seed,
            "probe": probe,
        }

    def _pumped(self, chunks: Iterator[Chunk], worker: Worker, index: Index | None) -> Iterator[Part]:
        """Runs chunks, a few at once; parts in order, each stored before it is handed out."""
        pool = ThreadPoolExecutor(self._wishes.in_flight, thread_name_prefix="polytrace-map")
        under_way: deque[tuple[Chunk, Future[Part] | None]] = deque()
        failure: Exception | None = None
        try:
            while True:
                while failure is None and len(under_way) < self._wishes.in_flight:
                    try:
                        chunk = next(chunks, None)
                    except Exception as error:  # noqa: BLE001 - what was sent before comes first
                        failure = error
                        break
                    if chunk is None:
                        break
                    under_way.append((chunk, None if chunk.stored else pool.submit(worker.run, chunk)))
                if not under_way:
                    break
                chunk, future = under_way.popleft()
                if future is None:
                    assert chunk.stored is not None
                    yield chunk.stored
                else:
                    part = future.result()
                    yield part if index is None else index.add(part, chunk.dataset)
            if failure is not None:
                raise failure
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def _whole(self, data: Iterator[Datum], mixed: MixesPromptsError) -> Iterator[Part]:
        """The body works on several prompts at once: all of them in one request, or none."""
        made = all_at_once(self._model, self._body, self._wishes.options, data, mixed, self._total)
        self._begin(made.recorded.outputs, made.measured)
        if self._priced is not None:
            self._priced.append(self._model.backend.validate(made.request).without_values())
            return
        part, index = made.run(), None
        if self._wishes.to is not None:
            facts = self._facts(made.member, checksum_of(file_of(part))) | {"prompts": made.dataset}
            index = open_index(open_folder(self._wishes.to), facts, Cut(tokens=0, prompts=0, bytes=0))
            stored = index.read(0) if index.parts else None
            if stored is None:
                index.cut_off(0)
            part = stored or index.add(part, made.dataset)
        yield part
        self._finish(index)

    def _finish(self, index: Index | None) -> None:
        """The dataset has ended: what is combined goes into the folder too."""
        if index is None or index.is_complete:
            return
        tensors = {}
        for name, value in self._running.items():
            result = value.result()
            members = result._asdict() if isinstance(result, TopK) else {"": result}
            for member, array in members.items():
                if array is not None:
                    tensors[f"{name}.{member}" if member else name] = raw_of(array)
        if tensors:
            index.folder.write("combined.safetensors", b"".join(encode_tensors("combined", {}, tensors)))
        index.finish()
