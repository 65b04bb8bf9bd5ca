"""Cores that may be used: of the affinity, and of the quotas of containers."""

from __future__ import annotations

from pathlib import Path

import pytest

from pyiqa_clipkd import cores
from pyiqa_clipkd.cores import usable_cores
from pyiqa_clipkd.scoring.core import default_workers


@pytest.fixture
def groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine of sixteen cores whose control groups are files of a test."""
    monkeypatch.setattr(cores, 'GROUPS', tmp_path / 'cgroup')
    monkeypatch.setattr(cores, 'OWN_GROUP', tmp_path / 'own')
    monkeypatch.setattr(
        cores.os, 'sched_getaffinity', lambda pid: set(range(16)), raising=False
    )
    return tmp_path


def write(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text + '\n')


def test_without_a_quota_those_of_the_affinity(groups: Path) -> None:
    assert usable_cores() == 16
    write(groups / 'cgroup/cpu.max', 'max 100000')
    write(groups / 'own', '0::/')
    assert usable_cores() == 16


@pytest.mark.parametrize(
    ('quota', 'count'),
    [('200000 100000', 2), ('250000 100000', 3), ('5000 100000', 1), ('nonsense', 16)],
)
def test_a_container_uses_what_its_quota_is_worth(
    groups: Path, quota: str, count: int
) -> None:
    write(groups / 'cgroup/cpu.max', quota)
    assert usable_cores() == count
    assert default_workers() == count
    assert default_workers(threads=2) == max(1, count // 2)


def test_the_narrowest_of_the_groups_around_a_service_counts(groups: Path) -> None:
    write(groups / 'own', '0::/system.slice/scores.service')
    write(groups / 'cgroup/system.slice/cpu.max', '300000 100000')
    write(groups / 'cgroup/system.slice/scores.service/cpu.max', '400000 100000')
    assert usable_cores() == 3


@pytest.mark.parametrize(('quota', 'count'), [('400000', 4), ('-1', 16)])
def test_control_groups_of_version_1(groups: Path, quota: str, count: int) -> None:
    write(groups / 'own', '12:memory:/box\n4:cpu,cpuacct:/box')
    write(groups / 'cgroup/cpu/box/cpu.cfs_quota_us', quota)
    write(groups / 'cgroup/cpu/box/cpu.cfs_period_us', '100000')
    assert usable_cores() == count
