"""The quantisations of a model among GGUF files, by the names of the files.

A file's quantisation is the end of its name, from the last word that names a type of weights: `Q4_K_M` of
`name-Q4_K_M.gguf`, `UD-Q4_K_XL` of `name-UD-Q4_K_XL-00001-of-00003.gguf`. Without such a word it is that of the folder.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace

from edgemoe.checkpoint.gguf.gguf_file import SPLIT
from edgemoe.errors import CheckpointError

TYPE = re.compile(r"(?<![a-z0-9])(?:ud-|i1-)?(?:(?:i?q|tq)\d|(?:bf|fp|f|mxfp|nvfp)(?:4|8|16|32)(?![0-9]))\w*", re.I)
"""A type of weights in a file's name, with the prefix of two publishers for files of their own making."""
NO_MODEL = re.compile(r"mmproj|imatrix|^mtp-|(?<![a-z0-9])(?:vocab|draft)(?![a-z0-9])", re.I)
"""Names of files that are no whole model: image encoders, importance matrices, heads that draft, vocabularies."""
COMMON = "Q4_K_M"
"""The quantisation to give as an example, where it is there."""


@dataclass(frozen=True)
class GgufVariant:
    """One quantisation of a model."""

    tag: str
    """What chooses it; its first file's name where another one has the same quantisation, or the name has none."""
    files: tuple[str, ...]
    """The names of its files, all parts of a split one in order."""

    def is_named(self, wanted: str) -> bool:
        """Whether `wanted` is the tag."""
        return self.tag.lower() == wanted.lower()

    def has_word(self, wanted: str) -> bool:
        """Whether `wanted` is one word of the tag, such as `Q4_K_XL` of `UD-Q4_K_XL`."""
        return wanted.lower() in re.split(r"[-.]", self.tag.lower())

    def has_file(self, wanted: str) -> bool:
        """Whether `wanted` is the name of one of its files, with its folder or without."""
        return any(wanted in (file, _base(file)) for file in self.files)


def variants(names: Iterable[str]) -> list[GgufVariant]:
    """The models among the files `names`, which have their folders in front, in the order of their tags."""
    found = [each for each in _groups(names) if not NO_MODEL.search(_base(each.files[0]))]
    counts = Counter(each.tag.lower() for each in found)
    told = [each if counts[each.tag.lower()] == 1 else replace(each, tag=each.files[0]) for each in found]
    return sorted(told, key=lambda each: each.tag.lower())


def choose(names: Iterable[str], wanted: str | None, name: str, setting: str, place: str = "") -> tuple[str, ...]:
    """Of the files `names` those of the quantisation `wanted`, or of the only one there is where that is None.

    The tag of a quantisation counts first, in any case of letters, then one of its words, if no other tag has it.
    `wanted` may also be the whole name of a file, which then may be any. `name` is the repository or folder, for
    messages, and `place` where its files are. Raises CheckpointError, with all tags, unless exactly one is meant.
    """
    names = list(names)
    found = variants(names)
    if wanted is None:
        chosen = found
    elif wanted.lower().endswith(".gguf"):
        chosen = [each for each in _groups(names) if each.has_file(wanted)]
    else:
        chosen = [each for each in found if each.is_named(wanted)] or [each for each in found if each.has_word(wanted)]
    if len(chosen) == 1:
        return chosen[0].files
    if not found:
        raise CheckpointError(f"{name} has no GGUF file of a model{place}: check the name given as {setting}=")
    tags = [each.tag for each in found]
    example = COMMON if COMMON in tags else tags[0]
    give = f"give one of them, such as {name}:{example}," if len(tags) > 1 else f"give {name}:{example}"
    raise CheckpointError(f"{name} has {', '.join(tags)}{place}: {give} as {setting}=")


def only_gguf(names: Iterable[str]) -> bool:
    """Whether models among the files `names` are GGUF files, and none is a safetensors file."""
    names = list(names)
    return not any(name.endswith(".safetensors") for name in names) and bool(variants(names))


def _groups(names: Iterable[str]) -> list[GgufVariant]:
    """The GGUF files among `names`, with the parts of a split one together."""
    together: dict[str, list[str]] = {}
    for name in sorted(name for name in names if name.endswith(".gguf")):
        split = SPLIT.match(name)
        together.setdefault(name if split is None else f"{split[1]}-of-{split[3]}.gguf", []).append(name)
    return [GgufVariant(_tag(files[0]), tuple(files)) for files in together.values()]


def _tag(file: str) -> str:
    split = SPLIT.match(file)
    path = split[1] if split is not None else file.removesuffix(".gguf")
    # From the file's own name outwards.
    for part in reversed(path.split("/")):
        matches = list(TYPE.finditer(part))
        if matches:
            return part[matches[-1].start() :]
    return file


def _base(file: str) -> str:
    return file.rpartition("/")[2]
