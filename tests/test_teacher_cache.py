"""Cached embeddings are the teacher's, whatever happens to the files."""

from __future__ import annotations

import logging
import multiprocessing
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from training_data import SIZE

from pyiqa_clipkd.network import CLIPLikert, QualityNetwork
from pyiqa_clipkd.teacher_cache import TeacherCache, teacher_key, view_key

DIM = 24
RECORD = 16 + 4 * DIM + 4
HEADER = 16


def build_teacher(seed: int = 0, temperature: float = 0.05) -> QualityNetwork:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        teacher = CLIPLikert(
            'timm:test_resnet',
            input_size=SIZE,
            embed_dim=DIM,
            temperature=temperature,
        )
    return teacher.eval().requires_grad_(False)


def build_views(count: int, seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    img = torch.rand(count, 3, SIZE, SIZE, generator=generator)
    return img, torch.stack([view_key(one) for one in img])


def embed_all(folder: Path | str, first: int, last: int) -> int:
    """What a training process does: batches of four; returns how many it computed."""
    torch.set_num_threads(1)
    cache = TeacherCache(folder, build_teacher())
    img, keys = build_views(last)
    for i in range(first, last, 4):
        cache.embed(img[i : i + 4], keys[i : i + 4])
        print(i + 4, flush=True)
    return cache.misses


def in_another_process(folder: Path, first: int, last: int) -> subprocess.Popen[str]:
    call = f'test_teacher_cache.embed_all({str(folder)!r}, {first}, {last})'
    code = f'import test_teacher_cache; print("misses", {call})'
    return subprocess.Popen(
        [sys.executable, '-c', code],
        cwd=Path(__file__).parent,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, 'OMP_NUM_THREADS': '1'},
    )


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob('*/shard-*.bin'))


@pytest.fixture
def teacher() -> QualityNetwork:
    return build_teacher()


@pytest.fixture
def warnings_seen() -> Iterator[list[str]]:
    """Texts of the warnings in pyiqa's log, which may not propagate."""
    seen: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: seen.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger('pyiqa').addHandler(handler)
    yield seen
    logging.getLogger('pyiqa').removeHandler(handler)


class Asked:
    """Counts the images that a teacher sees."""

    def __init__(self, teacher: QualityNetwork) -> None:
        self.images = 0
        teacher.encoder.register_forward_pre_hook(self._count)

    def _count(self, _: object, args: tuple[Tensor]) -> None:
        self.images += len(args[0])


# --- keys -------------------------------------------------------------------------


def test_equal_pixels_have_one_key_whatever_their_strides() -> None:
    img = torch.rand(3, 8, 6)
    key = view_key(img)
    assert key.dtype == torch.uint8
    assert key.shape == (16,)
    strided = img.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    assert torch.equal(view_key(strided), key)
    wider = torch.zeros(3, 8, 12)
    wider[..., ::2] = img
    assert torch.equal(view_key(wider[..., ::2]), key)


def test_pixels_shape_and_type_decide_the_key() -> None:
    img = torch.randint(0, 255, (3, 8, 6), dtype=torch.uint8)
    changed = img.clone()
    changed[1, 2, 3] += 1
    views = [
        img,
        changed,
        img.flip(-1),
        img.reshape(3, 6, 8),
        img.view(torch.int8),
        img.float(),
        img.half(),
        img.bfloat16(),
        img.bool(),
        img[:, :0],
    ]
    assert len({bytes(view_key(view).tolist()) for view in views}) == len(views)


class _Views(Dataset):
    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        img = torch.full((3, 9, 9), index / 11).permute(0, 2, 1)
        return img, view_key(img)


def test_loader_workers_give_the_keys_of_the_main_process() -> None:
    loader = DataLoader(_Views(), batch_size=5, num_workers=2)
    for img, keys in loader:
        assert torch.equal(keys, torch.stack([view_key(one) for one in img]))


def test_a_key_takes_less_than_a_loader_notices() -> None:
    img = torch.rand(3, 224, 224)
    seconds = []
    for _ in range(20):
        start = time.thread_time()
        view_key(img)
        seconds.append(time.thread_time() - start)
    assert min(seconds) < 2e-3


def test_weights_and_config_decide_the_teachers_key() -> None:
    keys = {
        teacher_key(build_teacher()),
        teacher_key(build_teacher(seed=1)),
        teacher_key(build_teacher(temperature=0.06)),
        teacher_key(build_teacher().half()),
    }
    assert len(keys) == 4
    assert teacher_key(build_teacher()) in keys


# --- one process ------------------------------------------------------------------


def test_first_pass_is_the_teacher_and_the_second_asks_it_nothing(
    tmp_path: Path, teacher: QualityNetwork
) -> None:
    img, keys = build_views(6)
    expected = teacher.embed(img)
    asked = Asked(teacher)
    cache = TeacherCache(tmp_path / 'new' / 'folder', teacher)
    assert torch.equal(cache.embed(img, keys), expected)
    assert asked.images == 6
    order = [5, 0, 3, 3]
    for again in (cache, TeacherCache(tmp_path / 'new' / 'folder', teacher)):
        assert torch.equal(again.embed(img[order], keys[order]), expected[order])
        assert len(again) == 6
    assert asked.images == 6
    assert (cache.hits, cache.misses) == (4, 6)
    assert '6 embeddings of 24 numbers, 4 hits, 6 misses' in repr(cache)


def test_only_missing_rows_are_computed_and_land_in_their_places(
    tmp_path: Path, teacher: QualityNetwork
) -> None:
    img, keys = build_views(8)
    expected = teacher.embed(img)
    cache = TeacherCache(tmp_path, teacher)
    cache.embed(img[[1, 2, 6]], keys[[1, 2, 6]])
    asked = Asked(teacher)
    torch.testing.assert_close(cache.embed(img, keys), expected, atol=1e-6, rtol=0)
    assert asked.images == 5
    assert torch.equal(cache.embed(img[:0], keys[:0]), expected[:0])


def test_the_same_view_twice_in_a_batch_is_kept_once(
    tmp_path: Path, teacher: QualityNetwork
) -> None:
    img, keys = build_views(2)
    cache = TeacherCache(tmp_path, teacher)
    cache.embed(img[[0, 1, 0]], keys[[0, 1, 0]])
    assert shards(tmp_path)[0].stat().st_size == HEADER + 2 * RECORD


def test_changed_pixels_and_other_teachers_are_computed(
    tmp_path: Path, teacher: QualityNetwork
) -> None:
    img, keys = build_views(4)
    TeacherCache(tmp_path, teacher).embed(img, keys)
    brighter = (img + 0.1).clamp(0, 1)
    cache = TeacherCache(tmp_path, teacher)
    result = cache.embed(brighter, torch.stack([view_key(one) for one in brighter]))
    assert torch.equal(result, teacher.embed(brighter))
    assert cache.misses == 4
    for other in (build_teacher(seed=1), build_teacher(temperature=0.06)):
        cache = TeacherCache(tmp_path, other)
        assert torch.equal(cache.embed(img, keys), other.embed(img))
        assert cache.misses == 4


def test_what_is_kept_is_float32_even_under_autocast(
    tmp_path: Path, teacher: QualityNetwork
) -> None:
    img, keys = build_views(4)
    expected = teacher.embed(img)
    cache = TeacherCache(tmp_path, teacher.requires_grad_(True))
    with torch.autocast('cpu', torch.bfloat16):
        for _ in range(2):
            result = cache.embed(img, keys)
            assert result.dtype == torch.float32
            assert not result.requires_grad
            assert torch.equal(result, expected)


def test_wrong_arguments_are_named(tmp_path: Path, teacher: QualityNetwork) -> None:
    (tmp_path / 'file').write_text('')
    for folder in (tmp_path / 'file', tmp_path / 'file' / 'below'):
        with pytest.raises(ValueError, match=r'`folder`.* but .*file is a file\.'):
            TeacherCache(folder, teacher)
    img, keys = build_views(4)
    cache = TeacherCache(tmp_path, teacher)
    for wrong in (keys[:3], keys.int(), keys[0]):
        with pytest.raises(
            ValueError, match=r'`keys` must be uint8 of shape \(4, 16\)'
        ):
            cache.embed(img, wrong)
    with pytest.raises(ValueError, match='evaluation mode'):
        TeacherCache(tmp_path, build_teacher().train())


# --- damage -----------------------------------------------------------------------


def flip(path: Path, offset: int) -> None:
    content = bytearray(path.read_bytes())
    content[offset] ^= 0x10
    path.write_bytes(content)


def swap_rows(path: Path) -> None:
    """Whole records, but where those of other views were."""
    content = path.read_bytes()
    rows = [content[i : i + RECORD] for i in range(HEADER, len(content), RECORD)]
    path.write_bytes(content[:HEADER] + b''.join(reversed(rows)))


DAMAGES = {
    'torn tail': lambda path: os.truncate(path, HEADER + 6 * RECORD - 5),
    'truncated': lambda path: os.truncate(path, HEADER + 2 * RECORD),
    'nothing left': lambda path: os.truncate(path, 0),
    'flipped key': lambda path: flip(path, HEADER + RECORD + 3),
    'flipped number': lambda path: flip(path, HEADER + RECORD + 40),
    'flipped check sum': lambda path: flip(path, HEADER + RECORD - 1),
    'other format': lambda path: flip(path, 0),
    'other version': lambda path: flip(path, 8),
    'other width': lambda path: flip(path, 12),
    'alien file': lambda path: path.write_bytes(b'%PDF-1.7 ' * 500),
    'other rows': swap_rows,
    'zeros': lambda path: path.write_bytes(bytes(path.stat().st_size)),
    'a folder': lambda path: (path.unlink(), path.mkdir()),
}


@pytest.mark.parametrize('live', [False, True], ids=['opened later', 'open'])
@pytest.mark.parametrize('damage', DAMAGES)
def test_what_is_damaged_is_computed_and_kept_once_more(
    damage: str,
    live: bool,
    tmp_path: Path,
    teacher: QualityNetwork,
    warnings_seen: list[str],
) -> None:
    img, keys = build_views(6)
    expected = TeacherCache(tmp_path, teacher).embed(img, keys)
    reader = TeacherCache(tmp_path, teacher)
    if live:
        reader.embed(img, keys)
    DAMAGES[damage](shards(tmp_path)[0])
    if not live:
        reader = TeacherCache(tmp_path, teacher)
    for _ in range(2):
        result = reader.embed(img, keys)
        torch.testing.assert_close(result, expected, atol=1e-6, rtol=0)
    if not live and damage != 'other rows':
        assert 0 < reader.misses <= 6
    assert len(warnings_seen) <= 1
    # Later good entries win, in whatever order the files are found.
    for _ in range(2):
        later = TeacherCache(tmp_path, teacher)
        result = later.embed(img, keys)
        torch.testing.assert_close(result, expected, atol=1e-6, rtol=0)
    assert later.misses == 0


def test_one_warning_a_damaged_file_names_it(
    tmp_path: Path, teacher: QualityNetwork, warnings_seen: list[str]
) -> None:
    img, keys = build_views(6)
    TeacherCache(tmp_path, teacher).embed(img, keys)
    path = shards(tmp_path)[0]
    flip(path, HEADER + 40)
    flip(path, HEADER + 3 * RECORD + 40)
    cache = TeacherCache(tmp_path, teacher)
    cache.embed(img, keys)
    cache.embed(img, keys)
    assert cache.misses == 2
    assert len(warnings_seen) == 1
    assert path.name in warnings_seen[0]
    assert 'damaged' in warnings_seen[0]


def test_a_deleted_file_is_made_again(tmp_path: Path, teacher: QualityNetwork) -> None:
    img, keys = build_views(4)
    cache = TeacherCache(tmp_path, teacher)
    expected = cache.embed(img, keys)
    shards(tmp_path)[0].unlink()
    assert torch.equal(cache.embed(img, keys), expected)
    assert torch.equal(TeacherCache(tmp_path, teacher).embed(img, keys), expected)


TEACHER, VIEWS = build_teacher(), build_views(5)  # once for all examples


@settings(max_examples=60, deadline=None)
@given(
    flips=st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), max_size=8),
    cut=st.integers(0, HEADER + 5 * RECORD),
    junk=st.binary(max_size=2 * RECORD),
)
def test_random_damage_never_gives_a_wrong_embedding(
    flips: list[tuple[int, int]], cut: int, junk: bytes
) -> None:
    teacher, (img, keys) = TEACHER, VIEWS
    with tempfile.TemporaryDirectory() as folder:
        expected = TeacherCache(folder, teacher).embed(img, keys)
        path = shards(Path(folder))[0]
        content = bytearray(path.read_bytes()[: cut or None] + junk)
        for offset, byte in flips:
            content[offset % len(content)] = byte
        path.write_bytes(content)
        for _ in range(2):
            cache = TeacherCache(folder, teacher)
            result = cache.embed(img, keys)
            torch.testing.assert_close(result, expected, atol=1e-6, rtol=0)
        assert cache.misses == 0


# --- a disk that takes no more ----------------------------------------------------


def test_a_full_disk_is_one_warning(
    tmp_path: Path, teacher: QualityNetwork, warnings_seen: list[str]
) -> None:
    img, keys = build_views(12)
    expected = teacher.embed(img)
    cache = TeacherCache(tmp_path, teacher)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (HEADER + 6 * RECORD, limits[1]))
    try:
        results = [cache.embed(img[i : i + 4], keys[i : i + 4]) for i in (0, 4, 8, 0)]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    order = [*range(12), *range(4)]
    torch.testing.assert_close(torch.cat(results), expected[order], atol=1e-6, rtol=0)
    assert len(warnings_seen) == 1
    assert 'training goes on' in warnings_seen[0]
    # What fitted stays: another process may have mapped it.
    assert shards(tmp_path)[0].stat().st_size == HEADER + 6 * RECORD
    assert len(TeacherCache(tmp_path, teacher)) == 6


def test_a_folder_that_is_removed_is_made_again(
    tmp_path: Path, teacher: QualityNetwork
) -> None:
    img, keys = build_views(4)
    expected = teacher.embed(img)
    cache = TeacherCache(tmp_path, teacher)
    cache.embed(img[:2], keys[:2])
    shutil.rmtree(tmp_path)
    for _ in range(2):
        torch.testing.assert_close(cache.embed(img, keys), expected, atol=1e-6, rtol=0)
    assert len(TeacherCache(tmp_path, teacher)) >= 2
    again = TeacherCache(tmp_path, teacher)
    again.embed(img[2:], keys[2:])
    assert again.misses == 0


def test_a_folder_that_cannot_be_made_is_one_warning(
    tmp_path: Path, teacher: QualityNetwork, warnings_seen: list[str]
) -> None:
    cache = TeacherCache(tmp_path, teacher)
    cache.folder.write_text('in the way')
    img, keys = build_views(4)
    for _ in range(3):
        assert torch.equal(cache.embed(img, keys), teacher.embed(img))
    assert cache.misses == 12
    assert len(warnings_seen) == 1


@pytest.mark.skipif(os.getuid() == 0, reason='root may write everywhere')
def test_a_read_only_folder_is_read(
    tmp_path: Path, teacher: QualityNetwork, warnings_seen: list[str]
) -> None:
    img, keys = build_views(8)
    expected = TeacherCache(tmp_path, teacher).embed(img[:4], keys[:4])
    cache = TeacherCache(tmp_path, teacher)
    cache.folder.chmod(0o500)
    try:
        assert torch.equal(cache.embed(img, keys)[:4], expected)
        cache.embed(img, keys)
    finally:
        cache.folder.chmod(0o700)
    assert (cache.hits, cache.misses) == (8, 8)
    assert len(warnings_seen) == 1


# --- several processes ------------------------------------------------------------


def test_two_open_caches_find_each_others_embeddings(
    tmp_path: Path, teacher: QualityNetwork
) -> None:
    img, keys = build_views(8)
    one, other = TeacherCache(tmp_path, teacher), TeacherCache(tmp_path, teacher)
    one.embed(img[:2], keys[:2])
    other.embed(img[:4], keys[:4])
    one.embed(img[:6], keys[:6])
    other.embed(img[2:], keys[2:])
    assert [one.misses, other.misses] == [4, 4]
    assert len(shards(tmp_path)) == 2
    assert len(other) == 8


def _forked(cache: TeacherCache, img: Tensor, keys: Tensor) -> None:
    torch.set_num_threads(1)
    cache.embed(img, keys)


def test_a_forked_process_writes_a_file_of_its_own(
    tmp_path: Path, teacher: QualityNetwork
) -> None:
    img, keys = build_views(12)
    cache = TeacherCache(tmp_path, teacher)
    cache.embed(img[:4], keys[:4])
    process = multiprocessing.get_context('fork').Process(
        target=_forked, args=(cache, img[:8], keys[:8])
    )
    process.start()
    process.join(60)
    assert process.exitcode == 0
    expected = teacher.embed(img)
    cache.embed(img[8:], keys[8:])
    torch.testing.assert_close(cache.embed(img, keys), expected, atol=1e-6, rtol=0)
    assert cache.misses == 8
    assert [p.stat().st_size for p in shards(tmp_path)].count(HEADER + 4 * RECORD) == 1
    assert len(shards(tmp_path)) == 2


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_processes_write_at_once_and_a_third_computes_nothing(
    tmp_path: Path, teacher: QualityNetwork
) -> None:
    writers = [
        in_another_process(tmp_path, 0, 400),
        in_another_process(tmp_path, 200, 600),
    ]
    for writer in writers:
        writer.communicate()
        assert writer.returncode == 0
    assert len(shards(tmp_path)) == 2
    reader = in_another_process(tmp_path, 0, 600)
    assert reader.communicate()[0].splitlines()[-1] == 'misses 0'
    img, keys = build_views(600)
    cache = TeacherCache(tmp_path, teacher)
    torch.testing.assert_close(
        cache.embed(img, keys), teacher.embed(img), atol=1e-6, rtol=0
    )
    assert cache.misses == 0


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_what_a_killed_process_has_written_stays(
    tmp_path: Path, teacher: QualityNetwork
) -> None:
    writer = in_another_process(tmp_path, 0, 20_000)
    assert writer.stdout is not None
    written = 0
    while written < 40:
        written = int(writer.stdout.readline())
    writer.send_signal(signal.SIGKILL)
    writer.communicate()
    assert writer.returncode == -signal.SIGKILL
    os.truncate(shards(tmp_path)[0], shards(tmp_path)[0].stat().st_size - 7)
    img, keys = build_views(20_000)
    cache = TeacherCache(tmp_path, teacher)
    assert len(cache) >= written - 1
    result = cache.embed(img[:written], keys[:written])
    torch.testing.assert_close(result, teacher.embed(img[:written]), atol=1e-6, rtol=0)
    assert cache.misses <= 1
