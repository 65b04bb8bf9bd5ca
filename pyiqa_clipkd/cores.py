"""How many processor cores this process may use: fewer in containers than there are.

Standard library only.
"""

from __future__ import annotations

import contextlib
import math
import os
import sys
from pathlib import Path

GROUPS = Path('/sys/fs/cgroup')
OWN_GROUP = Path('/proc/self/cgroup')


def usable_cores() -> int:
    """Those that its affinity names, or as many as its containers' quota is worth.

    A quota (`docker run --cpus 2`, a Kubernetes limit, systemd's CPUQuota) leaves all
    cores in sight and lets whoever uses more of them wait. Fractions are rounded up.
    """
    if hasattr(os, 'sched_getaffinity'):
        cores = len(os.sched_getaffinity(0))
    else:
        cores = os.cpu_count() or 1
    return max(1, min(cores, _quota()))


def _quota() -> int:
    """Cores that the control groups allow; `sys.maxsize` without a limit."""
    folders = {GROUPS, GROUPS / 'cpu'}  # version 2's, version 1's
    with contextlib.suppress(OSError, ValueError):
        for line in OWN_GROUP.read_text().splitlines():
            _, controllers, path = line.split(':', 2)
            if not controllers or 'cpu' in controllers.split(','):
                root = GROUPS / 'cpu' if controllers else GROUPS
                own = root / path.lstrip('/')
                folders |= {f for f in (own, *own.parents) if f.is_relative_to(root)}
    return min(_quota_of(folder) for folder in folders)


def _quota_of(folder: Path) -> int:
    for names in (['cpu.max'], ['cpu.cfs_quota_us', 'cpu.cfs_period_us']):
        with contextlib.suppress(OSError, ValueError):  # `max` isn't a number either
            words = ' '.join((folder / name).read_text() for name in names).split()
            quota, period = map(int, words)
            if quota > 0 and period > 0:  # -1: no limit
                return math.ceil(quota / period)
    return sys.maxsize
