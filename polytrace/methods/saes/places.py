"""Where an SAE belongs: a named point of a layer, the same words in every family, found from what its files say."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from polytrace.errors import GraphError
from polytrace.lines import user_line
from polytrace.methods.places import layers_of
from polytrace.points import DIMS

if TYPE_CHECKING:
    from polytrace.model import Model

_OF_TRANSFORMER_LENS = {
    "hook_resid_pre": "resid_pre",
    "hook_resid_mid": "resid_mid",
    "hook_resid_post": "resid_post",
    "hook_attn_out": "attention_added",  # behind a norm of its own where a family has one, as in TransformerLens
    "hook_mlp_out": "mlp_added",
    "attn.hook_z": "z",
    "mlp.hook_pre": "mlp_pre",
    "mlp.hook_post": "mlp_post",
}
_OF_MODULES = {  # how Gemma Scope 2 names places
    "output": "resid_post",
    "self_attn.o_proj.input": "z",
    "pre_feedforward_layernorm.output": "mlp_input",
    "post_feedforward_layernorm.output": "mlp_added",
}
_KINDS = {"res": "resid_post", "mlp": "mlp_added", "att": "z"}  # of Gemma Scope's repositories
_BLOCK = re.compile(r"blocks\.(\d+)\.(.+)")
_MODULE = re.compile(r"(?:.*\.)?layers\.(\d+)\.(.+)")
_REPOSITORY = re.compile(r"gemma-scope-[\w.]+-(?:pt|it)-(\w+)")
_FOLDER = re.compile(r"(?:^|/)layer_(\d+)(?:_|/|$)")


@dataclass(frozen=True, slots=True)
class LayerPoint:
    """A point of a layer: `LayerPoint("resid_post", 20)`."""

    point: str
    layer: int

    def __post_init__(self) -> None:
        known = [name for name, dims in DIMS.items() if dims[:2] == ("sequence", "token")]
        if self.point not in known:
            raise GraphError(f"a layer has no point {self.point!r}; it has {', '.join(known)}", where=user_line())

    def value(self, model: Model) -> Any:
        """The tensor in the open trace, to be read or changed in place: `[sequences, tokens, ...]`."""
        return getattr(model.layers[layers_of(model, self.layer)[0]], self.point)


def place_of_hook(hook: object) -> LayerPoint | None:
    """Of a name as in TransformerLens (`blocks.3.hook_resid_post`) or of a module's port; None for others."""
    if not isinstance(hook, str):
        return None
    for pattern, names in ((_BLOCK, _OF_TRANSFORMER_LENS), (_MODULE, _OF_MODULES)):
        found = pattern.fullmatch(hook)
        if found is not None and found[2] in names:
            return LayerPoint(names[found[2]], int(found[1]))
    return None


def place_of_folder(path: str) -> LayerPoint | None:
    """Of Gemma Scope's names: `google/gemma-scope-2b-pt-res/layer_20/width_16k/average_l0_71`."""
    layer = _FOLDER.search(path)
    kind = next((_KINDS[name] for name in _REPOSITORY.findall(path) if name in _KINDS), None)
    return LayerPoint(kind, int(layer[1])) if layer is not None and kind is not None else None


def layer_of_folder(path: str) -> int | None:
    """The layer that Gemma Scope's names tell, where they do not tell the point."""
    found = _FOLDER.search(path)
    return None if found is None else int(found[1])
