"""Number of usable CPUs under control groups of both versions, as files in their layout."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from service.infer.cpus import multiplies_int8, usable_cpus


@pytest.fixture(autouse=True)
def _sixteen_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)), raising=False)


def groups(root: Path, own: str, files: dict[str, str]) -> tuple[Path, Path]:
    for name, text in files.items():
        (root / "fs" / name).parent.mkdir(parents=True, exist_ok=True)
        (root / "fs" / name).write_text(text + "\n")
    (root / "own").write_text(own)
    return root / "fs", root / "own"


V2 = "0::/app/worker\n"
V1 = "4:cpu,cpuacct:/app\n3:memory:/app\n0::/\n"


@pytest.mark.parametrize(
    ("own", "files", "expected"),
    [
        (V2, {}, 16),
        (V2, {"app/worker/cpu.max": "max 100000"}, 16),
        (V2, {"app/worker/cpu.max": "200000 100000"}, 2),
        (V2, {"app/worker/cpu.max": "150000 100000"}, 2),  # one would leave a half unused
        (V2, {"app/worker/cpu.max": "10000 100000"}, 1),
        (V2, {"app/worker/cpu.max": "max 100000", "app/cpu.max": "300000 100000"}, 3),
        (V2, {"app/worker/cpu.max": "400000 100000", "app/cpu.max": "300000 100000"}, 3),
        (V2, {"cpu.max": "500000 100000"}, 5),  # the path is the host's, as without a namespace
        ("0::/\n", {"cpu.max": "200000 100000"}, 2),  # as a container sees itself
        ("0::/../other\n", {"cpu.max": "200000 100000"}, 2),
        (V2, {"app/worker/cpu.max": "6400000 100000"}, 16),
        (V2, {"app/worker/cpu.max": "what"}, 16),
        (V1, {"cpu/app/cpu.cfs_quota_us": "300000", "cpu/app/cpu.cfs_period_us": "100000"}, 3),
        (V1, {"cpu/app/cpu.cfs_quota_us": "-1", "cpu/app/cpu.cfs_period_us": "100000"}, 16),
        (V1, {"cpu/cpu.cfs_quota_us": "200000", "cpu/cpu.cfs_period_us": "100000"}, 2),
        (V1, {"memory/app/cpu.max": "100000 100000"}, 16),
        ("", {"cpu.max": "100000 100000"}, 16),
    ],
)
def test_the_tightest_quota_counts(
    tmp_path: Path, own: str, files: dict[str, str], expected: int
) -> None:
    assert usable_cpus(*groups(tmp_path, own, files)) == expected


def test_affinity_counts_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3}, raising=False)
    assert usable_cpus(*groups(tmp_path, V2, {"app/worker/cpu.max": "400000 100000"})) == 1


def test_without_control_groups_the_affinity_alone_counts(tmp_path: Path) -> None:
    assert usable_cpus(tmp_path / "none", tmp_path / "none") == 16


def test_this_machine_has_at_least_one_cpu() -> None:
    assert 1 <= usable_cpus() <= 16


@pytest.mark.parametrize(
    ("flags", "able"),
    [
        (["fpu avx2 avx512f", "fpu avx2 avx512f"], False),
        (["fpu avx2 avx_vnni", "fpu avx2 avx_vnni"], True),
        (["fpu avx512f avx512_vnni amx_int8"], True),
        (["fpu avx_vnni", "fpu avx2"], False),  # the slower kind may get the work
        ([], False),
    ],
)
def test_products_of_int8_are_for_cpus_that_have_instructions_for_them(tmp_path, flags, able):
    info = tmp_path / "cpuinfo"
    info.write_text("".join(f"processor\t: {i}\nflags\t\t: {f}\n\n" for i, f in enumerate(flags)))
    assert multiplies_int8(info) is able


def test_without_a_description_of_the_cpus_there_is_no_int8(tmp_path):
    assert not multiplies_int8(tmp_path / "none")
