"""Result files as `pyiqa-clipkd score` writes them, with scores of our choice."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pyiqa_clipkd.attributes.names import ATTRIBUTES, faults
from pyiqa_clipkd.names import LEVELS
from pyiqa_clipkd.scoring.tables import FAULT_SEPARATOR, FAULTS, HEADS, columns

Row = dict[str, Any]

MADE_BY: Row = {
    'metric': 'clipkd_efficientnet_lite',
    'weights': 'clipkd_efficientnet_lite.safetensors',
    'sha256': '0123456789abcdef',
    'backend': 'torch',
    'crops': 0,
    'input_size': 384,
}


def row(path: str, score: float | None, error: str = '', **changes: Any) -> Row:
    """One row; a bad file has no score and an error."""
    known = score is not None
    value = 0.0 if score is None else score
    probabilities = {
        f'p_{level}': max(0.0, 1 - abs(value - i)) if known else None
        for i, level in enumerate(LEVELS, 1)
    }
    return {
        'path': path,
        'score': score,
        'score_100': (value - 1) * 25 if known else None,
        'level': LEVELS[round(value) - 1] if known else '',
        **probabilities,
        **MADE_BY,
        'width': 640 if known else None,
        'height': 480 if known else None,
        'format': 'JPEG' if known else '',
        'notes': '',
        'seconds': 0.04 if known else None,
        'error': error,
        **changes,
    }


def explained(path: str, score: float, values: Sequence[float], **changes: Any) -> Row:
    """A row with values of the five attributes, as `--attributes` writes it."""
    attributes = dict(zip(ATTRIBUTES, values, strict=True))
    words = FAULT_SEPARATOR.join(faults(attributes))
    whole = {**row(path, score), **attributes, FAULTS: words, HEADS: 'f' * 16}
    whole |= changes
    return {name: whole[name] for name in columns(LEVELS, attributes=True)}


def write_results(
    path: Path, scores: Mapping[str, float | Row | None], **changes: Any
) -> Path:
    """A result file with a row for each path: a score, `None`, or a whole row."""
    rows = [
        value
        if isinstance(value, dict)
        else row(name, value, '' if value is not None else 'not an image', **changes)
        for name, value in scores.items()
    ]
    if path.suffix == '.jsonl':
        path.write_text(''.join(json.dumps(one) + '\n' for one in rows))
        return path
    with path.open('w', newline='', encoding='utf-8') as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator='\n')
        writer.writeheader()
        writer.writerows(rows)
    return path
