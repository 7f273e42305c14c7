"""As a library edgemoe prints nothing, changes no global state and leaves nothing behind."""

from __future__ import annotations

import logging
import random
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers.utils import logging as transformers_logging

from edgemoe import Engine, PlanError, Sampling
from edgemoe.quiet import quiet_logger, quiet_transformers
from tests.support.checkpoints import PROMPT, Zoo

FALLING_BACK = ["qwen3_next", "jamba", "nemotron_h", "minimax", "zaya"]
"""Families for which transformers warns that it runs without some optional package."""


def global_state() -> dict[str, object]:
    return {
        "threads": torch.get_num_threads(),
        "between operations": torch.get_num_interop_threads(),
        "dtype": torch.get_default_dtype(),
        "device": torch.get_default_device(),
        "grad": torch.is_grad_enabled(),
        "inference": torch.is_inference_mode_enabled(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "torch random": torch.get_rng_state().tolist(),
        "numpy random": np.random.get_state(legacy=False)["state"]["key"].tolist(),
        "python random": random.getstate(),
        "filters": list(warnings.filters),
        "verbosity": transformers_logging.get_verbosity(),
        "bars": transformers_logging.is_progress_bar_enabled(),
        "log level": logging.getLogger().level,
        "path": list(sys.path),
    }


@pytest.mark.parametrize("family", ["mixtral", "qwen3_next", "gpt_oss"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_global_state_is_left_as_it_was(family: str, dtype: str, zoo: Zoo) -> None:
    folder = zoo(family)
    torch.set_num_threads(2)
    try:
        before = global_state()
        with Engine.load(folder, expert_cache="30%", dtype=dtype, threads=1) as engine:
            assert global_state() == before
            for _ in engine.stream(PROMPT, Sampling(max_tokens=3, temperature=1.0)):
                assert global_state() == before
        assert global_state() == before
    finally:
        torch.set_num_threads(1)


def test_a_refusal_leaves_global_state_as_it_was(zoo: Zoo) -> None:
    folder = zoo("mixtral")
    before = global_state()
    with pytest.raises(PlanError):
        Engine.load(folder, expert_cache="nothing")
    assert global_state() == before


@pytest.mark.parametrize("bars", [True, False])
def test_transformers_own_talk_is_silenced_for_a_while_only(bars: bool) -> None:
    before = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    switches: dict[bool, Callable[[], None]] = {
        True: transformers_logging.enable_progress_bar,
        False: transformers_logging.disable_progress_bar,
    }
    try:
        switches[bars]()
        transformers_logging.set_verbosity_info()
        with suppress(KeyError), quiet_transformers():
            assert transformers_logging.get_verbosity() == logging.ERROR
            assert not transformers_logging.is_progress_bar_enabled()
            raise KeyError
        assert transformers_logging.get_verbosity() == logging.INFO
        assert transformers_logging.is_progress_bar_enabled() is bars
    finally:
        transformers_logging.set_verbosity(before[0])
        switches[before[1]]()


def test_silence_in_many_threads_leaves_no_trace() -> None:
    """Each thread on its own would restore what another one had set."""
    before = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    logger = logging.getLogger("edgemoe-test")
    level = logger.level
    barrier, seen = threading.Barrier(8), []

    def work(number: int) -> None:
        barrier.wait()
        for turn in range(300):
            with quiet_transformers(), quiet_logger("edgemoe-test"):
                seen.append((transformers_logging.get_verbosity(), logger.level))
                if (turn + number) % 5 == 0:
                    time.sleep(0)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(seen) == {(logging.ERROR, logging.ERROR)}
    assert (transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()) == before
    assert logger.level == level


def test_what_somebody_sets_meanwhile_stays() -> None:
    before = transformers_logging.get_verbosity()
    try:
        with quiet_transformers():
            transformers_logging.set_verbosity_info()
        assert transformers_logging.get_verbosity() == logging.INFO
    finally:
        transformers_logging.set_verbosity(before)


def test_nothing_is_printed(zoo: Zoo, capfd: pytest.CaptureFixture[str]) -> None:
    folder = zoo("mixtral")
    capfd.readouterr()
    with Engine.load(folder, expert_cache=4, threads=1) as engine:
        engine.generate(PROMPT, Sampling(max_tokens=3))
    assert capfd.readouterr() == ("", "")


def test_nothing_is_printed_by_a_fresh_process(zoo: Zoo, tmp_path: Path) -> None:
    """transformers says some things once a process, so that only a fresh one can tell that they are not said."""
    program = (
        "import sys\n"
        "from edgemoe import Engine, Sampling\n"
        "for folder in sys.argv[1:]:\n"
        "    with Engine.load(folder, expert_cache=8, threads=1) as engine:\n"
        "        engine.generate([5, 6, 7, 8], Sampling(max_tokens=3))\n"
    )
    folders = [str(zoo(family)) for family in FALLING_BACK]
    command = [sys.executable, "-c", program, *folders]
    ran = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "", "")


def test_no_warning_is_raised(zoo: Zoo) -> None:
    folder = zoo("deepseek_v3")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with Engine.load(folder, expert_cache=4, threads=1) as engine:
            engine.generate(PROMPT, Sampling(max_tokens=3))


def test_threads_and_files_are_given_back(zoo: Zoo) -> None:
    folder = zoo("mixtral")

    others = set(threading.enumerate())

    def held() -> tuple[set[str], int]:
        names = {thread.name for thread in set(threading.enumerate()) - others if thread.name.startswith("edgemoe")}
        descriptors = Path("/proc/self/fd")
        files = [link.resolve() for link in descriptors.iterdir()] if descriptors.exists() else []
        return names, sum(file.parent == folder for file in files)

    assert held() == (set(), 0)
    engine = Engine.load(folder, expert_cache=4, threads=2)
    engine.generate(PROMPT, Sampling(max_tokens=2))
    assert held()[0]
    engine.close()
    assert held() == (set(), 0)


def test_a_load_that_fails_half_way_gives_everything_back(zoo: Zoo) -> None:
    def refuse(progress: object) -> None:
        raise KeyboardInterrupt

    others = set(threading.enumerate())
    with pytest.raises(KeyboardInterrupt):
        Engine.load(zoo("mixtral"), expert_cache=4, threads=2, on_progress=refuse)
    left = [thread.name for thread in set(threading.enumerate()) - others]
    assert not [name for name in left if name.startswith("edgemoe")]


def test_the_checkpoint_is_not_written_to(zoo: Zoo, tmp_path: Path) -> None:
    for file in zoo("mixtral").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
        (tmp_path / file.name).chmod(0o444)
    tmp_path.chmod(0o555)
    before = {file.name: (file.stat().st_mtime_ns, file.stat().st_size) for file in tmp_path.iterdir()}
    with Engine.load(tmp_path, expert_cache=4, threads=1) as engine:
        engine.generate(PROMPT, Sampling(max_tokens=2))
    tmp_path.chmod(0o755)
    assert {file.name: (file.stat().st_mtime_ns, file.stat().st_size) for file in tmp_path.iterdir()} == before


def test_two_engines_live_side_by_side(zoo: Zoo) -> None:
    one, other = zoo("mixtral"), zoo("gpt_oss")
    settings = Sampling(max_tokens=6)
    with Engine.load(one, expert_cache=4, threads=1) as first:
        alone = first.generate(PROMPT, settings).token_ids
        with Engine.load(other, expert_cache=4, threads=1) as second:
            streams = first.stream(PROMPT, settings), second.stream(PROMPT, settings)
            mixed = [chunk for pair in zip(*streams, strict=False) for chunk in pair]
            assert tuple(token for chunk in mixed[::2] for token in chunk.token_ids) == alone[: len(mixed[::2])]
            for stream in streams:
                stream.close()
        assert first.generate(PROMPT, settings).token_ids == alone
