"""`spec-exact`: greedy replies with every way of drafting against plain decoding, for every family of the zoo."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bench.measurement import BaseSize, Measurement
from bench.support.engine_parts import runner_of
from bench.support.zoo import TESTED, make
from edgemoe import Completion, Engine, Sampling
from edgemoe.checkpoint.blueprint import open_blueprint
from edgemoe.config import choices_of
from edgemoe.draft.affinity_file import prepare
from edgemoe.experts.draft_routing import RULES
from edgemoe.quiet import quiet_transformers

NAME = "spec-exact"
BAR = "token ids and length equal to plain decoding"
LENGTHS = (1, 5, 23, 64)
"""Tokens of the prompts without a pattern ..."""
PERIODS = {12: 3, 30: 7, 61: 1, 100: 9}
"""... and of those that repeat themselves, with what they repeat."""
TOGETHER = 4
"""Sequences at once, where it is more than one."""
SHALLOW: dict[str, Any] = {"draft_nodes": 6, "draft_depth": 3}
"""Bounds for most of what drafts by passes: many drafts instead of deep ones."""
OTHER_FAMILY = "mixtral"
"""Of the draft model for families that cannot draft for themselves."""


SHAPES = choices_of("draft_shape")


@dataclass(frozen=True, kw_only=True)
class Size(BaseSize):
    """The families, the tokens of a reply, and every how many-th way of drafting is tried."""

    families: tuple[str, ...] = TESTED
    tokens: int = 200
    every: int = 1


FULL, SMALL = Size(), Size(small=True, families=("mixtral",), tokens=24, every=3)


@dataclass(frozen=True)
class Drafting:
    """One way of drafting; `model` says which checkpoint drafts, where one does."""

    speculate: str
    shape: str = "tree"
    rule: str = "reselect"
    model: str | None = None

    def describe(self) -> str:
        """Its settings, in a few words."""
        return " ".join(filter(None, (self.speculate, self.model, self.shape, self.rule)))


NGRAM, SELF = Drafting("ngram"), Drafting("self")
"""The main ways: they see every prompt, and both extremes of the cache."""
REFUSING = (NGRAM, SELF, Drafting("model", model="foreign"))
"""What a family is asked for that cannot take drafts back: it must say so and decode plainly."""


class Case(NamedTuple):
    """One engine and what it is asked."""

    drafting: Drafting
    slots: int
    batch: int
    prompts: tuple[int, ...]
    """Numbers of prompts."""
    bounds: dict[str, Any]


class Found(NamedTuple):
    """What came of one case: the engine's totals, and for each reply that was not the plain one, what is known."""

    drafted: int
    accepted: int
    reason: str
    wrong: list[str]


def run(size: Size = FULL) -> Measurement:
    """Every family, with caches from (top-k + 2) slots in all to one for every expert."""
    torch.set_num_threads(1)
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for number, family in enumerate(size.families):
            found[family] = item = compare(family, Path(folder) / family, number, size)
            print(
                f"{family:20} {item['same']:2} of {item['cases']:2} the same, "
                f"accepted {item['accepted']} of {item['drafted']}, verifies {item['verifies'] or item['reason']}",
                flush=True,
            )
            for line in item["wrong"]:
                print(f"  {line}", flush=True)
    wrong = {family: item["wrong"] for family, item in found.items() if item["wrong"]}
    # Where nothing was accepted, nothing was tested.
    untested = [family for family, item in found.items() if item["verifies"] and not item["accepted"]]
    counted = {name: sum(item[name] for item in found.values()) for name in ("cases", "same", "drafted", "accepted")}
    shapes = {shape: sum(item["verifies"] == shape for item in found.values()) for shape in (*SHAPES, "")}
    value = {"families": len(found), "tree": shapes["tree"], "chain": shapes["chain"], "refuse": shapes[""], **counted}
    detail = {"tokens": size.tokens, "wrong": wrong, "without_accepted": untested, "families": found}
    return Measurement(NAME, value, BAR, not wrong and not untested, detail)


def compare(family: str, folder: Path, number: int, size: Size) -> dict[str, Any]:
    """How many cases of `family`, the `number`th, give what plain decoding gives; `folder` is for its checkpoints."""
    folders = checkpoints(family, folder)
    asked = requests(number, size.tokens)
    settings: dict[str, Any] = {"device": "cpu", "dtype": "float32", "threads": 1, "state_folder": folder / "state"}
    # For the rule that takes the most similar expert.
    prepare(open_blueprint(folders["same"], "float32"), folder / "state")
    with Engine.load(folders["same"], speculate="off", prefetch="off", batch=1, **settings) as plain:
        assert plain.plan.slots == plain.plan.experts
        expected = [plain.generate(*request) for request in asked]
        verifies, plan = runner_of(plain).verifies, plain.plan
        few = plan.top_k + 2
        sizes = (few, few * plan.layers, plan.experts)
        cases = islice(covering(number, sizes) if verifies else plainly(sizes), 0, None, size.every)
        results = [case_result(folders, settings, case, asked, expected, plain) for case in cases]
    return {
        "verifies": verifies,
        "reason": results[0].reason,
        "cases": len(results),
        "same": sum(not result.wrong for result in results),
        "drafted": sum(result.drafted for result in results),
        "accepted": sum(result.accepted for result in results),
        "wrong": [line for result in results for line in result.wrong],
    }


def checkpoints(family: str, folder: Path) -> dict[str, Path]:
    """The family's checkpoint, one with other weights, and one of another family."""
    with quiet_transformers():
        return {
            "same": make(family, folder / "same"),
            "other": make(family, folder / "other", seed=1),
            "foreign": make(OTHER_FAMILY, folder / "foreign"),
        }


def requests(number: int, tokens: int) -> list[tuple[list[int], Sampling]]:
    """Prompts of many lengths, half of them with repetitions; every fourth reply may end by itself."""
    draw = random.Random(number)
    prompts = [[draw.randint(3, 250) for _ in range(length)] for length in LENGTHS]
    for length, period in PERIODS.items():
        part = [draw.randint(3, 250) for _ in range(period)]
        prompts.append((part * length)[:length])
    return [
        (prompt, Sampling(max_tokens=tokens, temperature=0.0, ignore_eos=place % 4 != 3))
        for place, prompt in enumerate(prompts)
    ]


def ways(number: int) -> list[Drafting]:
    """Every way of drafting but the main ones. In the `number`th family; the shapes of some take turns."""
    shape, other = SHAPES[number % 2], SHAPES[1 - number % 2]
    passes = [Drafting(who, form, rule) for who in ("self", "ngram+self") for rule in RULES for form in SHAPES]
    return [
        Drafting("ngram", "chain"),
        *(way for way in passes if way != SELF),
        Drafting("model", shape, model="other"),
        Drafting("model", other, model="same"),
        Drafting("ngram+model", shape, model="same"),
        Drafting("auto", other, model="same"),
        Drafting("auto+self", shape, "auto"),
    ]


def covering(number: int, sizes: tuple[int, int, int]) -> Iterator[Case]:
    """The main ways at both extremes, then every other way once; sizes, prompts and batches take turns."""
    count = len(LENGTHS) + len(PERIODS)
    for first, slots in enumerate((sizes[0], sizes[2])):
        yield Case(NGRAM, slots, TOGETHER, tuple(range(count)), {})
        yield Case(SELF, slots, TOGETHER, tuple(range(first, count, 2)), SHALLOW if number % 2 else {})
    for place, drafting in enumerate(ways(number)):
        turn = number + place
        alone = turn // len(sizes) % 2 == 0
        prompts = tuple((3 * turn + step) % count for step in (0, 5, 2)[: 1 if alone else 3])
        bounds = {} if drafting.speculate == "ngram" or turn % 4 == 0 else SHALLOW
        yield Case(drafting, sizes[turn % len(sizes)], 1 if alone else TOGETHER, prompts, bounds)


def plainly(sizes: tuple[int, int, int]) -> Iterator[Case]:
    """What is asked of a family that refuses."""
    for place, drafting in enumerate(REFUSING):
        yield Case(drafting, sizes[place], TOGETHER, (2, 5, 7), {})


def case_result(
    folders: dict[str, Path],
    settings: dict[str, Any],
    case: Case,
    asked: list[tuple[list[int], Sampling]],
    expected: list[Completion],
    plain: Engine,
) -> Found:
    """Loads an engine for `case` and compares its replies; `plain` tells how near a tie a difference is."""
    drafting = case.drafting
    with Engine.load(
        folders["same"],
        expert_cache=case.slots,
        batch=case.batch,
        speculate=drafting.speculate,
        draft_shape=drafting.shape,
        draft_rule=drafting.rule,
        draft_model=folders[drafting.model] if drafting.model else None,
        **case.bounds,
        **settings,
    ) as engine:
        how = f"{drafting.describe()}, {case.slots} slots, batch {case.batch}"
        wrong = differing(engine, asked, expected, case.prompts, plain, how)
        stats = engine.stats
    return Found(stats.drafted, stats.accepted, stats.speculation, wrong)


def differing(
    engine: Engine,
    asked: Sequence[tuple[list[int], Sampling]],
    expected: Sequence[Completion],
    numbers: Sequence[int],
    plain: Engine,
    how: str,
) -> list[str]:
    """What is known of the requests `numbers` that `engine`, described by `how`, does not answer as expected."""
    wrong = []
    for place, reply in engine.generate_batch(asked[number] for number in numbers):
        number = numbers[place]
        if isinstance(reply, Exception):
            raise reply
        if (reply.token_ids, reply.finish_reason) != (expected[number].token_ids, expected[number].finish_reason):
            wrong.append(f"{how}, prompt {number}: {difference(plain, expected[number], reply)}")
    return wrong


def difference(plain: Engine, expected: Completion, reply: Completion) -> str:
    """Where two replies part, and how far apart the two tokens are for plain decoding."""
    pairs = list(zip(expected.token_ids, reply.token_ids, strict=False))
    first = next((place for place, (own, other) in enumerate(pairs) if own != other), None)
    if first is None:
        return f"{len(reply.token_ids)} tokens instead of {len(expected.token_ids)}"
    runner = runner_of(plain).sequential
    tokens = [*expected.prompt_token_ids, *expected.token_ids[:first]]
    logits = runner.step(runner.start(len(tokens)), tokens)
    own, other = pairs[first]
    spread = float(logits.max() - logits.min())
    return f"token {first} is {other}, not {own}, {float(logits[own] - logits[other]) / spread:.1e} of the spread below"
