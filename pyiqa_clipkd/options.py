"""Option files that build on each other: `_base_` lists, overrides, names.

`python -m pyiqa_clipkd.options FILE ... [KEY:KEY=VALUE ...]` prints the whole options.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from pyiqa_clipkd.files import one_line

# Of one option file; ours have a hundred.
MOST_PARTS = 100_000

BASE = '_base_'
DATA = 'data'
NUMBER = re.compile(r'[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?')


def load_options(
    paths: str | Path | Sequence[str | Path], overrides: Iterable[str] = ()
) -> dict[str, Any]:
    """Read one or more option files with everything they build on.

    A file may start with `_base_: [FILE, ...]`, paths relative to itself. Later files
    win over earlier ones, the file itself over all of them, and overrides over the
    file; mappings are merged by key, everything else is replaced. Then each of
    `datasets` gets what it doesn't say itself from `data`.

    In `name` and in the paths of weights `{encoder}` becomes the encoder of `network`
    and `{data}` the name of `data`; in `name` also `{split}` the `split_word`; in
    `save_final_results_path`, `{name}` the name.

    Args:
        paths: the option file, or several: a recipe, then for instance one's own data.
        overrides: `key:key=value`, as for the host's `--force_yml`.

    Raises:
        FileNotFoundError: if a file is missing.
        ValueError: if a file is no mapping, builds on itself, or an override is wrong;
            if the options have no `name`.
    """
    if isinstance(paths, (str, Path)):
        paths = [paths]
    options: dict[str, Any] = {}
    for path in paths:
        options = _merged(options, _load(Path(path), ()))
    for override in overrides:
        _apply(options, override)
    if not options.get('name'):
        names = ', '.join(str(path) for path in paths)
        raise ValueError(f'{names} must give a `name`, the folder of the results.')
    data = options.pop(DATA, {})
    encoder = str((options.get('network') or {}).get('encoder', ''))
    words = {
        '{encoder}': encoder_word(encoder),
        '{data}': str(data.get('name', 'data')),
    }
    split = data.get('split_index')
    if '{split}' in options['name'] and split is None:
        raise ValueError('`name` holds {split}, but `data: split_index` is missing.')
    _fill(options, 'name', words)
    options['name'] = with_split(options['name'], split)
    words['{name}'] = options['name']
    _fill(options, 'save_final_results_path', words)
    _fill(options.get('path') or {}, 'pretrain_network', words)
    _fill(options.get('teacher') or {}, 'weights', words)
    _fill(options.get('network') or {}, 'encoder_weights', words)
    for key, own in (options.get('datasets') or {}).items():
        options['datasets'][key] = _merged(_unshared(data), own or {})
    return options


def encoder_word(encoder: str) -> str:
    """`timm:test_vit.in1k` -> `test_vit.in1k`, for names of folders and metrics."""
    return re.sub(r'[^\w.-]+', '-', encoder.split(':')[-1])


def split_word(split_index: int | str) -> str:
    """`{split}` of paths: `00` of split 1, as n-splits folders count; else a column."""
    if isinstance(split_index, int):
        return f'{split_index - 1:02d}'
    return split_index


def with_split(text: str, split_index: int | str | None) -> str:
    """`text` with the `split_word` for `{split}`, where there is a split."""
    if split_index is None:
        return text
    return text.replace('{split}', split_word(split_index))


def without_weights(network: dict[str, Any]) -> dict[str, Any]:
    """The options of the same network, without reading its pretrained weights."""
    none = {'encoder_weights': None, 'pretrained': None}
    return {k: none.get(k, v) for k, v in network.items()} | (
        {'pretrained': None} if network['type'] == 'CLIPLikert' else {}
    )


def _fill(place: dict[str, Any], key: str, words: dict[str, str]) -> None:
    for word, value in words.items():
        if place.get(key):
            place[key] = str(place[key]).replace(word, value)


def _load(path: Path, parents: tuple[Path, ...]) -> dict[str, Any]:
    path = path.resolve()
    if path in parents:
        raise ValueError(f'{path} builds on itself.')
    if not path.is_file():
        needed = f' (needed by {parents[-1]})' if parents else ''
        raise FileNotFoundError(f'There is no option file {path}{needed}.')
    try:
        own = _unshared(yaml.safe_load(path.read_text(encoding='utf-8')))
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise ValueError(f'{path} is damaged: {one_line(error)}.') from error
    if not isinstance(own, dict):
        raise ValueError(f'{path} must hold a mapping, but got {type(own).__name__}.')
    options: dict[str, Any] = {}
    bases = own.pop(BASE, [])
    for base in [bases] if isinstance(bases, str) else bases:
        options = _merged(options, _load(path.parent / base, (*parents, path)))
    return _merged(options, own)


def _unshared(value: Any) -> Any:
    """A copy in which no part is shared, as YAML's `*references` make it.

    Raises:
        ValueError: if a few references unfold to more than any option file has.
    """
    return _copy(value, iter(range(MOST_PARTS)))


def _copy(value: Any, left: Iterator[int]) -> Any:
    if next(left, None) is None:
        raise ValueError(f'it unfolds to more than {MOST_PARTS} parts')
    if isinstance(value, dict):
        return {key: _copy(part, left) for key, part in value.items()}
    return [_copy(part, left) for part in value] if isinstance(value, list) else value


def _merged(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    result = dict(first)
    for key, value in second.items():
        if isinstance(value, dict) and isinstance(result.get(key), dict):
            value = _merged(result[key], value)
        result[key] = value
    return result


def _apply(options: dict[str, Any], override: str) -> None:
    keys, equals, text = override.partition('=')
    *parents, last = keys.strip().split(':')
    if not equals or not last:
        raise ValueError(
            f'An override must look like key:key=value, but got {override!r}.'
        )
    place = options
    for key in parents:
        place = place.get(key) if isinstance(place, dict) else None  # type: ignore
        if not isinstance(place, dict):
            raise ValueError(f'Override {override!r}: the options have no {key!r}.')
    place[last] = _value(text.strip())


def _value(text: str) -> Any:
    if text.lower() in ('~', 'none', ''):
        return None
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f'The value {text!r} of an override is no YAML.') from error
    return float(text) if isinstance(value, str) and NUMBER.fullmatch(text) else value


if __name__ == '__main__':
    files = [word for word in sys.argv[1:] if '=' not in word]
    whole = load_options(files, [word for word in sys.argv[1:] if '=' in word])
    print(yaml.safe_dump(whole, sort_keys=False), end='')
