"""`mtp-exact`: replies with a checkpoint's own draft head against plain decoding, its drafts against transformers'."""

from __future__ import annotations

import copy
import random
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bench.exactness.spec_exact import differing
from bench.measurement import BaseSize, Measurement
from bench.support.engine_parts import runner_of
from bench.support.zoo import TESTED
from bench.support.zoo_heads import imitating, make_with_head
from edgemoe import Completion, Engine, PlanError, Sampling
from edgemoe.model.head_cache import HeadCache
from edgemoe.model.head_runner import AFTER, HeadInput
from edgemoe.quiet import quiet_transformers

NAME = "mtp-exact"
BAR = "equal to plain decoding; drafts equal to transformers' MtpModel where it has one"
DRAFTERS = ("mtp", "ngram+mtp")
FORMS: dict[str, dict[str, str]] = {
    "float32": {"dtype": "float32"},
    "bf16": {"dtype": "bfloat16"},
    "int8": {"dtype": "float32", "experts": "int8"},
}
"""What the weights are computed and kept in."""
ROUNDED = "bf16"
"""The form in which several tokens a pass may round otherwise than one, where sequences of the family share no pass."""
ORACLES = ("deepseek_v3", "glm4_moe")
"""Families for which transformers runs a head itself."""
PROMPTS = ((1, 1), (23, 23), (60, 7), (40, 40))
"""Tokens of each prompt, and after how many it repeats itself; every second reply is sampled."""
TOGETHER = 3
SETTINGS: dict[str, Any] = {"device": "cpu", "threads": 1, "state_folder": "none"}


@dataclass(frozen=True, kw_only=True)
class Size(BaseSize):
    """The families, the forms of their weights, the tokens of a reply, and those along which drafts are compared."""

    families: tuple[str, ...] = TESTED
    forms: tuple[str, ...] = tuple(FORMS)
    tokens: int = 200
    oracle_tokens: int = 100


FULL, SMALL = Size(), Size(small=True, families=("glm4_moe",), forms=("float32",), tokens=12, oracle_tokens=10)


class Case(NamedTuple):
    """One engine whose replies are compared."""

    form: str
    drafter: str
    slots: int
    judged: bool
    """Whether every difference counts; else they may be of rounding alone, and are listed."""

    def describe(self) -> str:
        """Its settings, in a few words."""
        return f"{self.drafter}, {self.form}, {self.slots} slots"


class Found(NamedTuple):
    """What came of one case: the replies that differ, and what the head drafted and was right about."""

    case: Case
    differing: list[str]
    drafted: int
    accepted: int


def run(size: Size = FULL) -> Measurement:
    """Every family that a head can be made for, with few slots and with one for every expert."""
    torch.set_num_threads(1)
    found, without = dict[str, dict[str, Any]](), dict[str, str]()
    with tempfile.TemporaryDirectory() as root:
        for number, family in enumerate(size.families):
            item = compare(family, Path(root) / family, number, size)
            if isinstance(item, str):
                without[family] = item
                print(f"{family:20} not tested: {item}", flush=True)
                continue
            found[family] = item
            print(f"{family:20} {describe(item)}", flush=True)
            for line in item["wrong"]:
                print(f"  {line}", flush=True)
    wrong = {family: item["wrong"] for family, item in found.items() if item["wrong"]}
    # Where nothing was drafted, nothing was tested.
    untested = [family for family, item in found.items() if item["undrafted"]]
    counted = {name: sum(item[name] for item in found.values()) for name in ("cases", "same", "drafted", "accepted")}
    compared = sum(item["oracle"] for item in found.values())
    value = {"families": len(found), "without": len(without), **counted, "compared_drafts": compared}
    detail = {"tokens": size.tokens, "wrong": wrong, "untested": untested, "without": without, "families": found}
    return Measurement(NAME, value, BAR, not wrong and not untested and bool(found), detail)


def describe(item: dict[str, Any]) -> str:
    """What came of one family, in a line."""
    oracle = f", {item['oracle']} drafts compared with transformers'" if item["oracle"] else ""
    undrafted = f", nothing drafted in {item['undrafted']}" if item["undrafted"] else ""
    counts = f"accepted {item['accepted']} of {item['drafted']}"
    rounded = f", {len(item['rounded'])} replies rounded otherwise" if item["rounded"] else ""
    return f"{item['same']:2} of {item['cases']:2} the same, {counts}{rounded}{oracle}{undrafted}"


def compare(family: str, folder: Path, number: int, size: Size) -> dict[str, Any] | str:
    """How many cases of `family`, the `number`th, give what plain decoding gives; or why its head is not used."""
    try:
        with quiet_transformers():
            made = make_with_head(family, folder / "imitating", seed=number)
    except ValueError:
        return "no layer of it has attention and experts, as a head has"
    reason = refusal(imitating(made))
    if reason:
        return reason
    results = [result for form in size.forms for result in of_form(made, form, number, size.tokens)]
    wrong = [line for result in results for line in result.differing if result.case.judged]
    compared = 0
    if family in ORACLES:
        # Its values are random, so that nothing that a head is made of is left out.
        with quiet_transformers():
            random_head = make_with_head(family, folder / "random", seed=number, copies=True)
        compared, others = against_transformers(random_head, number, size.oracle_tokens)
        wrong += others
    return {
        "cases": len(results),
        "same": sum(not result.differing for result in results),
        "drafted": sum(result.drafted for result in results),
        "accepted": sum(result.accepted for result in results),
        "undrafted": [result.case.describe() for result in results if not result.drafted],
        "rounded": [line for result in results for line in result.differing if not result.case.judged],
        "oracle": compared,
        "wrong": wrong,
    }


def refusal(folder: Path) -> str:
    """Why the head of a checkpoint does not draft; empty where it does."""
    try:
        with Engine.load(folder, speculate="mtp", dtype="float32", **SETTINGS) as engine:
            runner = runner_of(engine)
            if runner.head is not None:
                return ""
            return engine.stats.speculation if runner.verifies else runner.refusal
    except PlanError as error:
        return str(error)


# --- replies -------------------------------------------------------------------------------------------


def of_form(folder: Path, form: str, number: int, tokens: int) -> list[Found]:
    """Every case of one form of the weights."""
    asked = requests(number, tokens)
    settings = {**SETTINGS, **FORMS[form]}
    with Engine.load(folder, speculate="off", prefetch="off", batch=1, **settings) as plain:
        expected = [plain.generate(*request) for request in asked]
        few, every = plain.plan.top_k + 2, plain.plan.experts
        together = sum(length for length, _ in PROMPTS)
        runner = runner_of(plain)
        judged = form != ROUNDED or (runner.packs and together <= runner.sequential.batch_invariant_tokens)
        cases = [Case(form, drafter, slots, judged) for drafter in DRAFTERS for slots in (few, every)]
        return [case_result(folder, settings, case, asked, expected, plain) for case in cases]


def requests(number: int, tokens: int) -> list[tuple[list[int], Sampling]]:
    """Prompts with and without repetitions, greedy and sampled in turns."""
    draw, found = random.Random(number), []
    for place, (length, period) in enumerate(PROMPTS):
        part = [draw.randint(3, 250) for _ in range(period)]
        how: dict[str, Any] = {"temperature": 0.8, "top_p": 0.95, "seed": place} if place % 2 else {"temperature": 0.0}
        found.append(((part * length)[:length], Sampling(max_tokens=tokens, ignore_eos=True, **how)))
    return found


def case_result(
    folder: Path,
    settings: dict[str, Any],
    case: Case,
    asked: list[tuple[list[int], Sampling]],
    expected: list[Completion],
    plain: Engine,
) -> Found:
    """Loads an engine for `case` and compares its replies; `plain` tells how near a tie a difference is."""
    with Engine.load(folder, speculate=case.drafter, expert_cache=case.slots, batch=TOGETHER, **settings) as engine:
        wrong = differing(engine, asked, expected, range(len(asked)), plain, case.describe())
        stats = engine.stats
    return Found(case, wrong, stats.drafted_by.get("mtp", 0), stats.accepted_by.get("mtp", 0))


# --- drafts --------------------------------------------------------------------------------------------


def against_transformers(folder: Path, number: int, tokens: int) -> tuple[int, list[str]]:
    """Drafted tokens that were compared along a greedy reply, two at each of its tokens; those that differ."""
    prompt = requests(number, 1)[1][0]
    with Engine.load(folder, speculate="mtp", dtype="float32", **SETTINGS) as engine:
        reply = engine.generate(prompt, Sampling(max_tokens=tokens, temperature=0.0, ignore_eos=True))
        text = [*prompt, *reply.token_ids]
        found = drafts(engine, text, len(prompt))
    expected = transformers_drafts(folder, text, len(prompt))
    wrong = [
        f"drafts after {place} tokens are {own}, transformers' {other}"
        for place, (own, other) in enumerate(zip(found, expected, strict=True), start=len(prompt) + 1)
        if own != other
    ]
    return sum(map(len, expected)), wrong


def drafts(engine: Engine, text: Sequence[int], prompt: int) -> list[list[int]]:
    """Two tokens that the head drafts after each token of `text` behind the first `prompt` ones."""
    runner, found = runner_of(engine), []
    assert runner.head is not None
    cache = runner.start(len(text))
    own = cache.head
    assert isinstance(own, HeadCache)
    for end in range(prompt, len(text)):
        runner.step(cache, text[cache.tokens : end])
        count = own.waiting
        follow = text[own.rows + 1 : own.rows + 1 + count]
        (output,) = runner.head.run([HeadInput(own, follow, own.peek(count, AFTER), 1)])
        own.drop_first(count)
        first = int(torch.as_tensor(output.logits)[0].argmax())
        own.mark_rows()
        (output,) = runner.head.run([HeadInput(own, [first], output.hidden[:, AFTER], 1)])
        own.drop_rows(end)
        found.append([first, int(torch.as_tensor(output.logits)[0].argmax())])
    return found


def transformers_drafts(folder: Path, text: Sequence[int], prompt: int) -> list[list[int]]:
    """The same by transformers' own head."""
    from transformers import AutoModelForCausalLM
    from transformers.cache_utils import MtpCache
    from transformers.modeling_layers import MtpModel

    with quiet_transformers(), torch.inference_mode():
        loaded: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        model = loaded.eval()
        # It leaves these out for the published numbers of layers only.
        model._keys_to_ignore_on_load_unexpected = [rf"model\.layers\.{model.config.num_hidden_layers}\..*"]
        mtp: Any = MtpModel.from_pretrained(model, device_map={"": "cpu"}).eval()
        hidden = model(torch.tensor([text[:-1]]), output_hidden_states=True).hidden_states[-1]
        cache, found, first = MtpCache(config=model.config.get_mtp_config()), list[list[int]](), 0
        for end in range(prompt, len(text)):
            positions = torch.arange(first + 1, end + 1)[None]
            follow = torch.tensor([text[first + 1 : end + 1]])
            states = mtp.forward_layer(0, hidden[:, first:end], positions, cache, input_ids=follow)[:, -1:]
            drafted = mtp._project_to_logits(states).argmax(-1)
            place = torch.tensor([[end + 1]])
            after = mtp.forward_layer(0, states, place, copy.deepcopy(cache), input_ids=drafted)
            found.append([int(drafted), int(mtp._project_to_logits(after).argmax())])
            first = end
    return found
