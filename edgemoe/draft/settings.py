"""The settings of speculation and of expert budgets, checked. Needs no torch."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from edgemoe.config import EngineConfig, choices_of
from edgemoe.errors import PlanError
from edgemoe.sizes import format_bytes, parse_bytes

if TYPE_CHECKING:
    from edgemoe.prefetch.budget import Budget

DRAFTERS = ("ngram", "mtp", "self", "model")
PASSES = frozenset(DRAFTERS) - {"ngram"}
"""Drafters that run passes, of which an engine has one."""
MAX_NODES = 256
"""Limit of `draft_nodes` and `draft_depth`."""


@dataclass(frozen=True)
class DraftSettings:
    """How one engine drafts."""

    drafters: frozenset[str]
    """Any of `DRAFTERS`; with none there is no speculation."""
    priced: bool
    """Whether a node must be worth its cost to be drafted; else all that fit the bounds are drafted."""
    shape: str
    """"tree" or "chain"."""
    rule: str
    """What a self-draft does with an expert that is not resident; "auto" is the best rule, as measured."""
    nodes: int
    """Most drafted tokens of a sequence and cycle."""
    depth: int
    """Most drafted tokens that follow one another."""
    note: str = ""
    """Why a drafter that was asked for is not among them; empty where all are."""

    def without_head(self, why: str) -> DraftSettings:
        """The same without the checkpoint's draft head, which cannot be run."""
        return replace(self, drafters=self.drafters - {"mtp"}, note=why)

    def describe(self) -> str:
        """What drafts, in a few words."""
        if not self.drafters:
            return f"off: {self.note or 'asked for'}"
        when = "while it pays" if self.priced else "always"
        tokens = f"{self.nodes} token{'s' if self.nodes > 1 else ''}"
        note = f" (not mtp: {self.note})" if self.note else ""
        return f"{' and '.join(sorted(self.drafters))}, {when}, {self.shape}s of at most {tokens}{note}"


@dataclass(frozen=True)
class BudgetSettings:
    """A budget on experts, and what becomes of choices outside of it."""

    budget: Budget
    dropped: str
    """"substitute" (the node chooses again inside) or "truncate" (the node does without)."""

    def describe(self) -> str:
        """What is lossy about it, in a few words."""
        from edgemoe.prefetch.budget import Unit

        amount, moved = self.budget.amount, self.budget.rule == "residency"
        if self.budget.unit is Unit.MASS:
            size = f"{100 * amount:.4g}% of each {'token' if moved else 'layer'}'s routing mass"
        elif self.budget.unit is Unit.EXPERTS:
            size = f"{amount:.0f} {'new ' if moved else ''}expert{'s' if amount != 1 else ''} a layer"
        else:
            size = f"{format_bytes(amount)} of {'new ' if moved else ''}experts a pass"
        return f"verifications of drafts keep to {size}"


def draft_settings(config: EngineConfig, *, head: bool = False, no_head: str = "") -> DraftSettings:
    """The settings that `config` asks for, of a checkpoint with a `head` that drafts; PlanError names what is wrong.

    "auto" drafts what pays: n-grams, and the draft model where one is named, else the head; "auto+self" has the model
    itself beside the n-grams. Drafters named without "auto" always draft. `no_head` is why a head is not used.
    """
    asked = config.speculate.strip().lower()
    priced = asked in ("auto", "auto+self")
    if priced:
        drafters = {"ngram"} | ({"model"} if config.draft_model else set()) | set(asked.split("+")[1:])
        if head and config.drafts_with_head:
            drafters.add("mtp")
    elif asked == "off":
        drafters = set()
    else:
        drafters = set(asked.split("+"))
        if not drafters <= set(DRAFTERS):
            check_choice("speculate", config.speculate)
    if len(drafters & PASSES) > 1:
        raise PlanError(
            f"{' and '.join(sorted(drafters & PASSES))} cannot draft together: give one of them as speculate="
        )
    if "mtp" in drafters and not head:
        why = no_head or "the checkpoint has no draft head"
        raise PlanError(f"speculate={config.speculate!r} is not possible, since {why}: give auto as speculate=")
    if "model" in drafters and not config.draft_model:
        raise PlanError("speculate='model' needs a second checkpoint: name it as draft_model=")
    for setting in ("draft_shape", "draft_rule"):
        check_choice(setting, getattr(config, setting))
    for setting in ("draft_nodes", "draft_depth"):
        if not 1 <= getattr(config, setting) <= MAX_NODES:
            raise PlanError(
                f"{setting}={getattr(config, setting)} is not possible: give a number from 1 to {MAX_NODES}"
            )
    return DraftSettings(
        drafters=frozenset(drafters),
        priced=priced,
        shape=config.draft_shape,
        rule=config.draft_rule,
        nodes=config.draft_nodes,
        depth=min(config.draft_depth, config.draft_nodes),
    )


def budget_settings(config: EngineConfig) -> BudgetSettings | None:
    """The budget that `config` asks for, or None; PlanError names what is wrong with it."""
    check_choice("budget_rule", config.budget_rule)
    check_choice("budget_dropped", config.budget_dropped)
    text = str(config.budget).strip().lower()
    return None if text == "off" else BudgetSettings(_budget(text, config.budget_rule), config.budget_dropped)


def _budget(text: str, rule: str) -> Budget:
    from edgemoe.prefetch.budget import Budget, Unit

    if re.fullmatch(r"\d+", text):
        unit, amount, least = Unit.EXPERTS, float(text), 1.0
    elif match := re.fullmatch(r"(\d+(?:\.\d+)?)%", text):
        unit, amount, least = Unit.MASS, float(match[1]) / 100, 1e-9
    else:
        try:
            unit, amount, least = Unit.NBYTES, float(parse_bytes(text)), 1.0
        except ValueError:
            raise PlanError(
                f'budget={text!r} is no size: give off, experts of a layer ("8"), a share of the routing mass '
                '("95%") or bytes of a pass ("64MiB")'
            ) from None
    if amount < least or (unit is Unit.MASS and amount > 1):
        raise PlanError(f"budget={text} is not possible: give at least 1 expert or byte, or a share up to 100%")
    return Budget(unit, amount, rule)


def check_choice(setting: str, value: str) -> None:
    """PlanError unless `value` is one of the words that `setting` may be."""
    if value not in choices_of(setting):
        raise PlanError(f"{setting}={value!r} is none of {', '.join(choices_of(setting))}: give one of these")
