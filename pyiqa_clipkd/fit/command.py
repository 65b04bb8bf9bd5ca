"""From a CSV of one's own photographs and scores to a metric: scripts/fit.py."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pyiqa_clipkd import pipeline
from pyiqa_clipkd.cores import usable_cores
from pyiqa_clipkd.correlation import Interval, correlations, score_files
from pyiqa_clipkd.files import file_hash
from pyiqa_clipkd.fit.checks import NEW_TEACHER
from pyiqa_clipkd.fit.plan import Plan, make_plan, write
from pyiqa_clipkd.fit.quiet import host_log_to_file
from pyiqa_clipkd.names import weights_folder
from pyiqa_clipkd.network import load_network
from pyiqa_clipkd.publish import publish

Figures = dict[str, dict[str, Interval]]


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog='fit.py', description='Make a metric of your own photographs and scores.'
    )
    add = parser.add_argument
    add('csv', type=Path, help='columns `image` and `mos`, or else the first two')
    add('--images', type=Path, required=True, help='folder of the photographs')
    add('--student', required=True, help='for instance efficientnet_lite, mobilevit')
    add('--name', required=True, help='of the data: the metric is clipkd_STUDENT-NAME')
    add('--group', metavar='COLUMN', help='equal words stay on one side of the split')
    add('--lower-better', action='store_true', help='low scores are good (DMOS)')
    add(
        '--mos-range',
        type=float,
        nargs=2,
        metavar=('LOW', 'HIGH'),
        help='ends of the scale; default: smallest and largest score of the table',
    )
    add('--skip-bad', action='store_true', help="leave out what can't be decoded")
    add(
        '--teacher',
        nargs='?',
        const=NEW_TEACHER,
        metavar='FILE',
        help='distil from this teacher; without FILE one is trained first',
    )
    add(
        '--start',
        metavar='published|imagenet|random|FILE',
        help="the student's first weights: those of the metric clipkd_STUDENT "
        "(default), ImageNet's (default with --teacher), none, or a file",
    )
    add('--epochs', type=int, help='of each training; default: 3 to 12, by the start')
    add('--input-size', type=int, help='side in pixels; default: that of the start')
    add('--batch-size', type=int, default=16, help='default: 16')
    add('--workers', type=int, default=min(4, usable_cores()), help='of loaders')
    add('--seed', type=int, default=123, help='of split and training')
    add('--output', type=Path, default=Path('fits'), help='folder, default: fits')
    add('--weights-folder', type=Path, help=f'default: {weights_folder()}')
    add('--resume', action='store_true', help='go on with what was stopped')
    args = parser.parse_args(argv)
    words = sys.argv if argv is None else ['scripts/fit.py', *argv]
    args.command = shlex.join(['python', *words])
    return args


def train(plan: Plan) -> float:
    """Run the trainings that aren't finished; returns the seconds of all of them."""
    seconds = 0.0
    for stage in plan.stages:
        record = stage.experiment / 'run.json'
        if not record.is_file():
            print(f'Training; log and weights go to {stage.experiment}.', flush=True)
            resume = ['--auto_resume'] if plan.args.resume else []
            with host_log_to_file():
                pipeline.train(['-opt', str(stage.file), *resume])
        seconds += json.loads(record.read_text())['seconds']
    return seconds


def measure(plan: Plan) -> Figures:
    """SRCC and PLCC on the held-out photographs: start, teacher, new weights, change.

    What is trained on ImageNet or nothing only has no result before the training.
    """
    after = plan.stages[-1].checkpoint
    files = [plan.args.images / name for name in plan.held_out['img_name']]
    scores = {
        word: score_files(load_network(path), files, f'Scoring {word}')
        for word, path in [
            ('before', plan.start.path),
            ('teacher', plan.teacher),
            ('after', after),
        ]
        if path is not None
    }
    figures = correlations(scores, plan.labels, seed=plan.args.seed)
    if 'change' in figures and 'before' not in figures:
        figures['above teacher'] = figures.pop('change')
    return figures


def publish_and_record(plan: Plan, figures: Figures, seconds: float) -> dict[str, Any]:
    """Publish the metric, write `result.json`, remove what only a resume needs."""
    args, held_out = plan.args, len(plan.held_out)
    low, high = args.mos_range
    after = figures['after']
    published = publish(
        plan.stages[-1].checkpoint,
        plan.metric,
        folder=args.weights_folder,
        card={
            'Data': f'{args.name}: {plan.to_train} photographs of {args.csv.name}; '
            f'scores {low:g} to {high:g} became 1 to 5',
            'Licence': 'not stated: those of the photographs and of the start apply',
            'Results': f'SRCC {after["srcc"]}, PLCC {after["plcc"]} (95 % intervals) '
            f'on {held_out} held-out photographs',
            'Start': plan.start.words,
            'Made by': args.command,
            'Cost': f'{seconds:.0f} seconds of training',
        },
    )
    result = {
        'command': args.command,
        'metric': plan.metric,
        'weights': str(published),
        'weights_sha256': file_hash(published),
        'start': plan.start.words,
        'start_sha256': file_hash(plan.start.path) if plan.start.path else None,
        'mos_range': args.mos_range,
        'lower_better': args.lower_better,
        'photographs': {'to_train': plan.to_train, 'held_out': held_out},
        'seconds': round(seconds),
        'results': {
            word: {figure: interval._asdict() for figure, interval in both.items()}
            for word, both in figures.items()
        },
    }
    text = json.dumps(result, indent=2) + '\n'
    (plan.folder / 'result.json').write_text(text, encoding='utf-8')
    for stage in plan.stages:
        for state in stage.experiment.glob('training_states/*.state'):
            state.unlink()
            weights = stage.experiment / 'models' / f'net_{state.stem}.pth'
            weights.unlink(missing_ok=True)
    return result


def report(plan: Plan, figures: Figures, result: dict[str, Any]) -> str:
    """Results and how to go on, for people."""
    lines = [f'\n{"":>10}  {"SRCC":<21}  PLCC, with 95 % intervals']
    for word, both in figures.items():
        lines.append(f'{word:>10}  {both["srcc"]!s:<21}  {both["plcc"]!s}')
    lines.append(
        f'on {len(plan.held_out)} held-out photographs; {plan.to_train} were trained '
        f'on, for {result["seconds"]} s.'
    )
    change = figures['change']['srcc'] if 'before' in figures else None
    if change and change.value <= 0:
        lines.append(f'{plan.start.words} ranks these photographs as well or better.')
    elif change and change.low <= 0:
        lines.append('A gain that small may be chance: its interval holds 0.')
    lines.append(f'\nThe same by hand ({plan.folder} has split and options):')
    lines += [f'  python scripts/train.py -opt {s.file}' for s in plan.stages]
    checkpoint, folder = plan.stages[-1].checkpoint, plan.args.weights_folder
    where = f' --folder {folder}' if folder else ''
    lines.append(
        f'  python scripts/publish.py {checkpoint} --name {plan.metric}{where}'
    )
    lines.append(f'\nPublished {result["weights"]}. Use it:')
    variable = f'PYIQA_CLIPKD_WEIGHTS={shlex.quote(str(folder))} ' if folder else ''
    lines.append(f'  {variable}pyiqa {plan.metric} -t photo.jpg')
    return '\n'.join(lines)


def main(configs: Path, argv: Sequence[str] | None = None) -> None:
    """The command behind scripts/fit.py.

    Args:
        configs: folder of the shipped option files.
        argv: arguments; by default those of the process.
    """
    args = parse(argv)
    try:
        plan = make_plan(args, configs)
        write(plan)
    except (OSError, ValueError) as error:
        print(f'fit.py: error: {error}', file=sys.stderr)
        raise SystemExit(2) from None
    print(f'{plan.metric} starts from {plan.start.words}.')
    try:
        seconds = train(plan)
        figures = measure(plan)
        result = publish_and_record(plan, figures, seconds)
    except KeyboardInterrupt:
        print('\nStopped. The same command with --resume goes on.', file=sys.stderr)
        raise SystemExit(130) from None
    print(report(plan, figures, result))
