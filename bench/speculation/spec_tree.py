"""`spec-tree`: draws a real draft tree of the shipped model, each node with the experts that it wants."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.measurement import BaseSize, Measurement
from bench.support.alternating import answer, loaded, questions
from bench.support.engine_parts import cache_of, speculation_of, token_texts
from edgemoe import Engine, Sampling
from edgemoe.draft.pass_drafter import Branch
from edgemoe.draft.proposal import Proposal, StepReport
from edgemoe.model.draft_tree import DraftTree
from edgemoe.model.pass_logits import LogitsRows

NAME = "spec-tree"
BAR = "a picture of a tree with an accepted path and a rejected branch"
ACCEPTED, REJECTED, RESIDENT, MISSING = "#1f6f8b", "#8a8a8a", "#a9c9d6", "#e07a3f"
WIDTH, HEIGHT = 0.64, 0.78
"""Of a node's box, where nodes are 1 apart in both directions: edges run between the columns of boxes."""


@dataclass(frozen=True, kw_only=True)
class Size(BaseSize):
    """What is asked while trees are watched."""

    tasks: tuple[str, ...] = ()
    """Of the shipped model; all of them where none is named."""
    tokens: int = 60


FULL, SMALL = Size(), Size(small=True, tasks=("repeat",), tokens=12)


@dataclass
class Cycle:
    """One draft as it was grown: its tree, what was resident, the experts that each node wanted, what was accepted."""

    tree: DraftTree
    resident: list[set[int]]
    wanted: dict[int, list[list[int]]] = field(default_factory=dict)
    """By node and layer."""
    path: Sequence[int] = ()


def run(size: Size = FULL) -> Measurement:
    """Half of the experts cached; of the cycles of a reply to every task one that branches much."""
    with loaded(None, expert_cache="50%", speculate="self", draft_nodes=10, draft_depth=5) as engine:
        cycles = watch(engine)
        for question in questions(1, size.tasks):
            answer(engine, question, Sampling(temperature=0, max_tokens=size.tokens))
        chosen = max(cycles, key=_interest)
        texts = dict(enumerate(token_texts(engine, chosen.tree.tokens)))
    picture = size.picture("draft-tree")
    draw(chosen, texts, picture)
    value = {"nodes": chosen.tree.drafted, "accepted": len(chosen.path) - 1, "cycles": len(cycles)}
    return Measurement(NAME, value, BAR, 3 <= len(chosen.path) <= chosen.tree.drafted, {"picture": picture.name})


def _interest(cycle: Cycle) -> tuple[bool, int]:
    return 3 <= len(cycle.path) <= 5, sum(len(cycle.tree.children(node)) > 1 for node in range(len(cycle.tree)))


def watch(engine: Engine) -> list[Cycle]:
    """The cycles that `engine` will make, as it makes them; it answers one request at a time."""
    speculation, cache = speculation_of(engine), cache_of(engine)
    passes = speculation._passes
    assert passes is not None, "nothing drafts by passes"
    cycles: list[Cycle] = []
    run_nodes, learn_step, layers = passes.run, speculation.learn, range(engine.plan.layers)

    def run(branches: Sequence[Branch]) -> list[LogitsRows]:
        tree = branches[0].tree
        if not cycles or cycles[-1].tree is not tree:
            cycles.append(Cycle(tree, [set(cache.residents(layer)) for layer in layers]))
        logits = run_nodes(branches)
        for row, node in enumerate(branches[0].nodes):
            shares = (layer[row] for layer in passes.wanted)
            cycles[-1].wanted[node] = [each.topk(engine.plan.top_k).indices.tolist() for each in shares]
        return logits

    def learn(proposal: Proposal, report: StepReport) -> None:
        for request, verified in report.verified.items():
            if cycles and cycles[-1].tree is proposal.trees[request]:
                cycles[-1].path = verified.path
        learn_step(proposal, report)

    passes.run, speculation.learn = run, learn  # type: ignore[method-assign]
    return cycles


def draw(cycle: Cycle, texts: Mapping[int, str], path: Path) -> None:
    """The tree from left to right. In each box are a token, and below it a column a layer and a square an expert."""
    from matplotlib.figure import Figure

    tree, rows = cycle.tree, _rows(cycle.tree)
    figure = Figure(figsize=(1.95 * (max(tree.depths) + 1), 1.15 * (max(rows.values()) + 2)), layout="constrained")
    axes: Any = figure.subplots()
    for node, parent in enumerate(tree.parents):
        taken = node in cycle.path
        at = (float(tree.depths[node]), -rows[node])
        if parent >= 0:
            _draw_edge(axes, (tree.depths[parent], -rows[parent]), at, taken=taken)
        _draw_box(axes, at, texts[node] + f"  {tree.probabilities[node]:.2f}", taken=taken)
        _draw_experts(axes, cycle, node, at)
    _draw_legend(axes, len(cycle.resident))
    axes.set_xlim(-0.45, max(tree.depths) + 0.45)
    axes.set_ylim(-max(rows.values()) - 1.15, 0.5)
    axes.axis("off")
    axes.set_title(
        f"A draft of the shipped model for itself, half of its experts resident: {len(cycle.path) - 1} of "
        f"{tree.drafted} drafted tokens accepted",
        fontsize=11,
    )
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def _draw_edge(axes: Any, start: tuple[float, float], end: tuple[float, float], *, taken: bool) -> None:
    style = {"color": ACCEPTED, "linewidth": 2.4} if taken else {"color": REJECTED, "linewidth": 1.2, "dashes": (4, 2)}
    # An accepted edge lies over the others where they share a part of the way.
    axes.plot(*zip(*route(start, end), strict=True), zorder=2 if taken else 1, **style)


def route(start: tuple[float, float], end: tuple[float, float]) -> list[tuple[float, float]]:
    """From the right side of the box at `start` to the left side of that at `end`, with turns between the columns."""
    left, right = start[0] + WIDTH / 2, end[0] - WIDTH / 2
    middle = (left + right) / 2
    return [(left, start[1]), (middle, start[1]), (middle, end[1]), (right, end[1])]


def _draw_box(axes: Any, at: tuple[float, float], label: str, *, taken: bool) -> None:
    from matplotlib.patches import Rectangle

    color, width = (ACCEPTED, 2.4) if taken else (REJECTED, 1.2)
    corner = (at[0] - WIDTH / 2, at[1] - HEIGHT / 2)
    axes.add_patch(Rectangle(corner, WIDTH, HEIGHT, facecolor="white", edgecolor=color, linewidth=width, zorder=3))
    axes.text(at[0], at[1] + HEIGHT / 2 - 0.13, label, ha="center", va="center", fontsize=10, zorder=4)


def _draw_experts(axes: Any, cycle: Cycle, node: int, at: tuple[float, float]) -> None:
    from matplotlib.patches import Rectangle

    wanted = cycle.wanted.get(node, [])
    if not wanted:
        axes.text(at[0], at[1] - 0.1, "leaf: not run", ha="center", va="center", fontsize=9, color=REJECTED, zorder=4)
        return
    step = (0.9 * WIDTH / len(wanted), 0.58 * HEIGHT / max(map(len, wanted)))
    for layer, experts in enumerate(wanted):
        for place, expert in enumerate(sorted(experts, key=lambda each: each not in cycle.resident[layer])):
            color = RESIDENT if expert in cycle.resident[layer] else MISSING
            corner = (at[0] - 0.45 * WIDTH + layer * step[0], at[1] + 0.1 - (place + 1) * step[1])
            axes.add_patch(Rectangle(corner, 0.82 * step[0], 0.78 * step[1], color=color, linewidth=0, zorder=4))


def _draw_legend(axes: Any, layers: int) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    entries: list[tuple[Any, str]] = [
        (Line2D([], [], color=ACCEPTED, linewidth=2.4), "accepted by the verification"),
        (Line2D([], [], color=REJECTED, linewidth=1.2, dashes=(4, 2)), "rejected"),
        (Patch(color=RESIDENT), "expert wanted, resident"),
        (Patch(color=MISSING), "expert wanted, missing"),
    ]
    axes.legend(
        [handle for handle, _ in entries],
        [label for _, label in entries],
        title=f"box: a token, the estimated probability of its path, a column of experts for each of {layers} layers",
        loc="lower left",
        frameon=False,
        fontsize=10,
        title_fontsize=10,
        ncols=4,
        alignment="left",
    )


def _rows(tree: DraftTree) -> dict[int, float]:
    """Rows of the picture: leaves one below the other, the rest level with their likeliest child."""
    rows: dict[int, float] = {}
    free = iter(range(len(tree)))

    def place(node: int) -> float:
        children = sorted(tree.children(node), key=lambda child: -tree.probabilities[child])
        below = [place(child) for child in children]
        rows[node] = below[0] if below else float(next(free))
        return rows[node]

    place(0)
    return rows
