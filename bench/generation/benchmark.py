"""The whole benchmark of generation.

    python -m bench.run generation

Contenders take turns in one process on the same weights; requests are recorded and worked out beforehand, as a service
does it at admission. Of what is run one by one a few users take part and their seconds are scaled, as each costs the
same. Every row holds tokens against each other: ours merged, ours alone, Hugging Face alone and as one batch.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from bench import tinyworld
from bench.cones.models import folder_of
from bench.cones.workloads import Shape, evenly, shape_of
from bench.generation import by_hand
from bench.generation.arrival import arrival
from bench.generation.left import left
from bench.generation.ours import Ours
from bench.generation.users import User, ablating_users, plain_users, steered_users
from bench.plain import Plain
from bench.race import race, ratio
from scheduling.policy import PassPolicy

_AIMS = {
    "one by one / merged, 32 users": 6.0,
    "tokens a second of the hand-batched call, 32 users": 0.9,
    "steered / plain": 1.10,
    "ablating / plain": 1.25,
}
_MOST_ONE_BY_ONE = 2


PARTS = ("steered", "edits", "arrival", "sharing", "left")


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What is measured on one model."""

    model: str  # a name of bench.cones.models, or a folder
    parts: tuple[str, ...] = PARTS
    users: tuple[int, ...] = (1, 8, 32)
    tokens: int = 64  # of a prompt
    new_tokens: int = 64
    edited_users: int = 32  # whose edits are held against none
    long_prompt: int = 1000  # that arrives while others run
    alike: int = 8  # sequences that have most of `long_tokens` in common, with and without sharing
    long_tokens: int = 512
    short: int = 1000  # generations after which nothing may be left
    rounds: int = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationConfig:
    """One run of the benchmark."""

    settings: tuple[Setting, ...]
    threads: int = 2


def config_for(folder: Path, *, quick: bool) -> GenerationConfig:
    """The configuration that `make bench` runs, or a short one to see that it works."""
    if quick:
        short = Setting(
            model="4x64",
            users=(1, 4),
            tokens=12,
            new_tokens=10,
            edited_users=4,
            long_prompt=150,
            alike=3,
            long_tokens=70,
            short=40,
            rounds=2,
        )
        return GenerationConfig(settings=(short,), threads=1)
    large = Setting(model="16x1024", parts=("steered",), users=(32,), rounds=2)
    return GenerationConfig(settings=(Setting(model="8x512"), large))


def run(config: GenerationConfig) -> dict[str, Any]:
    """The figures, as plain JSON."""
    return {"models": [_run_model(setting, config.threads) for setting in config.settings], "aims": _AIMS}


def _run_model(setting: Setting, threads: int) -> dict[str, Any]:
    folder = folder_of(setting.model)
    shape = shape_of(folder)
    ours = Ours(folder, threads=threads)
    try:
        plain = Plain(folder)
        torch.set_num_threads(threads)
        figures: dict[str, Any] = {"model": tinyworld.FOLDER.name if folder == tinyworld.FOLDER else setting.model}
        if "steered" in setting.parts:
            figures["steered"] = [_steered(setting, shape, ours, plain, count) for count in setting.users]
        if "edits" in setting.parts:
            figures["edits"] = _edits(setting, shape, ours, plain)
        if "arrival" in setting.parts:
            figures["arrival"] = _arrival(setting, shape, ours)
        if "sharing" in setting.parts:
            figures["sharing"] = [*_sharing(setting, shape, ours), _going_on(setting, folder, shape, threads)]
        if "left" in setting.parts:
            figures["left"] = left(ours, plain_users(shape, setting.short, tokens=8, new_tokens=4))
            _say(f"short generations: {figures['left']}")
        return figures
    finally:
        ours.close()


def _steered(setting: Setting, shape: Shape, ours: Ours, plain: Plain, count: int) -> dict[str, Any]:
    """Users with a vector each, in every way to run them."""
    users = steered_users(shape, count, tokens=setting.tokens, new_tokens=setting.new_tokens)
    programs = ours.programs(users)
    few = evenly(range(count), _MOST_ONE_BY_ONE)
    scale = count / len(few)
    seconds = race(
        {
            "merged": lambda: ours.merged(programs),
            "one by one": lambda: ours.one_by_one([programs[place] for place in few]),
            "hugging face one by one": lambda: by_hand.one_by_one(plain, [users[place] for place in few]),
            "hand-batched": lambda: by_hand.as_one_batch(plain, users),
        },
        rounds=setting.rounds,
    )
    for name in ("one by one", "hugging face one by one"):
        seconds[name] = [scale * each for each in seconds[name]]
    merged, batched = ours.merged(programs), by_hand.as_one_batch(plain, users)
    untouched = by_hand.as_one_batch(
        plain, plain_users(shape, count, tokens=setting.tokens, new_tokens=setting.new_tokens)
    )
    figures: dict[str, Any] = {
        "users": count,
        "one_by_one_are": len(few),
        "ratios": _ratios(seconds, "merged"),
        "tokens_a_second": {name: _tokens_a_second(setting, count, each) for name, each in seconds.items()},
        "tokens_as_alone": [merged[place] for place in few] == ours.one_by_one([programs[place] for place in few]),
        "tokens_of_hugging_face": [merged[place] for place in few]
        == by_hand.one_by_one(plain, [users[place] for place in few]),
        "tokens_of_hand_batched": merged == batched,
        "steered_otherwise_than_plain": sum(map(tuple.__ne__, merged, untouched)),
    }
    _say(f"{count} steered users: " + _shown(figures["ratios"]))
    return figures


def _edits(setting: Setting, shape: Shape, ours: Ours, plain: Plain) -> dict[str, Any]:
    """What edits cost beside the same pass without them."""
    sizes: dict[str, int] = {"tokens": setting.tokens, "new_tokens": setting.new_tokens}
    users: dict[str, list[User]] = {
        "plain": plain_users(shape, setting.edited_users, **sizes),
        "steered": steered_users(shape, setting.edited_users, **sizes),
        "ablating": ablating_users(shape, setting.edited_users, **sizes),
    }
    programs = {name: ours.programs(each) for name, each in users.items()}
    contenders: dict[str, Callable[[], object]] = {
        name: functools.partial(ours.merged, each) for name, each in programs.items()
    }
    contenders["plain again"] = contenders["plain"]
    seconds = race(contenders, rounds=setting.rounds)
    figures: dict[str, Any] = {
        "users": setting.edited_users,
        "ratios": {
            f"{name} / plain": asdict(ratio(seconds[name], seconds["plain"])) for name in seconds if name != "plain"
        },
        "tokens_of_hugging_face": {
            name: ours.merged(programs[name]) == by_hand.as_one_batch(plain, each) for name, each in users.items()
        },
    }
    _say(f"edits of {setting.edited_users} users: " + _shown(figures["ratios"]))
    return figures


def _arrival(setting: Setting, shape: Shape, ours: Ours) -> dict[str, Any]:
    running = ours.programs(plain_users(shape, 8, tokens=setting.tokens, new_tokens=4 * setting.new_tokens))
    (long,) = ours.programs(plain_users(shape, 1, tokens=setting.long_prompt, new_tokens=2))
    figures = arrival(ours, running, long, rounds=setting.rounds)
    _say(f"a prompt of {setting.long_prompt} tokens arrives: {figures}")
    return figures


def _sharing(setting: Setting, shape: Shape, ours: Ours) -> list[dict[str, Any]]:
    """What is the same is there once, or once each: samples of one prompt, and prompts of users that begin alike."""
    sizes: dict[str, int] = {"tokens": setting.long_tokens, "new_tokens": setting.new_tokens}
    one = plain_users(shape, 1, **sizes)
    alike = plain_users(shape, setting.alike, **sizes, shared=setting.long_tokens * 7 // 8)
    rows: list[dict[str, Any]] = []
    for what, users, samples in (("samples of a prompt", one, setting.alike), ("prompts that begin alike", alike, 1)):
        on = ours.programs(users, samples=samples)
        off = ours.programs(users, samples=samples, sharing="off")
        seconds = race(
            {"on": functools.partial(ours.merged, on), "off": functools.partial(ours.merged, off)},
            rounds=setting.rounds,
        )
        tokens = ours.merged(on)
        rows.append(
            {
                "what": what,
                "sequences": len(tokens),
                "tokens": setting.long_tokens,
                "ratios": {"off / on": asdict(ratio(seconds["off"], seconds["on"]))},
                "tokens_are_equal": tokens == ours.merged(off),
                "different": len(set(tokens)),
            }
        )
        _say(f"{len(tokens)} {what}: " + _shown(rows[-1]["ratios"]))
    return rows


def _going_on(setting: Setting, folder: Path, shape: Shape, threads: int) -> dict[str, Any]:
    """Prompts that begin as one that has run before, whose keys and values are kept, or not."""
    sizes: dict[str, int] = {"tokens": setting.long_tokens, "new_tokens": setting.new_tokens}
    users = plain_users(shape, setting.alike + 1, **sizes, shared=setting.long_tokens * 7 // 8)
    ours = Ours(folder, threads=threads, policy=PassPolicy())
    try:
        first, *others = ours.programs(users)

        def begin() -> None:
            ours.backend.forget_prefixes()
            ours.merged([first])

        off = ours.programs(users[1:], sharing="off")
        seconds = race(
            {"on": functools.partial(ours.merged, others), "off": functools.partial(ours.merged, off)},
            rounds=setting.rounds,
            before=begin,
        )
        begin()
        tokens = ours.merged(others)
        figures: dict[str, Any] = {
            "what": "prompts that begin as one before",
            "sequences": len(tokens),
            "tokens": setting.long_tokens,
            "ratios": {"off / on": asdict(ratio(seconds["off"], seconds["on"]))},
            "tokens_are_equal": tokens == ours.merged(off),
            "different": len(set(tokens)),
        }
    finally:
        ours.close()
    _say(f"{len(tokens)} {figures['what']}: " + _shown(figures["ratios"]))
    return figures


def _ratios(seconds: Mapping[str, Sequence[float]], base: str) -> dict[str, Any]:
    return {f"{name} / {base}": asdict(ratio(each, seconds[base])) for name, each in seconds.items() if name != base}


def _tokens_a_second(setting: Setting, count: int, seconds: Sequence[float]) -> float:
    return count * setting.new_tokens / sorted(seconds)[len(seconds) // 2]


def is_right(figures: Mapping[str, Any]) -> bool:
    """Whether every token was what it should be, and nothing was left."""
    return all(map(_is_right, figures["models"]))


def _is_right(model: Mapping[str, Any]) -> bool:
    found = [
        row["tokens_as_alone"]
        and row["tokens_of_hugging_face"]
        and row["tokens_of_hand_batched"]
        and row["steered_otherwise_than_plain"] > 0
        for row in model.get("steered", ())
    ]
    if "edits" in model:
        found += model["edits"]["tokens_of_hugging_face"].values()
    if "arrival" in model:
        found.append(model["arrival"]["tokens_are_as_alone"])
    found += [row["tokens_are_equal"] and row["different"] > 1 for row in model.get("sharing", ())]
    if "left" in model:
        objects = model["left"]["objects"]
        found.append(model["left"]["cache_bytes"] == 0 and objects[-1] <= 1.001 * objects[0])
    return all(found)


def tell(figures: Mapping[str, Any]) -> str:
    """The figures for a person."""
    lines = []
    for model in figures["models"]:
        lines.append(model["model"])
        for row in model.get("steered", ()):
            speeds = ", ".join(f"{name} {speed:.0f}" for name, speed in row["tokens_a_second"].items())
            lines.append(f"  {row['users']:>3} steered: {_shown(row['ratios'])}; tokens a second: {speeds}")
        if edits := model.get("edits"):
            lines.append(f"  edits of {edits['users']} users: {_shown(edits['ratios'])}")
        if came := model.get("arrival"):
            lines.append(
                f"  while a prompt of {came['prompt']} tokens arrives among {came['running']}: "
                f"{came['ms_between_tokens_before']:.1f} ms between tokens before, "
                f"{came['ms_between_tokens_meanwhile']:.1f} meanwhile, {came['longest_ms_meanwhile']:.1f} at most; "
                f"its first token after {came['ms_to_first_token_of_the_long_one']:.0f} ms"
            )
        for row in model.get("sharing", ()):
            lines.append(f"  {row['sequences']} {row['what']}, {row['tokens']} tokens: {_shown(row['ratios'])}")
        if found := model.get("left"):
            lines.append(
                f"  {found['generations']} short generations: {found['cache_bytes']} bytes left in the cache, "
                f"process {found['resident_mib'][0]:.0f} MiB behind the first quarter, {found['resident_mib'][-1]:.0f} "
                f"behind all, {found['seconds']:.1f} s"
            )
        lines += [] if _is_right(model) else ["  WRONG tokens, or something was left"]
    return "\n".join(lines)


def _shown(ratios: Mapping[str, Mapping[str, float]]) -> str:
    return ", ".join(
        f"{name} {each['median']:.2f} ({each['low']:.2f}-{each['high']:.2f})" for name, each in ratios.items()
    )


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
