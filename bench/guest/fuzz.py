"""`fuzz`: what others wrote is read or refused, and never gives an unexpected error, a hang, or all of the memory."""

from __future__ import annotations

import importlib
import pkgutil
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from bench.field.case import tiny
from bench.guest import parsers
from bench.guest.hostile_checkpoints import Hostile, cases
from bench.guest.mutator import Mutator
from bench.guest.parser import Parser
from bench.measurement import BaseSize, Measurement
from edgemoe import CheckpointError, Engine
from edgemoe.quiet import quiet_transformers

NAME = "fuzz"
BAR = "no unexpected error, no run of more than 5 s, at most 1.2 GB of memory"
MAX_SECONDS = 5.0
MAX_MEMORY = 1_200_000_000
KEPT = 5
"""Faults of each parser that are told."""


@dataclass(frozen=True, kw_only=True)
class Size(BaseSize):
    """Cases of a parser whose share is 1, examples of hypothesis in the same way, and every how many-th checkpoint."""

    cases: int = 90_000
    examples: int = 1_000
    every: int = 1
    seed: int = 0


FULL, SMALL = Size(), Size(small=True, cases=120, examples=20, every=40)


class Hang(BaseException):
    """A case takes too long. No Exception, so that nothing that is tried catches it."""


@dataclass
class Tally:
    """What came of the cases of one parser."""

    cases: int = 0
    refused: int = 0
    slowest: float = 0.0
    faults: list[str] = field(default_factory=list)

    def note(self, fault: str) -> None:
        """Keeps the first faults."""
        if len(self.faults) < KEPT:
            self.faults.append(fault[:400])


def run(size: Size = FULL) -> Measurement:
    """Reads mutated samples, examples of hypothesis, and the checkpoints that are broken on purpose."""
    tallies: dict[str, Tally] = {}
    with tempfile.TemporaryDirectory() as folder, quiet_transformers():
        for number, parser in enumerate(all_parsers()):
            place = Path(folder) / str(number)
            place.mkdir()
            tallies[parser.name] = tally = Tally()
            _fuzz(parser, place, size, tally)
        tallies["broken checkpoints"] = tally = Tally()
        _try_checkpoints(Path(folder) / "checkpoints", size, tally)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    faults = {name: tally.faults for name, tally in tallies.items() if tally.faults}
    slowest = max(tally.slowest for tally in tallies.values())
    value = {
        "cases": sum(tally.cases for tally in tallies.values()),
        "refused": sum(tally.refused for tally in tallies.values()),
        "faults": sum(len(each) for each in faults.values()),
        "slowest_seconds": round(slowest, 2),
        "memory_gb": round(memory / 1e9, 2),
    }
    detail = {name: [tally.cases, tally.refused, round(tally.slowest, 2)] for name, tally in tallies.items()}
    ok = not faults and slowest <= MAX_SECONDS and memory <= MAX_MEMORY
    return Measurement(NAME, value, BAR, ok, {"cases, refused, slowest": detail, "faults": faults})


def all_parsers() -> Iterator[Parser]:
    """Those of all modules in `bench.guest.parsers`."""
    for module in sorted(each.name for each in pkgutil.iter_modules(parsers.__path__)):
        yield from importlib.import_module(f"{parsers.__name__}.{module}").PARSERS


def _fuzz(parser: Parser, folder: Path, size: Size, tally: Tally) -> None:
    samples = parser.samples(folder)
    expected = () if parser.sound else parser.errors
    for sample in samples:
        _try(lambda sample=sample: parser.parse(sample, folder), expected, f"{parser.name}: its own sample", tally)  # type: ignore[misc]
    mutator = Mutator(samples, size.seed, text=parser.text)
    for _ in range(round(size.cases * parser.share)):
        data = mutator.draw()
        _try(lambda data=data: parser.parse(data, folder), parser.errors, repr(data[:200]), tally)  # type: ignore[misc]
    examples = round(size.examples * parser.share)
    if examples:
        _examples(parser, folder, examples, samples, tally)


def _examples(parser: Parser, folder: Path, count: int, samples: list[bytes], tally: Tally) -> None:
    """What hypothesis makes: any bytes, and samples with any bytes in their middle."""
    inputs = st.one_of(
        st.binary(max_size=300),
        st.text(max_size=200).map(lambda text: text.encode("utf-8", "surrogatepass")),
        st.tuples(st.sampled_from(samples), st.integers(0, 4096), st.binary(max_size=16)).map(
            lambda drawn: drawn[0][: drawn[1]] + drawn[2] + drawn[0][drawn[1] + len(drawn[2]) :]
        ),
    )

    @settings(
        max_examples=count,
        database=None,
        deadline=None,
        derandomize=True,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(inputs)
    def example(data: bytes) -> None:
        _try(lambda: parser.parse(data, folder), parser.errors, repr(data[:200]), tally)

    example()


def _try(call: Callable[[], object], errors: tuple[type[Exception], ...], shown: str, tally: Tally) -> None:
    """Calls `call`, and notes what is no error of `errors`, or takes too long."""
    tally.cases += 1
    begun = time.monotonic()
    try:
        with _time_limit(MAX_SECONDS):
            call()
    except errors:
        tally.refused += 1
    except Hang:
        tally.note(f"no answer in {MAX_SECONDS:.0f} s: {shown}")
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        # Also those that are no Exception, such as the panics of tokenizers.
        tally.note(f"{type(error).__name__}: {error}: {shown}")
    tally.slowest = max(tally.slowest, time.monotonic() - begun)


@contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    """Raises Hang in the main thread after `seconds`; elsewhere, and without such signals, nothing does."""

    def stop(number: int, frame: FrameType | None) -> Any:
        raise Hang

    try:
        before = signal.signal(signal.SIGALRM, stop)
    except (AttributeError, ValueError):
        yield
        return
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _try_checkpoints(folder: Path, size: Size, tally: Tally) -> None:
    original = tiny(folder / "original", "mixtral")
    for number, case in enumerate(cases()):
        if number % size.every == 0:
            copy = Path(shutil.copytree(original, folder / "copy"))
            case.change(copy)
            _try(lambda copy=copy, case=case: refuse(copy, case), (CheckpointError,), case.name, tally)  # type: ignore[misc]
            shutil.rmtree(copy)


def refuse(folder: Path, case: Hostile) -> None:
    """Plans or loads the broken checkpoint in `folder`. Raises CheckpointError, as it should, or AssertionError."""
    if case.needs_load:
        Engine.load(folder, state_folder="none", device="cpu").close()
    else:
        Engine.plan_for(folder, state_folder="none", device="cpu")
    raise AssertionError(f"{case.name} was accepted")
