"""From what two forwards saw of a port to its site: where its rows are, and what of it may be written.

A dimension that follows the number of rows in both forwards is the token dimension. Owns the refusals that follow from
the tensors alone; `engine.placing` adds those of stages and ranks. No family is named here.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from torch import Tensor

from engine.recorder import Event, Recorder, memory_of
from polytrace.description import Leaf, Rows, SiteInfo
from polytrace.graph import Port

# A marker that `describe_model` turns into a refusal where there are several stages, and clears where there is one.
EVERY_LAYER = "every layer takes it beside the hidden states"
_IN_EVERY_LAYER = "it shares memory with what every layer takes beside the hidden states"
_ATTENDED = "it is all that there is to attend to, read only: edit `{}`, and later steps attend to what that has become"
_SHARED_BY_LAYERS = "every layer is given this tensor: change a copy (`.clone()`), and assign that for this call alone"


def merged_site(
    order: int, a: Event, b: Event, recorders: tuple[Recorder, Recorder], experts: Iterable[str]
) -> SiteInfo:
    """Merges what two forwards saw of one port."""
    recorder = recorders[0]
    kinds = [(Rows.ALL, (recorder.rows, recorders[1].rows)), (Rows.KEPT, (recorder.kept, recorders[1].kept))]
    kinds.append((Rows.DECODER, (recorder.decoded, recorders[1].decoded)))
    is_sorted = any(a.module.startswith(f"{path}.") for path in experts)
    in_layers = a.module.startswith(recorder.layers + ".")
    rows: Rows | None = None
    leaves = []
    for selector, tensor in a.leaves.items():
        found = _find_rows(tuple(tensor.shape), tuple(b.leaves[selector].shape), kinds)
        dim, kind, tail = found or (1, rows, ())
        told = [
            dict.fromkeys((recorder.rows, recorder.kept, recorder.decoded), "tokens").get(size, size)
            for size in tensor.shape
        ]
        refusal = None if found else f"its rows are not laid out as [1, tokens, ...] but as {told}"
        if a.is_operation and tensor.shape == b.leaves[selector].shape:
            refusal = f"it is {told} for all tokens of all prompts: what a module holds is read by its name there"
        rows = rows or kind
        if kind is not rows:
            refusal = "it has other rows than what stands beside it"
        if is_sorted:
            refusal = "its rows are sorted by expert, not by token"
        write_refusal = refusal
        if refusal is None and _overlaps(tensor):
            write_refusal = "it is an expanded view whose rows share memory"
        if refusal is None and not tensor.is_floating_point():
            write_refusal = "it holds token ids or positions, which the model uses as indices"
        if a.port.is_attended:
            write_refusal = _ATTENDED.format("k` or `k_rot" if a.port is Port.KEYS else "v")
        in_place_refusal = None
        is_shared = id(tensor) in recorder.layer_arguments
        if a.is_operation and (is_shared or memory_of(tensor) in recorder.layer_storages):
            write_refusal = write_refusal or (_IN_EVERY_LAYER if in_layers else EVERY_LAYER)
        elif is_shared and a.port is Port.INPUTS:
            in_place_refusal = _SHARED_BY_LAYERS
        elif is_shared:
            write_refusal = write_refusal or EVERY_LAYER
        leaves.append(
            Leaf(
                selector=selector,
                tail=tail,
                is_flat=dim == 0,
                row_dim=max(dim, 1),
                of_pairs=a.port.is_of_pairs,
                is_attended=a.port.is_attended,
                num_columns=1 if found and kind is Rows.DECODER else None,
                dtype=str(tensor.dtype).removeprefix("torch."),
                read_refusal=refusal,
                write_refusal=write_refusal,
                in_place_refusal=in_place_refusal,
                tensor=recorder.number_of(tensor),
            )
        )
    return SiteInfo(
        module=a.module,
        port=a.port,
        visit=a.visit,
        order=order,
        stage=0,
        structure=a.structure,
        rows=rows or Rows.ALL,
        leaves=tuple(leaves),
        keyword=a.keyword,
    )


def refuse_repeated_visits(sites: tuple[SiteInfo, ...]) -> tuple[SiteInfo, ...]:
    """A module that runs several times in a forward has sites nobody can name by path alone."""
    repeated = {(site.module, site.port) for site in sites if site.visit > 0}
    reason = "its module runs several times in one forward"
    return tuple(
        replace(
            site,
            leaves=tuple(replace(leaf, read_refusal=reason, write_refusal=reason) for leaf in site.leaves),
        )
        if (site.module, site.port) in repeated
        else site
        for site in sites
    )


def _find_rows(
    a: tuple[int, ...], b: tuple[int, ...], kinds: Sequence[tuple[Rows, tuple[int, int]]]
) -> tuple[int, Rows, tuple[int, ...]] | None:
    """From a tensor's shapes in two forwards: the dimension that follows their rows, which rows, and the others.

    Dimension 0 is of tensors without sequences, as a mixture of experts has them; before any other stands 1.
    """
    for kind, sizes in kinds:
        differing = [dim for dim, pair in enumerate(zip(a, b, strict=False)) if pair[0] != pair[1]]
        if len(a) == len(b) and len(differing) == 1:
            (dim,) = differing
            if (a[dim], b[dim]) == sizes and (dim == 0 or a[0] == 1):
                return dim, kind, a[1:dim] + a[dim + 1 :]
    return None


def _overlaps(tensor: Tensor) -> bool:
    """Whether elements may share memory, as those of expanded views do."""
    reach = 1
    for stride, size in sorted((s, n) for s, n in zip(tensor.stride(), tensor.shape, strict=True) if n > 1):
        if stride < reach:
            return tensor.numel() > 0
        reach = stride * (size - 1) + reach
    return False
