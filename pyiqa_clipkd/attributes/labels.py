"""Pseudo-labels of any number of photographs: a row each, in a file that goes on."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from PIL import Image

from pyiqa_clipkd.attributes.names import ATTRIBUTES
from pyiqa_clipkd.images import MAX_PIXELS, UnreadableError
from pyiqa_clipkd.scoring.core import default_workers
from pyiqa_clipkd.scoring.locks import locked
from pyiqa_clipkd.scoring.reading import (
    MEMORY,
    Allowance,
    decoded_bytes,
    in_order,
    read_image,
    reason_of,
)
from pyiqa_clipkd.scoring.results import RowFile
from pyiqa_clipkd.scoring.tables import LABEL_COLUMNS, RAW, Row

# Digits after the point of raw measures.
DIGITS = 4


class Labeller(Protocol):
    """Photographs to attributes; may be called from several threads.

    Attributes:
        identity: what it is, in a line: labels of equal lines belong together.
    """

    @property
    def identity(self) -> str: ...

    def __call__(self, image: Image.Image) -> dict[str, float]:
        """RGB -> the five attributes in [0, 1], 1 the good side.

        Keys that begin with `raw_` are the measures that led there, if there are any.
        """


@dataclass
class Counts:
    """What became of the photographs.

    Attributes:
        labelled: have labels; `known` of them had theirs before.
        bad: couldn't be labelled; `known_bad` of them had been tried before.
        first_bad: path and error of some of the bad ones.
    """

    labelled: int = 0
    known: int = 0
    bad: int = 0
    known_bad: int = 0
    first_bad: list[tuple[str, str]] = field(default_factory=list)

    def add(self, path: str, error: str, *, known: bool = False) -> None:
        if error:
            self.bad += 1
            self.known_bad += known
            self.first_bad = [*self.first_bad, (path, error)][:5]
        else:
            self.labelled += 1
            self.known += known


class Labels(RowFile):
    """A file of labels, all by one labeller; see `RowFile`."""

    kind, value = 'labels', ATTRIBUTES[0]

    def words(self, identity: Mapping[str, Any]) -> str:
        return str(identity['labeller'])


def write_labels(
    paths: Iterable[Path | None],
    target: Path,
    labeller: Labeller,
    *,
    workers: int | None = None,
    max_pixels: int = MAX_PIXELS,
    overwrite: bool = False,
    retry: bool = False,
    found: Callable[[], None] | None = None,
) -> Counts:
    """Label photographs into a file, and go on after those that can't be read.

    The same call goes on where one was stopped, by `kill -9`, too: no row twice, none
    missing. What is decoded at a time has a bound.

    Args:
        paths: of the photographs, read as they're needed; the rows have their order.
            `None` says that the next is not there yet: rows that are done don't wait.
        target: its ending says how it is written: .parquet, .csv or .jsonl, with the
            columns `LABEL_COLUMNS`. A Parquet file appears at the end.
        labeller: for instance `MeasureLabeller()`.
        workers: photographs at a time; by default one a processor core.
        max_pixels: larger photographs are refused.
        overwrite: begin the file anew.
        retry: drop the rows with an error, and try these photographs again.
        found: called after each photograph.

    Raises:
        ValueError: if an option is wrong, or the file holds something else, or labels
            of another labeller.
        BlockingIOError: if another run is writing the file.
    """
    workers = default_workers() if workers is None else workers
    for name, value in (('workers', workers), ('max_pixels', max_pixels)):
        if type(value) is not int or value < 1:
            raise ValueError(
                f'`{name}` must be a whole number >= 1, but got {value!r}.'
            )
    counts = Counts()
    identity = {'labeller': labeller.identity}
    with (
        locked(target),
        Labels(
            target, LABEL_COLUMNS, identity, overwrite=overwrite, retry=retry
        ) as file,
    ):

        def unknown() -> Iterator[Path | None]:
            for path in paths:
                if path is None:
                    yield None
                    continue
                key = file.key(os.path.abspath(path))
                if key not in file.done:
                    yield path
                    continue
                counts.add(str(path), file.errors.get(key, ''), known=True)
                if found is not None:
                    found()

        engine = _Engine(labeller, max_pixels)
        for row in in_order(engine.label, unknown(), workers, 4 * workers):
            file.add(row)
            counts.add(row['path'], row['error'])
            if found is not None:
                found()
    return counts


class _Engine:
    """One photograph at a time; called from several threads."""

    def __init__(self, labeller: Labeller, max_pixels: int) -> None:
        self.labeller = labeller
        self.max_pixels = max_pixels
        self.memory = Allowance(MEMORY)

    def label(self, path: Path) -> Row:
        row: Row = dict.fromkeys(LABEL_COLUMNS)
        # Whatever the folder of the next run: its paths must mean the same files.
        row |= {'path': os.path.abspath(path), 'labeller': self.labeller.identity}
        row |= {'format': '', 'notes': '', 'error': ''}
        try:
            with self.memory.take(decoded_bytes(path)):
                image = read_image(path, row, self.max_pixels)
                row |= _checked(self.labeller(image))
                del image
        except Exception as error:
            row['error'] = reason_of(error)
        return row


def _checked(values: dict[str, float]) -> Row:
    for attribute in ATTRIBUTES:
        value = values.get(attribute, math.nan)
        if not 0 <= value <= 1:
            raise UnreadableError(f'the labeller gives {value} for its {attribute}')
    raw = (RAW + attribute for attribute in ATTRIBUTES)
    return {attribute: float(values[attribute]) for attribute in ATTRIBUTES} | {
        name: round(float(values[name]), DIGITS) for name in raw if name in values
    }
