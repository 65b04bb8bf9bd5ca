"""Where in a photograph is it good, and where bad? A heat map over the photograph.

A PATH is a file, a folder (with all below it) or a pattern in quotes. For one file -o
is a picture; for more it is a folder, which gets a picture each.

The map has scores of overlapping windows at the photograph's own resolution. They can
be compared within one photograph only, for content moves them, too: sky or a background
out of focus scores lower than detail.

Exit codes:
  0    all maps were made
  2    wrong usage, or a picture can't be written
  3    some files could not be scored; they are named, and the others were done
  70   a bug: please report what is shown
  130  stopped with Ctrl-C
"""

from __future__ import annotations

import argparse
import csv
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pyiqa_clipkd.command import FINE, UNREADABLE
from pyiqa_clipkd.description import ONNX
from pyiqa_clipkd.files import written_whole
from pyiqa_clipkd.names import DEFAULT_METRIC
from pyiqa_clipkd.scale import level_of
from pyiqa_clipkd.scoring.pillow import check_megapixels, most_pixels, prepare_pillow
from pyiqa_clipkd.scoring.printing import printable

if TYPE_CHECKING:
    from pyiqa_clipkd.maps.windows import QualityMap
    from pyiqa_clipkd.scoring.backends import Backend

# Endings of pictures, with Pillow's names of their formats, and of arrays.
PICTURES = {'.png': 'PNG', '.jpg': 'JPEG', '.jpeg': 'JPEG', '.webp': 'WEBP'}
ARRAYS = ('.npy', '.csv')

# Ending of the names in a folder, and the mark in a PNG file by which a map is known.
MAP_ENDING = '_map.png'
MARK = ('Software', 'pyiqa-clipkd map')

JPEG_QUALITY = 90


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `pyiqa-clipkd map`."""
    add = parser.add_argument
    add('paths', nargs='+', metavar='PATH', help='file, folder or pattern')
    endings = ', '.join(PICTURES)
    add(
        *('-o', '--output'),
        type=Path,
        required=True,
        metavar='FILE|FOLDER',
        help=f'the picture ({endings}), or a folder for pictures',
    )
    add(
        '--array',
        type=Path,
        metavar='FILE',
        help='also the scores: .npy, or .csv with a line a window; of one photograph',
    )
    add('--size', type=int, metavar='PIXELS', help='longest side; default: 1600')
    windows = parser.add_argument_group('windows')
    add = windows.add_argument
    add(
        '--window', type=int, metavar='PIXELS', help='side; default: 3/8 of the shorter'
    )
    add('--stride', type=int, metavar='PIXELS', help='default: a third of the window')
    help_text = 'one look at the whole with a convolutional network; needs torch'
    add('--coarse', action='store_true', help=help_text)
    network = parser.add_argument_group('how it is scored')
    add = network.add_argument
    help_text = f'default: {DEFAULT_METRIC}, or that of an .onnx file'
    add('-m', '--metric', help=help_text)
    add('--device', choices=('auto', 'cpu', 'cuda', 'mps'), default='auto')
    add('--backend', choices=('auto', 'torch', 'onnx'), default='auto')
    add('--weights', type=Path, metavar='FILE', help="instead of the metric's own")
    add(
        '--workers',
        type=int,
        metavar='N',
        help='windows at a time; default: one a core, over --threads',
    )
    add('--threads', type=int, metavar='N', help='of one network; default: 1')
    add('--max-megapixels', type=float, metavar='X', help='refuse larger photographs')


def run(arguments: argparse.Namespace) -> int:
    """Make the maps; returns the exit code.

    Raises:
        ValueError: if an argument is wrong, or there are no photographs.
        OSError: if there are no weights, or a picture can't be written.
        ImportError: if what runs the network isn't installed.
    """
    prepare_pillow()
    from pyiqa_clipkd.images import UnreadableError
    from pyiqa_clipkd.maps.windows import StrideError
    from pyiqa_clipkd.scoring.backends import create_backend
    from pyiqa_clipkd.scoring.files import find_photographs

    check(arguments)
    arguments.max_pixels = most_pixels(arguments.max_megapixels)
    # The folder may have maps of an earlier run; what is named counts whatever it is.
    named = {os.path.abspath(path) for path in arguments.paths}
    paths = [
        path
        for path in find_photographs(arguments.paths)
        if os.path.abspath(path) in named or not _is_map(path)
    ]
    outputs = _outputs(arguments, paths)
    metric, weights = arguments.metric, arguments.weights
    if weights is None or weights.suffix.lower() != ONNX:  # such a file has a name
        metric = metric or DEFAULT_METRIC
    backend = create_backend(
        metric,
        kind='torch' if arguments.coarse else arguments.backend,
        device=arguments.device,
        threads=arguments.threads,
        weights=weights,
    )
    code = FINE
    for path, output in zip(paths, outputs, strict=True):
        try:
            line = _map(path, output, backend, arguments)
        except (UnreadableError, StrideError) as error:
            print(f'{printable(str(path))}: {error}', file=sys.stderr)
            code = UNREADABLE
        else:
            print(line, flush=True)
    return code


def check(arguments: argparse.Namespace) -> None:
    """What can be wrong with the arguments, before anything costly begins.

    Raises:
        ValueError: says what, and what to do.
    """
    from pyiqa_clipkd.maps.pictures import LEAST_SIZE, SIZE

    arguments.size = SIZE if arguments.size is None else arguments.size
    for name, least in (
        ('window', 1),
        ('stride', 1),
        ('workers', 1),
        ('threads', 1),
        ('size', LEAST_SIZE),
    ):
        value = getattr(arguments, name)
        if value is not None and value < least:
            raise ValueError(
                f'`--{name}` must be a whole number >= {least}, but got {value}.'
            )
    check_megapixels(arguments.max_megapixels)
    if arguments.array and arguments.array.suffix.lower() not in ARRAYS:
        raise ValueError(
            f'`--array` must end in {" or ".join(ARRAYS)}, but got {arguments.array}.'
        )
    if arguments.coarse and arguments.backend == 'onnx':
        raise ValueError('`--coarse` needs --backend torch.')


def _outputs(arguments: argparse.Namespace, paths: Sequence[Path]) -> list[Path]:
    """Where each picture goes; folders that are missing are made.

    Raises:
        ValueError: if there are no photographs, or they don't fit the outputs.
    """
    if not paths:
        raise ValueError(f'no photographs in {", ".join(arguments.paths)}.')
    output = arguments.output
    single = len(paths) == 1 and not Path(arguments.paths[0]).is_dir()
    if arguments.array and not single:
        raise ValueError('`--array` is for one photograph: give its file.')
    if single and not output.is_dir():
        if output.suffix.lower() not in PICTURES:
            raise ValueError(
                f'`--output` must end in {", ".join(PICTURES)} or be a folder, but got '
                f'{output}.'
            )
        outputs = [output]
    elif output.suffix.lower() in PICTURES and not output.is_dir():
        raise ValueError(
            f'`--output` must be a folder for several photographs, but got {output}.'
        )
    else:
        outputs = list(_names(output, paths))
        if foreign := next((f for f in outputs if f.exists() and not _is_map(f)), None):
            raise ValueError(
                f'{foreign} is there, and no map: it stays as it is. Choose another '
                'folder.'
            )
    photographs = {path.resolve() for path in paths}
    for file in {*outputs, arguments.array} - {None}:
        if file.resolve() in photographs:
            raise ValueError(f'{file} is a photograph that is read: it stays as it is.')
        file.parent.mkdir(parents=True, exist_ok=True)
    return outputs


def _is_map(path: Path) -> bool:
    """Whether an earlier run made it."""
    from PIL import Image

    if not path.name.endswith(MAP_ENDING):
        return False
    try:
        with Image.open(path, formats=('PNG',)) as image:
            return bool(image.info.get(MARK[0]) == MARK[1])
    except Exception:  # damaged, or no image
        return False


def _names(folder: Path, paths: Sequence[Path]) -> Iterator[Path]:
    """A name each, with numbers where photographs in different folders share one."""
    taken: set[str] = set()
    for path in paths:
        name, number = path.stem, 2
        while name.lower() in taken:
            name, number = f'{path.stem}_{number}', number + 1
        taken.add(name.lower())
        yield folder / f'{name}{MAP_ENDING}'


def _map(
    path: Path, output: Path, backend: Backend, arguments: argparse.Namespace
) -> str:
    """Make and write one map; returns what is said of it.

    Raises:
        UnreadableError: if there are no pixels to score.
    """
    from PIL.PngImagePlugin import PngInfo

    from pyiqa_clipkd.images import read_photograph
    from pyiqa_clipkd.maps.pictures import overlay
    from pyiqa_clipkd.maps.windows import quality_map
    from pyiqa_clipkd.scoring.core import default_workers
    from pyiqa_clipkd.scoring.reading import refuse

    refuse(path)
    image = read_photograph(path, max_pixels=arguments.max_pixels).image
    quality = quality_map(
        image,
        backend,
        window=arguments.window,
        stride=arguments.stride,
        coarse=arguments.coarse,
        workers=arguments.workers or default_workers(arguments.threads),
    )
    words = _words(quality, backend)
    picture = overlay(image, quality, size=arguments.size, caption=words)
    with written_whole(output) as partial:
        form = PICTURES[output.suffix.lower()]
        mark = PngInfo()
        mark.add_text(*MARK)
        picture.save(partial, form, quality=JPEG_QUALITY, pnginfo=mark)
    if arguments.array:
        _write_array(quality, arguments.array)
    return f'{printable(str(path))}: {words}'


def _words(quality: QualityMap, backend: Backend) -> str:
    left, top, right, bottom = quality.worst.box
    level = level_of(quality.score, backend.levels)
    name = f' by {backend.metric}' if backend.metric else ''
    return (
        f'score {quality.score:.2f} ({level}){name}; '
        f'worst of {quality.scores.size} windows: {quality.worst.score:.2f}, '
        f'{right - left} x {bottom - top} pixels at left {left}, top {top}'
    )


def _write_array(quality: QualityMap, path: Path) -> None:
    import numpy as np

    with written_whole(path) as partial:
        if path.suffix.lower() == '.npy':
            with partial.open('wb') as file:
                np.save(file, quality.scores)
            return
        with partial.open('w', newline='', encoding='utf-8') as text:
            writer = csv.writer(text, lineterminator='\n')
            names = ('left', 'top', 'right', 'bottom', 'score')
            writer.writerow(('row', 'column', *names))
            for one in quality.windows():
                place = (one.row, one.column, *one.box)
                writer.writerow((*place, f'{one.score:.6f}'))
