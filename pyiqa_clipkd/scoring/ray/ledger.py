"""Which photograph ends the process that reads it: it is left out, with an error.

A decoder that crashes, or takes all memory, would do so again each time that Ray starts
the work anew, without an end. So whoever begins some photographs says so, and whoever
takes them up again names each one before it is read.
"""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

# Processes that a photograph may end after it was named. One may have been killed for
# another reason. The one before them, which made the others careful, isn't counted.
DEATHS = 2

FATAL = f'it ended at least {DEATHS} processes that read it'


class Advice(NamedTuple):
    """How to go about some photographs.

    Attributes:
        careful: one by one, each of them named before.
        fatal: places of those that are to be left out.
    """

    careful: bool
    fatal: frozenset[int]


class Ledger:
    """What has been begun and not ended; one for all processes of a job."""

    def __init__(self) -> None:
        self.begun: set[str] = set()
        self.reading: dict[str, int] = {}
        self.deaths: Counter[tuple[str, int]] = Counter()

    def begin(self, work: str) -> Advice:
        """Some photographs, by a name that is the same at each try."""
        careful = work in self.begun
        self.begun.add(work)
        if (place := self.reading.pop(work, None)) is not None:
            self.deaths[work, place] += 1
        fatal = (p for (w, p), n in self.deaths.items() if w == work and n >= DEATHS)
        return Advice(careful, frozenset(fatal))

    def read(self, work: str, place: int) -> None:
        """One of them is read next."""
        self.reading[work] = place

    def end(self, work: str) -> None:
        """All of them are done."""
        self.begun.discard(work)
        self.reading.pop(work, None)
