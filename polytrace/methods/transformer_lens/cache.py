"""`ActivationCache`: activations of one run by name, and TransformerLens's ways to take the residual stream apart."""

from __future__ import annotations

from collections import Counter
from collections.abc import ItemsView, Iterator, KeysView, ValuesView
from typing import TYPE_CHECKING, Any

from polytrace.errors import GraphError
from polytrace.lines import user_line
from polytrace.methods.transformer_lens.decomposition import Decomposition
from polytrace.methods.transformer_lens.names import get_act_name
from polytrace.methods.transformer_lens.slices import taken

if TYPE_CHECKING:
    from torch import Tensor

    from polytrace.methods.transformer_lens.hooked import HookedModel


class NotCachedError(GraphError, KeyError):
    """Also a KeyError, as of any mapping."""

    __str__ = GraphError.__str__


class ActivationCache(Decomposition):
    """Activations by full name, short name or tuple: `cache["resid_post", 3]`, `cache["pattern", -1, "attn"]`.

    The methods work here, on what is cached; what they lack of the model's weights (`W_O`, `W_out`) is fetched. They
    compute what TransformerLens's of the same names do, on the model's own numbers. In the block of a session there is
    no data yet.
    """

    def __init__(self, cache_dict: dict[str, Any], model: HookedModel, *, has_batch_dim: bool = True) -> None:
        self.cache_dict = cache_dict
        self.model = model
        self.has_batch_dim = has_batch_dim

    # a mapping

    def __getitem__(self, key: Any) -> Tensor:
        """Raises NotCachedError, a KeyError, for what was not chosen."""
        if key in self.cache_dict:
            return self.cache_dict[key]  # type: ignore[no-any-return]
        if isinstance(key, str):
            name = get_act_name(key)
        else:
            given = list(key)
            if len(given) > 1 and isinstance(given[1], int) and given[1] < 0:
                given[1] += self.model.cfg.n_layers
            name = get_act_name(*given)
        if name not in self.cache_dict:
            self.model.hook_table.place(name)
            raise NotCachedError(
                f"{name} is not in this cache of {len(self)}: choose it with names_filter", where=user_line()
            )
        return self.cache_dict[name]  # type: ignore[no-any-return]

    def __contains__(self, key: object) -> bool:
        return key in self.cache_dict

    def __len__(self) -> int:
        return len(self.cache_dict)

    def __iter__(self) -> Iterator[str]:
        return iter(self.cache_dict)

    def keys(self) -> KeysView[str]:
        return self.cache_dict.keys()

    def values(self) -> ValuesView[Any]:
        return self.cache_dict.values()

    def items(self) -> ItemsView[str, Any]:
        return self.cache_dict.items()

    def __repr__(self) -> str:
        return f"ActivationCache with keys {list(self.cache_dict)}"

    @property
    def nbytes(self) -> int:
        """What it holds."""
        return sum(value.numel() * value.element_size() for value in self.cache_dict.values())

    def to(self, device: Any) -> ActivationCache:
        """Moves every activation; returns itself."""
        self.cache_dict = {name: value.to(device) for name, value in self.cache_dict.items()}
        return self

    def toggle_autodiff(self, mode: bool = False) -> None:
        """Not needed: nothing here has gradients."""
        if mode:
            raise GraphError("what is in a cache has no gradients: write loss.backward() in a trace", where=user_line())

    def remove_batch_dim(self) -> ActivationCache:
        """Of one prompt: drops its dimension everywhere; returns itself. Raises GraphError for several prompts."""
        if self.has_batch_dim:
            if (size := self._batch_size()) != 1:
                raise GraphError(f"this cache is of {size} prompts, so their dimension stays", where=user_line())
            self.cache_dict = {name: value[0] for name, value in self.cache_dict.items()}
            self.has_batch_dim = False
        return self

    def apply_slice_to_batch_dim(self, batch_slice: Any) -> ActivationCache:
        """A cache of some of the prompts; an int drops their dimension."""
        if not self.has_batch_dim and batch_slice is not None:
            raise GraphError("this cache has no dimension of prompts any more", where=user_line())
        chosen = {name: taken(value, batch_slice, 0) for name, value in self.cache_dict.items()}
        return ActivationCache(
            chosen, self.model, has_batch_dim=self.has_batch_dim and not isinstance(batch_slice, int)
        )

    def _batch_size(self) -> int:
        """Of most entries: embedded positions may be one for all prompts."""
        sizes = Counter(value.shape[0] for value in self.cache_dict.values())
        return sizes.most_common(1)[0][0] if sizes else 1
