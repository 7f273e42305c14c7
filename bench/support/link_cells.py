"""The cells that speculation at batch 1 is measured in: cache sizes, and links that are throttled or the real disk."""

from __future__ import annotations

from typing import Any, NamedTuple

from bench.support.alternating import Answers

PLAIN: dict[str, Any] = {"speculate": "off", "prefetch": "off"}
"""Decoding with demanded loads only."""

ON_DEMAND: dict[str, Any] = {"expert_cache": 8} | PLAIN
"""As many slots as a layer's pass needs to keep the link busy, and nothing is kept from one layer to the next."""


class Cell(NamedTuple):
    """A share of the experts in the cache, and a link: GB/s (1e9 bytes), or None for the disk itself."""

    cache: str
    gbps: float | None

    @property
    def name(self) -> str:
        """What tables call it."""
        return f"{self.cache} of the experts, {'disk' if self.gbps is None else f'{self.gbps:g} GB/s'}"

    @property
    def settings(self) -> dict[str, Any]:
        """How an engine is loaded for it. The disk is read past the page cache, which could hold it all here."""
        link = {"file_reads": "direct"} if self.gbps is None else {"link_gbps": self.gbps, "file_reads": "cached"}
        return {"expert_cache": self.cache} | link


CELLS = [Cell(cache, gbps) for gbps in (1.0, 4.0, 16.0, None) for cache in ("25%", "50%")]


def link_nbytes_per_token(answers: Answers) -> float:
    """Expert bytes that crossed the link for each generated token, prompts included."""
    return answers.grew("bytes_loaded") / (answers.grew("tokens_generated") + answers.grew("tokens_prompt"))
