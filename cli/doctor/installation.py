"""Python, and the packages that edgemoe's own metadata asks for."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Iterator
from typing import TYPE_CHECKING

from edgemoe import __version__
from edgemoe.cli.doctor.check import NOTE, OK, PROBLEM, Check
from edgemoe.cli.render import counted

if TYPE_CHECKING:
    from packaging.requirements import Requirement

_EXTRAS = ("server", "ray", "plot")
"""What users may want beside the package itself."""
_TESTED = "Programming Language :: Python :: "
"""Begins the classifiers of the versions that are tested."""


def installation() -> Iterator[Check]:
    """What is installed, and whether it is in the range that edgemoe takes."""
    try:
        from packaging.requirements import Requirement

        metadata = importlib.metadata.metadata("edgemoe")
        wanted = [Requirement(text) for text in metadata.get_all("Requires-Dist") or []]
    except ImportError as error:  # a package without metadata is an ImportError, too
        yield Check("python", OK, platform.python_version())
        yield Check("edgemoe", PROBLEM, f"not properly installed: {error}", "pip install edgemoe")
        return
    yield _python([line.removeprefix(_TESTED) for line in metadata.get_all("Classifier") or [] if _TESTED in line])
    yield Check("edgemoe", OK, __version__)
    needed = [package for package in wanted if package.marker is None or package.marker.evaluate({"extra": ""})]
    checks = [_package(package) for package in needed]
    yield from (check for check in checks if check.status != OK)
    yield Check(
        "packages", OK, f"{counted(sum(check.status == OK for check in checks), 'package')} in the range that is needed"
    )
    yield _extras(wanted)


def _python(tested: list[str]) -> Check:
    version = platform.python_version()
    minor = ".".join(version.split(".")[:2])
    if tested and minor not in tested:
        names = ", ".join(name for name in tested if "." in name)
        return Check("python", NOTE, f"{version}, which is not tested", f"if something fails, use one of {names}")
    return Check("python", OK, version)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _package(package: Requirement) -> Check:
    version = _version(package.name)
    if version is None:
        return Check(package.name, PROBLEM, "not installed", f"pip install '{package}'")
    if not package.specifier.contains(version, prereleases=True):
        return Check(package.name, PROBLEM, f"{version}, but {package.specifier} is needed", f"pip install '{package}'")
    return Check(package.name, OK, version)


def _extras(wanted: list[Requirement]) -> Check:
    """Which extras have all of their packages."""

    def has(extra: str) -> bool:
        own = [each for each in wanted if each.marker is not None and each.marker.evaluate({"extra": extra})]
        own = [each for each in own if not (each.marker is not None and each.marker.evaluate({"extra": ""}))]
        return bool(own) and all(_package(each).status == OK for each in own)

    there = [extra for extra in _EXTRAS if has(extra)]
    missing = [f"'edgemoe[{extra}]'" for extra in _EXTRAS if extra not in there]
    told = ", ".join(there) or "none"
    return Check("extras", OK, f"{told} (others: pip install {' '.join(missing)})" if missing else told)
