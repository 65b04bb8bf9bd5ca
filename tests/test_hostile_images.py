"""Files of strangers: each is read, or refused in one line, within time and memory."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hostile_files import CHEAP, SLOW, encoded
from PIL import Image
from scoring_data import photograph
from script_modules import SCRIPTS, load_script

from pyiqa_clipkd.images import UnreadableError, read_photograph
from pyiqa_clipkd.opening import FORMATS
from pyiqa_clipkd.scoring.isolated import Call, Isolated
from pyiqa_clipkd.scoring.reading import decoded_bytes, read_squares

linux_only = pytest.mark.skipif(sys.platform != 'linux', reason='looks into /proc')
no_windows = pytest.mark.skipif(sys.platform == 'win32', reason='no such files there')


@pytest.fixture(scope='module')
def mutations() -> Any:
    """`scripts/image_mutations.py`."""
    return load_script('image_mutations')


def outcome(path: Path, call: Call) -> str:
    """Why a file is refused, as `score` would find out; empty if it's read."""
    try:
        call(decoded_bytes, path)
        _, squares = call(read_squares, path, 178_000_000, 32, 1)
    except UnreadableError as error:
        return str(error)
    assert np.isfinite(squares).all()
    assert 0 <= squares.min() <= squares.max() <= 1
    return ''


def check_reason(reason: str, folder: Path) -> None:
    assert reason.isprintable()
    assert len(reason) < 300
    assert str(folder) not in reason


# --- damaged at random ----------------------------------------------------------------


@pytest.mark.parametrize(
    ('start', 'count'), [(0, 450), pytest.param(450, 9000, marks=pytest.mark.slow)]
)
def test_mutated_files_are_read_or_refused(
    mutations: Any, start: int, count: int, tmp_path: Path
) -> None:
    wholes = mutations.seeds(photograph(2).resize((96, 64)))
    assert {'JPEG', 'PNG', 'WEBP', 'GIF', 'TIFF', 'BMP'} <= set(wholes)
    readers, path, read = Isolated(30), tmp_path / 'file', dict.fromkeys(wholes, 0)
    for number in range(start, start + count):
        kind = list(wholes)[number % len(wholes)]
        rng = np.random.default_rng([1, number])
        path.write_bytes(mutations.mutated(kind, wholes[kind], rng)[1])
        with readers.one_file() as call:
            reason = outcome(path, call)
        check_reason(reason, tmp_path)
        assert not reason.startswith(('crashes', 'takes more'))
        read[kind] += not reason
    readers.close()
    assert all(0 < number < count / len(wholes) for number in read.values())


def test_whole_files_of_all_formats_are_read(mutations: Any, tmp_path: Path) -> None:
    picture = photograph(2).resize((96, 64))
    for kind, files in mutations.seeds(picture).items():
        for number, data in enumerate(files):
            path = tmp_path / f'{kind}{number}'
            path.write_bytes(data)
            photo = read_photograph(path)
            assert {photo.width, photo.height} == {96, 64}
            assert photo.format in (kind, 'MPO')


def test_the_same_seed_makes_the_same_files(mutations: Any) -> None:
    files = mutations.seeds(photograph(2).resize((96, 64)))['PNG']
    first, again = (
        [
            mutations.mutated('PNG', files, np.random.default_rng([3, n]))
            for n in range(9)
        ]
        for _ in range(2)
    )
    assert first == again
    assert len({data for _, data in first}) == 9


# --- made to cost much ----------------------------------------------------------------

# Megabytes and seconds of what is refused, or is small after all.
PEAK = """
import json, sys, time
from pathlib import Path
from pyiqa_clipkd.scoring.pillow import prepare_pillow
prepare_pillow()
from pyiqa_clipkd.images import UnreadableError
from pyiqa_clipkd.scoring.reading import decoded_bytes, read_squares
def memory(name):
    lines = open('/proc/self/status')
    return next(int(x.split()[1]) / 1024 for x in lines if x.startswith(name))
found = {}
for path in sorted(Path(sys.argv[1]).iterdir()):
    Path('/proc/self/clear_refs').write_text('5')
    before, begin, reason = memory('VmRSS'), time.perf_counter(), ''
    try:
        decoded_bytes(path)
        read_squares(path, 178_000_000, 32, 1)
    except UnreadableError as error:
        reason = str(error)
    seconds = time.perf_counter() - begin
    found[path.name] = [reason, seconds, memory('VmHWM') - before]
print(json.dumps(found))
"""


@linux_only
def test_lies_about_sizes_cost_little_time_and_memory(tmp_path: Path) -> None:
    for name, make in CHEAP.items():
        (tmp_path / name).write_bytes(make())
    done = subprocess.run(
        [sys.executable, '-c', PEAK, tmp_path],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    found = json.loads(done.stdout)
    assert set(found) == set(CHEAP)
    for name, (reason, seconds, megabytes) in found.items():
        check_reason(reason, tmp_path)
        assert seconds < 10, name
        assert megabytes < 150, name
        lies = name.endswith(('_65535.png', '_65535.jpg', '_65535.gif'))
        assert not lies or reason == 'too large', name
        if name in ('png_without_width.png', 'png_text.png', 'bmp_negative.bmp'):
            assert reason


@pytest.mark.slow
@pytest.mark.parametrize('name', SLOW)
def test_bombs_of_time_end_in_time(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(SLOW[name]())
    readers = Isolated(2)
    begin = time.perf_counter()
    with readers.one_file() as call:
        start = time.perf_counter() - begin
        assert outcome(path, call) == 'takes more than 2 s to read'
    assert time.perf_counter() - begin < start + 4


def test_a_file_far_larger_than_its_pixels_may_be_is_refused(tmp_path: Path) -> None:
    path = tmp_path / 'a.webp'  # is read as a whole by its decoder
    path.write_bytes(encoded((8, 8), 'WEBP'))
    os.truncate(path, 300_000_000)  # a hole: nothing of it is on the disk
    with pytest.raises(UnreadableError, match='too large: a file of 300 MB, more than'):
        read_photograph(path, max_pixels=1_000_000)
    with path.open('rb') as file, pytest.raises(UnreadableError, match='300 MB'):
        read_photograph(file, max_pixels=1_000_000)
    os.truncate(path, 2_000_000_000)
    with pytest.raises(
        UnreadableError, match=r'a file of 2,000 MB, more than 178 mega'
    ):
        read_photograph(path)


# --- other decoders -------------------------------------------------------------------


def test_only_formats_of_photographs_reach_a_decoder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.init()
    reached = []
    for name, (_, accepts) in list(Image.OPEN.items()):
        if name not in FORMATS:

            def factory(*arguments: Any, name: str = name) -> Any:
                reached.append(name)
                raise SyntaxError

            monkeypatch.setitem(Image.OPEN, name, (factory, accepts))
    heads = [
        b'8BPS',
        b'%!PS-Adobe',
        b'SIMPLE  =',
        b'DDS ',
        b'icns',
        b'\0\0\1\0',
        b'BLP2',
    ]
    for number, head in enumerate([*heads, *(bytes([n, n, 0xAF]) for n in range(16))]):
        path = tmp_path / f'{number}.tga'
        path.write_bytes(head + bytes(5000))
        with pytest.raises(UnreadableError):
            read_photograph(path)
    assert reached == []


@pytest.mark.parametrize('kind', ['TGA', 'PSD', 'DDS', 'ICO', 'PCX'])
def test_what_is_not_read_says_so(kind: str, tmp_path: Path) -> None:
    path = tmp_path / 'a.jpg'
    if kind == 'PSD':
        path.write_bytes(b'8BPS\0\1' + bytes(100))
    else:
        photograph(2).resize((32, 32)).save(path, kind)
    reason = 'not an image'
    if kind in ('PSD', 'DDS'):
        reason = f'{kind}, which is not read: convert'
    with pytest.raises(UnreadableError, match=reason):
        read_photograph(path)


@pytest.mark.parametrize('kind', ['JPEG', 'PNG', 'WEBP', 'GIF', 'TIFF', 'AVIF'])
def test_a_file_without_a_whole_header_is_called_damaged(
    kind: str, mutations: Any, tmp_path: Path
) -> None:
    path = tmp_path / 'a'
    files = mutations.seeds(photograph(2).resize((96, 64))).get(kind)
    if files is None:
        pytest.skip('this Pillow has no AVIF')
    path.write_bytes(files[0][:24])
    with pytest.raises(UnreadableError, match=r'^(damaged|truncated): '):
        read_photograph(path)


# --- files that are none, or change ---------------------------------------------------


def link_to(target: str) -> Callable[[Path], None]:
    return lambda path: path.symlink_to(target)


def listen(path: Path) -> None:
    here = os.getcwd()
    os.chdir(path.parent)  # such names must be short
    try:
        socket.socket(socket.AF_UNIX).bind(path.name)
    finally:
        os.chdir(here)


NO_FILES: dict[str, tuple[Callable[[Path], None], str]] = {
    'pipe': (lambda path: os.mkfifo(path), 'a pipe or a device, not a file'),
    'socket': (listen, 'a pipe or a device, not a file'),
    'endless': (link_to('/dev/zero'), 'a pipe or a device, not a file'),
    'loop': (link_to('loop.jpg'), 'cannot be read: Too many levels of symbolic links'),
    'broken link': (link_to('gone'), 'no such file'),
    'folder': (lambda path: path.mkdir(), 'a folder'),
}


@no_windows
@pytest.mark.timeout(60)
@pytest.mark.parametrize('name', NO_FILES)
def test_what_is_no_file_is_not_waited_for(name: str, tmp_path: Path) -> None:
    make, reason = NO_FILES[name]
    path = tmp_path / f'{name}.jpg'
    make(path)
    with pytest.raises(UnreadableError) as caught:
        read_photograph(path)
    assert str(caught.value) == reason
    assert decoded_bytes(path) == 0


@pytest.mark.parametrize(
    ('name', 'reason'), [('a\0.jpg', 'NUL'), ('a' * 300, 'cannot be read: File name')]
)
@no_windows
def test_names_that_no_file_can_have(name: str, reason: str) -> None:
    with pytest.raises(UnreadableError, match=reason):
        read_photograph(name)


@no_windows
@pytest.mark.timeout(60)
def test_a_file_that_becomes_a_pipe_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / 'a.jpg'
    path.write_bytes(encoded((8, 8), 'JPEG'))
    status = path.stat()
    path.unlink()
    os.mkfifo(path)
    monkeypatch.setattr(Path, 'stat', lambda *_, **__: status)
    with pytest.raises(UnreadableError, match='a pipe or a device'):
        read_photograph(path)


SHRINKS = """
import os, sys
from pyiqa_clipkd.opening import open_image
with open_image(sys.argv[1]) as image:
    image.load()
    os.truncate(sys.argv[1], 0)
    assert image.convert('RGB').getpixel((9, 999)) == (7, 7, 7)
"""


@no_windows
@pytest.mark.parametrize('kind', ['BMP', 'TIFF', 'PPM'])
def test_a_file_that_shrinks_while_it_is_read_ends_no_process(
    kind: str, tmp_path: Path
) -> None:
    """Pillow would map plain files into memory, and a signal would end it."""
    path = tmp_path / 'a'
    Image.new('L', (1000, 1000), 7).save(path, kind)
    done = subprocess.run([sys.executable, '-c', SHRINKS, path], capture_output=True)
    assert done.returncode == 0, done.stderr.decode()


def test_files_that_vanish_or_change_while_they_are_read(tmp_path: Path) -> None:
    contents = [encoded((size, size), 'PNG') for size in (8, 900)] + [b'', b'no image']
    path, stop = tmp_path / 'a.png', threading.Event()

    def change() -> None:
        while not stop.is_set():
            for content in contents:
                path.write_bytes(content)
            path.unlink()

    thread = threading.Thread(target=change)
    thread.start()
    reasons = set()
    for _ in range(300):
        try:
            assert read_photograph(path).width in (8, 900)
        except UnreadableError as error:
            check_reason(str(error), tmp_path)
            reasons.add(str(error))
    stop.set()
    thread.join()
    assert reasons


def test_words_of_a_decoder_are_printable_and_short(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / 'a.png'
    path.write_bytes(encoded((8, 8), 'PNG'))

    def speak(*_: Any) -> None:
        raise OSError('\x1b]0;title\x07\n' + 'a' * 9999 + '\u202e')

    monkeypatch.setattr('pyiqa_clipkd.images.from_image', speak)
    with pytest.raises(UnreadableError) as caught:
        read_photograph(path)
    check_reason(str(caught.value), tmp_path)


# --- the scripts ----------------------------------------------------------------------


def test_the_script_counts_what_became_of_the_files(tmp_path: Path) -> None:
    output = tmp_path / 'results' / 'images.json'
    command = [sys.executable, str(SCRIPTS / 'fuzz_images.py'), '-o', str(output)]
    words = ['--files', '40', '--formats', 'PNG', 'JPEG', '--seed', '4']
    subprocess.run([*command, *words], check=True, capture_output=True)
    result = json.loads(output.read_text())
    assert result['files'] == 40
    assert result['crashes'] == result['hangs'] == 0
    assert 0 < result['slowest_s'] < 20
    assert list(result['formats']) == ['PNG', 'JPEG']
    for part in result['formats'].values():
        assert part['files'] == part['read'] + part['refused'] == 20
        assert sum(part['outcomes'].values()) == 20
