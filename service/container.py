"""Container limits: CPUs and memory that the control groups of this process allow."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

CGROUP_ROOT = Path("/sys/fs/cgroup")
"""Mount point of the control groups, version 1 or 2."""
PROCESS_CGROUPS = Path("/proc/self/cgroup")
"""File that lists the control groups of this process."""


def cpu_quotas(groups: Path = CGROUP_ROOT, own: Path = PROCESS_CGROUPS) -> Iterator[float]:
    """CPU quota of each control group that this process belongs to, in CPUs; groups with one only.

    Args:
        groups: mount point of the control groups.
        own: file that lists the control groups of this process.
    """
    for group, version in _groups_of_process("cpu", groups, own):
        try:
            if version == 1:
                quota = (group / "cpu.cfs_quota_us").read_text()
                period = (group / "cpu.cfs_period_us").read_text()
            else:
                quota, period = (group / "cpu.max").read_text().split()
            cpus = float(quota) / float(period)  # "max" and -1 mean no limit
        except (OSError, ValueError, ZeroDivisionError):
            continue
        if cpus > 0:
            yield cpus


def usable_memory(groups: Path = CGROUP_ROOT, own: Path = PROCESS_CGROUPS) -> int:
    """Bytes of memory that this process may use: the machine's memory or the container's limit.

    Args:
        groups: mount point of the control groups.
        own: file that lists the control groups of this process.
    """
    limits = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    for group, version in _groups_of_process("memory", groups, own):
        name = "memory.limit_in_bytes" if version == 1 else "memory.max"
        try:
            limit = int((group / name).read_text())  # raises for "max", which means no limit
        except (OSError, ValueError):
            continue
        if limit > 0:  # version 1 states a huge number if there is no limit
            limits.append(limit)
    return min(limits)


def _groups_of_process(controller: str, groups: Path, own: Path) -> Iterator[tuple[Path, int]]:
    """The control groups that this process belongs to, innermost first, each with its version."""
    try:
        lines = own.read_text().splitlines()
    except OSError:  # not Linux
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        # Version 2 lists no controllers; version 1 mounts each controller under its name.
        mounted = groups / controller if controllers else groups
        innermost = mounted / path.lstrip("/")
        # In a container the path may be the host's; then only the root of the mount exists.
        inside = innermost.is_relative_to(mounted)
        for group in (innermost, *innermost.parents) if inside else ():
            yield group, 1 if controllers else 2
            if group == mounted:
                break
