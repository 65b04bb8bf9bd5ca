"""Local paths and object stores under one roof: fsspec, or else pyarrow."""

from __future__ import annotations

import os
from importlib.util import find_spec
from typing import Any
from urllib.parse import unquote, urlsplit

SCHEME, FILE = '://', 'file://'


def is_remote(name: str) -> bool:
    """Whether a name is a URI of another place than this file system."""
    return SCHEME in name and not name.startswith(FILE)


def local_path(name: str) -> str:
    """The absolute path of a local name; of `file://`, too."""
    if name.startswith(FILE):
        name = unquote(urlsplit(name).path)
    return os.path.abspath(name)


def located(name: str) -> str:
    """A name that means the same file in every process: a URI or an absolute path."""
    return name if is_remote(name) else local_path(name)


def store_of(uri: str) -> tuple[Any, str]:
    """The file system of a URI or path (fsspec's), and what it is called there.

    Raises:
        ImportError: if no library for this kind of URI is installed.
        ValueError: if nobody knows this kind of URI.
    """
    import fsspec

    if not is_remote(uri):
        return fsspec.filesystem('file'), local_path(uri)
    try:
        return fsspec.core.url_to_fs(uri)
    except ImportError as missing:
        return _arrow(uri, missing)


def _arrow(uri: str, missing: ImportError) -> tuple[Any, str]:
    """Of the stores that pyarrow knows by itself: S3, Google's, HDFS."""
    if find_spec('pyarrow') is None:
        raise missing
    from fsspec.implementations.arrow import ArrowFSWrapper
    from pyarrow import ArrowInvalid, fs  # type: ignore[import-untyped]

    scheme, _, rest = uri.partition(SCHEME)
    host, _, key = rest.partition('/')
    try:  # without the key: a pattern would be no URI
        system, root = fs.FileSystem.from_uri(f'{scheme}{SCHEME}{host}')
    except ArrowInvalid:
        raise ImportError(f'{uri}: {missing}') from missing
    return ArrowFSWrapper(system), f'{root}/{key}' if key else root


def uri_of(uri: str, path: str) -> str:
    """The URI of a path in the file system of another URI."""
    if not is_remote(uri):
        return path
    if SCHEME in path:  # some file systems give whole URIs back
        return path
    return f'{uri.partition(SCHEME)[0]}{SCHEME}{path.lstrip("/")}'
