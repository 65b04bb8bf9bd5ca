"""What the words of a command mean on a cluster: photographs, shards and tables."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, BinaryIO, NamedTuple

from pyiqa_clipkd.scoring.files import (
    STDIN,
    entries,
    find_photographs,
    is_image_name,
    tree,
)
from pyiqa_clipkd.scoring.ray.parts import is_part
from pyiqa_clipkd.scoring.ray.stores import (
    is_remote,
    local_path,
    located,
    store_of,
    uri_of,
)

SHARDS = ('.tar', '.tar.gz', '.tgz')
TABLES = ('.parquet',)
WEB = ('http://', 'https://')
CONTAINERS = SHARDS + TABLES


class Sources(NamedTuple):
    """What is to be scored: absolute paths and URIs, each once.

    Attributes:
        photographs: files with one photograph each.
        containers: shards and tables, with many.
    """

    photographs: list[str]
    containers: list[str]


def is_shard(name: str) -> bool:
    return name.lower().endswith(SHARDS)


def is_container(name: str) -> bool:
    return name.lower().endswith(CONTAINERS)


def find_sources(
    words: Sequence[str], *, stdin: BinaryIO | None = None, nul: bool = False
) -> Sources:
    """List what is named; nothing is opened.

    A folder means the photographs in it and below; if it has none, its shards and
    tables. What isn't there comes through, for its row to say so. Our own results are
    no tables, unless one of their parts is named.

    Args:
        words: paths and URIs of photographs, shards (.tar), tables (.parquet) and
            folders; patterns; `-`: a list of these on `stdin`.
        stdin: one entry a line.
        nul: its entries end with a NUL byte instead.

    Raises:
        ImportError: if the library for an object store isn't installed.
        OSError: if a store can't be listed.
    """
    found: dict[str, None] = {}
    for word in _words(words, stdin, b'\0' if nul else b'\n'):
        named = located(word)
        for name in _remote(word) if is_remote(word) else _local(word):
            if name == named or not is_part(name):
                found[name] = None
    return Sources(
        [name for name in found if not is_container(name)],
        [name for name in found if is_container(name)],
    )


def _words(words: Sequence[str], stdin: BinaryIO | None, end: bytes) -> Iterator[str]:
    for word in words:
        if word == STDIN and stdin is not None:
            yield from entries(stdin, end)
        else:
            yield word


def _local(word: str) -> Iterator[str]:
    path = local_path(word)
    photographs = [str(photograph) for photograph in find_photographs([path])]
    yield from photographs or _containers(_everything(path))


def _everything(path: str) -> Iterator[str]:
    """A folder's files, or those that a pattern matches, and all below them."""
    for match in [path] if os.path.isdir(path) else sorted(glob.iglob(path)):
        yield from sorted(
            os.path.join(match, *names)
            for names in tree(match)
            if not names or not names[-1].startswith('.')
        )


def _remote(word: str) -> Iterator[str]:
    store, path = store_of(word)
    matches = sorted(store.glob(path)) if glob.has_magic(path) else []
    if '/.' not in path:
        matches = [match for match in matches if '/.' not in match]
    for match in matches or [path]:
        if is_shard(match) or is_image_name(match) or not _is_folder(store, match):
            yield uri_of(word, match)
            continue
        base = match.rstrip('/')
        found = sorted(store.find(match))
        below = [name for name in found if '/.' not in name.removeprefix(base)]
        listed = [n for n in below if is_image_name(n)] or [*_containers(below)]
        yield from (uri_of(word, name) for name in listed)


def _is_folder(store: Any, path: str) -> bool:
    """A table, too, may be a folder of parts; ours are."""
    if path.startswith(WEB) and is_container(path):
        return False  # to ask would fetch it
    try:
        return bool(store.isdir(path))
    except Exception:  # of any store's own kind; its row will say so
        return False


def _containers(names: Iterable[str]) -> Iterator[str]:
    return (name for name in names if is_container(name) and not os.path.isdir(name))
