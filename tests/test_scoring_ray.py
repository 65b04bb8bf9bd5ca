from __future__ import annotations

import argparse
import contextlib
import io
import os
import signal
import socket
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from result_files import MADE_BY, row
from scoring_data import METRIC, ODD, encoded, photograph, write_odd

from pyiqa_clipkd.command import main
from pyiqa_clipkd.names import LEVELS
from pyiqa_clipkd.scoring.backends import create_backend
from pyiqa_clipkd.scoring.command import add_arguments
from pyiqa_clipkd.scoring.contents import Content
from pyiqa_clipkd.scoring.core import score_paths
from pyiqa_clipkd.scoring.ray import cluster
from pyiqa_clipkd.scoring.ray import parts as parts_module
from pyiqa_clipkd.scoring.ray.ledger import DEATHS, FATAL, Advice, Ledger
from pyiqa_clipkd.scoring.ray.options import device_of
from pyiqa_clipkd.scoring.ray.parts import Parts
from pyiqa_clipkd.scoring.ray.reading import Item, read_container, read_photograph
from pyiqa_clipkd.scoring.ray.sources import find_sources
from pyiqa_clipkd.scoring.results import read_results

fsspec = pytest.importorskip('fsspec')
pyarrow = pytest.importorskip('pyarrow')
parquet = pytest.importorskip('pyarrow.parquet')

IDENTITY = {k: MADE_BY[k] for k in ('metric', 'sha256', 'crops', 'input_size')}
NAMES = ('0.jpg', '1.jpg', '2.jpg')


def jpeg(number: int, size: tuple[int, int] = (120, 90)) -> bytes:
    return encoded(photograph(number, size))


def write_shard(path: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, 'w:gz' if path.suffix == '.tgz' else 'w') as shard:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            shard.addfile(member, io.BytesIO(data))


def write_table(path: Path, groups: int | None = None, /, **columns: Any) -> None:
    parquet.write_table(pyarrow.table(columns), path, row_group_size=groups)


@pytest.fixture
def photos(tmp_path: Path) -> dict[str, bytes]:
    """Three photographs, in a folder and as bytes."""
    (tmp_path / 'photos').mkdir()
    content = {name: jpeg(number) for number, name in enumerate(NAMES)}
    for name, data in content.items():
        (tmp_path / 'photos' / name).write_bytes(data)
    return content


def read_all(path: Path | str, *rest: Any) -> list[Item]:
    return list(read_container(str(path), *rest))


def test_bytes_are_scored_as_the_file_would_be(tmp_path: Path) -> None:
    write_odd(tmp_path)
    paths = sorted(tmp_path.iterdir())
    contents = [Content(str(path), path.read_bytes()) for path in paths]
    backend = create_backend(METRIC, kind='onnx')
    for mine, files in zip(
        score_paths(contents, backend), score_paths(paths, backend), strict=True
    ):
        assert {**mine, 'seconds': 0} == {**files, 'seconds': 0}
    raw = Content('shard.tar/a.dng', jpeg(0))
    (mine,) = score_paths([raw], backend)
    assert "camera's raw data" in mine['error']


def test_a_shard_is_its_images_and_where_it_ends(
    tmp_path: Path, photos: dict[str, bytes]
) -> None:
    members = {'0.jpg': photos['0.jpg'], '0.json': b'{}', '.1.jpg': b'hidden'}
    members |= {'deep/1.JPG': photos['1.jpg'], '2.jpg': photos['2.jpg']}
    for name in ('a.tar', 'b.tgz'):
        shard = tmp_path / name
        write_shard(shard, members)
        items = read_all(shard)
        assert [(item.name, item.row) for item in items] == [
            (f'{shard}/0.jpg', 0),
            (f'{shard}/deep/1.JPG', 1),
            (f'{shard}/2.jpg', 2),
            ('', 3),
        ]
        assert [item.data for item in items[:3]] == [*photos.values()]
        assert [item.row for item in read_all(shard, {0, 2})] == [1, 3]


def test_a_truncated_shard_gives_what_it_has_and_an_error(
    tmp_path: Path, photos: dict[str, bytes]
) -> None:
    shard = tmp_path / 'a.tar'
    write_shard(shard, photos)
    whole = shard.read_bytes()
    shard.write_bytes(whole[: 512 + len(photos['0.jpg']) + 900])
    first, *_, last = read_all(shard)
    assert first.data == photos['0.jpg']
    assert last.name == str(shard)
    assert last.error
    shard.write_bytes(b'no shard' * 200)
    (only,) = read_all(shard)
    assert only.error
    (missing,) = read_all(tmp_path / 'none.tar')
    assert missing.error == 'no such file'


@pytest.mark.parametrize('kind', ['bytes', 'struct', 'path'])
def test_tables_with_photographs_or_their_paths(
    kind: str, tmp_path: Path, photos: dict[str, bytes]
) -> None:
    columns: dict[str, list[Any]] = {
        'bytes': [*photos.values(), None],
        'struct': [{'bytes': d, 'path': n} for n, d in photos.items()] + [None],
        'path': [f'photos/{name}' for name in photos] + [None],
    }
    table = tmp_path / 'a.parquet'
    column = 'path' if kind == 'path' else 'image'
    write_table(table, 2, **{column: columns[kind], 'label': [1, 2, 3, 4]})
    *items, bad, end = read_all(table)
    assert end == Item('', None, '', str(table), 4)
    assert bad.error == 'an empty cell'
    if kind == 'path':
        paths = [str(tmp_path / 'photos' / name) for name in photos]
        assert items == [Item(p, None, '', str(table), i) for i, p in enumerate(paths)]
    else:
        assert items == [
            Item(f'{table}/{i}', data, '', str(table), i)
            for i, data in enumerate(photos.values())
        ]
    assert [item.row for item in read_all(table, {0, 1, 3})] == [2, 4]


def test_a_table_with_a_struct_of_a_path_only(tmp_path: Path) -> None:
    table = tmp_path / 'a.parquet'
    write_table(table, image=[{'bytes': None, 'path': 'https://x.invalid/a.jpg'}])
    item, _ = read_all(table)
    assert item.name == 'https://x.invalid/a.jpg'
    assert item.error
    assert item.row == 0


def test_which_column_it_is(tmp_path: Path, photos: dict[str, bytes]) -> None:
    table = tmp_path / 'a.parquet'
    write_table(table, jpg=[photos['0.jpg']], mask=[photos['1.jpg']])
    (error,) = read_all(table)
    assert 'jpg and mask could be it' in error.error
    assert '--column' in error.error
    item, _ = read_all(table, (), 'mask')
    assert item.data == photos['1.jpg']
    (error,) = read_all(table, (), 'picture')
    assert 'no column picture' in error.error


@pytest.mark.parametrize(
    ('cells', 'kind'), [([1], 'int64'), ([[1]], 'list'), ([{'path': 1}], 'struct')]
)
def test_a_column_of_something_else_is_an_error_in_its_rows(
    cells: list[Any], kind: str, tmp_path: Path
) -> None:
    table = tmp_path / 'a.parquet'
    write_table(table, label=cells)
    item, end = read_all(table, (), 'label')
    assert item.error.startswith(f'neither bytes nor a path, but {kind}')
    assert (item.data, item.row, end.row) == (b'', 0, 1)
    write_table(table, image=[1], file_name=['a.jpg'])
    assert read_all(table)[0].name == str(tmp_path / 'a.jpg')
    write_table(table, image=[1])
    (error,) = read_all(table)
    assert 'no such column' in error.error


def test_sources_of_a_command(
    tmp_path: Path, photos: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'shards').mkdir()
    for name in ('a.tar', 'b.parquet', 'notes.txt'):
        (tmp_path / 'shards' / name).write_bytes(b'')
    (tmp_path / 'photos' / 'scores.parquet').write_bytes(b'')
    files = [str(tmp_path / 'photos' / name) for name in NAMES]
    shards = [str(tmp_path / 'shards' / name) for name in ('a.tar', 'b.parquet')]
    for words, photographs, containers in (
        (['photos'], files, []),
        (['photos/*'], files, []),
        (['photos/[01].jpg', 'photos/0.jpg'], files[:2], []),
        (['shards'], [], shards),
        (['shar*'], [], shards),
        (['shards/*.tar', 'photos'], files, shards[:1]),
        ([f'file://{tmp_path}/photos'], files, []),
        (['gone.jpg', 'gone.tar'], [f'{tmp_path}/gone.jpg'], [f'{tmp_path}/gone.tar']),
    ):
        assert find_sources(words) == (photographs, containers), words
    given = io.BytesIO(b'photos/1.jpg\nshards/a.tar\n')
    assert find_sources(['-'], stdin=given) == ([files[1]], shards[:1])


def test_links_that_lead_back_give_each_shard_once(tmp_path: Path) -> None:
    shards = [tmp_path / 'a.tar', tmp_path / 'deep' / 'b.tar']
    (tmp_path / 'deep').mkdir()
    for shard in (*shards, tmp_path / '.hidden.tar', tmp_path / 'deep' / '.c.tar'):
        shard.write_bytes(b'')
    for name in ('x', 'y', 'deep/z'):
        (tmp_path / name).symlink_to(tmp_path)
    assert find_sources([str(tmp_path)]).containers == [*map(str, shards)]


def test_results_in_the_folder_are_no_tables(tmp_path: Path) -> None:
    table, folder = tmp_path / 'a.parquet', tmp_path / 'scores.parquet'
    table.write_bytes(b'')
    with open_parts(folder) as parts:
        parts.add(part_rows('/a.jpg')[0])
    for word in (str(tmp_path), f'{tmp_path}/*', f'{tmp_path}/**/*.parquet'):
        assert find_sources([word]) == ([], [str(table)]), word
    (part,) = map(str, folder.iterdir())
    assert find_sources([part]).containers == [part]


@pytest.fixture
def memory() -> Iterator[Any]:
    """An empty object store in this process."""
    store = fsspec.filesystem('memory')
    yield store
    store.rm('/bucket', recursive=True)


def test_what_is_left_out_in_an_object_store(memory: Any) -> None:
    for name in ('a.jpg', '._a.jpg', '.checkpoints/a.jpg', 'deep/.b.jpg', 'deep/b.jpg'):
        memory.pipe_file(f'/bucket/.in/{name}', b'')
    part = f'scores.parquet/scores-{"0" * 32}.parquet'
    for name in ('a.tar', '.b.tar', part):
        memory.pipe_file(f'/bucket/shards/{name}', b'')
    files = ['memory://bucket/.in/a.jpg', 'memory://bucket/.in/deep/b.jpg']
    shards = ['memory://bucket/shards/a.tar']
    assert find_sources(['memory://bucket/.in']) == (files, [])
    assert find_sources(['memory://bucket/shards']) == ([], shards)
    assert find_sources(['memory://bucket/shards/*.tar']) == ([], shards)
    assert find_sources(['memory://bucket/shards/*']) == ([], shards)


def test_a_table_in_an_object_store_may_be_a_folder_of_parts(memory: Any) -> None:
    parts = [f'bucket/table.parquet/part-{n}.parquet' for n in range(2)]
    for name in parts:
        memory.pipe_file(f'/{name}', b'')
    memory.pipe_file('/bucket/other.parquet', b'')
    parts = [f'memory://{name}' for name in parts]
    assert find_sources(['memory://bucket/table.parquet']) == ([], parts)
    tables = ['memory://bucket/other.parquet', *parts]
    assert find_sources(['memory://bucket/*.parquet']) == ([], tables)


def part_rows(*names: str, source: str = '', score: float | None = 3) -> list[Any]:
    return [
        row(n, score, '' if score else 'not an image')
        | {'source': source, 'row': i if source else None}
        for i, n in enumerate(names)
    ]


def open_parts(folder: Path | str, **options: Any) -> Parts:
    return Parts(str(folder), LEVELS, IDENTITY | options.pop('other', {}), **options)


def test_parts_are_taken_up_again(tmp_path: Path) -> None:
    folder = tmp_path / 'scores.parquet'
    with open_parts(folder) as parts:
        for one in part_rows('/a.jpg', '/b\udcff.jpg'):
            parts.add(one)
        parts.flush()
        for one in part_rows('/s.tar/0.jpg', '/s.tar/1.jpg', source='/s.tar'):
            assert not parts.has(one)
            parts.add(one)
            assert parts.has(one)
        parts.end('/s.tar', 3)
    assert len([*folder.iterdir()]) == 2
    with open_parts(folder) as parts:
        assert parts.has(part_rows('/b\udcff.jpg')[0])
        assert not parts.has(part_rows('/c.jpg')[0])
        assert parts.done_rows == {'/s.tar': {0, 1}}
        assert not parts.has_all('/s.tar')
        (bad,) = part_rows('/s.tar/2.jpg', source='/s.tar', score=None)
        parts.add({**bad, 'row': 2})
    assert open_parts(folder).has_all('/s.tar')
    assert not open_parts(folder, retry=True).has_all('/s.tar')
    assert len(read_results(folder)) == 4
    assert len([*open_parts(folder).known()]) == 4
    parts = open_parts(folder, overwrite=True)
    assert not parts.done
    assert not [*parts.known()]
    assert len(read_results(folder)) == 4
    parts.begin()
    assert not [*folder.iterdir()]


def test_a_store_without_empty_folders(
    memory: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    listed = memory.ls

    def ls(path: str, **options: Any) -> Any:
        if found := listed(path, **options):
            return found
        raise FileNotFoundError(path)

    monkeypatch.setattr(memory, 'ls', ls)
    for done in (set(), {'/a.jpg'}):
        with open_parts('memory://bucket/s.parquet') as parts:
            assert parts.done == done
            parts.add(part_rows('/a.jpg')[0])


def test_a_stop_keeps_what_was_scored(tmp_path: Path) -> None:
    def stopped() -> None:
        with open_parts(tmp_path / 's.parquet') as parts:
            parts.add(part_rows('/a.jpg')[0])
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped()
    assert open_parts(tmp_path / 's.parquet').done == {'/a.jpg'}


def test_parts_are_written_in_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / 's.parquet'
    monkeypatch.setattr(parts_module, 'PART_ROWS', 2)
    parts = open_parts(folder)
    for number, one in enumerate(part_rows('/a.jpg', '/b.jpg', '/c.jpg')):
        parts.add(one)
        assert len([*folder.iterdir()]) == (number + 1) // 2
    monkeypatch.setattr(parts_module, 'PART_SECONDS', -1)
    parts.add(part_rows('/d.jpg')[0])
    assert len(read_results(folder)) == 4


def test_parts_of_other_scores_and_other_folders_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / 's.parquet'
    with open_parts(folder) as parts:
        parts.add(part_rows('/a.jpg')[0])
    for other in ({'crops': 4}, {'sha256': 'f' * 16}, {'input_size': 512}):
        with pytest.raises(ValueError, match=r'holds scores of clipkd.*but these are'):
            open_parts(folder, other=other)
    with pytest.raises(ValueError, match='with --attributes or without'):
        open_parts(folder, other={'heads': 'f' * 16})
    (folder / 'train.parquet').write_bytes(b'')
    for options in ({}, {'overwrite': True}):
        with pytest.raises(ValueError, match='is no part'):
            open_parts(folder, **options)
    (folder / 'train.parquet').unlink()
    assert len(read_results(folder)) == 1
    (part,) = folder.iterdir()
    part.write_bytes(part.read_bytes()[:100])
    with pytest.raises(ValueError, match='damaged'):
        open_parts(folder)
    with pytest.raises(ValueError, match='is a file'):
        open_parts(part)


def test_a_photograph_that_ends_its_process_twice_is_left_out() -> None:
    ledger = Ledger()
    assert ledger.begin('work') == Advice(False, frozenset())
    for deaths in range(DEATHS):
        assert ledger.begin('work') == Advice(True, frozenset())
        ledger.read('work', deaths)
        ledger.read('work', 7)
    assert ledger.begin('work') == Advice(True, frozenset({7}))
    ledger.end('work')
    assert not ledger.begin('work').careful


MIXED = [(64, 0.0), (8, 2.0), (8, 2.0), (16, 0.0)]  # cores and GPUs of machines


@pytest.mark.parametrize(
    ('cpus', 'gpus', 'wanted'),
    [
        (1, 1, 4),
        (4, 1, 4),
        (5, 1, 2),
        (1, 0.5, 8),
        (1, 0.6, 4),  # two don't share one card
        (1, 1 / 3, 12),
        (9, 1, 0),
        (0, 4, 0),
        (12, 0, 6),
    ],
)
def test_a_worker_s_cores_and_gpus_are_on_one_machine(
    cpus: int, gpus: float, wanted: int
) -> None:
    assert cluster.room(MIXED, cpus, gpus) == wanted


@pytest.mark.parametrize(
    ('words', 'wanted'),
    [([], 'auto'), (['--backend', 'onnx'], 'cpu'), (['--weights', 'q.onnx'], 'cpu')],
)
def test_graphs_stay_on_processors(words: list[str], wanted: str) -> None:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    assert device_of(parser.parse_args(['photos', *words])) == wanted


def test_what_scores_with_a_graph_asks_for_no_gpu(
    tmp_path: Path,
    photos: dict[str, bytes],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip('onnxruntime')

    def plan(device: str, *_: Any) -> None:
        raise ValueError(f'planned for {device}')

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr('pyiqa_clipkd.scoring.ray.options.find_spec', lambda _: True)
    session = 'pyiqa_clipkd.scoring.ray.session'
    monkeypatch.setattr(f'{session}.connected', lambda *_: contextlib.nullcontext())
    monkeypatch.setattr(f'{session}.plan', plan)
    words = ['score', 'photos', '--engine', 'ray', '--backend']
    for backend, device in (('onnx', 'cpu'), ('torch', 'auto')):
        assert main([*words, backend]) == 2
        assert f'planned for {device}' in capsys.readouterr().err


@pytest.mark.slow
def test_cores_of_machines_without_gpus_are_not_counted_for_workers_with_one() -> None:
    ray = pytest.importorskip('ray')
    utils = pytest.importorskip('ray.cluster_utils')
    machines = utils.Cluster(initialize_head=True, head_node_args={'num_cpus': 6})
    try:
        machines.add_node(num_cpus=4, num_gpus=2)
        ray.init(address=machines.address, log_to_driver=False)
        assert cluster.plan('auto', None, None, None) == (2, 2, 1)
        assert cluster.plan('auto', 1, None, None) == (1, 4, 1)
        assert cluster.plan('auto', None, None, 0.5) == (4, 1, 0.5)
        assert cluster.plan('auto', None, 3, None) == (1, 3, 1)
        assert cluster.plan('cpu', None, None, None) == (10, 1, 0)
        assert cluster.plan('cpu', None, 4, None) == (2, 4, 0)
        with pytest.raises(
            ValueError,
            match=r'2 workers with 3 cores and 1 GPUs each.*'
            r'\(1 with 6 cores, 1 with 4 cores and 2 GPUs\)',
        ):
            cluster.plan('cuda', 2, 3, None)
        with pytest.raises(ValueError, match='3 workers with 1 GPUs each need more'):
            cluster.plan('cuda', 3, None, None)
        with pytest.raises(ValueError, match='3 workers with 4 cores each need more'):
            cluster.plan('cpu', 3, 4, None)
    finally:
        ray.shutdown()
        machines.shutdown()


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['-o', 'scores.csv', '--engine', 'ray'], 'a folder of Parquet files'),
        (['-o', 's3://bucket/scores.parquet'], 'needs --engine ray'),
        (['-o', 'parts.parquet'], 'is a folder'),
        (['--column', 'jpg'], '`--column` needs --engine ray'),
        (['--worker-gpus', '1'], '`--worker-gpus` needs --engine ray'),
        (['--engine', 'ray', '--worker-cpus', '0'], 'whole number >= 1'),
        (['--engine', 'ray', '--worker-gpus', '0'], 'must be above 0'),
        (['--engine', 'ray', '--worker-gpus', '1.5'], 'above 1 must be a whole number'),
        (['--engine', 'ray', '--worker-gpus', '1', '--device', 'cpu'], 'contradicts'),
        (['--engine', 'ray', '--device', 'mps'], 'needs --engine local'),
        (
            ['--engine', 'ray', '--worker-gpus', '1', '--backend', 'onnx'],
            '`--worker-gpus` needs --backend torch, and no .onnx file.',
        ),
        (
            ['--engine', 'ray', '--device', 'cuda', '--weights', 'a.onnx'],
            '`--device cuda` needs --backend torch, and no .onnx file.',
        ),
    ],
)
def test_wrong_usage_is_one_line(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    photos: dict[str, bytes],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr('pyiqa_clipkd.scoring.ray.options.find_spec', lambda _: True)
    (tmp_path / 'parts.parquet').mkdir()
    assert main(['score', 'photos', *arguments]) == 2
    assert message in capsys.readouterr().err


def test_without_ray_the_message_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr('pyiqa_clipkd.scoring.ray.options.find_spec', lambda _: None)
    assert main(['score', 'photos', '--engine', 'ray']) == 2
    assert "pip install 'pyiqa-clipkd[ray]'" in capsys.readouterr().err


def test_a_cluster_that_is_not_there_is_said_at_once(
    photos: dict[str, bytes], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip('ray')
    with socket.socket() as free:  # bound, but nobody listens
        free.bind(('127.0.0.1', 0))
        address = f'127.0.0.1:{free.getsockname()[1]}'
        run = ['score', str(tmp_path / 'photos'), '--engine', 'ray', '--ray-address']
        assert main([*run, address]) == 2
    assert f'There is no Ray cluster at {address}' in capsys.readouterr().err


def test_overwritten_scores_stay_until_there_is_a_cluster(
    photos: dict[str, bytes], tmp_path: Path
) -> None:
    pytest.importorskip('ray')
    out = tmp_path / 's.parquet'
    with open_parts(out) as parts:
        parts.add(part_rows('/a.jpg')[0])
    with socket.socket() as free:  # bound, but nobody listens
        free.bind(('127.0.0.1', 0))
        address = f'127.0.0.1:{free.getsockname()[1]}'
        run = ['score', str(tmp_path / 'photos'), '--engine', 'ray', '--ray-address']
        assert main([*run, address, '-o', str(out), '--overwrite']) == 2
    assert len(read_results(out)) == 1


def test_a_cluster_leaves_the_handler_of_sigterm(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ray = pytest.importorskip('ray')

    def init(**options: Any) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)

    monkeypatch.setattr(ray, 'init', init)
    monkeypatch.setattr(cluster, '_hush', lambda: None)
    before = signal.getsignal(signal.SIGTERM)
    with cluster.connected(None, 1):
        assert signal.getsignal(signal.SIGTERM) == before


def test_the_command_imports_nothing_heavy_before_it_runs() -> None:
    code = (
        'import sys, pyiqa_clipkd.scoring.command; '
        "bad = {'PIL', 'numpy', 'pyarrow', 'fsspec', 'ray'} & {*sys.modules}; "
        'sys.exit(str(bad) if bad else 0)'
    )
    subprocess.run([sys.executable, '-c', code], check=True)


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """An empty bucket of a server of our own that speaks as S3 does."""
    server_module = pytest.importorskip('moto.server')
    boto3 = pytest.importorskip('boto3')
    server = server_module.ThreadedMotoServer(ip_address='127.0.0.1', port=0)
    server.start()
    host, port = server.get_host_and_port()
    for name, value in {
        'AWS_ENDPOINT_URL': f'http://{host}:{port}',
        'AWS_ACCESS_KEY_ID': 'test',
        'AWS_SECRET_ACCESS_KEY': 'test',
        'AWS_DEFAULT_REGION': 'us-east-1',
        'AWS_EC2_METADATA_DISABLED': 'true',
        'no_proxy': '127.0.0.1',
    }.items():
        monkeypatch.setenv(name, value)
    boto3.client('s3').create_bucket(Bucket='photos')
    yield 's3://photos'
    server.stop()


def put(uri: str, data: bytes) -> None:
    import boto3  # type: ignore[import-not-found,import-untyped,unused-ignore]

    name, _, key = uri.removeprefix('s3://').partition('/')
    boto3.client('s3').put_object(Bucket=name, Key=key, Body=data)


def test_an_object_store(bucket: str, tmp_path: Path, photos: dict[str, bytes]) -> None:
    write_shard(tmp_path / 'a.tar', photos)
    write_table(tmp_path / 'b.parquet', jpg=[*photos.values()])
    for name in ('a.tar', 'b.parquet'):
        put(f'{bucket}/shards/{name}', (tmp_path / name).read_bytes())
    for name, data in photos.items():
        put(f'{bucket}/files/{name}', data)
    files = [f'{bucket}/files/{name}' for name in photos]
    shards = [f'{bucket}/shards/a.tar', f'{bucket}/shards/b.parquet']
    for words, expected in (
        ([f'{bucket}/files'], (files, [])),
        ([f'{bucket}/files/[01].*'], (files[:2], [])),
        ([f'{bucket}/shards'], ([], shards)),
        ([f'{bucket}/*/*.tar'], ([], shards[:1])),
    ):
        assert find_sources(words) == expected, words
    assert [read_photograph(f).data for f in files] == [*photos.values()]
    assert read_photograph(f'{bucket}/gone.jpg').error == 'no such file'
    for shard in shards:
        assert [i.data for i in read_all(shard)] == [*photos.values(), None]
    with open_parts(f'{bucket}/scores.parquet') as parts:
        parts.add(part_rows('/a.jpg')[0])
    with open_parts(f'{bucket}/scores.parquet', retry=True) as parts:
        assert parts.done == {'/a.jpg'}
    open_parts(f'{bucket}/scores.parquet', overwrite=True).begin()
    assert not open_parts(f'{bucket}/scores.parquet').done


# A cluster's processes run this, too: some photographs end whoever opens them.
DEADLY = """
import os
import PIL.Image
opened = PIL.Image.open
def deadly(file, *rest, **options):
    if 'deadly' in str(file):
        os.kill(os.getpid(), 9)
    return opened(file, *rest, **options)
PIL.Image.open = deadly
"""

# Parts come soon, so that a stop has something to keep.
SOON = """
import sys
from pyiqa_clipkd.command import main
from pyiqa_clipkd.scoring.ray import parts
parts.PART_SECONDS = 0.5
raise SystemExit(main(sys.argv[1:]))
"""


def title_of(number: int) -> str:
    """Of a running process; empty if it is no more."""
    try:
        return Path(f'/proc/{number}/cmdline').read_text()
    except OSError:
        return ''


class Job:
    """`pyiqa-clipkd score --engine ray` in a process of its own."""

    def __init__(self, folder: Path, *arguments: str, deadly: bool = False) -> None:
        self.folder = folder
        path = os.environ.get('PYTHONPATH', '')
        if deadly:
            (folder / 'site').mkdir()
            (folder / 'site' / 'sitecustomize.py').write_text(DEADLY)
            path = f'{folder / "site"}{os.pathsep}{path}'
        self.log = (folder / 'log').open('wb')
        root = str(Path(__file__).parents[1])
        self.process = subprocess.Popen(
            [sys.executable, '-c', SOON, 'score', *arguments, '--engine', 'ray'],
            cwd=folder,
            env={**os.environ, 'PYTHONPATH': f'{root}{os.pathsep}{path}'},
            stdout=self.log,
            stderr=self.log,
        )

    def descendants(self, title: str) -> list[int]:
        """Its processes, and theirs, whose title has this in it."""
        parents, titles = {}, {}
        for path in Path('/proc').glob('[0-9]*'):
            with contextlib.suppress(OSError):
                stat = (path / 'stat').read_text().rpartition(')')[2].split()
                parents[int(path.name)] = int(stat[1])
                titles[int(path.name)] = title_of(int(path.name))
        found = []
        for number in titles:
            above = number
            while above in parents and above != self.process.pid:
                above = parents[above]
            if above == self.process.pid and title in titles[number]:
                found.append(number)
        return found

    def wait_for(self, ready: Callable[[], Any], seconds: int = 150) -> Any:
        end = time.monotonic() + seconds
        while not (value := ready()):
            assert self.process.poll() is None, self.text
            assert time.monotonic() < end, self.text
            time.sleep(0.1)
        return value

    @property
    def text(self) -> str:
        return (self.folder / 'log').read_text()

    def end(self, code: int) -> str:
        assert self.process.wait(200) == code, self.text
        return self.text


@pytest.fixture(scope='module')
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Photographs in a folder, odd files, a shard, a table; and all as files."""
    pytest.importorskip('ray.data')
    root = tmp_path_factory.mktemp('sources')
    for name in ('photos', 'shards', 'tables', 'files'):
        (root / name).mkdir()
    write_odd(root / 'photos')
    for number in range(50):
        data = jpeg(number, (300, 240))
        (root / 'photos' / f'{number:02}.jpg').write_bytes(data)
        (root / 'files' / f'{number:02}.jpg').write_bytes(data)
    content = {path.name: path.read_bytes() for path in (root / 'files').iterdir()}
    write_shard(root / 'shards' / 'a.tar', content)
    write_table(root / 'tables' / 'b.parquet', 30, image=[*content.values()])
    # A name that isn't UTF-8.
    odd = os.fsencode(root / 'photos') + b'/\xff.jpg'
    Path(os.fsdecode(odd)).write_bytes(jpeg(3))
    return root


# Of a row, what makes it different from that of the same photograph elsewhere.
OWN = ['path', 'seconds', 'source', 'row']


def assert_as_on_one_machine(rows: Any, expected: Any) -> None:
    """The same photographs once each, and all that was said of them to the last bit."""
    both = [
        table.sort_values('path').reset_index(drop=True) for table in (rows, expected)
    ]
    assert list(both[0]['path']) == list(both[1]['path'])
    names = [name for name in expected if name not in OWN]
    for name in names:
        assert both[0][name].equals(both[1][name]), name


@pytest.mark.slow
def test_a_worker_is_killed_and_rows_are_those_of_one_machine(
    sources: Path, tmp_path: Path
) -> None:
    (tmp_path / 'deadly.jpg').write_bytes(jpeg(1))
    words = ['photos', 'shards/a.tar', 'tables/b.parquet']
    given = [str(sources / word) for word in words] + ['deadly.jpg']
    more = ['--crops', '2', '--attributes']
    job = Job(tmp_path, *given, '-o', 's.parquet', '--workers', '2', *more, deadly=True)
    job.wait_for(lambda: [*(tmp_path / 's.parquet').glob('scores-*')])
    before = job.wait_for(lambda: job.descendants('Scorer'))
    os.kill(before[0], signal.SIGKILL)
    text = job.end(3)
    assert 'could not be scored' in text
    assert 'Traceback' not in text
    assert len(text.splitlines()) < 12, text

    rows = read_results(tmp_path / 's.parquet')
    assert len(rows) == 51 + len(ODD) + 50 + 50 + 1
    own = {name: rows[rows['source'] == str(sources / name)] for name in words}
    names = sorted(path.name for path in (sources / 'files').iterdir())
    run = ['score', '--quiet', *more]
    folders = ['photos', 'files']
    for folder in folders:
        out = str(tmp_path / f'{folder}.parquet')
        main([*run, str(sources / folder), '-o', out])
    expected = {name: read_results(tmp_path / f'{name}.parquet') for name in folders}
    files = rows[rows['source'] == '']
    fatal = files['path'].str.endswith('deadly.jpg')
    assert list(files[fatal]['error']) == [FATAL]
    assert_as_on_one_machine(files[~fatal], expected['photos'])
    shard, table = own['shards/a.tar'], own['tables/b.parquet']
    base = str(sources / 'files')
    in_shard = shard.assign(path=base + '/' + shard['path'].map(os.path.basename))
    assert_as_on_one_machine(in_shard, expected['files'])
    order = [path.name for path in (sources / 'files').iterdir()]
    assert sorted(order) == names
    in_table = table.assign(
        path=[f'{base}/{order[int(number)]}' for number in table['row']]
    )
    assert_as_on_one_machine(in_table, expected['files'])

    assert (
        main(['report', str(tmp_path / 's.parquet'), '-o', f'{tmp_path}/r.html']) == 0
    )
    both = [f'{tmp_path}/s.parquet', f'{tmp_path}/photos.parquet']
    assert main(['compare', *both, '--force']) == 0


@pytest.mark.slow
def test_a_driver_is_killed_and_the_same_command_goes_on(
    sources: Path, tmp_path: Path
) -> None:
    words = [str(sources / 'photos'), str(sources / 'shards' / 'a.tar')]
    arguments = [*words, '-o', 's.parquet', '--workers', '1', '--crops', '2']
    job = Job(tmp_path, *arguments)
    folder = tmp_path / 's.parquet'
    job.wait_for(lambda: [*folder.glob('scores-*')])
    second = Job(tmp_path, *arguments)
    assert 'is being written by another run' in second.end(2)
    # Ray's agents, which do no work, take a minute or two to find out.
    workers = [*job.descendants('raylet'), *job.descendants('MapWorker')]
    assert len(workers) > 1
    job.process.kill()
    job.process.wait()
    kept = len(read_results(folder))
    total = 51 + len(ODD) + 50
    assert 0 < kept < total
    end = time.monotonic() + 60
    while left := [title for title in map(title_of, workers) if title]:
        assert time.monotonic() < end, f'left of the dead job: {left}'
        time.sleep(0.5)

    text = Job(tmp_path, *arguments).end(3)
    assert f'{total - kept} files read' in text
    assert f'{kept} were in' in text
    rows = read_results(folder)
    assert len(rows) == total == rows['path'].nunique()
    main(['score', words[0], '--quiet', '--crops', '2', '-o', f'{tmp_path}/e.parquet'])
    expected = read_results(tmp_path / 'e.parquet')
    assert_as_on_one_machine(rows[rows['source'] == ''], expected)
    assert set(rows[rows['source'] != '']['row']) == set(range(50))


@pytest.mark.slow
def test_sigterm_ends_it_in_order(sources: Path, tmp_path: Path) -> None:
    arguments = [str(sources / 'photos'), '-o', 's.parquet', '--workers', '1']
    job = Job(tmp_path, *arguments, '--crops', '4')
    job.wait_for(lambda: [*(tmp_path / 's.parquet').glob('scores-*')])
    job.process.terminate()
    text = job.end(143)
    assert 'Stopped. The same command goes on.' in text
    assert 'Traceback' not in text
    assert 0 < len(read_results(tmp_path / 's.parquet')) < 51 + len(ODD)
