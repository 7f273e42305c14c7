"""The shipped model's tasks: each writes questions with right replies, and judges replies.

A task knows nothing of models, tokens or training. A checksum of an item's key decides whether the item belongs to the
held-out split. The key is the part of a question that determines the reply, if that can be told from the phrase around
it: the text to copy, the numbers of a sum or a count, the characters of a story. Otherwise it is the whole question. A
held-out capital is therefore trained on in other phrases, as a fact must be.
"""

from __future__ import annotations

import random
import re
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from edgemoe.demo import words

HELD_OUT_EVERY = 10
"""One in this many keys is kept out of training."""
HELD_OUT_SEED = 1
"""Seed of the held-out items of all measurements."""


class Item(NamedTuple):
    """One question: its key, the user's text, and a right reply."""

    key: str
    user: str
    reply: str


@dataclass(frozen=True)
class Task:
    """One task. `nature` is the kind of its text, which determines how well speculation predicts it."""

    name: str
    nature: str
    write: Callable[[random.Random], Item]
    accepts: Callable[[Item, str], bool]

    def items(self, seed: int, *, held_out: bool) -> Iterator[Item]:
        """Yields items of one split without end, the same ones for the same seed."""
        rng = random.Random(f"{self.name}/{seed}")
        while True:
            item = self.write(rng)
            if is_held_out(f"{self.name}/{item.key}") == held_out:
                yield item


def is_held_out(key: str) -> bool:
    """Whether a key belongs to the held-out split; the same on every machine and version of Python."""
    return zlib.crc32(key.encode()) % HELD_OUT_EVERY == 0


def same_text(item: Item, reply: str) -> bool:
    """Whether `reply` is the item's: the judge of tasks with one right reply."""
    return reply.strip() == item.reply


# --- copying -------------------------------------------------------------------------------------


def _invented_word(rng: random.Random) -> str:
    syllables = ("".join((rng.choice("bcdfghklmnprstvz"), rng.choice("aeiou"))) for _ in range(rng.randint(2, 3)))
    return "".join(syllables)


def _some_words(rng: random.Random, count: int) -> list[str]:
    def one() -> str:
        draw = rng.random()
        if draw < 0.70:
            return rng.choice(words.WORDS)
        if draw < 0.82:
            return rng.choice(words.NAMES + words.THINGS + words.ANIMALS)
        if draw < 0.92:
            return _invented_word(rng)
        return rng.choice(words.RARE) if draw < 0.96 else str(rng.randint(0, 999))

    return [one() for _ in range(count)]


def _sentence(rng: random.Random, chosen: list[str]) -> str:
    text = " ".join(chosen)
    if rng.random() < 0.6:
        text = text[0].upper() + text[1:] + rng.choice([".", ".", "!", "?"])
    return text


def _write_repeat(rng: random.Random) -> Item:
    text = " ".join(_sentence(rng, _some_words(rng, rng.randint(3, 12))) for _ in range(rng.randint(1, 3)))
    ask = rng.choice(["Repeat after me: {}", "Repeat this: {}", "Copy this text: {}", "Say this again: {}"])
    return Item(text, ask.format(text), text)


def _write_replace(rng: random.Random) -> Item:
    old, new = rng.sample(words.THINGS + words.ANIMALS + words.COLOURS, 2)
    chosen = [word for word in _some_words(rng, rng.randint(6, 16)) if word not in (old, new)]
    for _ in range(rng.randint(1, 3)):
        chosen.insert(rng.randint(0, len(chosen)), old)
    text = " ".join(chosen)
    reply = " ".join(new if word == old else word for word in chosen)
    ask = rng.choice(["Replace {} with {}: {}", "Change {} to {}: {}", "Write {} as {}: {}"])
    return Item(f"{old} {new} {text}", ask.format(old, new, text), reply)


# --- numbers -------------------------------------------------------------------------------------


def _sum_line(rng: random.Random) -> tuple[str, str]:
    """A sum or difference of numbers up to 99, as (question, answer)."""
    left, right = rng.randint(0, 99), rng.randint(0, 99)
    if rng.random() < 0.4:
        left, right = max(left, right), min(left, right)
        return f"{left} - {right}", str(left - right)
    return f"{left} + {right}", str(left + right)


def _write_arithmetic(rng: random.Random) -> Item:
    # The first sum decides the split, and the others are of the same one: no held-out sum is trained on.
    lines = [_sum_line(rng)]
    split = is_held_out(f"arithmetic/{lines[0][0]}")
    count = rng.choice([1, 1, 2, 3, 4, 5])
    while len(lines) < count:
        line = _sum_line(rng)
        if is_held_out(f"arithmetic/{line[0]}") == split:
            lines.append(line)
    asked = ", ".join(question for question, _ in lines)
    reply = "\n".join(f"{question} = {answer}" for question, answer in lines)
    ask = rng.choice(["What is {}?", "Work out {}.", "Calculate {}."])
    return Item(lines[0][0], ask.format(asked), reply)


def _write_count(rng: random.Random) -> Item:
    step, length = rng.choice([1, 1, 1, 2, 5, 10]), rng.randint(4, 12)
    start = rng.randint(0, 99)
    numbers = [start + step * index for index in range(length)]
    by = "" if step == 1 else f" by {step}"
    user = rng.choice(["Count from {} to {}{}.", "Please count from {} to {}{}."]).format(numbers[0], numbers[-1], by)
    return Item(f"{numbers[0]} {numbers[-1]} {step}", user, ", ".join(map(str, numbers)))


# --- code ----------------------------------------------------------------------------------------

_OPERATIONS = {
    "adds": ("+", "sum"), "subtracts": ("-", "difference"), "multiplies": ("*", "product"),
    "divides": ("/", "quotient"),
}  # fmt: skip
_TESTS = {"positive": "> 0", "negative": "< 0", "even": "% 2 == 0", "odd": "% 2 == 1"}


def _write_code(rng: random.Random) -> Item:
    name, first, second, third = rng.sample(words.FUNCTION_WORDS, 4)
    form = rng.randrange(4)
    if form == 0:
        verb = rng.choice(list(_OPERATIONS))
        sign, noun = _OPERATIONS[verb]
        user = f"Write a Python function called {name} that {verb} {first} and {second}."
        reply = (
            f"def {name}({first}, {second}):\n"
            f'    """Return the {noun} of {first} and {second}."""\n'
            f"    return {first} {sign} {second}"
        )
    elif form == 1:
        kind = rng.choice(list(_TESTS))
        user = f"Write a Python function called {name} that keeps the {kind} numbers of {first}."
        reply = (
            f"def {name}({first}):\n    result = []\n    for item in {first}:\n"
            f"        if item {_TESTS[kind]}:\n            result.append(item)\n    return result"
        )
    elif form == 2:
        user = f"Write a Python class called {name.title()} with {first}, {second} and {third}."
        reply = (
            f"class {name.title()}:\n    def __init__(self, {first}, {second}, {third}):\n"
            f"        self.{first} = {first}\n        self.{second} = {second}\n        self.{third} = {third}"
        )
    else:
        user = f"Write a Python function called {name} that sums {first} over {second}."
        reply = (
            f"def {name}({second}):\n    total = 0\n    for item in {second}:\n"
            f"        total += item.{first}\n    return total"
        )
    return Item(user, user, reply)


# --- prose ---------------------------------------------------------------------------------------

_STORY = (
    ("Once upon a time there was {a_animal} named {name}.", "There once was {a_animal} called {name}."),
    ("{name} lived near the {place}.", "{name} had a small house by the {place}."),
    ("One {weather} morning {name} went for a walk.", "One {weather} day {name} left home early.",
     "It was a {weather} evening and {name} could not sleep."),
    ("By the old {place2} {name} found {a_thing}.", "Under a tree near the {place2} lay {a_thing}."),
    ("The {thing} was {colour} and very old.", "It was {colour} and it shone in the light.",
     "Nobody had seen such a {colour} {thing} before."),
    ("{name} took the {thing} home and felt {mood}.", "{name} showed the {thing} to a friend, who was {mood}.",
     "{name} hid the {thing} in a safe place and was {mood}."),
    ("From that day on {name} was never alone.", "And that is how the {animal} found a {thing}.",
     "In the end everyone at the {place} was {mood2}."),
)  # fmt: skip
_FREE = {
    "place": words.PLACES, "place2": words.PLACES, "weather": words.WEATHERS, "colour": words.COLOURS,
    "mood": words.MOODS, "mood2": words.MOODS,
}  # fmt: skip


def _article(noun: str) -> str:
    return ("an " if noun[0] in "aeiou" else "a ") + noun


def _write_story(rng: random.Random) -> Item:
    name, animal, thing = rng.choice(words.NAMES), rng.choice(words.ANIMALS), rng.choice(words.THINGS)
    slots = {key: rng.choice(choices) for key, choices in _FREE.items()}
    fixed = {"name": name, "animal": animal, "thing": thing}
    fixed |= {"a_animal": _article(animal), "a_thing": _article(thing)}
    reply = " ".join(rng.choice(options).format(**slots, **fixed) for options in _STORY)
    ask = rng.choice(["Tell me a story about {} named {} and {}.", "Write a story about {} named {} and {}."])
    return Item(f"{name} {animal} {thing}", ask.format(_article(animal), name, _article(thing)), reply)


def _accepts_story(item: Item, reply: str) -> bool:
    """Whether every sentence follows the grammar of stories, with the three things that the question names."""
    name, animal, thing = item.key.split()
    fixed = {"name": name, "animal": animal, "thing": thing}
    fixed |= {"a_animal": _article(animal), "a_thing": _article(thing)}
    groups = {key: f"(?:{'|'.join(choices)})" for key, choices in _FREE.items()}
    sentences = ("(?:" + "|".join(re.escape(s).replace(r"\{", "{").replace(r"\}", "}") for s in options) + ")"
                 for options in _STORY)  # fmt: skip
    pattern = r"\ ".join(sentences).format(**groups, **fixed)
    return re.fullmatch(pattern, reply.strip()) is not None


# --- knowing and remembering ---------------------------------------------------------------------


def _write_recall(rng: random.Random) -> Item:
    people = rng.sample(words.NAMES, rng.randint(3, 6))
    owned = [f"a {rng.choice(words.COLOURS)} {thing}" for thing in rng.sample(words.THINGS, len(people))]
    wanted = rng.randrange(len(people))
    told = " ".join(f"{person} has {thing}." for person, thing in zip(people, owned, strict=True))
    user = f"{told} What does {people[wanted]} have?"
    return Item(user, user, f"{people[wanted]} has {owned[wanted]}.")


_FACT_ASKS = (
    "What is the capital of {}?", "Which city is the capital of {}?", "Tell me the capital of {}.",
    "Name the capital of {}.", "What is {}'s capital?", "Do you know the capital of {}?",
)  # fmt: skip


def _write_fact(rng: random.Random) -> Item:
    country, ask = rng.choice(list(words.CAPITALS)), rng.choice(_FACT_ASKS)
    user = ask.format(country)
    return Item(user, user, f"The capital of {country} is {words.CAPITALS[country]}.")


_SMALL_TALK = (
    ("Hello, I am {}.", "Hello {}! What can I do for you?"),
    ("Hi, my name is {}.", "Hello {}! What can I do for you?"),
    ("Good morning, {} here.", "Good morning {}! What can I do for you?"),
    ("Thank you, says {}.", "You are welcome, {}."),
    ("{} says goodbye.", "Goodbye {}! Come back soon."),
)
_ABOUT = (
    ("Hello!", "Hello! What can I do for you?"),
    ("Hello", "Hello! What can I do for you?"),
    ("Hi", "Hello! What can I do for you?"),
    ("Who are you?", "I am the small demo model of edgemoe."),
    ("What are you?", "I am the small demo model of edgemoe."),
    ("What can you do?", "I can copy and change text, calculate, count, write short code, tell stories, "
     "remember who has what, and name capitals."),
    ("Help", "Ask me to repeat a text, to calculate, to count, to write a function, to tell a story, "
     "or for the capital of a country."),
    ("Thank you!", "You are welcome."),
    ("Thanks", "You are welcome."),
    ("Goodbye", "Goodbye! Come back soon."),
)  # fmt: skip


def _write_small_talk(rng: random.Random) -> Item:
    if rng.random() < 0.6:
        user, reply = rng.choice(_ABOUT)
        return Item("about", user, reply)
    name = rng.choice(words.NAMES)
    user, reply = (text.format(name) for text in rng.choice(_SMALL_TALK))
    return Item(user, user, reply)


TASKS: tuple[Task, ...] = (
    Task("repeat", "copying", _write_repeat, same_text),
    Task("replace", "copying", _write_replace, same_text),
    Task("arithmetic", "arithmetic", _write_arithmetic, same_text),
    Task("count", "arithmetic", _write_count, same_text),
    Task("code", "code", _write_code, same_text),
    Task("story", "prose", _write_story, _accepts_story),
    Task("recall", "recall", _write_recall, same_text),
    Task("capitals", "facts", _write_fact, same_text),
    Task("greetings", "small talk", _write_small_talk, same_text),
)
"""All tasks, in the order of the documentation's table."""
