from __future__ import annotations

import glob
import io
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from pyiqa_clipkd.scoring.files import _recursive, find_photographs
from pyiqa_clipkd.scoring.printing import printable, safe_name


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in (
        'photos/b.jpg',
        'photos/a.PNG',
        'photos/notes.txt',
        'photos/page.eps',
        'photos/.hidden.jpg',
        'photos/sub/c.webp',
        'photos/sub/deep.jpg/d.tif',
        'other/e.jpg',
        'other/raw.dat',
    ):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b'x')
    return tmp_path


def found(*paths: str, stdin: bytes = b'', nul: bool = False) -> list[str]:
    files = find_photographs(paths, stdin=io.BytesIO(stdin), nul=nul)
    return [path.as_posix() for path in files]


PHOTOS = [
    'photos/a.PNG',
    'photos/b.jpg',
    'photos/sub/c.webp',
    'photos/sub/deep.jpg/d.tif',
]


@pytest.mark.usefixtures('tree')
class TestFindPhotographs:
    def test_a_folder_is_searched_to_its_end_in_the_order_of_names(self) -> None:
        assert found('photos') == PHOTOS

    def test_a_file_is_taken_whatever_its_ending(self) -> None:
        assert found('other/raw.dat', 'photos/.hidden.jpg') == [
            'other/raw.dat',
            'photos/.hidden.jpg',
        ]

    def test_what_is_not_there_is_not_lost(self) -> None:
        assert found('gone.jpg', 'other/*.gone') == ['gone.jpg', 'other/*.gone']

    def test_nothing_comes_twice(self) -> None:
        given = ('photos/b.jpg', './photos', 'photos/sub', 'photos/sub/../b.jpg')
        assert sorted(found(*given)) == sorted(PHOTOS)

    def test_patterns_that_the_shell_left(self) -> None:
        assert found('*/*.jpg') == ['other/e.jpg', 'photos/b.jpg']
        assert found('photos/**') == PHOTOS
        assert found('**/*.dat') == ['other/raw.dat']

    def test_a_file_may_be_called_like_a_pattern(self, tree: Path) -> None:
        (tree / 'a[1].jpg').write_bytes(b'x')
        assert found('a[1].jpg') == ['a[1].jpg']

    def test_a_list_of_files_and_folders(self) -> None:
        given = b'other/e.jpg\r\n\nphotos/sub\nlast *.jpg'
        assert found('-', stdin=given) == ['other/e.jpg', *PHOTOS[2:], 'last *.jpg']
        given = b'other/e.jpg\0two\nlines.jpg\0'
        assert found('-', stdin=given, nul=True) == ['other/e.jpg', 'two\nlines.jpg']

    def test_lists_from_windows(self) -> None:
        given = b'\xef\xbb\xbfother/e.jpg\r\nlast.jpg\r\n'
        assert found('-', stdin=given) == ['other/e.jpg', 'last.jpg']

    @pytest.mark.skipif(sys.platform == 'win32', reason='no such names there')
    def test_names_that_end_with_nul_are_taken_as_they_are(self) -> None:
        given = b'\xef\xbb\xbfa.jpg\r\0b.jpg\r\0'
        assert found('-', stdin=given, nul=True) == ['\ufeffa.jpg\r', 'b.jpg\r']

    def test_photographs_that_pillow_lacks_come_through(self, tree: Path) -> None:
        for name in ('c.HEIC', 'd.dng', 'e.xmp'):
            (tree / 'other' / name).write_bytes(b'x')
        assert found('other') == ['other/c.HEIC', 'other/d.dng', 'other/e.jpg']

    @pytest.mark.skipif(sys.platform != 'linux', reason='names are text elsewhere')
    def test_names_may_be_any_bytes(self) -> None:
        (path,) = find_photographs(['-'], stdin=io.BytesIO(b'caf\xe9.jpg\n'))
        assert os.fsencode(path) == b'caf\xe9.jpg'

    def test_links_that_lead_back_end(self, tree: Path) -> None:
        try:
            (tree / 'photos' / 'sub' / 'back').symlink_to(tree / 'photos')
            (tree / 'photos' / 'other').symlink_to(tree / 'other')
        except OSError:
            pytest.skip('no links here')
        assert found('photos') == [*PHOTOS[:2], 'photos/other/e.jpg', *PHOTOS[2:]]

    def test_a_link_to_itself_is_left_out_alone(self, tree: Path) -> None:
        try:
            (tree / 'photos' / 'loop').symlink_to('loop')
            (tree / 'photos' / 'loop.jpg').symlink_to('loop.jpg')
        except OSError:
            pytest.skip('no links here')
        assert found('photos') == [*PHOTOS[:2], 'photos/loop.jpg', *PHOTOS[2:]]

    def test_files_come_before_the_last_folder_is_listed(
        self, tree: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        listed, scandir = [], os.scandir

        def watched(path: str) -> Any:
            listed.append(path)
            return scandir(path)

        monkeypatch.setattr('os.scandir', watched)
        assert next(find_photographs(['photos', 'other'])).name == 'a.PNG'
        assert listed == ['photos']

    @pytest.mark.skipif(sys.platform == 'win32', reason='no such links there')
    def test_patterns_end_where_links_lead_back(self, tree: Path) -> None:
        for name in 'abcdef':  # 6 ways back at each of 40 steps
            (tree / 'photos' / name).symlink_to('.')
            (tree / 'photos' / 'sub' / name).symlink_to('..')
        assert found('photos/**/*.jpg') == ['photos/b.jpg', 'photos/sub/deep.jpg/d.tif']
        assert sorted(found('**/*.tif')) == ['photos/sub/deep.jpg/d.tif']
        assert found('photos/**') == PHOTOS

    def test_recursive_patterns_mean_what_they_mean_to_glob(self, tree: Path) -> None:
        (tree / 'photos' / '.git').mkdir()
        (tree / 'photos' / '.git' / 'h.jpg').write_bytes(b'x')
        for pattern in (
            '**/*',
            'photos/**/*.webp',
            'photos/**/sub/**/*.tif',
            '**/[bc].*',
            '*/**/d.tif',
            'photos/**/.hidden.jpg',
            'photos/**/.*',
            f'{tree}/**/*.jpg',
        ):
            ours = {os.path.normpath(path) for path in _recursive(pattern)}
            theirs = glob.glob(pattern, recursive=True)
            assert ours - {'.'} == {os.path.normpath(path) for path in theirs}, pattern
        assert found('**/*.none') == ['**/*.none']

    @pytest.mark.skipif(sys.platform == 'win32', reason='such paths are too long')
    def test_folders_may_lie_deeper_than_calls(self, tree: Path) -> None:
        for _ in range(1500):
            os.mkdir('d')
            os.chdir('d')
        Path('a.jpg').write_bytes(b'x')
        os.chdir(tree)
        (path,) = found('d')
        assert path == 'd/' * 1500 + 'a.jpg'
        (path,) = found('d/**/*.jpg')
        assert path.endswith('d/a.jpg')
        for _ in range(1500):  # others can't remove them
            os.chdir('d')
        os.remove('a.jpg')
        for _ in range(1500):
            os.chdir('..')
            os.rmdir('d')

    @pytest.mark.skipif(sys.platform == 'win32', reason='such paths are too long')
    def test_a_folder_too_deep_for_the_system_is_named(self, tree: Path) -> None:
        name = 'd' * 250
        for _ in range(20):
            os.mkdir(name)
            os.chdir(name)
        os.chdir(tree)
        (path,) = found(name)
        assert path.endswith(name)


@pytest.mark.parametrize(
    ('name', 'shown'),
    [
        ('caf\xe9 \U0001f600.jpg', 'caf\xe9 \U0001f600.jpg'),
        ('a\nb.jpg', 'a\\nb.jpg'),
        ('\x1b]0;title\x07.jpg', '\\x1b]0;title\\x07.jpg'),
        ('\x9b2J.jpg', '\\x9b2J.jpg'),
        ('gpj.\u202ecod', 'gpj.\\u202ecod'),
        ('\udcff.jpg', '\\udcff.jpg'),
    ],
)
def test_names_are_shown_without_what_commands_a_terminal(
    name: str, shown: str
) -> None:
    assert printable(name) == shown


@pytest.mark.parametrize(
    'name', ['-rf.jpg', '=1+1.jpg', '+1.jpg', '@a.jpg', '\t=1.jpg']
)
def test_names_are_neither_options_nor_formulas(name: str) -> None:
    assert safe_name(name) == os.path.join('.', name)
    assert Path(safe_name(name)) == Path(name)
    assert safe_name(f'a{name}') == f'a{name}'
