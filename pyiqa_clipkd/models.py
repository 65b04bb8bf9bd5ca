"""The metrics by name: what each is, and where its weights come from."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NamedTuple

from pyiqa_clipkd.description import ONNX
from pyiqa_clipkd.files import SHORT_HASH, file_hash
from pyiqa_clipkd.header import read_header
from pyiqa_clipkd.locations import BUNDLED_FOLDER, attributes_file, find_weights
from pyiqa_clipkd.names import METRICS, RELEASED, user_names, weights_folder

TORCH_MAGIC = (b'PK', b'\x80')

BUNDLED, USER, DOWNLOAD, NONE = 'package', 'your folder', 'open_clip', 'none'


class Model(NamedTuple):
    """One metric.

    Attributes:
        name: for instance `clipkd_efficientnet_lite`.
        what: in a few words.
        source: `package`, `your folder`, `open_clip` (its cache or download) or `none`.
        file: the weights; `None` where they aren't a file of ours.
        megabytes: 10^6 bytes.
        input_size: side in pixels of the square that the network sees, where the file
            says so.
        sha256: the first digits, as in a row of results.
        card: a Markdown file: data, terms, results, limits.
        onnx: the same network for the runtime without torch.
        attributes: heads beside the weights that say why, if there are any.
        damage: what is wrong with the file, or `None`.
    """

    name: str
    what: str
    source: str
    file: Path | None = None
    megabytes: float | None = None
    input_size: int | None = None
    sha256: str | None = None
    card: Path | None = None
    onnx: Path | None = None
    attributes: Path | None = None
    damage: str | None = None


def models() -> list[Model]:
    """Every metric: those of the package, then the user's own."""
    return [describe(name) for name in dict.fromkeys([*METRICS, *user_names()])]


def describe(name: str) -> Model:
    """The metric of this name; nothing of it needs torch."""
    path, what = find_weights(name), METRICS.get(name, 'your own')
    if path is None:
        return Model(name, what, DOWNLOAD if name in RELEASED else NONE)
    model = Model(
        name,
        what,
        BUNDLED if path.parent == BUNDLED_FOLDER else USER,
        file=path,
        card=_existing(path.with_suffix('.md')),
        onnx=_existing(path.with_suffix(ONNX)),
        attributes=_existing(attributes_file(path)),
    )
    try:
        metadata = read_metadata(path)
        return model._replace(
            megabytes=path.stat().st_size / 1e6,
            input_size=metadata.get('config', {}).get('input_size'),
            sha256=file_hash(path)[:SHORT_HASH],
        )
    except (OSError, ValueError) as error:
        return model._replace(damage=str(error))


def read_metadata(path: Path) -> dict[str, Any]:
    """What a weight file says of itself: `config`, `card` and more.

    Empty for a file of PyTorch, which would have to be loaded for that.

    Raises:
        OSError: if it can't be read.
        ValueError: if it is damaged, with the reason.
    """
    with path.open('rb') as file:
        if file.read(8).startswith(TORCH_MAGIC):
            return {}
    metadata = read_header(path).metadata
    for key in ('config', 'card'):
        if not isinstance(metadata.get(key, {}), dict):
            raise ValueError(f'no weight file: its `{key}` is no mapping')
    return metadata


def card(model: Model) -> str:
    """Markdown: the card beside the weights, or what is known without one."""
    if model.card is not None:
        return model.card.read_text(encoding='utf-8')
    rows = {'What': model.what, 'Weights': _where(model)}
    if model.file is not None and model.damage is None:
        rows['SHA-256'] = file_hash(model.file)
        rows |= read_metadata(model.file).get('card', {})
    return card_text(model.name, rows)


def card_text(title: str, rows: Mapping[str, Any]) -> str:
    """A card in Markdown: a title, and a table of two columns."""
    lines = [f'# {title}', '', '| | |', '|---|---|']
    for key, value in rows.items():
        text = ' '.join(str(value).replace('|', r'\|').split())
        lines.append(f'| {key} | {text} |')
    return '\n'.join(lines) + '\n'


def _existing(path: Path) -> Path | None:
    return path if path.is_file() else None


def _where(model: Model) -> str:
    if model.damage is not None:
        return f'{model.file}: {model.damage}'
    if model.source == DOWNLOAD:
        pretrained = RELEASED[model.name]['pretrained']
        return f'{pretrained!r} of open_clip: from its cache, or downloaded'
    if model.file is None:
        return (
            f'none: train and publish them, or put {model.name}.safetensors into '
            f'{weights_folder()}'
        )
    return str(model.file)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.add_argument('metric', nargs='?', metavar='NAME', help='print its card')
    parser.add_argument('--json', action='store_true', help='for programs')


def run(arguments: argparse.Namespace) -> int:
    """Print the table, or the card of one metric; returns the exit code."""
    if arguments.metric is not None:
        _print_one(_named(arguments.metric), arguments.json)
    elif arguments.json:
        print(json.dumps([_plain(model) for model in models()], indent=2))
    else:
        _print_table(models())
        print(f'\nYour folder: {weights_folder()}')
        print('A card with data, terms, results and limits: pyiqa-clipkd models NAME')
    return 0


def _named(name: str) -> Model:
    known = list(dict.fromkeys([*METRICS, *user_names()]))
    if name not in known:
        near = get_close_matches(name, known, n=1, cutoff=0.5) or known
        raise ValueError(f'There is no metric {name!r}. Is it {" or ".join(near)}?')
    return describe(name)


def _print_one(model: Model, as_json: bool) -> None:
    if not as_json:
        print(card(model), end='')
        return
    known = model.file is not None and model.damage is None
    metadata = read_metadata(model.file) if known and model.file else {}
    print(json.dumps(_plain(model) | {'metadata': metadata}, indent=2))


def _plain(model: Model) -> dict[str, Any]:
    """For JSON."""
    return {
        key: str(value) if isinstance(value, Path) else value
        for key, value in model._asdict().items()
    }


def _print_table(rows: Sequence[Model]) -> None:
    cells = [('name', 'weights', 'MB', 'input', 'sha256', 'onnx', 'attributes', 'what')]
    for model in rows:
        size = '' if model.megabytes is None else f'{model.megabytes:.1f}'
        cells.append(
            (
                model.name,
                'damaged' if model.damage else model.source,
                size,
                str(model.input_size or ''),
                model.sha256 or '',
                'yes' if model.onnx else '',
                'yes' if model.attributes else '',
                model.what,
            )
        )
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for line in cells:
        padded = (cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        print('  '.join(padded).rstrip())
