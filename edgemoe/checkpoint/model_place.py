"""Where the files are that a model's name means: a folder, a GGUF file in it or in a repository of the hub, a file."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from edgemoe.checkpoint.gguf.gguf_variant import choose, only_gguf
from edgemoe.checkpoint.hub import Repository
from edgemoe.errors import CheckpointError, reason
from edgemoe.values import shown


def find_place(
    name: str,
    offline: bool,
    setting: str,
    check: Callable[[Path], None],
    weights: Callable[[Path, list[str]], list[str]],
) -> Path:
    """The folder of a checkpoint of transformers, or the first GGUF file, that `name` means.

    `name` is a path, a Hugging Face id, or either one with the quantisation or the name of a GGUF file behind a colon.
    `check` and `weights` are those of `Repository.fetch`. Raises CheckpointError where nothing is found or several are.
    """
    path = path_of(name, setting)
    if path.is_dir():
        return _gguf_in(path, name, None, setting) or path
    if path.suffix == ".gguf" and path.exists():
        return path
    folder, _, wanted = name.rpartition(":")
    if folder and _is_file_or_tag(wanted) and path_of(folder, setting).is_dir():
        return _gguf_in(path_of(folder, setting), folder, wanted, setting) or path
    repository, _, wanted = name.partition(":")
    if not path.exists() and _is_id(repository):
        found = Repository(repository, offline, setting)
        return found.find_gguf(wanted or None) or found.fetch(check, weights)
    if path.suffix == ".gguf":
        raise CheckpointError(f"{path} does not exist: give a GGUF file, the first one of a split model, as {setting}=")
    kind = "is not a folder" if path.exists() else "does not exist"
    raise CheckpointError(
        f"{name} {kind}: give a checkpoint's folder or a Hugging Face id such as org/name as {setting}="
    )


def place_name(model: Any, setting: str) -> str:
    """`model`, a text or a path, as a text. Raises CheckpointError, which names `setting`, for anything else."""
    name = os.fspath(model) if isinstance(model, str | os.PathLike) else None
    if not isinstance(name, str) or not name or "\0" in name:
        raise CheckpointError(
            f"{shown(model)} names no model: give a checkpoint's folder, a GGUF file or a Hugging Face id such as "
            f"org/name as {setting}="
        )
    return name


def gguf_names(folder: Path) -> list[str]:
    """The GGUF files in `folder` and in the folders in it, by their names from there."""
    files = [*folder.glob("*.gguf"), *folder.glob("*/*.gguf")]
    return sorted(file.relative_to(folder).as_posix() for file in files)


def path_of(name: str, setting: str) -> Path:
    """The path that `name` is, with the home folder in place of "~"; there need not be anything.

    Raises CheckpointError, with the argument `setting`, for what no system can have or this user may not look at.
    """
    try:
        path = Path(name).expanduser()
        os.stat(path)
    except FileNotFoundError:
        return path
    except (OSError, RuntimeError, ValueError) as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOTDIR, errno.ELOOP):
            return path
        why = getattr(error, "strerror", None) or reason(error)
        raise CheckpointError(f"{shown(name)} is no folder ({why}): give the whole path as {setting}=") from error
    return path


def _gguf_in(folder: Path, name: str, wanted: str | None, setting: str) -> Path | None:
    """The first GGUF file of the quantisation `wanted`; None where None is wanted and the folder has safetensors."""
    names = gguf_names(folder)
    weights = [file.name for file in (*folder.glob("*.safetensors"), *folder.glob("*.safetensors.index.json"))]
    if wanted is None and (weights or not only_gguf(names)):
        return None
    return folder / choose(names, wanted, name, setting)[0]


def _is_id(name: str) -> bool:
    """Whether `name` looks like a Hugging Face id, of which the name of a lost file is told by its ending."""
    return name.count("/") == 1 and not name.startswith((".", "/", "~")) and "\\" not in name and name[-5:] != ".gguf"


def _is_file_or_tag(text: str) -> bool:
    """Whether what follows a colon can be a quantisation or a file, and no path on a drive."""
    return bool(text) and "\\" not in text and not text.startswith("/")
