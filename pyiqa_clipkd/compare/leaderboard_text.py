"""A ranking of runs in words, and as JSON."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pyiqa_clipkd.attributes.names import ATTRIBUTES
from pyiqa_clipkd.compare import attributes as why
from pyiqa_clipkd.compare.leaderboard import Entrant, Leaderboard, Step


def as_text(board: Leaderboard) -> str:
    """All figures, for people; the last lines say what they mean."""
    blocks = [[_title(board), *_places(board)]]
    if board.has_attributes:
        blocks.append([f'{why.SCALE}; means:', *_attributes(board)])
    blocks.append([_levels(board), *_differences(board)])
    blocks.append([line for step in _steps(board) for line in _sentences(*step)])
    return '\n\n'.join('\n'.join(block) for block in blocks)


def as_dict(board: Leaderboard) -> dict[str, Any]:
    """All figures, for programs."""
    return {
        'ranking': [
            {'rank': number, **_entrant_as_dict(entrant, board)}
            for number, entrant in enumerate(board.entrants, 1)
        ],
        'steps': [
            {
                'above': entrant.name,
                'below': step.below,
                'difference': {**step.score._asdict(), 'test': step.score.test},
                'attributes': why.as_dict(step.attributes),
                'summary': _sentences(entrant, step),
            }
            for entrant, step in _steps(board)
        ],
        'paired': board.paired,
        'common': board.common,
        'confidence': board.confidence,
    }


def _entrant_as_dict(entrant: Entrant, board: Leaderboard) -> dict[str, Any]:
    run = entrant.run
    return {
        'name': entrant.name,
        'metric': run.values('metric'),
        'sha256': run.values('sha256'),
        'scored': len(run.scored),
        'bad': len(run.bad),
        'counted': len(entrant.values['score']),
        'mean': entrant.mean(),
        'attributes': {n: entrant.mean(n) for n in ATTRIBUTES if board.has_attributes},
    }


def _steps(board: Leaderboard) -> Iterator[tuple[Entrant, Step]]:
    return zip(board.entrants, board.steps, strict=False)  # the last one has none


def _title(board: Leaderboard) -> str:
    title = f'{len(board.entrants)} runs by their mean score, best first'
    if board.paired:
        return f'{title}, over the {board.common:,} photographs that all of them have:'
    return f'{title}; not paired, for only {board.common:,} names are in all of them:'


def _places(board: Leaderboard) -> Iterator[str]:
    for number, entrant in enumerate(board.entrants, 1):
        run, counted = entrant.run, len(entrant.values['score'])
        line = f'{number:3}   {entrant.mean():.3f}   {entrant.name}'
        if left := len(run.scored) - counted:
            line += f', {left:,} without a scored partner left out'
        if len(run.bad):
            line += f', {len(run.bad):,} could not be scored'
        yield line


def _attributes(board: Leaderboard) -> Iterator[str]:
    yield '      ' + '   '.join(ATTRIBUTES)
    for number, entrant in enumerate(board.entrants, 1):
        cells = (f'{entrant.mean(name):{len(name)}.3f}' for name in ATTRIBUTES)
        yield f'{number:3}   {"   ".join(cells)}'


def _levels(board: Leaderboard) -> str:
    step = board.steps[0]
    text = f'Each minus the next one; {why.percent(step.score.confidence)} intervals'
    if board.has_attributes:
        each = why.percent(step.attributes[ATTRIBUTES[0]].confidence)
        text += f' of scores, {each} of attributes'
    together = why.percent(board.confidence)
    return f'{text},\nso that those of all pairs of runs hold with {together}:'


def _differences(board: Leaderboard) -> Iterator[str]:
    for entrant, step in _steps(board):
        yield f'{entrant.name} - {step.below}'
        for name, d in {'score': step.score, **step.attributes}.items():
            yield f'  {name:12}   {d.value:+.3f} [{d.low:+.3f}, {d.high:+.3f}]'


def _sentences(entrant: Entrant, step: Step) -> list[str]:
    names = step.below, entrant.name
    lines = [step.score.sentence(*names)]
    return [*lines, why.sentence(step.attributes, *names)] if step.attributes else lines
