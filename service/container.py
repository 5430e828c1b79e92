"""Container limits: CPUs and memory that the control groups around this process grant."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

GROUPS = Path("/sys/fs/cgroup")
"""Mount point of the control groups, version 1 or 2."""
OWN = Path("/proc/self/cgroup")
"""File with the groups of this process."""


def cpu_quotas(groups: Path = GROUPS, own: Path = OWN) -> Iterator[float]:
    """CPUs that each control group around this process grants; those without a limit left out."""
    for group, version in _around("cpu", groups, own):
        try:
            if version == 1:
                quota = (group / "cpu.cfs_quota_us").read_text()
                period = (group / "cpu.cfs_period_us").read_text()
            else:
                quota, period = (group / "cpu.max").read_text().split()
            granted = float(quota) / float(period)  # "max" is not a number; -1 means the same
        except (OSError, ValueError, ZeroDivisionError):
            continue
        if granted > 0:
            yield granted


def usable_memory(groups: Path = GROUPS, own: Path = OWN) -> int:
    """Bytes of memory that this process may use: the machine's, or its container's limit."""
    limits = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    for group, version in _around("memory", groups, own):
        name = "memory.limit_in_bytes" if version == 1 else "memory.max"
        try:
            limit = int((group / name).read_text())  # "max" is not a number
        except (OSError, ValueError):
            continue
        if limit > 0:  # version 1 without a limit has one beyond any machine
            limits.append(limit)
    return min(limits)


def _around(controller: str, groups: Path, own: Path) -> Iterator[tuple[Path, int]]:
    """The control groups around this process, and their version."""
    try:
        lines = own.read_text().splitlines()
    except OSError:  # not Linux
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        # Version 2 names no controllers; version 1 mounts each under its name.
        mounted = groups / controller if controllers else groups
        at = mounted / path.lstrip("/")
        # In a container the path may be the host's, and only the root of the mount exists.
        for group in (at, *at.parents) if at.is_relative_to(mounted) else ():
            yield group, 1 if controllers else 2
            if group == mounted:
                break
