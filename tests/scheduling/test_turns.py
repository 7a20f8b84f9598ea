"""Who goes next where sequences run one by one: steps together, other waves one at a time, in turns."""

from __future__ import annotations

from dataclasses import dataclass

from scheduling.policy import InTurns


@dataclass(frozen=True)
class Waiting:
    """A wave that is ready."""

    name: str
    is_step: bool = False
    num_rows: int = 1
    party: object | None = None
    company: object | None = None

    @property
    def least_rows(self) -> int:
        return self.num_rows


def names(choice: InTurns, *waiting: Waiting) -> list[str]:
    """Who goes, and has gone."""
    chosen = [one for one, _ in choice.choose(waiting, 100, 100)]
    choice.went(chosen)
    return [one.name for one in chosen]


def test_steps_go_together_in_turns_with_one_other_wave_at_a_time() -> None:
    choice = InTurns(8)
    steps = Waiting("a", is_step=True), Waiting("b", is_step=True)
    others = Waiting("c"), Waiting("d")
    assert names(choice, *steps, *others) == ["a", "b"]
    assert names(choice, *steps, *others) == ["c"]
    assert names(choice, *steps, others[1]) == ["a", "b"]
    assert names(choice, *steps) == ["a", "b"], "nobody else waits"
    assert names(choice, *others) == ["c"], "no generation is on its way"
    assert names(choice) == []


def test_asking_twice_changes_nothing() -> None:
    choice = InTurns(1)
    steps = Waiting("a", is_step=True), Waiting("b", is_step=True)
    assert [one.name for one, _ in choice.choose(steps, 100, 100)] == ["a"]
    assert names(choice, *steps) == ["a"], "as many as may go"
    assert [one.name for one, _ in choice.choose([*steps, Waiting("c")], 100, 100)] == ["c"]
    assert names(choice, *steps, Waiting("c")) == ["c"]


def test_a_party_of_steps_goes_beside_nobody_else() -> None:
    choice = InTurns(8)
    steps = Waiting("a", is_step=True, party=1), Waiting("b", is_step=True), Waiting("c", is_step=True, party=1)
    assert names(choice, *steps) == ["a", "c"]
