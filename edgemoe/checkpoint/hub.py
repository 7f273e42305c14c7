"""Fetches a checkpoint from the Hugging Face hub: its configuration first, and of the weights one copy."""

from __future__ import annotations

import glob
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from edgemoe.errors import CheckpointError, is_device_or_memory_error, told_as

CONFIG = "config.json"
SMALL_FILES = ("*.json", "*.model", "*.txt", "*.jinja")
"""What is fetched beside the weights, from the top folder: tokenizers, templates, generation settings."""


def fetch(
    name: str,
    offline: bool,
    setting: str,
    check: Callable[[Path], None],
    weights: Callable[[Path, list[str]], list[str]],
) -> Path:
    """The folder in the local cache of the repository `name`.

    `check` is given the folder with the configuration alone, before anything large is fetched, and raises what speaks
    against it. `weights`, given the folder with all small files and the names of the repository's files, chooses those
    of the weights. `setting` is the argument that messages tell a user to correct. Raises CheckpointError where the
    repository cannot be reached, or is not in the cache with `offline`.
    """
    from huggingface_hub.errors import LocalEntryNotFoundError

    def unreachable(why: str) -> CheckpointError:
        return CheckpointError(
            f"{name} could not be fetched ({why}): check the id, or give a local folder as {setting}="
        )

    # The errors of a connection are of another type in each version of the hub's library.
    with told_as(unreachable, of_files=True):
        try:
            folder = _only_snapshot(name, offline) or _snapshot(name, [CONFIG], None, offline)
            names = [] if offline else _names(name, folder.name)
            small = [file for file in names if "/" not in file and any(fnmatch(file, each) for each in SMALL_FILES)]
            if not _has(folder, small) or not _has(folder, weights(folder, names)):
                check(folder)
                _snapshot(name, small, folder.name, offline)
                _snapshot(name, [*small, *weights(folder, names)], folder.name, offline, shown=True)
            return folder
        except LocalEntryNotFoundError as error:
            here = (
                "run once without offline="
                if offline
                else f"check the connection, or give a local folder as {setting}="
            )
            raise CheckpointError(f"{name} is not a folder and not in the local Hugging Face cache: {here}") from error


def _only_snapshot(name: str, offline: bool) -> Path | None:
    """The one snapshot in the cache, where the hub may not be asked and nothing says which commit the branch is at.

    So it is with a cache that was filled by commit, or whose `refs/main` an editor has ended with a line break.
    """
    from huggingface_hub import constants, try_to_load_from_cache

    if not (offline or constants.HF_HUB_OFFLINE) or isinstance(try_to_load_from_cache(name, CONFIG), str):
        return None
    folder = Path(constants.HF_HUB_CACHE) / f"models--{name.replace('/', '--')}"
    snapshots = list(folder.glob(f"snapshots/*/{CONFIG}"))
    try:
        commit = (folder / "refs" / "main").read_text().strip()
    except OSError:
        commit = ""
    found = [each.parent for each in snapshots if not commit or each.parent.name == commit]
    return found[0] if len(found) == 1 else None


def _has(folder: Path, files: list[str]) -> bool:
    return all((folder / file).exists() for file in files)


def _snapshot(name: str, files: list[str], revision: str | None, offline: bool, *, shown: bool = False) -> Path:
    """The folder of a repository with `files` in it. With `shown`, a terminal shows how far it is."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils import tqdm  # type: ignore[attr-defined]

    class Bar(tqdm):
        def __init__(self, *given: Any, **settings: Any) -> None:
            # None is for tqdm: wherever there is no terminal.
            super().__init__(*given, **{**settings, "disable": None if shown else True})  # type: ignore[no-untyped-call]

    patterns = [glob.escape(file) for file in files]
    return Path(
        snapshot_download(name, revision=revision, allow_patterns=patterns, local_files_only=offline, tqdm_class=Bar)
    )


def _names(name: str, revision: str) -> list[str]:
    """The names of the repository's files; none where there is no connection: what is in the cache must do."""
    from huggingface_hub import HfApi

    try:
        return HfApi().list_repo_files(name, revision=revision)
    except Exception as error:
        if is_device_or_memory_error(error) and not isinstance(error, OSError):
            raise
        return []
