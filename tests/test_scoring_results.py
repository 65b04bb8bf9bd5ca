from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pyiqa_clipkd.names import LEVELS
from pyiqa_clipkd.scoring.results import Results, read_results
from pyiqa_clipkd.scoring.tables import columns

IDENTITY = {'metric': 'clipkd_x', 'sha256': '0123abcd', 'crops': 0, 'input_size': 384}
ENDINGS = ['.csv', '.jsonl', '.parquet']

# Names that break careless tables; the last isn't UTF-8.
PATHS = [
    'plain.jpg',
    'a,b.jpg',
    'say "a".jpg',
    'two\nlines.jpg',
    'carriage\rreturn.jpg',
    'NA',
    '',
    'ü 写真.jpg',
    'odd "\n, quote.jpg',
    'latin \udce9.jpg',
]


def row(path: str, score: float | None = 3.25, **changes: Any) -> dict[str, Any]:
    given = {
        'path': path,
        'score': score,
        'score_100': None if score is None else (score - 1) * 25,
        'level': 'fair',
        **{f'p_{level}': None if score is None else 0.2 for level in LEVELS},
        **IDENTITY,
        'weights': 'x.safetensors',
        'backend': 'torch',
        'width': 640,
        'height': 480,
        'format': 'JPEG',
        'notes': '',
        'seconds': 0.015625,
        'error': '' if score else 'not an image',
        **changes,
    }
    return {name: given[name] for name in columns(LEVELS)}


def opened(path: Path, **changes: Any) -> Results:
    options = {key: changes.pop(key, False) for key in ('overwrite', 'retry')}
    return Results(path, LEVELS, {**IDENTITY, **changes}, **options)


def write(path: Path, *rows: dict[str, Any]) -> None:
    with opened(path) as results:
        for one in rows:
            results.add(dict(one))


def stop(path: Path, *rows: dict[str, Any]) -> None:
    """Write rows, and be stopped by the user before the end."""
    results = opened(path)
    for one in rows:
        results.add(one)
    results.__exit__(KeyboardInterrupt, KeyboardInterrupt(), None)


def paths_in(path: Path) -> list[str]:
    return list(read_results(path)['path'])


@pytest.fixture(params=ENDINGS)
def path(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    yield tmp_path / f'results{request.param}'
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith('.')] == []


def test_every_row_comes_back_as_it_was(path: Path) -> None:
    rows = [row(name) for name in PATHS] + [row('bad.jpg', None, width=None)]
    write(path, *rows)
    table = read_results(path)
    assert list(table) == columns(LEVELS)
    if path.suffix == '.parquet':  # all of it is text there
        rows[9]['path'] = 'latin \\udce9.jpg'
    for expected, (_, got) in zip(rows, table.iterrows(), strict=True):
        for name, value in expected.items():
            if value is None:
                assert math.isnan(got[name])
            else:
                assert got[name] == value, name
                assert isinstance(got[name], str) == isinstance(value, str)


def test_what_is_there_is_done_and_new_rows_follow(path: Path) -> None:
    write(path, *(row(name, 2.5) for name in PATHS), row('bad.jpg', None))
    with opened(path) as results:
        assert [results.done[results.key(name)] for name in PATHS] == [2.5] * len(PATHS)
        assert results.done['bad.jpg'] is None
        results.add(row('new.jpg'))
    assert len(read_results(path)) == len(PATHS) + 2
    assert paths_in(path)[-1] == 'new.jpg'


@pytest.mark.parametrize('ending', ['.csv', '.jsonl'])
def test_a_file_cut_anywhere_loses_the_torn_row_alone(
    ending: str, tmp_path: Path
) -> None:
    path = tmp_path / f'results{ending}'
    write(path, *(row(name) for name in PATHS))
    content = path.read_bytes()
    for cut in range(0, len(content), 7):
        path.write_bytes(content[:cut])
        with opened(path) as results:
            kept = len(results.done)
            for name in PATHS[kept:]:
                results.add(row(name))
        assert path.read_bytes() == content


def test_a_stopped_parquet_run_keeps_its_rows_and_ends_whole(tmp_path: Path) -> None:
    path = tmp_path / 'results.parquet'
    write(path, row('first.jpg'))
    stop(path, row('second.jpg'))
    journal = tmp_path / '.results.parquet.rows.jsonl'
    assert paths_in(path) == ['first.jpg']
    torn = journal.read_bytes() + b'{"path": "thi'
    # The last two of these are a run killed before it could remove the journal.
    for content, names in ((torn, ['third.jpg']), (torn[:-13], [])):
        journal.write_bytes(content)
        with opened(path) as results:
            assert set(results.done) >= {'first.jpg', 'second.jpg'}
            for name in names:
                results.add(row(name))
        assert paths_in(path) == ['first.jpg', 'second.jpg', 'third.jpg']
        assert not journal.exists()


def test_an_unfinished_parquet_file_says_so(tmp_path: Path) -> None:
    path = tmp_path / 'results.parquet'
    stop(path, row('a.jpg'))
    with pytest.raises(FileNotFoundError, match='not finished'):
        read_results(path)


@pytest.mark.parametrize(
    'change', [{'metric': 'clipkd_y'}, {'sha256': 'ffff'}, {'crops': 2}]
)
def test_scores_of_another_kind_are_refused(path: Path, change: dict[str, Any]) -> None:
    write(path, row('a.jpg'))
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r'holds scores of clipkd_x .*--overwrite'):
        opened(path, **change)
    assert path.read_bytes() == before
    with opened(path, overwrite=True, **change) as results:
        assert results.done == {}
        results.add(row('b.jpg', **change))
    assert paths_in(path) == ['b.jpg']


@pytest.mark.parametrize(
    'content', [b'name,age\nme,5\n', b'{"a": 1}\n', b'{"a": 1}', b'PAR1', b'text']
)
def test_a_file_of_another_kind_is_left_alone(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r'results\.'):
        opened(path)
    assert path.read_bytes() == content
    with pytest.raises(ValueError, match=r'results\.'):
        read_results(path)


def test_a_missing_column_is_named(tmp_path: Path) -> None:
    path = tmp_path / 'a.jsonl'
    path.write_text(json.dumps({'path': 'a.jpg', 'score': 3.0}) + '\n')
    with pytest.raises(ValueError, match='no column score_100, level'):
        read_results(path)


def test_bad_files_are_dropped_to_be_tried_again(path: Path) -> None:
    good = [row(name, 2.5) for name in PATHS]
    write(path, *good)
    before = path.read_bytes()
    path.unlink()
    bad = [row('bad.jpg', None), row('worse.jpg', None, error='the file is empty')]
    write(path, bad[0], *good[:3])
    stop(path, *good[3:], bad[1])
    with opened(path) as results:
        assert results.errors['worse.jpg'] == 'the file is empty'
        assert set(results.errors) == {'bad.jpg', 'worse.jpg'}
    with opened(path, retry=True) as results:
        assert set(results.done) == {results.key(name) for name in PATHS}
        assert results.errors == {}
    if path.suffix != '.parquet':
        assert path.read_bytes() == before
    with opened(path) as results:
        results.add(row('bad.jpg'))
    assert len(paths_in(path)) == len(PATHS) + 1
    assert not read_results(path)['score'].isna().any()
    assert list(path.parent.iterdir()) == [path]


def test_an_ending_that_says_nothing_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r'must end in \.csv, \.jsonl, \.parquet, but'):
        opened(tmp_path / 'results.txt')
    with pytest.raises(FileNotFoundError):
        read_results(tmp_path / 'gone.csv')
