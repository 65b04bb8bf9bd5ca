"""The page's section of attributes: their means, their faults, how two runs differ."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

import numpy as np

from pyiqa_clipkd.attributes.names import ATTRIBUTES, LOW, WORDS
from pyiqa_clipkd.compare.attributes import (
    attribute_differences,
    levels_of,
    sentence,
)
from pyiqa_clipkd.compare.runs import Run
from pyiqa_clipkd.report.figures import heads, table


def means_and_faults(runs: Sequence[Run]) -> str:
    """Two tables, of one run or of two; '' where a run has no attributes.

    The faults' names are buttons that filter the page's table.
    """
    if not all(run.has_attributes and len(run.scored) for run in runs):
        return ''
    means = [
        (name.capitalize(), [f'{run.attribute_means[name]:.2f}' for run in runs])
        for name in ATTRIBUTES
    ]
    counts = [
        (word, [_share(run.fault_counts[word], len(run.scored)) for run in runs])
        for word in runs[0].fault_counts
    ]
    return (
        f'<p>{escape(_meaning())}</p><div class="columns">'
        f'{table("Means", heads(runs, "Mean"), means)}'
        f'{table("Faults", heads(runs, "Photographs"), counts, chooses="fault")}</div>'
        '<p class="hint">A fault filters <a href="#table">the table</a>.</p>'
    )


def _share(count: int, total: int) -> str:
    return f'{count:,} ({count / total:.0%})'


def _meaning() -> str:
    """What the values say, in plain words."""
    low, high = (', '.join(words) for words in zip(*WORDS.values(), strict=True))
    below = ', '.join(f'{name} below {least:g}' for name, least in LOW.items())
    return f'Values from 0 ({low}) to 1 ({high}). A fault is {below}.'


def differences(first: Run, second: Run, pairs: np.ndarray) -> str:
    """By which attributes B differs from A; '' where a run has none.

    Args:
        first, second: A and B, large enough to be compared.
        pairs: (N, 2), of `scored_pairs`.
    """
    found = attribute_differences((first, second), pairs)
    if not found:
        return ''
    each, together = levels_of(found)
    rows = [
        (
            name.capitalize(),
            [f'{d.value:+.3f}', f'{d.low:+.3f} to {d.high:+.3f}'],
        )
        for name, d in found.items()
    ]
    title = 'Attributes, B - A'
    return (
        f'<p class="verdict">{escape(sentence(found))}</p>'
        f'{table(title, ["Mean", f"{each} interval"], rows)}'
        f'<p class="hint">Each is a {each} interval, so that all five hold with '
        f'{together}.</p>'
    )
