"""docs/families.md: a row a class, and above them what the rows come to.

A page is made of its rows alone, so some of them can be tried anew and put among the others.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import transformers

from bench.families.configurations import classes
from bench.families.trial import Trial
from polytrace.points import DIMS

HEAD = "| class | model types | layout | standard names | without the points | stages | ranks | notes |"
_RULE = "|---|---|---|---|---|---|---|---|"
_REFUSED = "refused"
_NOTE = 240  # letters

# The classes that nnterp's repository lists as tested (nnterp/data/status.json, transformers 4.56.2, nnsight 0.5.7;
# its BloomModel is the body of BloomForCausalLM).
NNTERP = (
    *("BloomForCausalLM", "DbrxForCausalLM", "Ernie4_5_MoeForCausalLM", "GPT2LMHeadModel", "GPTBigCodeForCausalLM"),
    *("GPTJForCausalLM", "Gemma2ForCausalLM", "Gemma3ForCausalLM", "Gemma3ForConditionalGeneration"),
    *("GemmaForCausalLM", "Glm4ForCausalLM", "Glm4MoeForCausalLM", "GptOssForCausalLM", "LlamaForCausalLM"),
    *("MistralForCausalLM", "MixtralForCausalLM", "OPTForCausalLM", "Phi3ForCausalLM", "Qwen2ForCausalLM"),
    *("Qwen2MoeForCausalLM", "Qwen3ForCausalLM", "Qwen3MoeForCausalLM", "SeedOssForCausalLM", "SmolLM3ForCausalLM"),
    "StableLmForCausalLM",
)


def row(trial: Trial) -> str:
    """One line of the table."""
    missing = [name for name in DIMS if name not in trial.points]
    cells = (
        trial.name,
        ", ".join(dict.fromkeys(trial.families)),
        _layout(trial),
        ", ".join(trial.standard) if trial.is_green else "",
        (", ".join(missing) or "-") if trial.is_green else "",
        ("2" if trial.has_stages else "1") if trial.is_green else "",
        ("2" if trial.has_ranks else "1") if trial.is_green else "",
        "; ".join(_short(note) for note in trial.notes),
    )
    return f"| {' | '.join(cells)} |"


def rows_of(text: str) -> dict[str, str]:
    """The rows of a page, by class."""
    table = text.partition(_RULE + "\n")[2]
    return {line.split(" | ")[0].removeprefix("| "): line for line in table.splitlines() if line.startswith("| ")}


def page(rows: Mapping[str, str]) -> str:
    """All of it."""
    ordered = [rows[name] for name in sorted(rows, key=str.lower)]
    cells = [_cells(line) for line in ordered]
    counts = {kind: sum(own[2] == kind for own in cells) for kind in ("packed", "padded", _REFUSED)}
    green = [own for own in cells if own[2] in ("packed", "padded")]
    names = {own[0] for own in green}
    left = sorted(set(NNTERP) - names)
    untried = [name for name in classes() if name not in rows]
    served = counts["packed"] + counts["padded"]
    lines = [
        "# Model families",
        "",
        "Written by `make families`, which tries every causal language model class of transformers "
        f"({transformers.__version__}), each in a process of its own, from its default configuration made tiny, with "
        "random weights, in float32 on one thread. Not edited by hand.",
        "",
        f"Of {len(cells)} classes **{served} are served**: {counts['packed']} packed, {counts['padded']} padded. "
        f"{counts[_REFUSED]} are refused.",
        "",
        f"Of the {served}, {_yes(green, 5)} run over 2 stages and {_yes(green, 6)} over 2 ranks. Of the {len(NNTERP)} "
        f"classes that nnterp names {len(NNTERP) - len(left)} are served{f' (not {_listed(left)})' if left else ''}.",
        "",
        _ENCODERS,
        "",
        *((f"Not tried yet: {_listed(untried)}.", "") if untried else ()),
        *_LEGEND,
        "",
        HEAD,
        _RULE,
        *ordered,
        "",
    ]
    return "\n".join(lines)


_ENCODERS = (
    "Models with an encoder and a decoder (T5, mT5, UMT5, LongT5, BART, Pegasus, Marian, M2M100) are served padded, "
    "on one stage and one rank, without standard names; they are no causal language models and not in the table."
)
_LEGEND = (
    "*Served* means, each seen in the run: the first argument and the output of every module, where a trace can read",
    "them, logits among them, are plain Hugging Face's (hooks) to 1e-5 of the largest value; an edit of the first",
    "layer's output is the hook's; two prompts in one pass have, bit for bit, what they have alone; attention patterns",
    "are the model's own where it tells them, else they have no weight on later tokens and rows of at most 1.",
    "",
    "- **layout**: how a pass holds its sequences. *packed*: in one stream, with rows shared and left out; *padded*:",
    f"  each alone, in step with the others of its request. *{_REFUSED}*: the notes say why; where no tiny model could",
    "  be made the class was not tried.",
    "- **standard names**: those of the model that resolve, found by structure.",
    "- **without the points**: which of the points that have one name in every family neither a layer nor the model",
    f"  has. There are {', '.join(DIMS)}.",
    "- **stages**, **ranks**: 2 where the model split so gives the bits (stages; a note says where only the numbers),",
    "  or the numbers to 1e-5 (ranks), of one process; 1 where it does not, with the reason.",
)

_WAY_OUT = re.compile(r"[:;] use (ranks=1 and split it into stages|stages=1 and ranks) instead$")
_NAME = re.compile(r"\b\w+(ForCausalLM|LMHeadModel|ForConditionalGeneration|Decoder|LMHead) (?=has|cannot|does)")


def _layout(trial: Trial) -> str:
    if trial.is_green:
        return trial.layout or "packed"
    return _REFUSED


def _short(note: str) -> str:
    """Without the way out, which is for a service's people, and the class's name, which the row has."""
    note = _NAME.sub("", _WAY_OUT.sub("", note)).replace("|", "/").replace("\n", " ")
    return note if len(note) <= _NOTE else f"{note[: _NOTE - 1]}…"


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names)


def _cells(line: str) -> Sequence[str]:
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def _yes(cells: Sequence[Sequence[str]], column: int) -> int:
    return sum(own[column] == "2" for own in cells)
