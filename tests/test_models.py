"""The list of metrics, without torch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from pyiqa_clipkd.command import main
from pyiqa_clipkd.files import file_hash
from pyiqa_clipkd.locations import BUNDLED_FOLDER, bundled_metrics
from pyiqa_clipkd.models import card, describe, models, read_metadata
from pyiqa_clipkd.names import METRICS
from pyiqa_clipkd.weights import read_weights

LITE = 'clipkd_efficientnet_lite'
BUNDLED = [BUNDLED_FOLDER / f'{name}.safetensors' for name in bundled_metrics()]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's weights folder."""
    monkeypatch.setenv('PYIQA_CLIPKD_WEIGHTS', str(tmp_path))
    return tmp_path


def copied(folder: Path, name: str, text: bool = False) -> Path:
    """The bundled weights under another name, with their card or without."""
    path = folder / f'{name}.safetensors'
    path.write_bytes((BUNDLED_FOLDER / f'{LITE}.safetensors').read_bytes())
    if text:
        path.with_suffix('.md').write_text('# my card\n')
    return path


def test_the_table_has_every_name_with_the_origin_of_its_weights(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mine = copied(folder, 'clipkd_mine')
    mine.with_suffix('.onnx').write_bytes(b'')
    assert main(['models']) == 0
    head, *rows = capsys.readouterr().out.partition('\n\n')[0].splitlines()
    columns = 'name weights MB input sha256 onnx attributes what'
    assert head.split() == columns.split()
    lines = {row.split()[0]: row for row in rows}
    assert list(lines) == [*METRICS, 'clipkd_mine']
    assert lines['clipkd_teacher'].split()[1] == 'none'
    assert lines['clipkd_zeroshot'].split()[1] == 'open_clip'
    digits = file_hash(BUNDLED_FOLDER / f'{LITE}.safetensors')[:16]
    assert lines[LITE].split()[1:5] == ['package', '8.7', '384', digits]
    assert 'your folder  8.7   384    ' in lines['clipkd_mine']
    assert lines['clipkd_mine'].endswith('  yes               your own')


def test_json_has_every_bundled_file_with_card_and_input_size(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(['models', '--json']) == 0
    rows = {row['name']: row for row in json.loads(capsys.readouterr().out)}
    assert list(rows) == list(METRICS)
    for path in BUNDLED:
        row = rows[path.stem]
        assert row['source'] == 'package'
        assert row['damage'] is None
        assert row['megabytes'] == pytest.approx(path.stat().st_size / 1e6)
        assert row['input_size'] == read_weights(path).metadata['config']['input_size']
        assert Path(row['card']) == path.with_suffix('.md')


def test_a_file_of_the_user_comes_before_the_bundled_one(folder: Path) -> None:
    path = copied(folder, LITE)
    assert describe(LITE).source == 'your folder'
    assert describe(LITE).file == path


@pytest.mark.parametrize('path', BUNDLED, ids=lambda path: path.stem)
def test_metadata_read_without_torch_is_what_torch_reads(path: Path) -> None:
    assert read_metadata(path) == read_weights(path).metadata


def test_a_name_prints_its_card(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copied(folder, 'clipkd_mine', text=True)
    for name, start in {'clipkd_mine': '# my card', LITE: f'# {LITE}\n\n| | |'}.items():
        assert main(['models', name]) == 0
        assert capsys.readouterr().out.startswith(start)


def test_without_a_card_beside_it_the_one_in_the_file_is_printed(folder: Path) -> None:
    path = copied(folder, 'clipkd_mine')
    text = card(describe('clipkd_mine'))
    assert text.startswith('# clipkd_mine\n')
    assert f'| SHA-256 | {file_hash(path)} |' in text
    assert '| Data | 5,145 photographs of BIQ2021' in text


@pytest.mark.parametrize(
    ('name', 'words'),
    [
        ('clipkd_zeroshot', "'openai' of open_clip: from its cache, or downloaded"),
        ('clipkd_teacher', 'put clipkd_teacher.safetensors into '),
    ],
)
def test_without_weights_the_card_says_where_they_come_from(
    folder: Path, name: str, words: str
) -> None:
    assert words in card(describe(name))


def test_an_unknown_name_is_an_error_with_the_nearest_one(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(['models', 'clipkd_efficientnet_light']) == 2
    told = capsys.readouterr().err
    assert "no metric 'clipkd_efficientnet_light'. Is it clipkd_efficientnet" in told


@pytest.mark.parametrize(
    ('content', 'reason'),
    [
        (b'', 'it has no header of safetensors'),
        (b'<html>not found</html>', 'it has no header of safetensors'),
        (b'\x02' + bytes(7) + b'{}rest', 'damaged: 14 bytes, but its header says 10'),
        (b'\x04' + bytes(7) + b'{"a}', 'its header is damaged'),
        (b'\x08' + bytes(7) + b'{"a": 1}', 'its header is damaged'),
    ],
)
def test_damaged_files_are_named_and_do_not_stop_the_others(
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    content: bytes,
    reason: str,
) -> None:
    (folder / 'clipkd_mine.safetensors').write_bytes(content)
    assert reason in str(models()[-1].damage)
    assert main(['models']) == 0
    assert 'clipkd_mine               damaged' in capsys.readouterr().out
    assert main(['models', 'clipkd_mine']) == 0
    assert reason in capsys.readouterr().out


def test_a_truncated_file_is_damaged(folder: Path) -> None:
    path = copied(folder, LITE)
    path.write_bytes(path.read_bytes()[:-1])
    assert 'damaged: 8' in str(describe(LITE).damage)


def test_a_file_of_pytorch_is_no_damage(folder: Path) -> None:
    """OpenAI's file of CLIP may lie there under this name."""
    (folder / 'clipkd_zeroshot.safetensors').write_bytes(b'PK\x03\x04 and so on')
    model = describe('clipkd_zeroshot')
    assert (model.source, model.damage, model.input_size) == ('your folder', None, None)


def test_a_folder_with_the_name_of_weights_is_none(folder: Path) -> None:
    (folder / 'clipkd_mine.safetensors').mkdir()
    assert models()[-1][:3] == ('clipkd_mine', 'your own', 'none')


def test_torch_is_not_needed() -> None:
    code = (
        'import sys; from pyiqa_clipkd.command import main; main(["models"]); '
        f'main(["models", "{LITE}"]); '
        'print({"torch", "pyiqa", "numpy"} & set(sys.modules), file=sys.stderr)'
    )
    done = subprocess.run(
        [sys.executable, '-c', code], capture_output=True, text=True, check=True
    )
    assert done.stderr.strip() == 'set()'
