"""Pictures are drawn from data that is handed over: here from little of it, and from what the documentation shows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bench.measurement import PICTURES
from bench.speculation import budget_curve, inverted_u, spec_tree
from edgemoe.model.draft_tree import DraftTree


def kept(name: str) -> Any:
    return json.loads((PICTURES / f"{name}.json").read_text())


def test_the_curves_of_the_documentation_can_be_drawn_again(tmp_path: Path) -> None:
    data = kept("inverted-u")
    readings = {name: {int(batch): gains for batch, gains in at.items()} for name, at in data["readings"].items()}
    inverted_u.draw(readings, tmp_path / "inverted-u.svg", data["rounds"])
    budget_curve.draw(kept("budget-curve"), tmp_path / "budget-curve.svg")
    for file in tmp_path.iterdir():
        assert "<!-- median of 5 rounds -->" in file.read_text() or "task score" in file.read_text()


def test_single_rounds_are_drawn_where_they_are_known(tmp_path: Path) -> None:
    readings = {name: {1: [1.0, 1.2, 1.1], 4: [1.5, 1.4, 1.6]} for name in inverted_u.TOP_K}
    inverted_u.draw(readings, tmp_path / "curve.svg", rounds=3)
    text = (tmp_path / "curve.svg").read_text()
    assert text.count("<!-- one round -->") == len(readings)
    assert text.count("<!-- best: 1.50 at 4 -->") == len(readings)


def branching() -> DraftTree:
    tree = DraftTree(0)
    for parent, token in ((0, 1), (0, 2), (1, 3), (1, 4), (2, 5), (3, 6)):
        tree.add(parent, token, 0.5)
    return tree


def test_no_edge_of_a_tree_crosses_a_box() -> None:
    tree = branching()
    rows = spec_tree._rows(tree)
    boxes = [(float(tree.depths[node]), -rows[node]) for node in range(len(tree))]
    assert len(set(boxes)) == len(tree)
    edges = [spec_tree.route(boxes[parent], boxes[node]) for node, parent in enumerate(tree.parents) if parent >= 0]
    assert len(edges) == tree.drafted
    assert not [(edge, box) for edge in edges for box in boxes if crosses(edge, box)]


def crosses(edge: list[tuple[float, float]], box: tuple[float, float]) -> bool:
    """Whether a level or upright part of `edge` goes through the inside of `box`; its side may be touched."""
    inside = [(box[0] - spec_tree.WIDTH / 2 + 1e-6, box[0] + spec_tree.WIDTH / 2 - 1e-6)]
    inside.append((box[1] - spec_tree.HEIGHT / 2, box[1] + spec_tree.HEIGHT / 2))
    parts = zip(edge, edge[1:], strict=False)
    return any(
        all(
            min(a, b) < high and max(a, b) > low
            for (a, b), (low, high) in zip(zip(*part, strict=True), inside, strict=True)
        )
        for part in parts
    )


def test_a_tree_is_drawn_with_what_is_known_of_it(tmp_path: Path) -> None:
    tree = branching()
    cycle = spec_tree.Cycle(tree, [{0, 1}, {2}], {0: [[0, 1], [2, 3]], 1: [[0, 5], [2, 4]]}, path=[0, 1, 3])
    spec_tree.draw(cycle, {node: f"t{node}" for node in range(len(tree))}, tmp_path / "tree.svg")
    text = (tmp_path / "tree.svg").read_text()
    assert text.count("<!-- leaf: not run -->") == len(tree) - 2
    assert "<!-- accepted by the verification -->" in text
