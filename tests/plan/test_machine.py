"""Control-group limits, read from folders laid out like the kernel's."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from edgemoe.plan.machine import GroupLimit, cores, cpu_quota, gpus, group_limits, ram_free, ram_limit

TOTAL = psutil.virtual_memory().total


def group(folder: Path, files: dict[str, object]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_text(f"{content}\n")
    return folder


def v2(folder: Path, limit: object, used: int, *, inactive: int = 0, active: int = 0) -> Path:
    stat = f"anon 5\ninactive_file {inactive}\nactive_file {active}\ninactive_anon 7"
    return group(folder, {"memory.max": limit, "memory.current": used, "memory.stat": stat})


def v1(folder: Path, limit: object, used: int, *, inactive: int = 0, active: int = 0) -> Path:
    stat = f"cache 99\ninactive_file 1\ntotal_inactive_file {inactive}\ntotal_active_file {active}"
    return group(folder, {"memory.limit_in_bytes": limit, "memory.usage_in_bytes": used, "memory.stat": stat})


def limits(tmp_path: Path, *lines: str) -> list[GroupLimit]:
    membership = tmp_path / "cgroup"
    membership.write_text("".join(f"{line}\n" for line in lines))
    return group_limits(tmp_path / "fs", membership)


def test_v2_reads_the_group_and_every_ancestor(tmp_path: Path) -> None:
    root = tmp_path / "fs"
    v2(root / "user", 9000, 700)
    v2(root / "user" / "job", 5000, 600, inactive=100, active=50)
    assert limits(tmp_path, "0::/user/job") == [GroupLimit(5000, 450), GroupLimit(9000, 700)]


def test_v2_without_a_limit_limits_nothing(tmp_path: Path) -> None:
    v2(tmp_path / "fs" / "job", "max", 600)
    assert limits(tmp_path, "0::/job") == []


def test_v2_in_a_container_whose_path_lies_outside_takes_the_root(tmp_path: Path) -> None:
    v2(tmp_path / "fs", 5000, 600)
    assert limits(tmp_path, "0::/kubepods/pod1") == [GroupLimit(5000, 600)]
    assert limits(tmp_path, "0::/") == [GroupLimit(5000, 600)]


@pytest.mark.parametrize("path", ["/..", "/../..", "/../other"])
def test_v2_in_a_namespace_that_shows_its_parents_terminates(tmp_path: Path, path: str) -> None:
    v2(tmp_path / "fs", 5000, 600)
    assert GroupLimit(5000, 600) in limits(tmp_path, f"0::{path}")


def test_v1_reads_the_memory_controller_only(tmp_path: Path) -> None:
    root = tmp_path / "fs"
    v1(root / "memory" / "docker" / "abc", 4000, 900, inactive=300, active=100)
    v2(root / "docker" / "abc", 1, 1)
    found = limits(tmp_path, "12:cpu,cpuacct:/docker/abc", "9:memory:/docker/abc", "1:name=systemd:/docker/abc")
    assert found == [GroupLimit(4000, 500)]


def test_v1_beside_an_empty_v2_hierarchy(tmp_path: Path) -> None:
    v1(tmp_path / "fs" / "memory" / "job", 4000, 900)
    assert limits(tmp_path, "4:memory:/job", "0::/job") == [GroupLimit(4000, 900)]


def test_v1_has_a_huge_number_for_no_limit(tmp_path: Path) -> None:
    v1(tmp_path / "fs" / "memory", 9223372036854771712, 900)
    assert limits(tmp_path, "4:memory:/") == []


def test_a_limit_beyond_the_machines_memory_is_none(tmp_path: Path) -> None:
    v2(tmp_path / "fs", TOTAL + 1, 0)
    assert limits(tmp_path, "0::/") == []


def test_usage_that_is_all_page_cache_is_no_usage(tmp_path: Path) -> None:
    v2(tmp_path / "fs", 5000, 600, inactive=400, active=500)
    assert limits(tmp_path, "0::/") == [GroupLimit(5000, 0)]


def test_a_group_without_statistics_counts_all_its_usage(tmp_path: Path) -> None:
    group(tmp_path / "fs", {"memory.max": 5000, "memory.current": 600})
    assert limits(tmp_path, "0::/") == [GroupLimit(5000, 600)]


def test_no_control_groups_at_all(tmp_path: Path) -> None:
    assert group_limits(tmp_path / "fs", tmp_path / "missing") == []
    assert limits(tmp_path, "0::/job") == []


def test_this_machine_has_memory_and_cores() -> None:
    assert 0 < ram_free() <= ram_limit() <= TOTAL
    assert cores() >= 1
    assert all(0 <= gpu.free <= gpu.total for gpu in gpus())


@pytest.mark.parametrize(
    ("membership", "files", "quota"),
    [
        ("0::/job", {"job/cpu.max": "150000 100000"}, 1.5),
        ("0::/job", {"job/cpu.max": "max 100000", "cpu.max": "400000 100000"}, 4.0),
        ("4:cpu,cpuacct:/", {"cpu/cpu.cfs_quota_us": "50000", "cpu/cpu.cfs_period_us": "100000"}, 0.5),
        ("4:cpu:/", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, None),
        ("0::/job", {"job/cpu.max": "nonsense"}, None),
        ("", {}, None),
    ],
)
def test_time_of_cores_that_control_groups_give(
    membership: str, files: dict[str, str], quota: float | None, tmp_path: Path
) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    told = tmp_path / "membership"
    told.write_text(membership)
    assert cpu_quota(tmp_path, told) == quota
    assert cpu_quota(tmp_path, tmp_path / "none") is None
