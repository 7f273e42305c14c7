"""What the package does with the errors of others."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from edgemoe.errors import CheckpointError, is_device_or_memory_error, reading, reason, unreadable


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ValueError("one line"), "one line"),
        (ValueError("\n  first \nsecond"), "first"),
        (ValueError("a list: \n  of one"), "a list: of one"),
        (ValueError(), "ValueError"),
        (KeyError(" "), "' '"),
        (RuntimeError(" \n "), "RuntimeError"),
    ],
)
def test_a_reason_is_the_first_line_or_the_type(error: Exception, said: str) -> None:
    assert reason(error) == said


def test_a_file_that_is_gone_is_a_checkpoint_error_that_keeps_its_cause() -> None:
    gone = OSError("gone")
    with pytest.raises(CheckpointError) as raised, reading("org/model"):
        raise gone
    assert str(raised.value) == str(unreadable("org/model", gone))
    assert str(raised.value) == "org/model cannot be read any more (gone): fetch it again"
    assert raised.value.__cause__ is gone


def test_other_errors_pass_through_reading() -> None:
    with pytest.raises(ZeroDivisionError), reading("org/model"):
        raise ZeroDivisionError


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        OSError("gone"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        torch.cuda.OutOfMemoryError("out of memory"),
        torch.AcceleratorError("an illegal memory access was encountered", 700),
        RuntimeError("CUDA error: device-side assert triggered"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator: can't allocate memory"),
    ],
    ids=lambda error: f"{type(error).__name__}-{str(error)[:10]}",
)
def test_faults_of_the_machine_are_told_from_those_of_a_model(error: Exception) -> None:
    assert is_device_or_memory_error(error)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("The size of tensor a (3) must match the size of tensor b (4)"),
        ValueError("out of memory"),
        NotImplementedError("Cannot copy out of meta tensor; no data!"),
        KeyError("labels"),
    ],
)
def test_faults_of_a_model_are_none_of_the_machine(error: Exception) -> None:
    assert not is_device_or_memory_error(error)


def test_without_torch_its_errors_need_no_import() -> None:
    script = (
        "import sys\n"
        "from edgemoe.errors import is_device_or_memory_error as machine\n"
        "assert machine(MemoryError()) and machine(RuntimeError('out of memory')) and not machine(RuntimeError())\n"
        "assert 'torch' not in sys.modules\n"
    )
    assert subprocess.run([sys.executable, "-c", script]).returncode == 0


def test_a_torch_without_some_of_the_errors_has_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch, "AcceleratorError")
    assert is_device_or_memory_error(torch.OutOfMemoryError("out"))
