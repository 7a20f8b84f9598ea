"""The object-attention lens: at one position attention finds another prompt's last token, in a few layers on end."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from polytrace import functions
from polytrace.errors import GraphError
from polytrace.lines import user_line
from polytrace.methods.patchscopes import Scope, next_tokens, scope_of
from polytrace.methods.places import check_top_k, layers_of, position_in, prompts_of, token_ids
from polytrace.methods.unembedding import behind_head, prepare_unembedding

if TYPE_CHECKING:
    from polytrace.model import Model


def object_attention_lens(
    model: Model,
    prompts: Any,
    sources: Any,
    position: int,
    layers: Any = None,
    *,
    window: int = 5,
    source_position: int = -1,
    top_k: int = 5,
    tokens: Any = None,
) -> Scope:
    """From each layer on, for `window` layers, what attention is given at `position` is what it is given in a source.

    That is `patch_object_attn_lens` of nnterp (Dumas): in layers `l` to `l + window - 1` the input of the attention
    module (behind its norm) at the prompt's `position` is that of the source's `source_position` in the same layer. So
    these layers' keys and values there are the source's, and what later tokens find out about the object is what the
    source knows; the residual itself, and what the MLP is given, stay. (nnterp changes the norm's output in place, so
    that in families whose attention and MLP share one norm the MLP's input changes too; here it never does.)

    `prompts` and `sources`: as many of each, or one source for all. What comes back is the next token of each prompt,
    prompt x layer x rank, `layer` being the first one. One request: a prompt times a layer is an invoke.
    """
    where = user_line()
    asked, given = prompts_of(model, prompts), prompts_of(model, sources)
    if len(given) not in (1, len(asked)):
        raise GraphError(f"{len(given)} sources do not fit {len(asked)} prompts: give one, or one each", where=where)
    if not isinstance(window, int) or window < 1:
        raise GraphError(f"window is a number of layers, not {window!r}", where=where)
    for batch, place in ((asked, position), (given, source_position)):
        for prompt in range(len(batch)):
            position_in(batch, prompt, place)
    numbers, count = layers_of(model, layers), len(model.layers)
    ids = None if tokens is None else token_ids(model, tokens)
    top_k = check_top_k(model, top_k) if ids is None else 0
    touched = sorted({n for first in numbers for n in range(first, min(count, first + window))})
    prepare_unembedding(model)
    found: list[dict[int, Any]] = []
    read = []
    with model.trace() as tracer:
        for sequence in given.sequences:
            with tracer.invoke([list(sequence)]):
                found.append({n: model.attentions_input[n][:, source_position] for n in touched})
        for row, sequence in enumerate(asked.sequences):
            states = found[row if len(found) > 1 else 0]
            for first in numbers:
                with tracer.invoke([list(sequence)]):
                    for number in range(first, min(count, first + window)):
                        changed = model.attentions_input[number].clone()
                        changed[:, position] = states[number]
                        model.attentions_input[number] = changed
                    read.append(next_tokens(behind_head(model, model.lm_head.output[:, -1]), top_k, ids))
        saved = [functions.cat(list(part)).save() for part in zip(*read, strict=True)]
    return scope_of(model, asked, {"prompt": None, "layer": numbers}, saved, ids, (tracer.receipt,))
