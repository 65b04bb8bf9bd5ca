"""Thumbnails: the best, the worst and the middle of a run, and what moved most."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import quote_from_bytes

from pyiqa_clipkd.compare.runs import Run, faults_of
from pyiqa_clipkd.report.thumbnails import Thumbnail

if TYPE_CHECKING:
    import pandas as pd  # type: ignore[import-untyped]


class Gallery(NamedTuple):
    """A heading and places in `run.rows`."""

    title: str
    places: Sequence[int]


def galleries(run: Run, number: int) -> list[Gallery]:
    """The `number` worst, middle and best; all of a run that has few photographs."""
    order = run.scored.sort_values('score', kind='stable').index.to_numpy()
    if not number or not len(order):
        return []
    if len(order) <= 3 * number:
        return [Gallery('All photographs, worst to best', order.tolist())]
    middle = (len(order) - number) // 2
    return [
        Gallery('Worst', order[:number].tolist()),
        Gallery('Around the median', order[middle : middle + number].tolist()),
        Gallery('Best', order[::-1][:number].tolist()),
    ]


def href(path: Path, page: Path) -> str:
    """A link to a file or folder: relative where it lies below the page's folder."""
    target, here = Path(os.path.abspath(path)), Path(os.path.abspath(page)).parent
    if not target.is_relative_to(here):
        # Not Path.as_uri, which fails for names that aren't UTF-8.
        return 'file://' + quote_from_bytes(_posix_bytes(target), safe='/:')
    return './' + quote_from_bytes(_posix_bytes(target.relative_to(here)))


def _posix_bytes(path: Path) -> bytes:
    text = path.as_posix()
    return os.fsencode(text if text.startswith('/') or not path.drive else f'/{text}')


class Cards:
    """Writes the cards of one or two runs' galleries.

    Args:
        page: where the page will be, for the links.
        thumbnails: of all files that get a card.
    """

    def __init__(self, page: Path, thumbnails: dict[Path, Thumbnail]) -> None:
        self.page = page
        self.thumbnails = thumbnails

    def of_run(self, run: Run, gallery: Gallery) -> str:
        """A gallery of one run."""
        rows = run.rows.iloc[list(gallery.places)]
        cards = [
            f'<li class="card">{self.picture(run, row.path)}'
            f'<p class="name">{escape(run.relative(row.path))}</p>'
            f'<p>{score(row.score)} {escape(row.level)}{faults(row.faults)}</p></li>'
            for row in rows.itertuples()
        ]
        return section(gallery.title, cards)

    def of_moves(
        self, title: str, runs: tuple[Run, Run], pairs: Iterable[Sequence[int]]
    ) -> str:
        """Pairs of photographs side by side: places in the two runs' `rows`."""
        cards = []
        for places in pairs:
            rows = [run.rows.iloc[i] for run, i in zip(runs, places, strict=True)]
            change = rows[1]['score'] - rows[0]['score']
            cards.append(
                f'<li class="card move">{self._both(runs, rows)}'
                f'<p class="name">{escape(runs[1].relative(rows[1]["path"]))}</p>'
                f'<p><strong class="{"fell" if change < 0 else "rose"}">{change:+.2f}'
                '</strong></p></li>'
            )
        return section(title, cards)

    def _both(self, runs: tuple[Run, Run], rows: Sequence[pd.Series]) -> str:
        """Two photographs side by side; one, if two runs scored the same file."""
        scores = [
            f'<p>{word} {score(row["score"])}{faults(row["faults"])}</p>'
            for word, row in zip('AB', rows, strict=True)
        ]
        files = [run.locate(r['path']) for run, r in zip(runs, rows, strict=True)]
        if files[0] == files[1]:
            picture = self.picture(runs[1], rows[1]['path'])
            return f'{picture}<div class="both">{"".join(scores)}</div>'
        both = ''.join(
            f'<div>{self.picture(run, row["path"])}{text}</div>'
            for run, row, text in zip(runs, rows, scores, strict=True)
        )
        return f'<div class="both">{both}</div>'

    def picture(self, run: Run, path: str) -> str:
        """A linked thumbnail, or a box that says why there is none."""
        name, file = escape(run.relative(path)), run.locate(path)
        image, problem = self.thumbnails[file]
        if image is None:
            return f'<div class="gone"><span>{name}: {escape(problem)}</span></div>'
        return (
            f'<a href="{escape(href(file, self.page))}">'
            f'<img src="{image}" alt="Photograph {name}"></a>'
        )


def score(value: float) -> str:
    return f'<strong>{value:.2f}</strong>'


def faults(cell: str) -> str:
    """What is wrong with a photograph, where there is anything."""
    words = ', '.join(faults_of(cell))
    return f' <span class="faults">{escape(words)}</span>' if words else ''


def section(title: str, cards: Sequence[str]) -> str:
    if not cards:
        return ''
    return f'<h3>{escape(title)}</h3><ul class="cards">{"".join(cards)}</ul>'


def files_of(run: Run, shown: Iterable[Gallery]) -> list[Path]:
    """The files whose thumbnails the galleries need."""
    paths = run.rows['path'].to_numpy()
    return [run.locate(paths[i]) for gallery in shown for i in gallery.places]
