"""CPU detection: the CPUs that this process may use, and their int8 instructions."""

from __future__ import annotations

import functools
import math
import os
from pathlib import Path

from service.container import CGROUP_ROOT, PROCESS_CGROUPS, cpu_quotas

# Linux's names for the VNNI of AVX-512 and of AVX, and for AMX.
_INT8_PRODUCTS = frozenset({"avx512_vnni", "avx_vnni", "amx_int8"})


@functools.cache  # called for each bundle, and the CPUs do not change
def multiplies_int8(info: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether all CPUs have instructions for int8 products: True or False on x86 Linux.

    On other systems the result is False. Without these instructions, an int8 model is hardly
    faster than the float32 one.

    Args:
        info: path of the kernel's description of the CPUs.
    """
    try:
        lines = info.read_text().splitlines()
    except OSError:  # not Linux
        return False
    flags = [set(line.partition(":")[2].split()) for line in lines if line.startswith("flags")]
    return bool(flags) and all(of_cpu & _INT8_PRODUCTS for of_cpu in flags)


def usable_cpus(groups: Path = CGROUP_ROOT, own: Path = PROCESS_CGROUPS) -> int:
    """Number of CPUs that this process may use, by its affinity and its container's quota.

    A quota of 1.5 CPUs counts as 2, because one thread would leave half a CPU unused.

    Args:
        groups: mount point of the control groups, version 1 or 2.
        own: file that lists the control groups of this process.

    Returns:
        The number of CPUs, at least 1.
    """
    if hasattr(os, "sched_getaffinity"):  # without it, every CPU may be used
        allowed = len(os.sched_getaffinity(0))
    else:
        allowed = os.cpu_count() or 1
    quotas = [math.ceil(quota) for quota in cpu_quotas(groups, own)]
    return max(1, min([allowed, *quotas]))
