"""llama.cpp as a peer: where it is looked for, and what is said where it is missing or dies."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bench.exactness import gguf_peer
from bench.support.llama_cpp_peer import llama_cpp
from bench.support.llama_cpp_peer.llama_cpp import LlamaCpp, PeerError


def test_without_llama_cpp_the_measurement_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(llama_cpp.SOURCE, raising=False)
    measurement = gguf_peer.run()
    assert measurement.value is None
    assert measurement.ok is False
    assert "pip install llama-cpp-python" in measurement.detail["why"]


@pytest.mark.parametrize("inside", llama_cpp.FOLDERS)
def test_the_named_folder_is_llama_cpps_source_or_that_of_its_package(
    inside: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / inside
    library = source / "build" / "bin" / "libllama.so"
    library.parent.mkdir(parents=True)
    library.touch()
    monkeypatch.setenv(llama_cpp.SOURCE, str(tmp_path))
    assert llama_cpp.llama_cpp() is None
    (source / llama_cpp.CONVERTER).touch()
    assert llama_cpp.llama_cpp() == LlamaCpp(source, library)


def test_a_library_that_cannot_be_used_is_an_error_with_its_reason(tmp_path: Path) -> None:
    library = tmp_path / "libllama.so"
    library.write_text("not a library")
    with pytest.raises(PeerError, match=r"ended with 1: .*OSError"):
        LlamaCpp(tmp_path, library).quantize(tmp_path / "a.gguf", tmp_path / "b.gguf", "Q8_0")


def test_edgemoe_may_be_as_far_from_llama_cpp_as_llama_cpp_is_from_itself_in_float32() -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(9, 50, generator=generator)
    rounded = values + 0.5 * torch.randn(9, 50, generator=generator)
    assert not gguf_peer.compared(rounded, values, values[1:])["wrong"]
    assert not gguf_peer.compared(values, values, values[1:])["wrong"]
    wrong = gguf_peer.compared(values, values, rounded[1:])["wrong"]
    assert "8 positions" in wrong
    assert "in float32" in wrong
