"""The residual stream taken apart: what layers, heads and neurons added to it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from polytrace.errors import GraphError
from polytrace.lines import user_line
from polytrace.methods.transformer_lens.attribution import Attribution
from polytrace.methods.transformer_lens.slices import taken

if TYPE_CHECKING:
    from torch import Tensor

# Shapes: C = components, B = prompts, P = positions, D = d_model, N = neurons, K = directions; B or P may be gone


class Decomposition(Attribution):
    """The part of `ActivationCache` that takes the residual apart."""

    # the residual stream

    def accumulated_resid(
        self,
        layer: int | None = None,
        incl_mid: bool = False,
        apply_ln: bool = False,
        pos_slice: Any = None,
        mlp_input: bool = False,
        return_labels: bool = False,
    ) -> Any:
        """The residual in front of each block up to `layer`'s, `[C, B, P, D]`, and behind all where that is None.

        `incl_mid`: between attention and MLP too. `mlp_input`: up to the MLP of `layer`. `apply_ln`: behind the final
        norm, worked out anew for each (of an earlier `layer`: divided by the scale of that block's norm).
        """
        layer = self._layer(layer)
        names = [(f"{number}_pre", ("resid_pre", number)) for number in range(min(layer + 1, self._layers))]
        if layer == self._layers:
            names.append(("final_post", ("resid_post", layer - 1)))
        found = []
        for label, key in names:
            found.append((label, key))
            number = key[1]
            is_before = number < layer and key[0] == "resid_pre"
            if (incl_mid and is_before) or (mlp_input and number == layer):
                found.append((f"{number}_mid", ("resid_mid", number)))
        stack = self._stacked([key for _, key in found], pos_slice)
        if apply_ln and layer == self._layers:
            stack = self.model.ln_final(stack)
        elif apply_ln:
            stack = self.apply_ln_to_stack(
                stack, layer, mlp_input=mlp_input, pos_slice=pos_slice, has_batch_dim=self.has_batch_dim
            )
        return (stack, [label for label, _ in found]) if return_labels else stack

    def decompose_resid(
        self,
        layer: int | None = None,
        mlp_input: bool = False,
        mode: str = "all",
        apply_ln: bool = False,
        pos_slice: Any = None,
        incl_embeds: bool = True,
        return_labels: bool = False,
    ) -> Any:
        """What was added to the residual in front of `layer`, `[C, B, P, D]`: embeddings, then each sublayer.

        Its sum over components is `resid_pre` of `layer` (behind the last block, where that is None). `mode`: "all",
        "attn" or "mlp".
        """
        if mode not in ("all", "attn", "mlp"):
            raise GraphError(f"mode is 'all', 'attn' or 'mlp', not {mode!r}", where=user_line())
        layer = self._layer(layer)
        found: list[tuple[str, tuple[Any, ...]]] = []
        if incl_embeds:
            found += [(name, (f"hook_{name}",)) for name in ("embed", "pos_embed") if f"hook_{name}" in self.cache_dict]
        for number in range(layer):
            found += [
                (f"{number}_{part}_out", (f"{part}_out", number)) for part in ("attn", "mlp") if mode in ("all", part)
            ]
        if mlp_input and mode != "mlp":
            found.append((f"{layer}_attn_out", ("attn_out", layer)))
        stack = self._stacked([key for _, key in found], pos_slice)
        if apply_ln:
            stack = self.apply_ln_to_stack(stack, layer, mlp_input=mlp_input, pos_slice=pos_slice)
        return (stack, [label for label, _ in found]) if return_labels else stack

    def stack_activation(self, activation_name: str, layer: int = -1, sublayer_type: str | None = None) -> Tensor:
        """One activation of all blocks before `layer`: `[layers, ...]`."""
        import torch

        return torch.stack([self[activation_name, number, sublayer_type] for number in range(self._layer(layer))])

    # heads

    def compute_head_results(self) -> None:
        """Puts `attn.hook_result` of every block into the cache, `[B, P, heads, D]`, from `z` and `W_O`."""
        self._compute_results(self._layers)

    def stack_head_results(
        self,
        layer: int | None = -1,
        return_labels: bool = False,
        incl_remainder: bool = False,
        pos_slice: Any = None,
        apply_ln: bool = False,
    ) -> Any:
        """What each head of the blocks before `layer` added, `[C, B, P, D]`: labels "L0H0", "L0H1", ...

        `incl_remainder`: one more, the rest of the residual there. In families that norm what attention gave before
        it is added (Gemma 2) heads are in front of that norm, as in TransformerLens.
        """
        import torch

        layer = self._layer(layer)
        self._compute_results(layer)
        results = [taken(self["result", number, "attn"], pos_slice, -3) for number in range(layer)]
        labels = [f"L{number}H{head}" for number in range(layer) for head in range(self.model.cfg.n_heads)]
        parts = [result.movedim(-2, 0) for result in results]
        if incl_remainder:
            parts, labels = self._with_remainder(parts, labels, layer, pos_slice)
        stack = torch.cat(parts) if parts else self._nothing(pos_slice)
        if apply_ln:
            stack = self.apply_ln_to_stack(stack, layer, pos_slice=pos_slice)
        return (stack, labels) if return_labels else stack

    # neurons

    def get_neuron_results(
        self, layer: int, neuron_slice: Any = None, pos_slice: Any = None, project_output_onto: Tensor | None = None
    ) -> Tensor:
        """What each neuron of a block added, `[B, P, N, D]`, or its product with directions `[D, K]` (one: `[D]`)."""
        activations = taken(taken(self["post", layer, "mlp"], pos_slice, -2), neuron_slice, -1)
        number = layer + self._layers if layer < 0 else layer
        out = taken(self.model.weight(number, "W_out"), neuron_slice, 0)
        if project_output_onto is not None:
            out = out @ project_output_onto
        is_one = project_output_onto is not None and project_output_onto.ndim == 1
        result: Tensor = activations * out if is_one else activations[..., None] * out
        return result

    def stack_neuron_results(
        self,
        layer: int | None,
        pos_slice: Any = None,
        neuron_slice: Any = None,
        return_labels: bool = False,
        incl_remainder: bool = False,
        apply_ln: bool = False,
        project_output_onto: Tensor | None = None,
        mlp_input: bool = False,
    ) -> Any:
        """What each neuron of the blocks before `layer` added, `[C, B, P, D]`: labels "L0N0", ...; `[C, B, P]` of a
        direction. Large: `project_output_onto` or `neuron_slice` keep it small. `mlp_input`: of
        the norm that `apply_ln` means.
        """
        import torch

        layer = self._layer(layer)
        chosen = taken(torch.arange(self.model.cfg.d_mlp or 0), neuron_slice, 0).reshape(-1).tolist()
        labels = [f"L{number}N{neuron}" for number in range(layer) for neuron in chosen]
        directions = _columns(project_output_onto)
        self.model.weights_of("W_out", layer)  # in one request
        is_through = apply_ln and directions is not None
        parts = [
            self._projected_through_ln(number, layer, mlp_input, pos_slice, chosen, directions)
            if apply_ln and directions is not None
            else self.get_neuron_results(number, chosen, pos_slice, directions).movedim(-2, 0)
            for number in range(layer)
        ]
        if incl_remainder:
            norm = (layer, mlp_input) if is_through else None
            parts, labels = self._with_remainder(parts, labels, layer, pos_slice, directions, norm)
        stack = torch.cat(parts) if parts else self._nothing(pos_slice, directions)
        if apply_ln and not is_through:
            stack = self.apply_ln_to_stack(stack, layer, mlp_input=mlp_input, pos_slice=pos_slice)
        stack = _without_column(stack, project_output_onto)
        return (stack, labels) if return_labels else stack

    # everything

    def get_full_resid_decomposition(
        self,
        layer: int | None = None,
        mlp_input: bool = False,
        expand_neurons: bool = True,
        apply_ln: bool = False,
        pos_slice: Any = None,
        return_labels: bool = False,
        project_output_onto: Tensor | None = None,
    ) -> Any:
        """Heads, neurons (or MLPs), embeddings, biases: the residual in front of `layer` as a sum, `[C, B, P, D]`."""
        import torch

        layer = self._layer(layer)
        directions = _columns(project_output_onto)

        def finished(stack: Tensor) -> Tensor:
            if apply_ln:
                stack = self.apply_ln_to_stack(stack, layer, mlp_input=mlp_input, pos_slice=pos_slice)
            return stack if directions is None else stack @ directions

        heads, labels = self.stack_head_results(layer + mlp_input, pos_slice=pos_slice, return_labels=True)
        parts = [finished(heads)]
        if layer and expand_neurons:
            neurons, names = self.stack_neuron_results(
                layer,
                pos_slice,
                return_labels=True,
                apply_ln=apply_ln,
                project_output_onto=directions,
                mlp_input=mlp_input,
            )
            parts.append(neurons)
            labels += names
        elif layer:
            mlps, names = self.decompose_resid(
                layer, mode="mlp", pos_slice=pos_slice, incl_embeds=False, return_labels=True
            )
            parts.append(finished(mlps))
            labels += names
        for name in ("embed", "pos_embed"):
            if f"hook_{name}" in self.cache_dict:
                parts.append(finished(taken(self[f"hook_{name}"], pos_slice, -2)[None]))
                labels.append(name)
        bias = self.model.accumulated_bias(layer, mlp_input, include_mlp_biases=expand_neurons)
        parts.append(finished(bias.to(heads.dtype).expand(1, *heads.shape[1:])))
        labels.append("bias")
        stack = _without_column(torch.cat(parts), project_output_onto)
        return (stack, labels) if return_labels else stack

    # what they are made of

    def _stacked(self, keys: list[tuple[Any, ...]], pos_slice: Any) -> Tensor:
        import torch

        values = [taken(self[key if len(key) > 1 else key[0]], pos_slice, -2) for key in keys]
        if not values:
            return self._nothing(pos_slice)
        return torch.stack(torch.broadcast_tensors(*values))

    def _compute_results(self, layers: int) -> None:
        """Those that the cache lacks: the products are made where the model is."""
        import torch

        zs = {
            number: self["z", number, "attn"]
            for number in range(layers)
            if f"blocks.{number}.attn.hook_result" not in self.cache_dict
        }

        def result(number: int) -> Any:
            return torch.einsum("...hc,hcd->...hd", zs[number], self.model.model.layers[number].W_O)

        made = self.model.fetched({number: lambda number=number: result(number) for number in zs})  # type: ignore[misc]
        for number, value in made.items():
            self.cache_dict[f"blocks.{number}.attn.hook_result"] = value

    def _with_remainder(
        self,
        parts: list[Tensor],
        labels: list[str],
        layer: int,
        pos_slice: Any,
        directions: Tensor | None = None,
        norm: tuple[int, bool] | None = None,
    ) -> tuple[list[Tensor], list[str]]:
        key = ("resid_post", layer - 1) if layer else ("resid_pre", 0)
        rest = taken(self[key], pos_slice, -2)[None]
        if norm is not None:
            rest = self.apply_ln_to_stack(rest, *norm, pos_slice=pos_slice)
        if directions is not None:
            rest = rest @ directions
        for part in parts:
            rest = rest - part.sum(0, keepdim=True)
        return [*parts, rest], [*labels, "remainder"]

    def _nothing(self, pos_slice: Any, directions: Tensor | None = None) -> Tensor:
        """A stack of no components."""
        like: Tensor = taken(self["hook_embed"], pos_slice, -2)
        width = like.shape[-1] if directions is None else directions.shape[-1]
        return like.new_zeros(0, *like.shape[:-1], width)

    def _projected_through_ln(
        self, number: int, layer: int, mlp_input: bool, pos_slice: Any, neurons: list[int], directions: Tensor
    ) -> Tensor:
        """`[N, B, P, K]`: `activation / scale * (centred W_out @ directions)`, without `[.., N, D]` in between."""
        out = self._norm_facts(layer, mlp_input).centred(taken(self.model.weight(number, "W_out"), neurons, 0))
        activations = taken(taken(self["post", number, "mlp"], pos_slice, -2), neurons, -1)
        scaled = activations / self._scale(layer, mlp_input, pos_slice)
        projected: Tensor = scaled[..., None] * (out @ directions)
        return projected.movedim(-2, 0)


def _columns(directions: Tensor | None) -> Tensor | None:
    """`[D, K]` of one direction `[D]` too."""
    return directions[:, None] if directions is not None and directions.ndim == 1 else directions


def _without_column(stack: Tensor, directions: Tensor | None) -> Tensor:
    return stack[..., 0] if directions is not None and directions.ndim == 1 else stack
