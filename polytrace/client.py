"""How a model is reached: in this process, or over HTTP."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from polytrace import environment
from polytrace.description import PassLayout
from polytrace.edits.http_shelf import HttpShelf
from polytrace.edits.sets import LocalShelf
from polytrace.errors import GraphError, UserError
from polytrace.http_backend import HttpBackend, list_models
from polytrace.http_calls import told_url
from polytrace.http_jobs import HttpJobs
from polytrace.jobs import Job
from polytrace.keywords import check_load_keywords, chosen_device, chosen_dtype, chosen_places
from polytrace.lines import user_line
from polytrace.model import Model
from polytrace.progress import showing_bytes

DEFAULT_TIMEOUT_S = 3600.0


def load(
    source: Any,
    *,
    dtype: str = "auto",
    name: str | None = None,
    threads: int | None = None,
    device: str | None = None,
    random_weights: int | None = None,
    offload_gib: float = 0.0,
    edits: str | None = None,
    rename: Mapping[str, str | Sequence[str]] | None = None,
    torch_dtype: Any = None,
    device_map: Any = None,
    whole: bool = True,
    merges_calls: bool = False,
    **others: Any,
) -> Model:
    """A model of the Hugging Face hub or a local folder, run in this process by the engine of a service.

    Or a torch module of your own, which runs as it is: `polytrace.whole_model`. It stays where it is, in the mode that
    it is in; `dtype` and the other options of loading are not for it.

    `dtype`: a name, torch's own, or "auto" for the checkpoint's; `torch_dtype` is the same. `device_map`: a device, or
    "auto"; of a model that is called as it is, how it lies over several (docs/any_model.md).
    `rename`: other names for modules (`polytrace.aliases`). Other keywords of nnsight's are taken as
    `polytrace.keywords` says: weights are loaded at once, whatever `dispatch` is.
    `random_weights`: a seed; no weights are read but drawn, for a model of which there is only a configuration.
    `offload_gib`: so much of the weights, or all, stays in the host's memory, and is on the GPU only while it is used.
    `whole=False`: a vision-language model runs as the language model in it, whose prompts have images
    (`polytrace.images`); by default it is called as it is.
    `merges_calls`: calls of a model that runs as it is are one call where that is exact (docs/any_model.md); each has
    the same bits alone, which may differ from plain torch's in the last places.
    `edits`: a folder where named edits are kept; without one they live as long as the model does.
    """
    check_load_keywords(load, others)
    from engine.local import LocalBackend, module_backend, source_backend

    if not isinstance(source, (str, os.PathLike)):
        from polytrace.whole_model import WholeModel

        own = module_backend(source, name=name, merges_calls=merges_calls)
        loading = (dtype, torch_dtype, device, device_map, threads, random_weights, whole)
        if loading != ("auto", None, None, None, None, None, True):
            told = "a module that is there runs as it is: no dtype, device, threads, random weights or whole are for it"
            raise GraphError(told, where=user_line())
        _check_whole(offload_gib, edits)
        return WholeModel(own, rename)
    one_device, places = chosen_places(device, device_map)
    try:
        called = (
            None
            if not whole
            else source_backend(
                str(source),
                dtype=chosen_dtype(dtype, torch_dtype),
                name=name,
                threads=threads,
                device=one_device,
                device_map=places,
                random_weights=random_weights,
                merges_calls=merges_calls,
            )
        )
    except UserError as error:  # of a device map that does not fit the model
        raise GraphError(error.message, where=error.where or user_line()) from None
    if called is not None:
        from polytrace.whole_model import WholeModel

        _check_whole(offload_gib, edits)
        return WholeModel(called, rename)
    with showing_bytes(f"loading {source}") as tell:
        backend = LocalBackend(
            str(source),
            dtype=chosen_dtype(dtype, torch_dtype),
            name=name,
            threads=threads,
            device=chosen_device(device, device_map),
            random_weights=random_weights,
            offload_gib=offload_gib,
            tell=tell,
        )
    return Model(backend, rename, shelf=LocalShelf(edits))


def _check_whole(offload_gib: float, edits: str | None) -> None:
    """Raises GraphError for what does not exist of models that are called as they are."""
    if offload_gib:
        told = "offload_gib is for language models: device_map says where the parts of such a model lie"
        raise GraphError(told, where=user_line())
    if edits is not None:
        raise GraphError("edits are kept of language models: write such an edit in each trace", where=user_line())


def connect(
    url: str,
    name: str | None = None,
    *,
    key: str | None = None,
    timeout: float = DEFAULT_TIMEOUT_S,
    rename: Mapping[str, str | Sequence[str]] | None = None,
    dtype: Any = "auto",
    torch_dtype: Any = None,
    device_map: Any = None,
    **others: Any,
) -> Model:
    """A model that a service runs; no weights come here.

    `url`: http://, https://, or ray://auto from inside a Ray job. `name` may miss where the service has one model.
    `key` defaults to the environment's POLYTRACE_KEY. `timeout`: seconds that one trace may take, queueing included.
    `rename`: other names for modules (`polytrace.aliases`). The service decides where a model is and in which dtype:
    `device_map` means nothing, and another `dtype` (or `torch_dtype`) than it serves is an error.
    """
    check_load_keywords(connect, others)
    backend = HttpBackend(gateway_url(url), name, key=key or environment.key(), timeout_s=timeout)
    wanted, served = chosen_dtype(dtype, torch_dtype), backend.describe().dtype
    if wanted not in ("auto", served):
        backend.close()
        raise GraphError(f"{backend.name} is served in {served}, not in {wanted}", where=user_line())
    if backend.describe().layout is PassLayout.WHOLE:
        from polytrace.whole_model import WholeModel

        return WholeModel(backend, rename)
    return Model(backend, rename, shelf=HttpShelf(backend))


def job(id: str, url: str | None = None, *, key: str | None = None) -> Job:
    """A job that this or another process has sent to a service (`polytrace.jobs`).

    `url`: the service's; by default the environment's POLYTRACE_URL. Raises NotFoundError for a job that is not there,
    or somebody else's.
    """
    url = url or environment.url()
    if not url:
        raise UserError(f"say which service has the job: polytrace.job({id!r}, url), or set {environment.URL}")
    running = HttpJobs.connect(gateway_url(url), key).running(id)
    running.status()  # raises when there is none
    return Job(running)


def models(url: str, *, key: str | None = None) -> list[dict[str, Any]]:
    """The models of a service: a dict each with name, state and, once it is ready, class, dtype, layers and shards."""
    return list_models(gateway_url(url), key=key or environment.key())


def gateway_url(url: str) -> str:
    """Where the service's gateway listens. Raises ValueError for an address that is none."""
    if url.startswith("ray://"):
        from cluster.discovery import find_gateway

        return find_gateway().rstrip("/")
    if not url.startswith(("http://", "https://")):
        raise ValueError(f"{told_url(url)!r} is no address of a service: it begins with http://, https:// or ray://")
    return url.rstrip("/")
