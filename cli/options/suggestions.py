"""What somebody meant who wrote a name that does not exist."""

from __future__ import annotations

from collections.abc import Iterable

SYNONYMS = {
    "temperature": "temp",
    "max-new-tokens": "max-tokens",
    "max-completion-tokens": "max-tokens",
    "n-predict": "max-tokens",
    "num-predict": "max-tokens",
    "predict": "max-tokens",
    "context": "ctx-size",
    "context-size": "ctx-size",
    "context-length": "ctx-size",
    "num-ctx": "ctx-size",
    "n-ctx": "ctx-size",
    "max-model-len": "ctx-size",
    "max-seq-len": "ctx-size",
    "repetition-penalty": "repeat-penalty",
    "system": "system-prompt",
    "stop-sequences": "stop",
    "batch-size": "batch",
    "parallel": "batch",
    "n-threads": "threads",
    "num-threads": "threads",
    "cache": "expert-cache",
    "cache-size": "expert-cache",
    "draft": "draft-model",
    "model-draft": "draft-model",
    "draft-max": "draft-nodes",
    "out": "output",
    "input": "file",
    "debug": "verbose",
}
"""Names of other programs, and of the library, for options of this one; without dashes in front."""
_ALIKE = 0.6
"""Least likeness of a misspelt name to what is suggested, from 0 to 1."""
_MIN_BEGINNING = 3
"""Letters that a shortened name has at least to be told by."""


def closest(name: str, known: Iterable[str]) -> str | None:
    """The one of `known` that `name` most likely stands for; None where nothing is like it."""
    names = list(known)
    plain = {_plain(each): each for each in reversed(names)}
    wanted = _plain(name)
    other = SYNONYMS.get(wanted)
    if other in plain:
        return plain[other]
    if wanted in plain:
        return plain[wanted]
    begun = [each for each in plain if each.startswith(wanted)]
    if len(wanted) >= _MIN_BEGINNING and len(begun) == 1:
        return plain[begun[0]]
    # Slow to import for what is hardly ever needed.
    from difflib import get_close_matches

    alike = get_close_matches(wanted[:80], list(plain), n=1, cutoff=_ALIKE)
    return plain[alike[0]] if alike else None


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The end of a sentence that refuses `name`, such as ` (did you mean --temp?)`; empty where nothing is like it."""
    found = closest(name, known)
    return f" (did you mean {found}?)" if found is not None else ""


def _plain(name: str) -> str:
    """A name without its marks: dashes or a slash in front, underscores, capitals, the value after an equals sign."""
    return name.partition("=")[0].lstrip("-/").replace("_", "-").lower()
