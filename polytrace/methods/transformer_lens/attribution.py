"""What components of the residual are to the next norm, and what they add to logits."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from polytrace.errors import GraphError
from polytrace.lines import user_line
from polytrace.methods.transformer_lens.slices import taken

if TYPE_CHECKING:
    from torch import Tensor

    from polytrace.methods.transformer_lens.facts import NormFacts
    from polytrace.methods.transformer_lens.hooked import HookedModel

# Shapes: C = components, B = prompts, P = positions, D = d_model; B or P may be gone


class Attribution:
    """The part of `ActivationCache` that divides by norms' scales. What it lacks of the model's weights is fetched."""

    cache_dict: dict[str, Any]
    model: HookedModel
    has_batch_dim: bool

    def __getitem__(self, key: Any) -> Tensor:
        raise NotImplementedError

    def apply_ln_to_stack(
        self,
        residual_stack: Tensor,
        layer: int | None = None,
        mlp_input: bool = False,
        pos_slice: Any = None,
        batch_slice: Any = None,
        has_batch_dim: bool = True,
        recompute_ln: bool = False,
    ) -> Tensor:
        """Components `[C, B, P, D]` divided by the scale that the norm in front of `layer` had in this run.

        None: the final norm. Centred before where that norm centres; its weight and bias are not applied.
        `pos_slice`, `batch_slice` are those of the stack. `recompute_ln`: of the final norm, the norm itself, anew for
        each component.
        """
        layer = self._layer(layer)
        if has_batch_dim:
            residual_stack = taken(residual_stack, batch_slice, 1)
        if recompute_ln and layer == self._layers:
            return self.model.ln_final(residual_stack)
        facts = self._norm_facts(layer, mlp_input)
        scaled = facts.centred(residual_stack) / self._scale(layer, mlp_input, pos_slice, batch_slice)
        return scaled.to(residual_stack.dtype)  # type: ignore[no-any-return]

    def logit_attrs(
        self,
        residual_stack: Tensor,
        tokens: Any,
        incorrect_tokens: Any = None,
        pos_slice: Any = None,
        batch_slice: Any = None,
        has_batch_dim: bool = True,
        *,
        fold_ln: bool = True,
    ) -> Tensor:
        """What each component adds to the logits of tokens, less that of `incorrect_tokens`: `[C, B, P]`.

        `tokens`: a token for all, or ids `[B]` or `[B, P]` as the stack has them. The sum over all components and the
        final norm's bias times `W_U` and `b_U` is the logit. `fold_ln` as in `tokens_to_residual_directions`: False
        leaves the final norm's weight out, which are TransformerLens's numbers without processing, and no logits.
        """
        directions = self.model.tokens_to_residual_directions(tokens, fold_ln=fold_ln)
        if incorrect_tokens is not None:
            other = self.model.tokens_to_residual_directions(incorrect_tokens, fold_ln=fold_ln)
            if other.shape != directions.shape:
                raise GraphError(
                    f"tokens and incorrect_tokens have one shape, not {list(directions.shape[:-1])} and "
                    f"{list(other.shape[:-1])}",
                    where=user_line(),
                )
            directions = directions - other
        scaled = self.apply_ln_to_stack(
            residual_stack, -1, pos_slice=pos_slice, batch_slice=batch_slice, has_batch_dim=has_batch_dim
        )
        attributions: Tensor = (scaled * directions).sum(-1)
        return attributions

    @property
    def _layers(self) -> int:
        return self.model.cfg.n_layers

    def _layer(self, layer: int | None) -> int:
        """A block's number; the number of blocks stands for what is behind all."""
        if layer is None or layer == -1:
            return self._layers
        if not 0 <= layer <= self._layers:
            raise GraphError(f"layer {layer}: this model has blocks 0-{self._layers - 1}", where=user_line())
        return layer

    def _norm_facts(self, layer: int, mlp_input: bool) -> NormFacts:
        path = self.model.model.description.standard["ln_final"]
        if layer < self._layers:
            block = self.model.hook_table.blocks[layer]
            own = block.ln2 if mlp_input else block.ln1
            if own is None:
                raise GraphError(f"block {layer} has no norm there", where=user_line())
            path = own
        return self.model.norm_facts(path)

    def _scale(self, layer: int, mlp_input: bool, pos_slice: Any, batch_slice: Any = None) -> Tensor:
        part = "ln_final" if layer == self._layers else f"blocks.{layer}.{'ln2' if mlp_input else 'ln1'}"
        scale = taken(self[f"{part}.hook_scale"], pos_slice, -2)
        return taken(scale, batch_slice, 0) if self.has_batch_dim else scale  # type: ignore[no-any-return]
