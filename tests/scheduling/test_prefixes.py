"""Caches of generations that have ended: who goes on from them, and when they go."""

from __future__ import annotations

from dataclasses import replace

from polytrace.graph import Constant, Op, Sharing
from scheduling.plan import NOWHERE, PAGE, Cone, Edit, Plan, RequestId
from scheduling.prefixes import Prefix, Prefixes
from tests.scheduling.generations import Tokens, expected, generating_llama, generation, steering
from tests.scheduling.test_generating import LAYERS, ONE, Service, prompt

TEXT = prompt(100, 1)


def first_rows(service: Service, name: str) -> int:
    """Rows of the pass in which a request's first tokens were drawn."""
    return next(plan.layer_rows[0] for plan in service.shards.plans if _begins(plan, name))


def _begins(plan: Plan, name: str) -> bool:
    return any(member.program.request == name and member.step == 0 for member in plan.members)


def served(service: Service, name: str, *prompts: Tokens, **options: object) -> int:
    """Runs one alone; how many rows its prompts took."""
    service.add(generation(ONE, name, *prompts, **options))  # type: ignore[arg-type]
    service.run(len(service.outcomes) + 1)
    for place, own in enumerate(prompts):
        assert service.tokens(name, place) == expected(own)
    return first_rows(service, name)


def test_the_next_turn_goes_on_from_the_one_before() -> None:
    service = Service()
    assert served(service, "a", TEXT) == 100
    talk = TEXT + expected(TEXT)
    assert served(service, "b", talk + prompt(5, 2)) == 6, "the last token that was drawn has run nowhere"
    assert served(service, "c", TEXT) == 1
    assert served(service, "d", TEXT[:50] + prompt(20, 3)) == 20
    assert served(service, "e", TEXT[:20] + prompt(20, 3)) == 40, "less than a page is not worth it"
    receipt = service.outcomes["b"].receipt
    assert receipt is not None and receipt.token_layers_alone - receipt.token_layers == 107 * LAYERS
    assert len(service.scheduler._room.memory.prefixes) == 3, "what one says another need not say"
    service.empty()


def test_samples_leave_what_they_have_in_common_and_go_on_from_it() -> None:
    service = Service()
    assert served(service, "a", TEXT, TEXT, TEXT) == 100
    assert served(service, "b", TEXT, TEXT) == 100 - 96
    assert served(service, "c", TEXT + prompt(9, 2)) == 109 - 96
    service.empty()


def test_private_requests_neither_give_nor_take() -> None:
    service = Service()
    assert served(service, "a", TEXT, sharing=Sharing.OFF) == 100
    assert len(service.scheduler._room.memory.prefixes) == 0
    assert served(service, "b", TEXT) == 100
    assert served(service, "c", TEXT, sharing=Sharing.OFF) == 100
    service.empty()


def test_a_limit_of_0_keeps_none() -> None:
    service = Service(prefix_bytes=0)
    assert served(service, "a", TEXT) == served(service, "b", TEXT) == 100
    while service.scheduler.has_work():
        service.step()
    assert not service.shards.caches


def test_steered_steps_leave_their_prompt_alone() -> None:
    service = Service()
    at_later_steps = tuple(
        replace(node, step=1) if not isinstance(node, (Constant, Op)) else node for node in steering(1, 7)
    )
    assert served(service, "a", TEXT, nodes=at_later_steps) == 100
    assert served(service, "b", TEXT + expected(TEXT) + prompt(5, 2)) == 13
    service.empty()


def test_what_is_steered_everywhere_is_for_nobody() -> None:
    service = Service()
    assert served(service, "a", TEXT, nodes=steering(1, 8)) == 100
    assert served(service, "b", TEXT) == 100
    assert served(service, "c", TEXT, nodes=steering(1, 8)) == 100, "its own reads need the rows"
    service.empty()


def cone(*edits: Edit, read: int = NOWHERE) -> Cone:
    nowhere = (NOWHERE,) * LAYERS
    return Cone(edits=edits, needs=(99,) * LAYERS, head=(), inside=(*nowhere, read), behind=nowhere)


def prefix(number: int, tokens: Tokens, *edits: Edit) -> Prefix:
    owner = RequestId(f"cache:{number}")
    return Prefix(trunk=(owner, -1), domain="tenant", tokens=tokens, edits=edits, num_bytes=PAGE)


def test_prefixes_are_found_as_far_as_tokens_and_edits_are_equal() -> None:
    early, late = (Edit(1, position, b"key") for position in (50, 80))
    other = Edit(1, 80, b"other")
    prefixes = Prefixes(1000)
    for number, own in enumerate([(), (early,), (early, late)]):
        assert prefixes.keep(prefix(number, TEXT, *own))
    assert not prefixes.keep(prefix(4, TEXT[:60], early))

    def found(*edits: Edit, domain: object = "tenant", read: int = 99, tokens: Tokens = TEXT) -> tuple[int, int]:
        one = prefixes.find(domain, tokens, cone(*edits, read=read))
        return (0, 0) if one is None else (int(one[0].trunk[0].removeprefix("cache:")), one[1])

    assert found() == (0, 99)
    assert found(early) == (1, 99)
    assert found(early, late) == (2, 99)
    assert found(early, other) == (1, 80), "up to its own write"
    assert found(late) == (0, 80)
    assert found(read=40) == (0, 40)
    assert found(read=20) == found(domain="other") == found(tokens=prompt(100, 9)) == (0, 0)
    assert found(early, tokens=TEXT[:70] + prompt(40, 2)) == (1, 70)


def test_the_least_recently_used_goes_first() -> None:
    small = generating_llama(trunk_bytes=64 * PAGE * LAYERS)
    service = Service(small, prefix_bytes=9 * PAGE * LAYERS)
    texts = [prompt(60, number) for number in range(5)]
    for number in (0, 1, 2, 0, 3):  # three pages each
        served(service, f"{number} {len(service.outcomes)}", texts[number])
    assert service.scheduler._room.memory.prefixes.held_bytes == 9 * PAGE * LAYERS
    assert served(service, "0", texts[0]) == served(service, "3", texts[3]) == served(service, "2", texts[2]) == 1
    assert served(service, "1", texts[1]) == 60
    service.empty()


def test_prefixes_make_room_for_whoever_needs_it() -> None:
    small = generating_llama(trunk_bytes=10 * PAGE * LAYERS)
    service = Service(small)
    for number in range(3):
        served(service, f"{number}", prompt(40, number))
    assert len(service.scheduler._room.memory.prefixes) == 2
    service.add(generation(small, "large", prompt(200, 9)))
    service.run(4)
    assert service.shards.most_held <= small.limits.trunk_bytes
    assert service.outcomes["large"].error is None
    service.empty()


def test_those_that_arrive_together_go_on_from_one_prefix() -> None:
    service = Service()
    served(service, "a", TEXT)
    for number in range(8):
        service.add(generation(ONE, f"{number}", TEXT + (number,) * 10, nodes=steering(1, 8) if number > 5 else ()))
    service.run(9)
    plan = next(plan for plan in service.shards.plans if _begins(plan, "0"))
    assert plan.layer_rows[0] == 6 * 10 + 2 * 110 - 100, "those that steer have the text in common"
    for number in range(8):
        assert service.tokens(f"{number}") == expected(TEXT + (number,) * 10)
    service.empty()
