"""Which of the scored photographs are shown: all, the best, the worst, one a group."""

from __future__ import annotations

import heapq
import os
import re
from collections.abc import Callable, Iterator
from itertools import count
from typing import Protocol

from pyiqa_clipkd.scoring.tables import Row

FOLDER = 'folder'


class Selection(Protocol):
    """Takes rows with a score; gives back what is shown at once, and at the end."""

    def add(self, row: Row) -> Iterator[Row]: ...
    def rest(self) -> Iterator[Row]: ...
    def note(self) -> str: ...


class Everything:
    """Each row, as soon as it's there."""

    def add(self, row: Row) -> Iterator[Row]:
        yield row

    def rest(self) -> Iterator[Row]:
        yield from ()

    def note(self) -> str:
        return ''


class Extremes:
    """The rows with the highest or lowest scores, the most extreme first.

    Of equal scores those that came first. No more than `number` rows are kept.
    """

    def __init__(self, number: int, *, best: bool) -> None:
        self.number = number
        self.sign = 1 if best else -1
        self.heap: list[tuple[float, int, Row]] = []
        self.turn = count(0, -1)

    def add(self, row: Row) -> Iterator[Row]:
        item = (self.sign * row['score'], next(self.turn), row)
        if len(self.heap) < self.number:
            heapq.heappush(self.heap, item)
        else:
            heapq.heappushpop(self.heap, item)
        yield from ()

    def rest(self) -> Iterator[Row]:
        yield from (row for *_, row in sorted(self.heap, reverse=True))

    def note(self) -> str:
        return ''


class BestOfGroups:
    """The best row of each group, in the order in which the groups came up."""

    def __init__(self, group_of: Callable[[str], str | None]) -> None:
        self.group_of = group_of
        self.best: dict[str, Row] = {}
        self.without = 0

    def add(self, row: Row) -> Iterator[Row]:
        group = self.group_of(row['path'])
        if group is None:
            self.without += 1
        else:
            known = self.best.setdefault(group, row)
            if row['score'] > known['score']:
                self.best[group] = row
        yield from ()

    def rest(self) -> Iterator[Row]:
        yield from self.best.values()

    def note(self) -> str:
        """What the summary says of photographs that are in no group."""
        if not self.without:
            return ''
        return f'{self.without:,} match no group of --best-of, and are not shown.'


def grouping(by: str) -> Callable[[str], str | None]:
    """What names the group of a path: its folder, or what a pattern finds in it.

    Args:
        by: `folder`, or a regular expression: its first group, or else all that it
            matches, is the name. What doesn't match belongs to no group.

    Raises:
        ValueError: if it is no regular expression.
    """
    if by == FOLDER:
        return os.path.dirname
    try:
        pattern = re.compile(by)
    except re.error as error:
        raise ValueError(
            f'`--best-of` must be `{FOLDER}` or a regular expression, but got {by!r}: '
            f'{error}.'
        ) from None

    def group(path: str) -> str | None:
        found = pattern.search(path)
        return found[min(1, pattern.groups)] if found else None

    return group
