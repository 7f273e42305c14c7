"""`spec-tree`: draws a real draft tree of the shipped model, each node with the experts that it wants."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from bench.measurement import Measurement
from bench.support.alternating import answer, loaded, questions
from edgemoe import Engine, Sampling
from edgemoe.draft.pass_drafter import Branch, PassDrafter
from edgemoe.model.draft_tree import DraftTree

NAME = "spec-tree"
BAR = "a picture of a tree with an accepted path and a rejected branch"
LABEL = 0.2
"""How far a node's label is above the squares of its experts."""
PICTURE = Path(__file__).parents[2] / "docs" / "benchmarks" / "draft-tree.svg"
ACCEPTED, REJECTED, RESIDENT, MISSING = "#1f6f8b", "#b9b9b9", "#d7e3e8", "#e07a3f"


@dataclass
class Cycle:
    """One draft as it was grown: its tree, what was resident, the experts that each node wanted, what was accepted."""

    tree: DraftTree
    resident: list[set[int]]
    wanted: dict[int, list[list[int]]] = field(default_factory=dict)
    path: Sequence[int] = ()


def run() -> Measurement:
    """Half of the experts cached; of the cycles of a reply to every task one that branches much."""
    with loaded(None, expert_cache="50%", speculate="self", draft_nodes=10, draft_depth=5) as engine:
        cycles = watch(engine)
        for question in questions(1):
            answer(engine, question, Sampling(temperature=0, max_tokens=60))
        chosen = max(cycles, key=_interest)
        draw(chosen, engine._tokenizer, PICTURE)
    value = {"nodes": chosen.tree.drafted, "accepted": len(chosen.path) - 1, "cycles": len(cycles)}
    return Measurement(NAME, value, BAR, 3 <= len(chosen.path) <= chosen.tree.drafted, {"picture": PICTURE.name})


def _interest(cycle: Cycle) -> tuple[bool, int]:
    return 3 <= len(cycle.path) <= 5, sum(len(cycle.tree.children(node)) > 1 for node in range(len(cycle.tree)))


def watch(engine: Engine) -> list[Cycle]:
    """The cycles that `engine` will make, as it makes them."""
    speculation: Any = engine._scheduler.speculation
    cache, passes = engine._loaded().cache, speculation._passes
    cycles: list[Cycle] = []
    run, learn, layers = passes.run, speculation.learn, range(engine.plan.layers)

    def running(branches: Sequence[Branch]) -> list[torch.Tensor]:
        tree = branches[0].tree
        if not cycles or cycles[-1].tree is not tree:
            cycles.append(Cycle(tree, [set(cache.residents(layer)) for layer in layers]))
        logits = run(branches)
        _note(cycles[-1], branches[0], passes, engine.plan.top_k)
        return list(logits)

    def learning(tree: DraftTree, path: Sequence[int], made: int) -> None:
        cycles[-1].path = path
        learn(tree, path, made)

    passes.run, speculation.learn = running, learning
    return cycles


def _note(cycle: Cycle, branch: Branch, passes: PassDrafter, top_k: int) -> None:
    for row, node in enumerate(branch.nodes):
        cycle.wanted[node] = [shares[row].topk(top_k).indices.tolist() for shares in passes.wanted]


def draw(cycle: Cycle, tokenizer: Any, path: Path) -> None:
    """The tree from left to right; under each node a column a layer, a square an expert."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot
    from matplotlib.patches import Rectangle

    tree = cycle.tree
    heights = _heights(tree)
    figure, axes = pyplot.subplots(
        figsize=(1.9 * (max(tree.depths) + 1), 1.25 * (max(heights.values()) + 1)), layout="constrained"
    )
    for node, parent in enumerate(tree.parents):
        at = (tree.depths[node], -heights[node])
        taken = node in cycle.path
        if parent >= 0:
            line = {"color": ACCEPTED if taken else REJECTED, "linewidth": 2.2 if taken else 1.2, "zorder": 0}
            axes.plot([tree.depths[parent], at[0]], [LABEL - heights[parent], LABEL + at[1]], **line)
        _draw_node(axes, cycle, node, tokenizer.decode([tree.tokens[node]]), at, taken=taken)
    legend = {"accepted": ACCEPTED, "rejected": REJECTED, "resident expert": RESIDENT, "missing, foretold": MISSING}
    handles = [Rectangle((0, 0), 1, 1, color=color) for color in legend.values()]
    axes.legend(handles, list(legend), loc="lower left", frameon=False, fontsize=8, ncols=2)
    axes.set_xlim(-0.55, max(tree.depths) + 0.55)
    axes.set_ylim(-max(heights.values()) - 0.6, 0.45)
    axes.axis("off")
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path)
    pyplot.close(figure)


def _draw_node(axes: Any, cycle: Cycle, node: int, text: str, at: tuple[float, float], *, taken: bool) -> None:
    from matplotlib.patches import Rectangle

    shown = text.replace(" ", "\N{OPEN BOX}").replace("\n", "\N{DOWNWARDS ARROW WITH CORNER LEFTWARDS}")
    label = f"{shown}  {cycle.tree.probabilities[node]:.2f}"
    box = {"boxstyle": "round,pad=0.25", "facecolor": "white", "edgecolor": ACCEPTED if taken else REJECTED}
    axes.text(at[0], at[1] + LABEL, label, ha="center", va="center", fontsize=9, bbox=box)
    for layer, experts in enumerate(cycle.wanted.get(node, [])):
        for place, expert in enumerate(sorted(experts, key=lambda each: each not in cycle.resident[layer])):
            color = RESIDENT if expert in cycle.resident[layer] else MISSING
            corner = (at[0] - 0.21 + 0.07 * layer, at[1] - 0.06 - 0.085 * place)
            axes.add_patch(Rectangle(corner, 0.06, 0.07, color=color, linewidth=0, zorder=2))


def _heights(tree: DraftTree) -> dict[int, float]:
    """Rows of the picture: leaves one below the other, the rest level with their likeliest child."""
    heights: dict[int, float] = {}
    rows = iter(range(len(tree)))

    def place(node: int) -> float:
        children = sorted(tree.children(node), key=lambda child: -tree.probabilities[child])
        below = [place(child) for child in children]
        heights[node] = below[0] if below else float(next(rows))
        return heights[node]

    place(0)
    return heights
