"""What drafts, and how much: the settings of speculation, checked."""

from __future__ import annotations

from dataclasses import dataclass

from edgemoe.config import EngineConfig
from edgemoe.errors import PlanError
from edgemoe.experts.draft_routing import RULES

DRAFTERS = ("ngram", "self", "model")
SHAPES = ("tree", "chain")
RULE_CHOICES = ("auto", *RULES)


@dataclass(frozen=True)
class DraftSettings:
    """How one engine drafts."""

    drafters: frozenset[str]
    """Any of `DRAFTERS`; with none there is no speculation."""
    priced: bool
    """Whether a node must pay for itself to be drafted; else as many as fit the bounds are."""
    shape: str
    """"tree" or "chain"."""
    rule: str
    """What a self-draft does with an expert that is not resident: one of `RULES`, or "auto" for the best of them."""
    nodes: int
    """Most drafted tokens of a sequence and cycle."""
    depth: int
    """Most drafted tokens that follow one another."""

    def describe(self) -> str:
        """What drafts, in a few words."""
        if not self.drafters:
            return "off: asked for"
        when = "while it pays" if self.priced else "always"
        tokens = f"{self.nodes} token{'s' if self.nodes > 1 else ''}"
        return f"{' and '.join(sorted(self.drafters))}, {when}, {self.shape}s of at most {tokens}"


def draft_settings(config: EngineConfig) -> DraftSettings:
    """The settings that `config` asks for; PlanError names what is wrong with it.

    "auto" drafts what pays: n-grams, and with a draft model that one too; "auto+self" has the model itself beside
    the n-grams. Drafters that are named without "auto" always draft.
    """
    asked = config.speculate.strip().lower()
    priced = asked in ("auto", "auto+self")
    if priced:
        drafters = {"ngram"} | ({"model"} if config.draft_model else set()) | set(asked.split("+")[1:])
    elif asked == "off":
        drafters = set()
    else:
        drafters = set(asked.split("+"))
        if not drafters <= set(DRAFTERS):
            raise PlanError(f"--speculate {config.speculate!r} is none of {_CHOICES}: give one of these")
    if {"self", "model"} <= drafters:
        raise PlanError("both a draft model and the model itself cannot draft: give one of them with --speculate")
    if "model" in drafters and not config.draft_model:
        raise PlanError("--speculate model needs a second checkpoint: name it with --draft-model")
    one_of("--draft-shape", config.draft_shape, SHAPES)
    one_of("--draft-rule", config.draft_rule, RULE_CHOICES)
    for option, value in (("--draft-nodes", config.draft_nodes), ("--draft-depth", config.draft_depth)):
        if not 1 <= value <= MAX_NODES:
            raise PlanError(f"{option} {value} is not possible: give a number from 1 to {MAX_NODES}")
    return DraftSettings(
        drafters=frozenset(drafters),
        priced=priced,
        shape=config.draft_shape,
        rule=config.draft_rule,
        nodes=config.draft_nodes,
        depth=min(config.draft_depth, config.draft_nodes),
    )


MAX_NODES = 256
_CHOICES = "auto, auto+self, off, ngram, self, model, ngram+self, ngram+model"


def one_of(option: str, value: str, choices: tuple[str, ...]) -> None:
    """PlanError, naming `option`, unless `value` is among `choices`."""
    if value not in choices:
        raise PlanError(f"{option} {value!r} is none of {', '.join(choices)}: give one of these")
