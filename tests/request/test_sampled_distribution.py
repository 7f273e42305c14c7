"""Sampling with drafts has the distribution of sampling without; the test detects a sampler that has not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bench.exactness.spec_sampled import LEAST_P, SETTINGS, Setting, checkpoint, chi_square, measured

SEEDS = range(1000)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint(tmp_path_factory.mktemp("sampled"))


@pytest.mark.parametrize("setting", [SETTINGS[0], SETTINGS[5]], ids=lambda setting: setting.speculate)
def test_the_first_tokens_have_the_exact_distribution(folder: Path, setting: Setting) -> None:
    row = measured(folder, setting, SEEDS)
    assert row["p"] > LEAST_P
    assert row["accepted"] > len(SEEDS) / 10, "little was drafted"
    assert row["drafted"] > row["accepted"], "nothing was rejected"


@pytest.mark.parametrize("setting", [SETTINGS[0], SETTINGS[4]], ids=lambda setting: setting.speculate)
def test_a_sampler_that_trusts_the_drafts_has_not(folder: Path, setting: Setting) -> None:
    assert measured(folder, setting, SEEDS, "likely child")["p"] < LEAST_P


def test_chi_square_agrees_with_tables() -> None:
    assert chi_square(torch.tensor([50.0, 50.0]), torch.tensor([50.0, 50.0])) == (1.0, 2)
    assert chi_square(torch.tensor([59.8, 40.2]), torch.tensor([50.0, 50.0]))[0] == pytest.approx(0.05, abs=1e-4)
    assert chi_square(torch.tensor([30.0, 45.0, 25.0]), torch.tensor([25.0, 50.0, 25.0]))[0] == pytest.approx(
        0.4724, abs=1e-4
    )


def test_rare_cells_are_pooled() -> None:
    expected = torch.tensor([1.0, 2.0, 3.0, 44.0, 50.0])
    assert chi_square(torch.tensor([6.0, 0.0, 0.0, 44.0, 50.0]), expected) == (1.0, 3)
    # The rare cells together are below the minimum, so the next one is pooled with them.
    assert chi_square(torch.tensor([3.0, 0.0, 47.0, 50.0]), torch.tensor([1.0, 2.0, 47.0, 50.0])) == (1.0, 2)


def test_a_sample_of_probability_zero_is_detected() -> None:
    assert chi_square(torch.tensor([1.0, 99.0, 100.0]), torch.tensor([0.0, 100.0, 100.0]))[0] == 0
