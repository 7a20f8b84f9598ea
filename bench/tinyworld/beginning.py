"""Where training begins: random weights, but for two heads that already copy, roughly.

Induction needs two heads that are useless without each other (one looks at the token before, one finds where the
present token stood before), so a small model finds them late, after far more tokens than this recipe spends. Here both
are put in by hand, crudely, and then trained with everything else; nothing of them is kept fixed. Untrained, the model
names the next token of a repeated random sequence about two times in three.

The construction: all embeddings share an offset, on which queries and keys that only depend on distance are built, in
the fastest rotary pairs; the token before is written into a part of the stream that no embedding uses; the second head
compares it with the present token in the slowest pairs, and what it passes on is turned as the output table is turned.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaForCausalLM

# V = vocabulary, D = hidden, C = head dimension, K = dimensions of a token's code

_CODE = 20  # dimensions by which tokens are told apart
_FAST_PAIRS = 5
_FIRST_SLOW_PAIR = 6
_EMBEDDING_NORM = 3.0
_PREVIOUS_TOKEN_SCORE = 7.0  # a query's product with the key one before, per rotary pair
_MATCH_GAIN = 7.5  # of queries and keys each, where codes of norm about 1 are compared


@torch.no_grad()
def start_close_to_copying(model: LlamaForCausalLM, seed: int) -> None:
    """Sets embeddings, output table and two heads, and makes everything else small, in place."""
    config: Any = model.config
    hidden, size = config.hidden_size, config.hidden_size // config.num_attention_heads
    generator = torch.Generator().manual_seed(seed)
    basis_DD = torch.linalg.qr(torch.randn(hidden, hidden, generator=generator))[0].T
    offset_D, code_KD = basis_DD[0], basis_DD[1 : 1 + _CODE]
    before_KD, rest_XD = basis_DD[1 + _CODE : 1 + 2 * _CODE], basis_DD[1 + 2 * _CODE :]
    # 1) tokens: unit vectors outside the offset and outside the part that is kept for the token before
    table_VD = torch.randn(config.vocab_size, hidden, generator=generator)
    table_VD = table_VD - table_VD @ offset_D[:, None] * offset_D[None]
    table_VD = table_VD - (table_VD @ before_KD.T) @ before_KD
    table_VD = table_VD / table_VD.norm(dim=1, keepdim=True)
    model.model.embed_tokens.weight.copy_(table_VD * _EMBEDDING_NORM + offset_D * _EMBEDDING_NORM)
    turn_DD = torch.linalg.qr(torch.randn(hidden, hidden, generator=generator))[0]
    model.lm_head.weight.copy_(table_VD @ turn_DD.T * 0.3)
    # 2) what every layer adds is small at first
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.mul_(0.2)
        layer.mlp.down_proj.weight.mul_(0.2)
    # 3) the two heads
    _look_one_back(model, offset_D, code_KD, before_KD, size)
    _find_the_same_token(model, code_KD, before_KD, rest_XD[:size], turn_DD, size)


def _look_one_back(model: LlamaForCausalLM, offset_D: Tensor, code_KD: Tensor, before_KD: Tensor, size: int) -> None:
    """Layer 0, head 0: attends to the token before and writes its code."""
    config: Any = model.config
    attention = model.model.layers[0].self_attn
    hidden, half = config.hidden_size, size // 2
    norm = math.sqrt(hidden) / math.sqrt(2)  # of the normalised stream along a token, and along the offset
    angles = config.rope_parameters["rope_theta"] ** (-torch.arange(half) / half)
    strength = torch.tensor(math.sqrt(_PREVIOUS_TOKEN_SCORE * math.sqrt(size)) / norm)
    query_CD, key_CD = torch.zeros(size, hidden), torch.zeros(size, hidden)
    for pair in range(_FAST_PAIRS):
        query_CD[pair] = strength * math.cos(-angles[pair]) * offset_D
        query_CD[pair + half] = strength * math.sin(-angles[pair]) * offset_D
        key_CD[pair] = strength * offset_D
    attention.q_proj.weight[:size] = query_CD
    attention.k_proj.weight[:size] = key_CD
    heads_a_group = config.num_attention_heads // config.num_key_value_heads
    attention.q_proj.weight[size : heads_a_group * size].mul_(0.3)  # the heads that share this key
    value_CD, output_DC = torch.zeros(size, hidden), torch.zeros(hidden, size)
    value_CD[:_CODE] = code_KD / norm
    output_DC[:, :_CODE] = before_KD.T * _EMBEDDING_NORM * math.sqrt(hidden / _CODE) * 0.7
    attention.v_proj.weight[:size] = value_CD
    attention.o_proj.weight[:, :size] = output_DC


def _find_the_same_token(
    model: LlamaForCausalLM, code_KD: Tensor, before_KD: Tensor, copied_CD: Tensor, turn_DD: Tensor, size: int
) -> None:
    """Layer 1, head 0: attends to where the token before was the present one, and votes for the token there."""
    attention = model.model.layers[1].self_attn
    hidden, half = copied_CD.shape[1], size // 2
    norm = math.sqrt(hidden) / math.sqrt(2 + 0.5)
    slow = list(range(_FIRST_SLOW_PAIR, half))
    query_CD, key_CD = torch.zeros(size, hidden), torch.zeros(size, hidden)
    for place, channel in enumerate(slow + [pair + half for pair in slow]):
        query_CD[channel] = code_KD[place] * math.sqrt(hidden / _CODE) / norm * _MATCH_GAIN
        key_CD[channel] = before_KD[place] / 0.7 / norm * _MATCH_GAIN
    attention.q_proj.weight[:size] = query_CD
    attention.k_proj.weight[:size] = key_CD
    attention.v_proj.weight[:size] = copied_CD / norm
    attention.o_proj.weight[:, :size] = turn_DD @ copied_CD.T * _EMBEDDING_NORM * 1.5 * math.sqrt(hidden / size)
