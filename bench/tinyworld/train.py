"""Makes tinyworld: corpus, tokenizer, weights, scores.

    python -m bench.tinyworld.train                       # writes bench/tinyworld/model, about half an hour on 2 cores
    python -m bench.tinyworld.train --folder /tmp/again   # somewhere else

The model is an unmodified `LlamaForCausalLM`. Documents are packed into rows with their positions counted from 0, which
transformers reads as "attend inside your own document only". The same seed, library versions and thread count give
the same data in the same order; sums of floats may still differ between processors.
"""

import argparse
import itertools
import json
import platform
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import tokenizers
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from bench.tinyworld import FOLDER, corpus, evaluate
from bench.tinyworld.beginning import start_close_to_copying
from bench.tinyworld.corpus import BOS, EOS, NUM_SPECIAL, PAD, SPECIAL_TOKENS

# N = rows, T = tokens of a row, V = vocabulary


@dataclass(frozen=True, slots=True, kw_only=True)
class Phase:
    """A stretch of training with optimizers and a rate of its own."""

    steps: int
    matrix_rate: float  # Muon's highest, scaled to match AdamW's updates
    table_rate: float  # AdamW's highest
    warmup_steps: int
    decay_share: float  # of the steps, at the end, the rate falls linearly to zero
    repeat_share: float  # of the documents are random tokens said several times
    practice_share: float = (
        0.0  # of the other documents are one indirect-object sentence, mostly with any token for a name
    )
    long_share: float = 0.0  # of the steps, at the end, have long rows, so that late positions are trained too


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """Everything that decides what comes out, apart from library versions."""

    seed: int = 20
    vocab_size: int = 3200
    hidden_size: int = 256
    intermediate_size: int = 448
    num_layers: int = 8
    num_heads: int = 8
    num_key_value_heads: int = 4
    max_positions: int = 512
    batch_tokens: int = 2048
    row_tokens: int = 128
    long_row_tokens: int = 512
    weight_decay: float = 0.05
    answer_weight: float = 3.0  # of an answer's tokens in the loss, where other tokens have 1
    practice_answer_weight: float = 8.0  # the same in sentences to practise with
    num_threads: int = 2  # the order of sums depends on it
    phases: tuple[Phase, ...] = (
        Phase(
            steps=1300,
            matrix_rate=3e-3,
            table_rate=2e-3,
            warmup_steps=60,
            decay_share=0.4,
            repeat_share=0.15,
            long_share=0.08,
        ),
        # Who received is learned by heart for the names of the corpus, until any token may be a name.
        Phase(
            steps=400,
            matrix_rate=3e-3,
            table_rate=1e-3,
            warmup_steps=20,
            decay_share=0.5,
            repeat_share=0.1,
            practice_share=0.6,
        ),
        Phase(
            steps=160,
            matrix_rate=1.5e-3,
            table_rate=1e-3,
            warmup_steps=10,
            decay_share=0.8,
            repeat_share=0.08,
            practice_share=0.45,
        ),
    )


class Document(NamedTuple):
    """Token ids from `<bos>` on, and the weight of each as something to be foreseen."""

    ids: list[int]
    weights: list[float]


def train_tokenizer(recipe: Recipe) -> Tokenizer:
    """A byte-level BPE that reads any text and spells the corpus' own words in few tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=recipe.vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    rng = random.Random(recipe.seed)
    sentences = (corpus.sentence(rng).text for _ in range(60_000))
    # Names of places and people are rare in the sentences; said often, they become words rather than syllables.
    tokenizer.train_from_iterator(itertools.chain(sentences, list(corpus.topics()) * 150), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A <bos> $B", special_tokens=[("<bos>", BOS)]
    )
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=SPECIAL_TOKENS[BOS],
        eos_token=SPECIAL_TOKENS[EOS],
        pad_token=SPECIAL_TOKENS[PAD],
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=512,
    )
    wrapped.save_pretrained(folder)


def new_model(recipe: Recipe) -> LlamaForCausalLM:
    torch.manual_seed(recipe.seed)
    config = LlamaConfig(
        vocab_size=recipe.vocab_size,
        hidden_size=recipe.hidden_size,
        intermediate_size=recipe.intermediate_size,
        num_hidden_layers=recipe.num_layers,
        num_attention_heads=recipe.num_heads,
        num_key_value_heads=recipe.num_key_value_heads,
        max_position_embeddings=recipe.max_positions,
        tie_word_embeddings=False,
        bos_token_id=BOS,
        eos_token_id=EOS,
        pad_token_id=PAD,
    )
    model = LlamaForCausalLM(config)
    start_close_to_copying(model, recipe.seed)
    return model


class Reader:
    """Draws documents and packs them into batches."""

    def __init__(self, recipe: Recipe, tokenizer: Tokenizer, seed: int) -> None:
        self._recipe = recipe
        self._tokenizer = tokenizer
        self._rng = random.Random(seed)
        self._names = [self._name(name) for name in corpus.NAMES]
        held_out = {self._name(name) for name in corpus.HELD_OUT_NAMES}
        self._stand_ins = [token for token in range(NUM_SPECIAL, recipe.vocab_size) if token not in held_out]

    def batch(self, row_tokens: int, phase: Phase) -> tuple[Tensor, Tensor, Tensor]:
        """Ids, positions within the document, and loss weights, each `[N, T]`. Documents are cut at the row's end."""
        ids, positions, weights = [], [], []
        for _ in range(self._recipe.batch_tokens // row_tokens):
            row = Document([], [])
            row_positions: list[int] = []
            while len(row.ids) < row_tokens:
                document = self._document(row_tokens, phase)
                row.ids.extend(document.ids)
                row.weights.extend(document.weights)
                row_positions.extend(range(len(document.ids)))
            ids.append(row.ids[:row_tokens])
            weights.append(row.weights[:row_tokens])
            positions.append(row_positions[:row_tokens])
        return torch.tensor(ids), torch.tensor(positions), torch.tensor(weights)

    def _document(self, row_tokens: int, phase: Phase) -> Document:
        if self._rng.random() < phase.repeat_share:
            return self._repeat(row_tokens)
        if phase.practice_share and self._rng.random() < phase.practice_share:
            return self._practice()
        return self._text(row_tokens)

    def _name(self, name: str) -> int:
        """The first token of a name inside a sentence, which is the whole name."""
        return int(self._tokenizer.encode(f" {name}", add_special_tokens=False).ids[0])

    def _practice(self) -> Document:
        """One indirect-object sentence. In three of four any token but a held-out name may stand for a name."""
        document = Document([BOS], [0.0])
        sentence = corpus.training_indirect_object(self._rng)
        stand_ins: dict[int, int] = {}
        if self._rng.random() < 0.75:
            stand_ins = dict(zip(self._names, self._rng.sample(self._stand_ins, len(self._names)), strict=True))
        self._add(document, sentence.prompt, 1.0, stand_ins)
        self._add(document, sentence.answer, self._recipe.practice_answer_weight, stand_ins)
        self._add(document, sentence.rest, 1.0, stand_ins)
        document.ids.append(EOS)
        document.weights.append(1.0)
        return document

    def _add(self, document: Document, text: str, weight: float, stand_ins: Mapping[int, int]) -> None:
        ids = self._tokenizer.encode(text, add_special_tokens=False).ids
        document.ids.extend(stand_ins.get(token, token) for token in ids)
        document.weights.extend([weight] * len(ids))

    def _repeat(self, most_tokens: int) -> Document:
        """Random tokens said again and again. The first time nobody could foresee them, so they weigh nothing.

        Many are short and said often, and half are of names only: copying is learned there first, and then
        holds for the long ones. Without that, a run of this size ends before it has begun to copy.
        """
        is_short = self._rng.random() < 0.75
        length = self._rng.randint(2, 12 if is_short else most_tokens // 2 - 1)
        times = max(2, min(8, 64 // length)) if is_short else 2
        is_names = is_short and self._rng.random() < 0.5
        choices: Sequence[int] = self._names if is_names else range(NUM_SPECIAL, self._recipe.vocab_size)
        once = self._rng.sample(choices, length)
        unseen = length + 1
        return Document([BOS, *once * times], [0.0] * (unseen + 1) + [1.0] * (length * times - unseen))

    def _text(self, most_tokens: int) -> Document:
        document = Document([BOS], [0.0])
        is_long = most_tokens > self._recipe.row_tokens and self._rng.random() < 0.3
        while True:
            sentence = corpus.sentence(self._rng)
            space = " " if len(document.ids) > 1 else ""
            self._add(document, space + sentence.prompt, 1.0, {})
            self._add(document, sentence.answer, self._recipe.answer_weight, {})
            self._add(document, sentence.rest, 1.0, {})
            if len(document.ids) > most_tokens - 32 or self._rng.random() < (0.04 if is_long else 0.5):
                document.ids.append(EOS)
                document.weights.append(1.0)
                return document


def rate_share(phase: Phase, step: int) -> float:
    """The learning rate as a share of its highest: rises, stays, falls to zero."""
    rise = (step + 1) / phase.warmup_steps
    fall = (phase.steps - step) / (phase.decay_share * phase.steps)
    return min(1.0, rise, fall)


def train(recipe: Recipe, folder: Path, *, score_every: int = 200) -> None:
    """Runs the whole recipe into `folder`, printing a line every 20 steps."""
    torch.set_num_threads(recipe.num_threads)
    started = time.monotonic()
    folder.mkdir(parents=True, exist_ok=True)
    # 1) the tokenizer
    tokenizer = train_tokenizer(recipe)
    save_tokenizer(tokenizer, folder)
    # 2) the model
    model = new_model(recipe)
    # 3) the steps, phase by phase
    for number, phase in enumerate(recipe.phases):
        optimizers = _optimizers(recipe, phase, model)
        reader = Reader(recipe, tokenizer, recipe.seed + 1 + number)
        first_long_step = round(phase.steps * (1 - phase.long_share))
        model.train()
        for step in range(phase.steps):
            for group in (group for optimizer in optimizers for group in optimizer.param_groups):
                group["lr"] = group["highest"] * rate_share(phase, step)
            row_tokens = recipe.row_tokens if step < first_long_step else recipe.long_row_tokens
            loss = _loss(model, *reader.batch(row_tokens, phase))
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            if step % 20 == 19:
                seconds = time.monotonic() - started
                print(
                    f"phase {number} step {step + 1}/{phase.steps}  loss {loss.item():.3f}  {seconds:.0f} s", flush=True
                )
            if step % score_every == score_every - 1:
                model.eval()
                print(json.dumps(evaluate.held_out_scores(model, tokenizer, num_samples=200)), flush=True)
                model.train()
    # 4) the files, and the scores of the files
    model.save_pretrained(folder)
    training = {
        "recipe": asdict(recipe),
        "tokens": sum(phase.steps for phase in recipe.phases) * recipe.batch_tokens,
        "seconds": round(time.monotonic() - started),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "tokenizers": tokenizers.__version__,
    }
    (folder / "scores.json").write_text(json.dumps({"training": training}, indent=2))
    print(json.dumps(evaluate.score_folder(folder), indent=2))


def _optimizers(recipe: Recipe, phase: Phase, model: LlamaForCausalLM) -> list[torch.optim.Optimizer]:
    """Muon for the matrices between layers (in 50 steps it got where AdamW was after 80), AdamW for the rest."""
    inner = [p for p in model.model.layers.parameters() if p.dim() == 2]
    tables = [model.model.embed_tokens.weight, model.lm_head.weight]
    gains = [p for p in model.parameters() if p.dim() == 1]
    decay = recipe.weight_decay
    matrices = {"params": inner, "highest": phase.matrix_rate}
    rest = [
        {"params": tables, "highest": phase.table_rate, "weight_decay": decay},
        {"params": gains, "highest": phase.table_rate, "weight_decay": 0.0},
    ]
    return [
        torch.optim.Muon([matrices], weight_decay=decay, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, betas=(0.9, 0.98), fused=True),
    ]


def _loss(model: LlamaForCausalLM, ids_NT: Tensor, positions_NT: Tensor, weights_NT: Tensor) -> Tensor:
    """The weighted mean cross entropy of each token after the first of its document."""
    with torch.autocast("cpu", torch.bfloat16):
        logits_NTV = model(input_ids=ids_NT, position_ids=positions_NT, use_cache=False).logits
    per_token = functional.cross_entropy(
        logits_NTV[:, :-1].flatten(0, 1).float(), ids_NT[:, 1:].flatten(), reduction="none"
    )
    weights = weights_NT[:, 1:].flatten()
    return (per_token * weights).sum() / weights.sum()


def main() -> None:
    parser = argparse.ArgumentParser(description="Makes tinyworld.")
    parser.add_argument("--folder", type=Path, default=FOLDER)
    train(Recipe(), parser.parse_args().folder)


if __name__ == "__main__":
    main()
