"""`rewind-exact`: verifications of families with states, indexers or compressed rows against single steps."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from bench.exactness.spec_exact import Case, Drafting, case_result, checkpoints, requests
from bench.measurement import BaseSize, Measurement
from bench.support.engine_parts import runner_of
from bench.support.zoo import TESTED
from edgemoe import Engine
from edgemoe.checkpoint.blueprint import open_blueprint
from edgemoe.draft.affinity_file import prepare
from edgemoe.model.draft_tree import DraftTree
from edgemoe.model.kv_cache import SequenceCache
from edgemoe.model.model_runner import ModelRunner, tree_input

NAME = "rewind-exact"
BAR = "states, logits and tokens equal to single steps, bit for bit in float32; every family verifies"
PROMPTS = (3, 9, 26)
"""Tokens, with which drafts begin inside and beyond the zoo's windows, and at many places of its compressed rows."""
DRAFTED = 4
LINES = 6
"""Most of a family's differences that are printed."""
WAYS = (
    Drafting("ngram"),
    Drafting("self"),
    Drafting("model", model="same"),
    Drafting("model", model="other"),
    Drafting("ngram+self"),
    Drafting("self", "chain", "fewer"),
)
"""How engines draft; families take turns with few slots, and one for every expert."""


@dataclass(frozen=True, kw_only=True)
class Size(BaseSize):
    """The families, the verifications after each prompt, the tokens of a reply and every how many-th engine is run."""

    families: tuple[str, ...] = TESTED
    cycles: int = 9
    tokens: int = 64
    every: int = 1


FULL, SMALL = Size(), Size(small=True, families=("lfm2_moe",), cycles=3, tokens=12, every=5)


def run(size: Size = FULL) -> Measurement:
    """Every family whose cache holds more than rows of keys and values."""
    torch.set_num_threads(1)
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for number, family in enumerate(size.families):
            item = compare(family, Path(folder) / family, number, size)
            if item is None:
                continue
            found[family] = item
            print(
                f"{family:20} verifies {item['verifies'] or item['reason']}, {item['verified']} verifications and "
                f"{item['engines']} engines, {len(item['wrong'])} wrong, "
                f"accepted {item['accepted']} of {item['drafted']}",
                flush=True,
            )
            for line in item["wrong"][:LINES]:
                print(f"  {line}", flush=True)
    wrong = {family: item["wrong"] for family, item in found.items() if item["wrong"]}
    plain = {family: item["reason"] for family, item in found.items() if not item["verifies"]}
    untested = [family for family, item in found.items() if not item["accepted"]]
    counted = {name: sum(item[name] for item in found.values()) for name in ("verified", "engines", "accepted")}
    shapes = {shape: sum(item["verifies"] == shape for item in found.values()) for shape in ("tree", "chain")}
    value = {"families": len(found), **shapes, **counted, "wrong": sum(map(len, wrong.values()))}
    detail = {"wrong": wrong, "plain": plain, "without_accepted": untested, "families": found}
    return Measurement(NAME, value, BAR, not wrong and not plain and not untested, detail)


def compare(family: str, folder: Path, number: int, size: Size) -> dict[str, Any] | None:
    """What came of one family, the `number`th; None for one whose cache holds rows alone."""
    folders = checkpoints(family, folder)
    settings: dict[str, Any] = {"device": "cpu", "dtype": "float32", "threads": 1, "state_folder": folder / "state"}
    prepare(open_blueprint(folders["same"], "float32"), folder / "state")
    with Engine.load(folders["same"], speculate="off", prefetch="off", batch=1, **settings) as plain:
        runner = runner_of(plain)
        if runner.start(1).holds_rows_alone:
            return None
        wrong = list(verifications(runner, number, size.cycles)) if runner.verifies else []
        asked = requests(number, size.tokens)
        expected = [plain.generate(*request) for request in asked]
        few, verified = (plain.plan.top_k + 2) * plain.plan.layers, len(PROMPTS) * size.cycles
        cases = [
            Case(
                way,
                (few, plain.plan.experts)[(number + place) % 2],
                4,
                tuple((number + place + step) % len(asked) for step in (0, 3, 5)),
                {},
            )
            for place, way in enumerate(WAYS)
        ]
        results = [
            case_result(folders, settings, case, asked, expected, plain) for case in islice(cases, 0, None, size.every)
        ]
    return {
        "verifies": runner.verifies,
        "reason": runner.refusal,
        "verified": verified if runner.verifies else 0,
        "engines": len(results),
        "drafted": sum(result.drafted for result in results),
        "accepted": sum(result.accepted for result in results),
        "wrong": wrong + [line for result in results for line in result.wrong],
    }


def verifications(runner: ModelRunner, number: int, cycles: int) -> Iterator[str]:
    """What differs where drafts are verified of which none, some and all tokens are right, from single steps."""
    draw = random.Random(number)
    for length in PROMPTS:
        prompt = [draw.randint(3, runner.vocabulary - 1) for _ in range(length)]
        cache = runner.start(8)
        logits = runner.step(cache, prompt)
        plain = cache.fork(cache.tokens, cache.capacity)
        for cycle in range(cycles):
            right = (0, 2, DRAFTED)[cycle % 3]
            tree, path = drafted(runner, plain, int(logits.argmax()), right, draw, trees=cycle % 2 == 0)
            base = cache.tokens
            cache.mark()
            rows = runner.run([tree_input(cache, tree, range(len(tree)), ())._replace(verifies=True)])[0]
            cache.rollback(base, path)
            for node in path:
                logits = runner.step(plain, [tree.tokens[node]])
                if not torch.equal(rows[node], logits):
                    yield f"logits of node {node} after {base} tokens"
            yield from (f"after {base} tokens and {right} accepted: {each}" for each in differences(cache, plain))


def drafted(
    runner: ModelRunner, plain: SequenceCache, root: int, right: int, draw: random.Random, *, trees: bool
) -> tuple[DraftTree, list[int]]:
    """A draft after `root` whose first `right` tokens are the model's own, and the nodes of these and the root."""
    ahead = plain.fork(plain.tokens, plain.capacity)
    tree, node, path, token = DraftTree(root), 0, [0], root
    for depth in range(DRAFTED):
        own = int(runner.step(ahead, [token]).argmax())
        wrong = (own + draw.randint(1, 50)) % runner.vocabulary
        if trees and runner.verifies == "tree":
            tree.add(node, wrong, 0.5)
        token = own if depth < right else wrong
        node = tree.add(node, token, 0.5)
        path += [node] if depth < right else []
    return tree, path


def differences(cache: SequenceCache, plain: SequenceCache) -> Iterator[str]:
    """Names of the tensors of two caches that are not the same to the bit."""
    pairs = zip(tensors(cache.kv), tensors(plain.kv), strict=True)
    for (name, found), (other, expected) in pairs:
        if name != other or found.shape != expected.shape or not torch.equal(found, expected):
            yield f"{name} {tuple(found.shape)} instead of {other} {tuple(expected.shape)}"


def tensors(kv: Any) -> Sequence[tuple[str, torch.Tensor]]:
    """The tensors that a cache holds, by name, without the spare rows of buffers."""
    parts = [(f"layer {number}", vars(layer)) for number, layer in enumerate(kv.layers)]
    parts.append(("cache", {name: value for name, value in vars(kv).items() if name != "layers"}))
    found = []
    for where, values in parts:
        for name, value in sorted(values.items()):
            inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
            for key, each in [("", value), *inner]:
                if isinstance(each, torch.Tensor) and not name.startswith("_"):
                    found.append((f"{name} {key} of {where}", each))
    return found
