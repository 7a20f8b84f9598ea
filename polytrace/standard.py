"""Names that every decoder has, on the model itself, so that one script runs on GPT-2, Llama and Gemma.

`model.layers_output[3]`, `model.attentions[-1]`, `model.logits`, `model.num_heads`: a superset of the interface of
nnterp's StandardizedTransformer. Where they lead is found by the service (`engine.standard`) and stands in the
description; what a user renames to a standard name takes its place. The model's own paths stay as they are: where it
has a module of its own that is called `layers`, say, `model.layers` is that one, and `model.standard["layers"]` ours.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from polytrace.description import ModelDescription
from polytrace.errors import GraphError
from polytrace.layered import LayerModules, LayerValues, numbers_of
from polytrace.lines import user_line
from polytrace.modules import Module
from polytrace.positions import prompt_index
from polytrace.skipping import skip_layer
from polytrace.storage import is_recorded
from polytrace.tree import NoSuchNameError

VALUES = {  # of every layer: the point that each is
    "layers_input": "resid_pre",
    "layers_output": "resid_post",
    "attentions_input": "attention_input",
    "attentions_output": "attention_output",
    "attention_probabilities": "pattern",
    "mlps_input": "mlp_input",
    "mlps_output": "mlp_output",
}
MODULES = {"attentions": "self_attn", "mlps": "mlp"}  # of every layer: the name that each has there
ROOT_VALUES = ("input_ids", "token_embeddings", "logits")  # points of the model itself
FACTS = ("num_layers", "num_heads", "num_kv_heads", "head_dim", "hidden_size", "vocab_size")
_INSTEAD = {
    "attention_mask": "in a shared pass rows attend to their own sequence's earlier tokens by construction, so there "
    "is no mask to change: edit `model.layers[i].scores` or `model.attention_probabilities[i]` to change who sees whom",
    "next_token_probs": "it is worked out of the logits: write model.logits",
    **dict.fromkeys(FACTS, "it is a fact of the model"),
    **dict.fromkeys(
        MODULES, "a trace changes what modules receive and return: write {name}_input[i], {name}_output[i]"
    ),
    **dict.fromkeys(VALUES, "write one layer's, as in {name}[i] = value"),
}


class StandardModel(Module):
    """The root module with these names."""

    description: ModelDescription

    @property
    def standard(self) -> StandardNames:
        """The modules that every decoder has by their standard names; printed, all standard names of this model."""
        return StandardNames(self)

    @property
    def layers_input(self) -> LayerValues:
        """What each layer takes, `[sequences, tokens, hidden]`: the residual stream before it."""
        return self._values("layers_input")

    @property
    def layers_output(self) -> LayerValues:
        """What each layer gives, `[sequences, tokens, hidden]`: the residual stream behind it."""
        return self._values("layers_output")

    @property
    def attentions(self) -> LayerModules:
        """The attention module of each layer."""
        return LayerModules(self, "attentions", MODULES["attentions"])

    @property
    def attentions_input(self) -> LayerValues:
        """What each attention module is given, `[sequences, tokens, hidden]`: behind a norm where one is before it."""
        return self._values("attentions_input")

    @property
    def attentions_output(self) -> LayerValues:
        """The hidden states that each attention module gives, `[sequences, tokens, hidden]`, never a tuple.

        It is what the layer adds to the residual, but for a norm or a factor of which `model.layers[i].points` tells.
        """
        return self._values("attentions_output")

    @property
    def attention_probabilities(self) -> LayerValues:
        """What the softmax makes of each layer's scores, `[sequences, heads, queries, keys]`: the point `pattern`."""
        return self._values("attention_probabilities")

    @property
    def attn_probs_available(self) -> bool:
        """Whether some layer has attention probabilities."""
        return any(refusal is None for refusal in self.attention_probabilities.refusals())

    @property
    def mlps(self) -> LayerModules:
        """The MLP of each layer, or its mixture of experts."""
        return LayerModules(self, "mlps", MODULES["mlps"])

    @property
    def mlps_input(self) -> LayerValues:
        """What each MLP is given, `[sequences, tokens, hidden]`: behind a norm where one is before it."""
        return self._values("mlps_input")

    @property
    def mlps_output(self) -> LayerValues:
        """The hidden states that each MLP gives, `[sequences, tokens, hidden]`, also where it returns more than these.

        It is what the layer adds to the residual, but for a norm or a factor of which `model.layers[i].points` tells.
        """
        return self._values("mlps_output")

    @property
    def attention_mask(self) -> Any:
        """`[sequences, longest]`, 1 where the left-padded view has a token, int64; read only."""
        return self._tracer("attention_mask", "").mask.long()

    @property
    def input_size(self) -> tuple[int, ...]:
        """How many prompts there are and how many tokens the longest has."""
        return tuple(self.input_ids.shape)

    @property
    def next_token_probs(self) -> Any:
        """The softmax of each prompt's last logits, `[sequences, vocabulary]`; read only."""
        return self.logits[:, -1].softmax(-1)

    @property
    def num_layers(self) -> int:
        """Decoder layers."""
        return len(self.standard["layers"])

    @property
    def num_heads(self) -> Any:
        """Query heads of a layer: one number, or a list of one a layer where they differ."""
        return self._fact("num_heads")

    @property
    def num_kv_heads(self) -> Any:
        """Heads of keys and values: one number, or a list of one a layer where they differ."""
        return self._fact("num_kv_heads")

    @property
    def head_dim(self) -> Any:
        """Features of a head: one number, or a list of one a layer where they differ.

        Raises GraphError where a head's queries and its values have different ones.
        """
        return self._fact("head_dim")

    @property
    def hidden_size(self) -> int:
        """Features of the residual stream."""
        return self.description.hidden_size

    @property
    def vocab_size(self) -> Any:
        """Logits that a token has."""
        is_told = any(info.name == "vocab_size" for info in self.description.facts)
        return self._fact("vocab_size") if is_told else self.description.vocab_size

    def project_on_vocab(self, hidden: Any) -> Any:
        """`[..., vocabulary]`: the final norm and the head on hidden states `[..., hidden]` of a trace or of one's own.

        Without what a family does to logits behind its head (Gemma 2's soft-cap).
        """
        return self.standard["lm_head"](self.standard["ln_final"](hidden))

    def skip_layer(self, layer: int, skip_with: Any = None) -> None:
        """The layer is not run: it gives what it takes, or `skip_with`, `[sequences, tokens, hidden]`."""
        self.skip_layers(layer, layer, skip_with)

    def skip_layers(self, start_layer: int, end_layer: int, skip_with: Any = None) -> None:
        """The layers from `start_layer` to `end_layer`, both included, are not run: they give what the first takes.

        Or `skip_with`, `[sequences, tokens, hidden]`. See `Module.skip`.
        """
        first, last = (numbers_of(self.layers_output, place)[0] for place in (start_layer, end_layer))
        if last < first:
            raise GraphError(f"there are no layers from {start_layer} to {end_layer}", where=user_line())
        given = self.layers_input[first] if skip_with is None else skip_with
        for layer in list(self.standard["layers"])[first : last + 1]:
            skip_layer(layer._port("output"), given)

    def steer(
        self,
        layers: Any,
        steering_vector: Any,
        factor: Any = 1.0,
        positions: Any = None,
        token_positions: Any = None,
        batch_index: Any = None,
    ) -> None:
        """Adds `factor * steering_vector` `[hidden]` to what layers give, at all tokens or at some.

        `layers`: an int, several, a slice, or None for all. `positions`, which may be called `token_positions` too: an
        int or several, counted in each prompt without its pads, negative from its end. `batch_index`: of which prompts,
        an int or several; beside several positions the first prompt goes with the first position, and so on.
        """
        if positions is not None and token_positions is not None:
            raise GraphError("positions and token_positions are one thing: give one of them", where=user_line())
        places = _plain(token_positions if positions is None else positions)
        prompts = _plain(batch_index)
        for layer in sorted(numbers_of(self.layers_output, layers)):
            value = self.layers_output[layer]
            if prompts is None:
                place = value if places is None else value.at(places)
                place += factor * steering_vector
            else:
                lengths = self._tracer("steer", "").view_lengths
                value[prompt_index(lengths, prompts, places)] += factor * steering_vector

    def get_topk_closest_tokens(self, hidden_state: Any, k: int = 5) -> Any:
        """The tokens that hidden states `[hidden]` or `[number, hidden]` of one's own are closest to, and how likely.

        A dict `{token: probability}`, most likely first, or a list of them. The projection runs where the model is;
        only `k` numbers a row come back. Raises GraphError for a value of a trace: `project_on_vocab` is for these.
        """
        if is_recorded(hidden_state):
            raise GraphError(
                "get_topk_closest_tokens takes a tensor of your own; of a trace's value take "
                "model.project_on_vocab(value).softmax(-1).topk(k) and save that",
                where=user_line(),
            )
        if len(hidden_state.shape) not in (1, 2) or hidden_state.shape[-1] != self.hidden_size:
            raise GraphError(
                f"hidden states are [{self.hidden_size}] or [number, {self.hidden_size}], not "
                f"{list(hidden_state.shape)}",
                where=user_line(),
            )
        if self.tokenizer is None:
            raise GraphError(
                "this model came without a tokenizer, so its tokens have no texts: in a trace take "
                "model.project_on_vocab(hidden).softmax(-1).topk(k), whose indices are ids",
                where=user_line(),
            )
        with self.trace():
            found = self.project_on_vocab(hidden_state).softmax(-1).topk(k)
            probabilities, tokens = found[0].save(), found[1].save()
        if len(hidden_state.shape) == 1:
            return self.probs_to_dict(tokens, probabilities)
        return [self.probs_to_dict(*row) for row in zip(tokens, probabilities, strict=True)]

    def probs_to_dict(self, tokens: Any, probs: Any) -> dict[str, float]:
        """`{token: probability}` of ids and their probabilities, in their order; tokens as the vocabulary has them."""
        texts = (self.tokenizer.id_to_token(int(token)) for token in tokens)
        return {text: float(probability) for text, probability in zip(texts, probs, strict=True)}

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _INSTEAD:
            told = _INSTEAD[name].format(name=name)
            raise GraphError(f"model.{name} cannot be set: {told}", where=user_line())
        super().__setattr__(name, value)

    def __repr__(self) -> str:
        names = repr(self.standard).replace("\n", "\n  ")
        return f"{super().__repr__()}\nstandard names:\n  {names}"

    def _values(self, name: str) -> LayerValues:
        return LayerValues(self, name, VALUES[name])

    def _fact(self, name: str) -> int | list[int]:
        info = next((info for info in self.description.facts if info.name == name), None)
        if info is None or info.refusal is not None:
            told = "the service that describes this model does not tell" if info is None else info.refusal
            raise GraphError(f"this model has no {name}: {told}", where=user_line())
        return info.values[0] if len(info.values) == 1 else list(info.values)


def _plain(numbers: Any) -> Any:
    """A tensor of integers as these."""
    return numbers.tolist() if hasattr(numbers, "tolist") else numbers


class StandardNames(Mapping[str, Module]):
    """The modules that every decoder has by their standard names."""

    def __init__(self, model: StandardModel) -> None:
        self._model = model

    def __getitem__(self, name: str) -> Module:
        table = self._model._table
        if name not in table.standard:
            told = table.description.not_standard.get(name, "it is none of " + ", ".join(table.standard))
            raise NoSuchNameError(f"this model has no {name}: {told}", where=user_line())
        return self._model.get_submodule(table.standard[name])

    def __contains__(self, name: object) -> bool:
        return name in self._model._table.standard

    def __iter__(self) -> Iterator[str]:
        return iter(self._model._table.standard)

    def __len__(self) -> int:
        return len(self._model._table.standard)

    def __repr__(self) -> str:
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        model, table = self._model, self._model._table
        for name, path in table.standard.items():
            own = name if name in table.children.get("", ()) else path
            told = "" if own == path else f"; model.{name} is a module of its own: write model.standard[{name!r}]"
            yield f"{name}: {path}{told}"
        yield from (f"{name}: not here, {why}" for name, why in table.description.not_standard.items())
        for name, part in MODULES.items():
            yield from LayerModules(model, name, part).lines()
        for name, point in VALUES.items():
            yield from LayerValues(model, name, point).lines()
        yield ", ".join((*ROOT_VALUES, "attention_mask", "next_token_probs"))
        for name in FACTS:
            try:
                yield f"{name}: {getattr(model, name)}"
            except GraphError as refused:
                yield f"{name}: not here, {str(refused).partition(': ')[2]}"
