"""Fetches a checkpoint from the Hugging Face hub: its configuration first, and of the weights one copy."""

from __future__ import annotations

import glob
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from functools import cached_property
from pathlib import Path
from typing import Any

from edgemoe.checkpoint.gguf.gguf_variant import choose, only_gguf
from edgemoe.errors import CheckpointError, is_device_or_memory_error, told_as

CONFIG = "config.json"
SMALL_FILES = ("*.json", "*.model", "*.txt", "*.jinja")
"""What is fetched beside the weights, from the top folder: tokenizers, templates, generation settings."""
MODELS = "models--"
"""How the folder of a repository of models begins in the cache."""


class Repository:
    """A repository of models: what the hub has of it, and what the local cache has."""

    def __init__(self, name: str, offline: bool, setting: str) -> None:
        """`setting` is the argument that messages tell a user to correct."""
        self._name = name
        self._offline = offline
        self._setting = setting
        self._failure: Exception | None = None
        """Why the hub could not be asked for its files."""

    def fetch(
        self, check: Callable[[Path], None], weights: Callable[[Path, list[str]], list[str]] = lambda folder, names: []
    ) -> Path:
        """The folder in the local cache of a checkpoint of transformers.

        `check` is given the folder with the configuration alone, before anything large is fetched, and raises what
        speaks against it. `weights`, given the folder with all small files and the names of the repository's files,
        chooses those of the weights. Raises CheckpointError where the repository cannot be reached, or is not in the
        cache with `offline`.
        """
        name, offline = self._name, self._offline
        with self._told():
            folder = _only_snapshot(name, offline) or _snapshot(name, [CONFIG], None, offline)
            names = self._listing[1]
            small = [file for file in names if "/" not in file and any(fnmatch(file, each) for each in SMALL_FILES)]
            if not _has(folder, small) or not _has(folder, weights(folder, names)):
                check(folder)
                _snapshot(name, small, folder.name, offline)
                _snapshot(name, [*small, *weights(folder, names)], folder.name, offline, shown=True)
            return folder

    def find_gguf(self, wanted: str | None) -> Path | None:
        """The first GGUF file, in the local cache, of the quantisation or file `wanted`, and nothing else is fetched.

        None where None is wanted and the repository has other weights, too. Raises CheckpointError, with the
        quantisations that there are, unless exactly one is meant, and where it cannot be reached.
        """
        commit, names = self._listing
        cached = {} if names else cached_files(self._name)
        if wanted is None and not only_gguf(names or cached):
            return None
        if not names:
            if not any(file.endswith(".gguf") for file in cached):
                raise self._unreachable()
            chosen = choose(cached, wanted, self._name, self._setting, " in the local Hugging Face cache")
            return cached[chosen[0]]
        files = list(choose(names, wanted, self._name, self._setting))
        folder = _cache_folder(self._name) / "snapshots" / commit
        if not _has(folder, files):
            with self._told():
                folder = _snapshot(self._name, files, None, self._offline, shown=True)
        return folder / files[0]

    @cached_property
    def _listing(self) -> tuple[str, list[str]]:
        """The newest commit and the names of its files; none without a connection: what is in the cache must do."""
        from huggingface_hub import HfApi

        if self._offline:
            return "", []
        try:
            found = HfApi().model_info(self._name)
        except Exception as error:
            if is_device_or_memory_error(error) and not isinstance(error, OSError):
                raise
            self._failure = error
            return "", []
        return found.sha or "", [file.rfilename for file in found.siblings or []]

    def _unreachable(self) -> CheckpointError:
        """The error to raise where neither the hub nor the cache has what is asked for."""
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError

        if isinstance(self._failure, HfHubHTTPError | HFValidationError):
            try:
                with self._told():
                    raise self._failure
            except CheckpointError as error:
                return error
        return self._not_here()

    def _not_here(self) -> CheckpointError:
        here = (
            "run once without offline="
            if self._offline
            else f"check the connection, or give a local folder as {self._setting}="
        )
        return CheckpointError(f"{self._name} is not a folder and not in the local Hugging Face cache: {here}")

    @contextmanager
    def _told(self) -> Iterator[None]:
        """Raises the hub's errors of the block as CheckpointErrors that say what to do."""
        from huggingface_hub import constants
        from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError

        def unreachable(why: str) -> CheckpointError:
            return CheckpointError(
                f"{self._name} could not be fetched ({why}): check the id, or give a local folder as {self._setting}="
            )

        # The errors of a connection are of another type in each version of the hub's library.
        with told_as(unreachable, of_files=True):
            try:
                yield
            except LocalEntryNotFoundError as error:
                raise self._not_here() from error
            except GatedRepoError as error:
                raise CheckpointError(
                    f"{self._name} is given only to those who accept its terms: accept them at "
                    f"{constants.ENDPOINT}/{self._name}, and log in with 'hf auth login'"
                ) from error
            except RepositoryNotFoundError as error:
                raise CheckpointError(
                    f"{self._name} is not on the hub, or not for everybody: check the id given as {self._setting}=, "
                    "or log in with 'hf auth login'"
                ) from error


def cached_repositories() -> list[str]:
    """The names of the repositories of models in the local cache. Never asks the hub."""
    from huggingface_hub import constants

    folders = Path(constants.HF_HUB_CACHE).glob(f"{MODELS}*")
    return sorted(folder.name.removeprefix(MODELS).replace("--", "/") for folder in folders if folder.is_dir())


def cached_files(name: str) -> dict[str, Path]:
    """A repository's files in the local cache by their names there: those of the branch, then of the newest commits."""
    found: dict[str, Path] = {}
    for snapshot in cached_snapshots(name):
        for file in sorted(snapshot.rglob("*")):
            if file.is_file():
                found.setdefault(file.relative_to(snapshot).as_posix(), file)
    return found


def cached_snapshots(name: str) -> list[Path]:
    """The folders of a repository's commits in the local cache: the one that the branch is at, then the newest."""
    folder = _cache_folder(name)
    commit = _commit(folder)
    snapshots = [each for each in folder.glob("snapshots/*") if each.is_dir()]
    return sorted(snapshots, key=lambda each: (each.name != commit, -each.stat().st_mtime))


def partial_files(name: str) -> list[Path]:
    """What an unfinished download has left of a repository in the local cache."""
    return sorted(_cache_folder(name).glob("blobs/*.incomplete"))


def _cache_folder(name: str) -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE) / f"{MODELS}{name.replace('/', '--')}"


def _commit(folder: Path) -> str:
    """The commit that the branch is at, for all that the cache knows; empty where it does not say."""
    try:
        return (folder / "refs" / "main").read_text().strip()
    except (OSError, UnicodeDecodeError):
        return ""


def _only_snapshot(name: str, offline: bool) -> Path | None:
    """The one snapshot in the cache, where the hub may not be asked and nothing says which commit the branch is at.

    So it is with a cache that was filled by commit, or whose `refs/main` an editor has ended with a line break.
    """
    from huggingface_hub import constants, try_to_load_from_cache

    if not (offline or constants.HF_HUB_OFFLINE) or isinstance(try_to_load_from_cache(name, CONFIG), str):
        return None
    folder = _cache_folder(name)
    commit = _commit(folder)
    snapshots = list(folder.glob(f"snapshots/*/{CONFIG}"))
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
