"""Scores the shipped tinyworld on what its training held out.

    python -m bench.tinyworld.evaluate            # prints the scores and writes them into model/scores.json

An answer counts only if every one of its tokens is the model's first choice over the whole vocabulary, the earlier ones
given. Sets and seeds are fixed, so the figures repeat; nothing here changes the model.
"""

import json
import random
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from bench.tinyworld import FOLDER, corpus
from bench.tinyworld.corpus import BOS, NUM_SPECIAL, Sentence

# N = sequences, T = tokens, L = layers, H = query heads, V = vocabulary

_NUM_SAMPLES = 1000
_SEED = 1234


@dataclass(frozen=True, slots=True, kw_only=True)
class InductionHead:
    """The head that most looks for what came after the last time, and how much, from 0 to 1."""

    layer: int
    head: int
    score: float
    second_score: float  # the next best head's


def load(folder: Path = FOLDER) -> tuple[PreTrainedModel, Tokenizer]:
    """The model in float32 on the CPU, in eval mode, and its tokenizer."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval(), load_tokenizer(folder)


def load_tokenizer(folder: Path = FOLDER) -> Tokenizer:
    """The tokenizer without transformers. It puts `<bos>` first unless told `add_special_tokens=False`."""
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


@torch.inference_mode()
def accuracy(model: PreTrainedModel, tokenizer: Tokenizer, sentences: Iterable[Sentence], batch: int = 64) -> float:
    """The share of sentences whose whole answer the model would have written, greedily, after the prompt."""
    rows = [
        (tokenizer.encode(s.prompt).ids, tokenizer.encode(s.answer, add_special_tokens=False).ids) for s in sentences
    ]
    rows.sort(key=lambda row: len(row[0]) + len(row[1]))
    num_right = 0
    for start in range(0, len(rows), batch):
        part = rows[start : start + batch]
        longest = max(len(prompt) + len(answer) for prompt, answer in part)
        # Padding stands at the right, where a causal model cannot see it from any answer.
        ids_NT = torch.tensor([(p + a + [0] * longest)[:longest] for p, a in part])
        best_NT = model(input_ids=ids_NT, use_cache=False).logits.argmax(-1)
        for n, (prompt, answer) in enumerate(part):
            num_right += best_NT[n, len(prompt) - 1 : len(prompt) - 1 + len(answer)].tolist() == answer
    return num_right / len(rows)


def repeated_tokens(vocab_size: int, *, num_rows: int, length: int, seed: int = _SEED) -> Tensor:
    """`<bos>` and then `length` random tokens, none twice, said two times: int64 `[num_rows, 1 + 2 * length]`."""
    rng = random.Random(seed)
    halves = [rng.sample(range(NUM_SPECIAL, vocab_size), length) for _ in range(num_rows)]
    return torch.tensor([[BOS, *half, *half] for half in halves])


@torch.inference_mode()
def induction_scores(model: PreTrainedModel, *, num_rows: int = 64, length: int = 24) -> Tensor:
    """How much each head attends from a token's second occurrence to the token after its first: means, `[L, H]`.

    The model is left with its eager attention, the one that can say where it looks.
    """
    model.set_attn_implementation("eager")
    ids_NT = repeated_tokens(model.config.vocab_size, num_rows=num_rows, length=length)
    patterns = model(input_ids=ids_NT, use_cache=False, output_attentions=True).attentions
    seconds = torch.arange(1 + length, 1 + 2 * length)
    return torch.stack([layer[:, :, seconds, seconds - length + 1].mean((0, 2)) for layer in patterns])


def induction_head(scores_LH: Tensor) -> InductionHead:
    best, second = scores_LH.flatten().topk(2).indices.tolist()
    layer, head = divmod(best, scores_LH.shape[1])
    flat = scores_LH.flatten()
    return InductionHead(
        layer=layer, head=head, score=round(flat[best].item(), 4), second_score=round(flat[second].item(), 4)
    )


@torch.inference_mode()
def repeat_accuracy(model: PreTrainedModel, *, num_rows: int = 64, length: int = 24) -> float:
    """The share of tokens of the second half, from its second on, that the model foresees."""
    ids_NT = repeated_tokens(model.config.vocab_size, num_rows=num_rows, length=length)
    best_NT = model(input_ids=ids_NT, use_cache=False).logits.argmax(-1)
    return float((best_NT[:, length + 1 : -1] == ids_NT[:, length + 2 :]).float().mean())


def held_out_scores(model: PreTrainedModel, tokenizer: Tokenizer, *, num_samples: int = _NUM_SAMPLES) -> dict[str, Any]:
    """Every score of the model card. `num_samples` sentences are drawn for each set that is not listed in full."""
    facts = list(corpus.held_out_facts())
    if num_samples < _NUM_SAMPLES:
        facts = random.Random(_SEED).sample(facts, num_samples)
    relations = sorted({name for name, _ in facts})
    by_relation = {name: [sentence for relation, sentence in facts if relation == name] for name in relations}

    def score(sentences: Iterable[Sentence]) -> float:
        return round(accuracy(model, tokenizer, sentences), 4)

    return {
        "facts_held_out_phrasings": score(sentence for _, sentence in facts),
        "facts_by_relation": {name: score(sentences) for name, sentences in by_relation.items()},
        "indirect_object_held_out_names": score(_draw(num_samples)),
        "indirect_object_held_out_names_and_frames": score(_draw(num_samples, is_new_frame=True)),
        "sums_held_out_pairs": score(corpus.held_out_sums()),
        "repeated_tokens": round(repeat_accuracy(model), 4),
    }


def score_folder(folder: Path) -> dict[str, Any]:
    """Scores the model as it lies in `folder`, and keeps what its `scores.json` says of the training."""
    path = folder / "scores.json"
    record: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    model, tokenizer = load(folder)
    record["held_out"] = held_out_scores(model, tokenizer)
    record["parameters"] = model.num_parameters()
    record["induction_head"] = asdict(induction_head(induction_scores(model)))
    path.write_text(json.dumps(record, indent=2) + "\n")
    return record


def _draw(num_samples: int, *, is_new_frame: bool = False) -> Sequence[Sentence]:
    rng = random.Random(_SEED)
    return [corpus.held_out_indirect_object(rng, is_new_frame=is_new_frame) for _ in range(num_samples)]


if __name__ == "__main__":
    print(json.dumps(score_folder(FOLDER), indent=2))
