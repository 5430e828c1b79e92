"""CPU detection: the CPUs that this process may use, and their int8 instructions."""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Iterator
from pathlib import Path

# Linux's names for the VNNI of AVX-512 and of AVX, and for AMX.
_INT8_PRODUCTS = frozenset({"avx512_vnni", "avx_vnni", "amx_int8"})


@functools.cache  # called for each bundle, and the CPUs do not change
def multiplies_int8(info: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether the CPUs have instructions for products of int8 (x86 on Linux; elsewhere False).

    Without them such products gain little over float32.

    Args:
        info: the kernel's description of the CPUs.
    """
    try:
        lines = info.read_text().splitlines()
    except OSError:  # not Linux
        return False
    flags = [set(line.partition(":")[2].split()) for line in lines if line.startswith("flags")]
    return bool(flags) and all(have & _INT8_PRODUCTS for have in flags)


def usable_cpus(
    groups: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")
) -> int:
    """CPUs that this process may use, by its affinity and its container's quota.

    A quota of one and a half CPUs counts as two: one thread would leave the half unused.

    Args:
        groups: mount point of the control groups, version 1 or 2.
        own: file with the groups of this process.
    """
    if hasattr(os, "sched_getaffinity"):  # without it, every CPU may be used
        allowed = len(os.sched_getaffinity(0))
    else:
        allowed = os.cpu_count() or 1
    quotas = [math.ceil(quota) for quota in _quotas(groups, own)]
    return max(1, min([allowed, *quotas]))


def _quotas(groups: Path, own: Path) -> Iterator[float]:
    """CPUs that each control group around this process grants; those without a limit left out."""
    try:
        lines = own.read_text().splitlines()
    except OSError:  # no Linux
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        # Version 2 names no controllers; version 1 mounts each under its name.
        mounted = groups / "cpu" if controllers else groups
        at = mounted / path.lstrip("/")
        # In a container the path may be the host's, and only the root of the mount exists.
        for group in (at, *at.parents) if at.is_relative_to(mounted) else ():
            quota = _quota(group, version=1 if controllers else 2)
            if quota is not None:
                yield quota
            if group == mounted:
                break


def _quota(group: Path, *, version: int) -> float | None:
    try:
        if version == 1:
            quota = (group / "cpu.cfs_quota_us").read_text()
            period = (group / "cpu.cfs_period_us").read_text()
        else:
            quota, period = (group / "cpu.max").read_text().split()
        granted = float(quota) / float(period)  # "max" is not a number; -1 means the same
    except (OSError, ValueError, ZeroDivisionError):
        return None
    return granted if granted > 0 else None
