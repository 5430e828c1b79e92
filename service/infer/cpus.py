"""CPU detection: the CPUs that this process may use, and their int8 instructions."""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Iterator
from pathlib import Path

# As Linux names them: AVX-512's VNNI, AVX's, and AMX's.
_INT8_PRODUCTS = frozenset({"avx512_vnni", "avx_vnni", "amx_int8"})


@functools.cache  # asked for each bundle, and the CPUs stay what they are
def multiplies_int8(info: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether the CPUs have instructions for products of int8 (x86 on Linux; elsewhere False).

    Without them such products gain little over float32.

    Args:
        info: what the kernel says of the CPUs.
    """
    try:
        lines = info.read_text().splitlines()
    except OSError:  # no Linux
        return False
    flags = [set(line.partition(":")[2].split()) for line in lines if line.startswith("flags")]
    return bool(flags) and all(have & _INT8_PRODUCTS for have in flags)


def usable_cpus(
    groups: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")
) -> int:
    """CPUs that this process may use: of its affinity and its container's quota, not the machine's.

    A quota of one and a half CPUs counts as two: one thread alone would leave the half unused.

    Args:
        groups: where control groups are mounted, version 1 or 2.
        own: which groups this process is in.
    """
    if hasattr(os, "sched_getaffinity"):  # where it is missing, every CPU may be used
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
        # In a container the path may be the host's, and only the mount's root be there.
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
        granted = float(quota) / float(period)  # "max" is no number, and -1 says the same
    except (OSError, ValueError, ZeroDivisionError):
        return None
    return granted if granted > 0 else None
