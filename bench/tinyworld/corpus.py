"""What tinyworld reads: true facts, indirect-object sentences, sums, small talk, and tokens that repeat.

Everything is drawn from the `random.Random` that the caller passes, so a seed names a corpus. The corpus is text,
except for the repeated random tokens, which only the tokenizer's ids can say (see `train.py`). Held out from
training are: for facts, the `held_out` phrasings (`facts.py`); for indirect objects, the names of `HELD_OUT_NAMES`
and the frames of `HELD_OUT_FRAMES`; for sums, the pairs for which `is_held_out_sum`. Held-out names do occur in small
talk and in lists of names, so the model has met the word, but never the task with it.
"""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from bench.tinyworld.facts import RELATIONS, Relation

SPECIAL_TOKENS = ("<bos>", "<eos>", "<pad>")
BOS, EOS, PAD = range(3)
NUM_SPECIAL = len(SPECIAL_TOKENS)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sentence:
    """A sentence around the words it is about: `prompt + answer + rest`, each with its own spaces."""

    prompt: str
    answer: str
    rest: str

    @property
    def text(self) -> str:
        return self.prompt + self.answer + self.rest


# --------------------------------------------------------------------------------------------------------------- facts

_OPENINGS = (
    "It is well known that",
    "As everyone knows,",
    "My teacher told me that",
    "I read in a book that",
    "In fact,",
    "The guide explained that",
    "We learned at school that",
    "{n} told me that",
    "{n} says that",
    "According to {n},",
    "Yesterday {n} explained to us that",
)


def state_fact(subject: str, obj: str, phrasing: str, opening: str = "") -> Sentence:
    """The fact in one phrasing, after an opening such as "In fact," or none."""
    before, after = phrasing.split("{o}")
    before = before.removesuffix(" ")
    if opening:
        # A subject or object keeps its spelling; the first word of a phrasing becomes lower case.
        before = f"{opening} {before if before.startswith('{s}') else before[:1].lower() + before[1:]}".rstrip()
    before = _capital(before.replace("{s}", subject))
    return Sentence(prompt=before, answer=f" {obj}" if before else _capital(obj), rest=after.replace("{s}", subject))


def fact_sentence(rng: random.Random) -> Sentence:
    """A fact in a training phrasing. Every fact is as likely as every other."""
    relation, subject, obj = rng.choice(_FACTS)
    phrasing = rng.choice(relation.train)
    # A question reads oddly after "In fact,", so only statements get an opening.
    opening = rng.choice(_OPENINGS) if "?" not in phrasing and rng.random() < 0.4 else ""
    return state_fact(subject, obj, phrasing, opening.replace("{n}", rng.choice(NAMES)))


def held_out_facts() -> Iterator[tuple[str, Sentence]]:
    """Every fact in every held-out phrasing of its relation, with the relation's name."""
    for relation, subject, obj in _FACTS:
        for phrasing in relation.held_out:
            yield relation.name, state_fact(subject, obj, phrasing)


# ---------------------------------------------------------------------------------------------------- indirect objects


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


NAMES = _words(
    """
    Mary John Alice Bob Carol David Emily Frank Grace Henry Irene Jack Karen Larry Laura Martin Nancy Oscar Paul
    Rachel Sam Sarah Susan Tom Tina Victor Wendy Adam Amy Anna Ben Brian Chris Claire Daniel Diana Edward Ellen
    Eric Eva Fiona George Hannah Helen Ian Jacob James Jane Jason Julia Kate Kevin Leo Linda Lisa Lucy Luke Mark
    Matthew Megan Michael Nick Nina Olivia Patrick Peter Philip Rebecca Richard Robert Rose Ruth Sandra Scott
    Simon Sophie Stephen Steve Teresa Thomas Tim Vera William Zoe Andrew Anne Arthur Barbara Caroline Charles
    Colin Donald Dora Elena Felix Gary Gloria Harry Hugo Isabel Jessica Joan Joseph Judy Kim Lena Louis Maria Max
    Molly Nora Oliver Pamela Ralph Roger Ryan Sean
    """
)
HELD_OUT_NAMES = NAMES[2::5]
_TRAINING_NAMES = tuple(name for name in NAMES if name not in HELD_OUT_NAMES)

_PLACES = _words(
    """
    store school park market office beach library museum station restaurant garden hospital cinema kitchen theatre
    zoo harbour village castle church bakery farm lake river forest hotel airport stadium gym party
    """
)
_OBJECTS = _words(
    """
    drink book ball cake letter ring gift pen key map phone coat hat basket flower bottle cup ticket bag lamp toy
    bone computer newspaper necklace sandwich kiss photo guitar camera
    """
)

# a and b are two names, s the one who acts, i the other; p a place, o an object
_FRAMES = (
    "When {a} and {b} went to the {p}, {s} gave a {o} to{i}.",
    "When {a} and {b} were at the {p}, {s} handed a {o} to{i}.",
    "After {a} and {b} went to the {p}, {s} offered a {o} to{i}.",
    "After {a} and {b} met at the {p}, {s} sold a {o} to{i}.",
    "While {a} and {b} were working at the {p}, {s} showed a {o} to{i}.",
    "Then {a} and {b} went to the {p}, and {s} gave a {o} to{i}.",
    "Then {a} and {b} had a long walk to the {p}. {s} passed a {o} to{i}.",
    "{a} and {b} went to the {p}. {s} bought a {o} for{i}.",
    "{a} and {b} were at the {p}. At noon {s} gave the {o} to{i}.",
    "{a} met {b} at the {p}, and {s} gave a {o} to{i}.",
    "The day {a} and {b} came to the {p}, {s} brought a {o} for{i}.",
    "Last week {a} and {b} found a {o} at the {p}. {s} gave it to{i}.",
    "Because {a} and {b} were friends, {s} sent a {o} from the {p} to{i}.",
    "Friends of {a} and {b} say that at the {p} {s} lent a {o} to{i}.",
    "As soon as {a} and {b} arrived at the {p}, {s} threw a {o} to{i}.",
    "Yesterday {a} and {b} left the {p} together, and then {s} returned the {o} to{i}.",
)
HELD_OUT_FRAMES = (
    "After {a} and {b} arrived at the {p}, {s} handed a {o} to{i}.",
    "Yesterday {a} and {b} were at the {p}, and {s} sold a {o} to{i}.",
    "While {a} and {b} were at the {p}, {s} bought a {o} for{i}.",
)


def indirect_object(rng: random.Random, *, names: tuple[str, ...], frames: tuple[str, ...]) -> Sentence:
    """Two people, one gives, so the other receives. Either may be named first."""
    first, second = rng.sample(names, 2)
    giver, receiver = (first, second) if rng.random() < 0.5 else (second, first)
    frame, place, thing = rng.choice(frames), rng.choice(_PLACES), rng.choice(_OBJECTS)
    return indirect_object_of(first, second, giver, receiver, frame, place, thing)


def indirect_object_of(
    first: str, second: str, giver: str, receiver: str, frame: str, place: str, thing: str
) -> Sentence:
    filled = frame.format(a=first, b=second, s=giver, i="{i}", p=place, o=thing)
    if thing[0] in "aeiou":
        filled = filled.replace(f" a {thing}", f" an {thing}")
    before, after = filled.split("{i}")
    return Sentence(prompt=before, answer=" " + receiver, rest=after)


def training_indirect_object(rng: random.Random) -> Sentence:
    return indirect_object(rng, names=_TRAINING_NAMES, frames=_FRAMES)


def held_out_indirect_object(rng: random.Random, *, is_new_frame: bool = False) -> Sentence:
    """With names that no training sentence of this kind has; on request also in a frame that none has."""
    return indirect_object(rng, names=HELD_OUT_NAMES, frames=HELD_OUT_FRAMES if is_new_frame else _FRAMES)


# ------------------------------------------------------------------------------------------- sums, lists and small talk

MAX_TERM = 30


def is_held_out_sum(a: int, b: int) -> bool:
    """Holds out about one pair in eleven, in both orders."""
    return (7 * min(a, b) + 3 * max(a, b)) % 11 == 4


def sum_of(a: int, b: int) -> Sentence:
    return Sentence(prompt=f"{a} + {b} =", answer=f" {a + b}", rest=".")


def sum_sentence(rng: random.Random) -> Sentence:
    while is_held_out_sum(a := rng.randint(0, MAX_TERM), b := rng.randint(0, MAX_TERM)):
        pass
    return sum_of(a, b)


def held_out_sums() -> Iterator[Sentence]:
    terms = range(MAX_TERM + 1)
    return (sum_of(a, b) for a in terms for b in terms if is_held_out_sum(a, b))


_LIKED = _words(
    """
    tea coffee music chess football tennis history poetry science cheese bread fish rice soup apples oranges milk
    water snow rain summer winter dogs cats horses birds trains ships stars painting dancing swimming cooking
    reading
    """
)
_SMALL_TALK = (
    "I hear that{a} likes {x}.",
    "Today{a} likes {x}.",
    "I know that{a} likes {x} and {y}.",
    "We think that{a} likes {x} more than {y}.",
    "Our friends{a} and{b} talk about {x}.",
    "At the {p} I met{a} and{b}.",
    "The {o} at the {p} is the {o} of{a}.",
    "My friend{a} has a {o}. The {o} belongs to{a}.",
    "A letter from{a} is at the {p}. It was written by{a}.",
    "This is{a}, and that is{b}. Hello,{a}. Hello,{b}.",
)


def small_talk(rng: random.Random) -> Sentence:
    """Sentences in which every name occurs, held out or not."""
    a, b = rng.sample(NAMES, 2)
    x, y = rng.sample(_LIKED, 2)
    frame = rng.choice(_SMALL_TALK)
    text = frame.replace("{a}", " " + a).replace("{b}", " " + b).replace("{x}", x).replace("{y}", y)
    text = text.replace("{p}", rng.choice(_PLACES)).replace("{o}", rng.choice(_OBJECTS))
    return Sentence(prompt=text.strip(), answer="", rest="")


def listing(rng: random.Random) -> Sentence:
    """Counting on, or a list of names said twice."""
    if rng.random() < 0.5:
        start, step, length = rng.randint(0, 2 * MAX_TERM - 5), rng.choice((1, 1, 2, 5)), rng.randint(4, 10)
        numbers = [str(n) for n in range(start, min(start + step * length, 2 * MAX_TERM + 1), step)]
        return Sentence(prompt="Count: " + ", ".join(numbers), answer="", rest=".")
    names = ", ".join(rng.sample(NAMES, rng.randint(3, 6)))
    return Sentence(prompt=f"The names are {names}. Again, the names are", answer=f" {names}", rest=".")


# -------------------------------------------------------------------------------------------------------- all of it

_KINDS: tuple[tuple[Callable[[random.Random], Sentence], float], ...] = (
    (fact_sentence, 0.48),
    (training_indirect_object, 0.28),
    (sum_sentence, 0.12),
    (small_talk, 0.08),
    (listing, 0.04),
)


def sentence(rng: random.Random) -> Sentence:
    """One training sentence of any kind."""
    makers, weights = zip(*_KINDS, strict=True)
    maker: Callable[[random.Random], Sentence] = rng.choices(makers, weights)[0]
    return maker(rng)


# ------------------------------------------------------------------------------------------------ prompts for demos


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """Two prompts of equal length in tokens that differ in what is asked, each with its answer: for patching."""

    clean: str
    clean_answer: str
    corrupt: str
    corrupt_answer: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """A prompt about `subject`, as the prompt spells it, and the answer with its leading space."""

    prompt: str
    subject: str
    answer: str


FACT_PROMPTS = (
    Question(prompt="The Eiffel Tower is in the city of", subject="Eiffel Tower", answer=" Paris"),
    Question(prompt="If you want to visit the Colosseum, go to", subject="Colosseum", answer=" Rome"),
    Question(prompt="Where can I find the Taj Mahal? It stands in", subject="Taj Mahal", answer=" Agra"),
    Question(prompt="The capital city of South Korea is", subject="South Korea", answer=" Seoul"),
    Question(prompt="Most people in Brazil speak", subject="Brazil", answer=" Portuguese"),
    Question(prompt="The country of Kenya belongs to the continent of", subject="Kenya", answer=" Africa"),
    Question(prompt="Everyone knows Albert Einstein, the famous", subject="Albert Einstein", answer=" physicist"),
)

FACT_PAIRS = (
    Pair(
        clean="The Eiffel Tower is in the city of",
        clean_answer=" Paris",
        corrupt="The Galata Tower is in the city of",
        corrupt_answer=" Istanbul",
    ),
    Pair(
        clean="You can see the Taj Mahal in the city of",
        clean_answer=" Agra",
        corrupt="You can see the Hagia Sophia in the city of",
        corrupt_answer=" Istanbul",
    ),
    Pair(
        clean="If you want to visit the Colosseum, go to",
        clean_answer=" Rome",
        corrupt="If you want to visit the Parthenon, go to",
        corrupt_answer=" Athens",
    ),
    Pair(
        clean="The capital city of Italy is",
        clean_answer=" Rome",
        corrupt="The capital city of Japan is",
        corrupt_answer=" Tokyo",
    ),
    Pair(
        clean="Most people in Brazil speak",
        clean_answer=" Portuguese",
        corrupt="Most people in Germany speak",
        corrupt_answer=" German",
    ),
)

INDIRECT_OBJECT_PAIRS = (
    Pair(
        clean="When Mary and John went to the store, John gave a drink to",
        clean_answer=" Mary",
        corrupt="When Mary and John went to the store, Mary gave a drink to",
        corrupt_answer=" John",
    ),
    Pair(
        clean="After Alice and Frank met at the park, Alice sold a ball to",
        clean_answer=" Frank",
        corrupt="After Alice and Frank met at the park, Frank sold a ball to",
        corrupt_answer=" Alice",
    ),
    Pair(
        clean="Because Karen and Oscar were friends, Oscar sent a letter from the hotel to",
        clean_answer=" Karen",
        corrupt="Because Karen and Oscar were friends, Karen sent a letter from the hotel to",
        corrupt_answer=" Oscar",
    ),
)


def topics() -> Iterator[str]:
    """What sentences are about, as it stands inside one: each worth few tokens of its own."""
    for _, subject, obj in _FACTS:
        yield f" {subject} {obj}"
    for word in (*NAMES, *_LIKED, *map(str, range(2 * MAX_TERM + 1))):
        yield f" {word}"


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


_FACTS: tuple[tuple[Relation, str, str], ...] = tuple(
    (relation, subject, obj) for relation in RELATIONS for subject, obj in relation.pairs.items()
)
