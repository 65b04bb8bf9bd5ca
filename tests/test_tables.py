"""Everything that can be wrong with a user's table is named, all of it at once."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFile

from pyiqa_clipkd.fit.tables import Table, TableError, load_table

ROWS = 24


def noise(seed: int) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (40, 48, 3))
    return Image.fromarray(pixels.astype(np.uint8))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """`photos/0.png` and on, and a table whose line 2 is 0.png."""
    (tmp_path / 'photos').mkdir()
    for i in range(ROWS):
        noise(i).save(tmp_path / f'photos/{i}.png')
    write(tmp_path)
    return tmp_path


def write(folder: Path, *changes: tuple[int, str], header: str = 'image,mos') -> None:
    """The table, with other text in some lines (numbered as in the file)."""
    lines = [header, *(f'{i}.png,{1 + i / 10:g}' for i in range(ROWS))]
    for line, text in changes:
        lines[line - 1] = text
    (folder / 'photos.csv').write_text('\n'.join(lines) + '\n')


def load(folder: Path, **options: object) -> Table:
    return load_table(folder / 'photos.csv', folder / 'photos', **options)  # type: ignore[arg-type]


def findings(folder: Path, **options: object) -> list[str]:
    with pytest.raises(TableError) as caught:
        load(folder, **options)
    return caught.value.findings


def test_a_right_table_is_read_as_it_is(folder: Path) -> None:
    table = load(folder)
    assert list(table.rows['image']) == [f'{i}.png' for i in range(ROWS)]
    assert table.rows['mos'].tolist() == pytest.approx(
        [1 + i / 10 for i in range(ROWS)]
    )
    assert table.columns == ('image', 'mos')
    assert table.fingerprints.shape == (ROWS, 128)


@pytest.mark.parametrize(
    ('header', 'columns'),
    [
        ('file,score', ('file', 'score')),
        ('Image,MOS', ('Image', 'MOS')),
        ('photo,mos', ('photo', 'mos')),
    ],
)
def test_it_says_which_columns_it_took(
    folder: Path, header: str, columns: tuple[str, str]
) -> None:
    write(folder, header=header)
    assert load(folder).columns == columns


def test_named_columns_win_over_the_first_two(folder: Path) -> None:
    lines = [f'scene {i // 3};{1 + i / 10:g};0.1;{i}.png' for i in range(ROWS)]
    text = '\n'.join(['scene;mos;deviation;image', *lines])
    (folder / 'photos.csv').write_text(text, encoding='utf-8-sig')
    table = load(folder, group='scene')
    assert table.rows['image'][5] == '5.png'
    assert table.rows['mos'][5] == 1.5
    assert table.rows['group'].nunique() == ROWS // 3


@pytest.mark.parametrize(
    ('text', 'finding'),
    [
        ('4.png,', r"Empty cells in the score column 'mos' \(1\): line 6\."),
        ('4.png,good', r"Text in the score column 'mos' \(1\): line 6 'good'\."),
        ('"4.png","3,5"', r"Text in the score column 'mos' \(1\): line 6 '3,5'\."),
        ('4.png,nan', r"NaN or infinity in the score column 'mos' \(1\): line 6 'nan'"),
        ('4.png,-inf', r"NaN or infinity .* line 6 '-inf'"),
        ('gone.png,3', r"No such files below .*photos \(1\): line 6 'gone.png'\."),
        (
            '3.png,3',
            r"One image in several rows \(1\): line 5 .* = line 6 '3.png'",
        ),
        ('./3.png,3', r"One image in several rows \(1\): line 5 .* line 6 './3.png'"),
        ('4.png', r"Rows that don't have 2 cells .* \(1\): line 6 has 1\."),
        ('4.png,3,4', r"Rows that don't have 2 cells .* \(1\): line 6 has 3\."),
    ],
)
def test_a_wrong_row_is_named_by_its_line(
    folder: Path, text: str, finding: str
) -> None:
    write(folder, (6, text))
    (found,) = findings(folder)
    assert re.match(finding, found)


def test_every_kind_of_finding_comes_at_once(folder: Path) -> None:
    write(folder, (3, '1.png,good'), (4, 'gone.png,2'), (5, '3.png,'), (6, '5.png,inf'))
    (folder / 'photos/9.png').write_bytes(b'no image')
    found = findings(folder, group='scene', mos_range=(1, 3))
    words = ('`--group`', 'Empty', 'Text', 'NaN', 'outside', 'several', 'files', 'dec')
    assert len(found) == len(words)
    for word in words:
        assert sum(word in one for one in found) == 1, word


def test_many_rows_of_a_kind_are_counted_and_the_first_shown(folder: Path) -> None:
    write(folder, *((line, f'{line}.gone,2') for line in range(2, 14)))
    (found,) = findings(folder)
    assert '(12): line 2 ' in found
    assert found.endswith("line 6 '6.gone', and 7 more.")


def test_lines_are_those_of_the_file_where_cells_and_gaps_take_several(
    folder: Path,
) -> None:
    write(folder, (3, '"1.png",2\n\n'), (4, '2.png,"two\nlines"'), (5, '3.png,bad'))
    (found,) = findings(folder)
    assert r"line 6 'two\nlines', line 8 'bad'" in found


def test_a_truncated_photograph_is_named_or_left_out(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    noise(99).resize((640, 480)).save(folder / 'photos/4.jpg')
    whole = (folder / 'photos/4.jpg').read_bytes()
    (folder / 'photos/4.jpg').write_bytes(whole[: len(whole) // 2])
    write(folder, (6, '4.jpg,3'))
    monkeypatch.setattr(ImageFile, 'LOAD_TRUNCATED_IMAGES', True)  # some libraries do
    (found,) = findings(folder)
    assert re.match(r"Photographs that can't be decoded .*\(1\): line 6 '4.jpg'", found)
    table = load(folder, skip_bad=True)
    assert len(table.rows) == len(table.fingerprints) == ROWS - 1
    assert '4.jpg' not in set(table.rows['image'])
    assert len(table.left_out) == 1
    assert "line 6 '4.jpg'" in table.left_out[0]


def test_constant_scores_and_too_few_rows_are_findings(folder: Path) -> None:
    lines = ''.join(f'{i}.png,3\n' for i in range(7))
    (folder / 'photos.csv').write_text(f'image,mos\n{lines}')
    few, constant = findings(folder)
    assert few == 'At least 20 photographs are needed, but there are 7.'
    assert constant == 'All scores are 3.'


def test_what_is_left_must_be_enough(folder: Path) -> None:
    for i in range(5):
        (folder / f'photos/{i}.png').write_bytes(b'no image')
    (found,) = findings(folder, skip_bad=True)
    assert found == 'At least 20 photographs are needed, but there are 19.'


def test_a_score_outside_the_given_range_is_a_finding(folder: Path) -> None:
    (found,) = findings(folder, mos_range=(1, 3.2))
    assert found == 'Scores outside `--mos-range` 1 3.2 (1): line 25 3.3.'


@pytest.mark.parametrize(
    ('content', 'finding'),
    [
        (b'', 'The file is empty.'),
        (b'\xff\xfeimage', 'It is no text in UTF-8'),
        (b'image,mos\n"1.png,3\n', "It can't be read as CSV: unexpected end of data."),
        (b'image\n1.png\n', 'It must have a column for the image and one for the'),
        (b'1.png,3\n2.png,4\n', 'The first line must name the columns'),
    ],
)
def test_what_is_no_table_is_said_in_a_sentence(
    folder: Path, content: bytes, finding: str
) -> None:
    (folder / 'photos.csv').write_bytes(content)
    assert findings(folder)[-1].startswith(finding)


def test_a_missing_table_or_folder_is_named(folder: Path) -> None:
    with pytest.raises(TableError, match="can't be opened: No such file"):
        load_table(folder / 'other.csv', folder / 'photos')
    with pytest.raises(TableError) as caught:
        load_table(folder / 'photos.csv', folder / 'other')
    assert caught.value.findings == [
        f'There is no folder {folder / "other"} for `--images`.'
    ]
