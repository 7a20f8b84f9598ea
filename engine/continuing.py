"""How a sequence of the padded layout goes on from the cache that its model made."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from transformers import DynamicCache, EncoderDecoderCache, PreTrainedModel

from engine.encoders import has_encoder
from engine.manners import forward_names
from engine.own_caches import OwnCache
from engine.trunks import Trunks
from polytrace.errors import ServiceError

# R = rows of keys, G = key/value heads, C = head dimension

_NAMES = ("past_key_values", "cache_params", "state")  # by which forwards take a cache, and their outputs have it


def new_cache(model: PreTrainedModel) -> OwnCache:
    """One without tokens. ServiceError where the family has none."""
    name = next((name for name in _NAMES if name in forward_names(model)), None)
    if name is None:
        raise ServiceError("its forward takes none")
    config = model.get_decoder().config if has_encoder(model) else model.config.get_text_config()
    if has_encoder(model):
        both = DynamicCache(config=config), DynamicCache(config=config)
        return OwnCache(name=name, value=EncoderDecoderCache(*both), has_encoder=True)
    has_default = getattr(model, "_supports_default_dynamic_cache", lambda: False)()
    return OwnCache(name=name, value=DynamicCache(config=config) if has_default else None)


class EarlierKeys(Trunks):
    """Keys of one sequence whose earlier ones the model's own cache has: these are the rows of the stream's trunk."""

    def through(self, layer: int, places: Sequence[int], key_GRC: Tensor, value_GRC: Tensor) -> tuple[Tensor, Tensor]:
        """The stream's rows, and behind them those of the trunk. A cache that slides has lost the first ones."""
        stream = self._streams.inside(layer)
        num_own = stream.num_rows
        moved = []
        for part_GRC in (key_GRC, value_GRC):
            earlier = part_GRC[:, : part_GRC.shape[1] - num_own]
            rows = part_GRC.new_zeros(part_GRC.shape[0], stream.num_reachable, part_GRC.shape[2])
            rows[:, :num_own] = part_GRC[:, part_GRC.shape[1] - num_own :]
            rows[:, stream.num_reachable - earlier.shape[1] :] = earlier
            moved.append(rows)
        return moved[0], moved[1]

    def keep_keys(self, layer: int, key_GRC: Tensor, value_GRC: Tensor) -> None:
        """The model has."""
