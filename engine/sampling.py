"""From logits to tokens, and how likely tokens were.

Owns what a token is drawn from and the draw. Scores are processed as transformers' `generate` processes them, in its
order and in float32, with its bits. What is drawn depends on the row's logits and on (seed, place, step) alone: each
draw's number is hashed from these, whatever the device, and no row looks at another.

Rows with equal settings are processed together; where all take the likeliest token it is one reduction over the
logits. Nothing here waits for a GPU.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from engine.copies import to_device
from polytrace.graph import Sampling

# K = sequences to draw for, V = vocabulary, C = likeliest tokens that are told

NO_TOKEN = -1  # of a row whose logits say nothing: one is NaN, all are -inf, or one is +inf where tokens are drawn
_LIKELIEST = Sampling()
_WHOLE = 2.0**51  # float64 adds whole numbers up to here exactly, in any order


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawing:
    """Sequences of one invoke whose next tokens are drawn, each a row of the logits."""

    sampling: Sampling
    places: Sequence[int]  # each sequence's in its invoke
    step: int
    histories: Sequence[Sequence[int]] = ()  # each one's prompt and new tokens; read for the repetition penalty alone


@dataclass(frozen=True, slots=True, kw_only=True)
class Likelihoods:
    """Natural logarithms of probabilities, float32, on the logits' device."""

    chosen_K: Tensor
    likeliest_KC: Tensor  # descending
    tokens_KC: Tensor  # whose these are, int64


def draw_tokens(logits_KV: Tensor, drawings: Sequence[Drawing]) -> Tensor:
    """The next token of each row, `[K]` int64 on the logits' device; `NO_TOKEN` where logits say nothing.

    Rows are those of the drawings, one after another. The likeliest token is the first of equals.
    """
    logits_KV = logits_KV.detach()  # a token is no function of logits that has gradients
    groups: dict[Sampling, list[tuple[int, Drawing]]] = {}
    start = 0
    for drawing in drawings:
        groups.setdefault(_settings(drawing.sampling), []).append((start, drawing))
        start += len(drawing.places)
    if len(groups) == 1:
        (settings,) = groups
        return _draw(logits_KV, settings, drawings)
    tokens_K = torch.empty(len(logits_KV), dtype=torch.int64, device=logits_KV.device)
    for settings, members in groups.items():
        rows = to_device([start + row for start, one in members for row in range(len(one.places))], logits_KV.device)
        drawn = _draw(logits_KV.index_select(0, rows), settings, [one for _, one in members])
        tokens_K.index_copy_(0, rows, drawn)
    return tokens_K


def log_likelihoods(logits_KV: Tensor, tokens_K: Tensor, count: int) -> Likelihoods:
    """How likely tokens, and the `count` likeliest, were by the model: `log_softmax` of its logits in float32.

    So temperature, penalties and cuts have no part in it (as of OpenAI's and vLLM's figures), but a graph's writes to
    the logits have. The tokens are those that their sequences go on with, whoever chose them.
    """
    logs_KV = logits_KV.detach().float().log_softmax(-1)
    likeliest = logs_KV.topk(min(count, logs_KV.shape[-1]))
    chosen_K = logs_KV.gather(1, tokens_K[:, None]).squeeze(1)
    return Likelihoods(chosen_K=chosen_K, likeliest_KC=likeliest.values, tokens_KC=likeliest.indices)


def process(scores_KV: Tensor, sampling: Sampling, histories: Sequence[Sequence[int]] = ()) -> Tensor:
    """Scores that tokens are drawn from, float32, as transformers' processors make them of logits."""
    scores_KV = scores_KV.float()
    if sampling.repetition_penalty != 1:
        scores_KV = _penalise(scores_KV, sampling.repetition_penalty, histories)
    if not sampling.do_sample:
        return scores_KV
    if sampling.temperature != 1:
        scores_KV = scores_KV / sampling.temperature
    if sampling.top_k:
        worst = scores_KV.topk(min(sampling.top_k, scores_KV.shape[-1])).values[:, -1:]
        scores_KV = _without(scores_KV, scores_KV < worst)
    if sampling.top_p < 1:
        tail = _tail_on_cpu if scores_KV.device.type == "cpu" else _tail
        scores_KV = _without(scores_KV, tail(scores_KV, sampling.top_p))
    if sampling.min_p > 0:
        probabilities_KV = scores_KV.softmax(-1)
        largest = probabilities_KV.max(-1, keepdim=True)
        unlikely = probabilities_KV < sampling.min_p * largest.values
        scores_KV = _without(scores_KV, unlikely.scatter_(1, largest.indices, False))
    return scores_KV


def uniform(seed: int, place: int, step: int) -> float:
    """The number in [0, 1) that a sequence's token at a step is drawn by: 53 bits of a hash of these."""
    digest = hashlib.blake2b(f"token {seed} {place} {step}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) * 2.0**-53


def _settings(sampling: Sampling) -> Sampling:
    """What of it decides how scores are processed."""
    if sampling.do_sample:
        return replace(sampling, seed=0)
    return _LIKELIEST if sampling.repetition_penalty == 1 else Sampling(repetition_penalty=sampling.repetition_penalty)


def _draw(logits_KV: Tensor, settings: Sampling, drawings: Sequence[Drawing]) -> Tensor:
    histories = [history for one in drawings for history in one.histories]
    if not settings.do_sample:
        is_plain = settings.repetition_penalty == 1
        best = (logits_KV if is_plain else process(logits_KV, settings, histories)).max(-1)
        is_told = best.values > -torch.inf  # not of NaN
        return best.indices.where(is_told, NO_TOKEN)
    numbers = [uniform(one.sampling.seed, place, one.step) for one in drawings for place in one.places]
    probabilities_KV = process(logits_KV, settings, histories).softmax(-1)
    return _pick(probabilities_KV, to_device(numbers, logits_KV.device, torch.float64))


def _pick(probabilities_KV: Tensor, numbers_K: Tensor) -> Tensor:
    """The token, in their order, in which each row's share of the whole lies."""
    sums_KV = _sums(probabilities_KV)
    whole_K = sums_KV[:, -1]
    shares_K = torch.minimum(numbers_K * whole_K, whole_K.nextafter(torch.zeros_like(whole_K)))  # less, when rounded
    tokens_K = torch.searchsorted(sums_KV, shares_K[:, None], right=True).squeeze(1)
    return tokens_K.where(whole_K > 0, NO_TOKEN)


def _sums(probabilities_KV: Tensor) -> Tensor:
    """Of the probabilities up to each token, float64, with bits that do not depend on how many rows there are."""
    if probabilities_KV.device.type == "cpu":  # adds one after another
        return probabilities_KV.cumsum(-1, dtype=torch.float64)
    return (probabilities_KV.double() * _WHOLE).floor_().cumsum(-1).div_(_WHOLE)


def _penalise(scores_KV: Tensor, penalty: float, histories: Sequence[Sequence[int]]) -> Tensor:
    """Keskar et al. 2019, section 4.1: tokens that were there become less likely, once however often they were."""
    width = scores_KV.shape[-1]
    rows = [np.asarray(ids, dtype=np.int64) for ids in histories]
    places = np.concatenate([ids[ids < width] + row * width for row, ids in enumerate(rows)])
    there = to_device(torch.from_numpy(places), scores_KV.device)
    penalised = scores_KV.flatten().clone()
    own = penalised.index_select(0, there)
    penalised.index_copy_(0, there, torch.where(own < 0, own * penalty, own / penalty))
    return penalised.view_as(scores_KV)


def _without(scores_KV: Tensor, removed_KV: Tensor) -> Tensor:
    return scores_KV.masked_fill(removed_KV, -torch.inf)


def _tail(scores_KV: Tensor, top_p: float) -> Tensor:
    """Where the least likely tokens are that together have at most `1 - top_p`. Holtzman et al. 2020."""
    ascending = scores_KV.sort(-1)
    return torch.empty_like(scores_KV, dtype=torch.bool).scatter_(
        1, ascending.indices, _is_tail(ascending.values, top_p)
    )


def _tail_on_cpu(scores_KV: Tensor, top_p: float) -> Tensor:
    """The same. Numpy sorts values ten times faster; only where a tie is cut it matters what the order of places is."""
    ascending_KV = torch.from_numpy(np.sort(scores_KV.numpy(), -1))
    sizes_K = _is_tail(ascending_KV, top_p).sum(-1, keepdim=True)
    least_kept_K = ascending_KV.gather(1, sizes_K)
    removed_KV = scores_KV < least_kept_K
    is_tie_cut = (removed_KV.sum(-1, keepdim=True) != sizes_K).squeeze(1)
    if is_tie_cut.any():
        removed_KV[is_tie_cut] = _tail(scores_KV[is_tie_cut], top_p)
    return removed_KV


def _is_tail(ascending_KV: Tensor, top_p: float) -> Tensor:
    is_tail_KV = _sums(ascending_KV.softmax(-1)).float() <= 1 - top_p
    is_tail_KV[:, -1] = False
    return is_tail_KV
