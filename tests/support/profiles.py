"""A machine that never was, whose every second is known: what fits and predictions are tested on."""

from __future__ import annotations

import random

from edgemoe.measure.profiler import LEAN_SHAPES, LEAN_SHARE, SHAPES
from edgemoe.plan.performance_model import Locality, MachineSpeed, ModelShape, PerformanceModel, Routing, Times
from edgemoe.plan.profile import CardSpeed, Profile, ProfileConditions, ProfilePoint

CONDITIONS = ProfileConditions("Abacus 9", 2, 24, "cpu", 0, "2.13.0", "bfloat16", "bf16", 2, None, False, "file")
CARD = CardSpeed(
    pcie=24e9, pcie_beside=20e9, vram=350e9, launch_seconds=5e-6, read_seconds=2.5e-5, cpu=40e9, cpu_beside=30e9
)
"""The speeds of a card that never was."""


def known_model(bulk_from: int = 129) -> PerformanceModel:
    """Six layers of 32 experts of 14 MB, top-4: a token 2 ms, an expert of all layers 3 ms, a missing one 3.5 ms."""
    return PerformanceModel(
        ModelShape(layers=6, experts=32, top_k=4, record_nbytes=14_000_000, dense_nbytes=4_000_000, itemsize=2),
        MachineSpeed(memory=50e9, arithmetic=300e9, link=4e9),
        Routing(experts=28, among=0.8, within=0.6),
        Locality(few=3.0, all=0.8),
        Times(
            bias=0.002, token=0.002, expert=0.003, load=0.001, knee=0.5, base=1.5,
            draft_bias=1e-4, draft_sequence=5e-5, reject_bias=5e-5, reject_sequence=4e-5,
            exposed=0.7, bulk_from=bulk_from, bulk_bias=0.15, bulk_token=0.0009, bulk_exposed=0.4,
        ),
    )  # fmt: skip


def points_of(model: PerformanceModel, noise: float = 0.0, seed: int = 0) -> list[ProfilePoint]:
    """What a profile would measure there, each time off by `noise` or so."""
    chance = random.Random(seed)
    found = []
    for share, shapes in ((1.0, SHAPES), (LEAN_SHARE, LEAN_SHAPES)):
        for batch, tokens in shapes:
            experts = model.activated(batch, tokens)
            misses = model.shape.layers * experts * (1 - model.hit_rate(share, batch, tokens))
            seconds = model.pass_seconds(batch * tokens, experts, misses) * (1 + chance.gauss(0, noise))
            times = model.times
            draft = times.draft_bias + times.draft_sequence * batch if tokens > 1 else 0.0
            reject = times.reject_bias + times.reject_sequence * batch
            found.append(ProfilePoint(batch, tokens, share, seconds, experts, misses, draft, reject))
    return found


def known_profile(conditions: ProfileConditions = CONDITIONS) -> Profile:
    """The profile of that machine, without noise."""
    model = known_model()
    return Profile("2026-01-31", conditions, model, tuple(points_of(model)))
