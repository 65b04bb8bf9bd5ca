"""A coverage-guided fuzzer (atheris) on the reading path of `score`.

    pip install atheris
    python scripts/fuzz_images_guided.py -o guided.json --seconds 600

It keeps a mutated file that reached new lines of Pillow's Python code or of this
package, and mutates it further. Pillow's decoders in C, and the libraries below them,
aren't instrumented: damage that they alone can tell apart doesn't guide it. Whatever is
raised but `UnreadableError` counts as an error, once a kind; a crash, a file of more
than 20 seconds and one of more than 4 GB end the run; the file is kept beside OUTPUT.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PICTURE = ROOT / 'tests' / 'photos' / 'coffee.jpg'
SIZE, LONGEST = (48, 32), 65536

# Libfuzzer's, for one file: seconds and megabytes.
HANG, MEMORY = 20, 4096

# Small ones, so that there are many files a second; the other script has large ones.
MAX_PIXELS = 4_000_000


def write_seeds(folder: Path) -> int:
    from image_mutations import seeds

    from pyiqa_clipkd.images import read_photograph

    wholes = seeds(read_photograph(PICTURE).image.resize(SIZE))
    files = [data for several in wholes.values() for data in several]
    for number, data in enumerate(files):
        (folder / f'seed{number}').write_bytes(data)
    return len(files)


def child(notes: Path, words: list[str]) -> None:
    """The fuzzer itself, which ends its process."""
    import atheris

    with atheris.instrument_imports(include=['PIL', 'pyiqa_clipkd']):
        from pyiqa_clipkd.images import UnreadableError
        from pyiqa_clipkd.scoring.pillow import prepare_pillow
        from pyiqa_clipkd.scoring.reading import decoded_bytes, read_squares

        prepare_pillow()
        from PIL import Image

        Image.init()
    slowest, files, outcomes, errors = 0.0, 0, {'read': 0, 'refused': 0}, {}
    path = notes.with_name('file')

    def test_one_input(data: bytes) -> None:
        nonlocal slowest, files
        path.write_bytes(data)
        begin = time.perf_counter()
        outcome = 'refused'
        try:
            decoded_bytes(path)
            read_squares(path, MAX_PIXELS, 32, 1)
            outcome = 'read'
        except UnreadableError as error:
            if not str(error).isprintable():
                errors['not printable'] = repr(error)
        except Exception as error:
            errors[type(error).__name__] = repr(error)
        outcomes[outcome] += 1
        files += 1
        slowest = max(slowest, time.perf_counter() - begin)
        if files % 200 == 0:
            numbers = {'files': files, **outcomes, 'slowest_s': round(slowest, 3)}
            notes.write_text(json.dumps({**numbers, 'errors': errors}))

    atheris.Setup([sys.argv[0], *words], test_one_input)
    atheris.Fuzz()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add('-o', '--output', type=Path, required=True)
    add('--seconds', type=int, default=600)
    add('--seed', type=int, default=1)
    args = parser.parse_args()
    from pyiqa_clipkd.experiment import recorded_command, recorded_commit

    args.output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name, 'seeds')
        folder.mkdir()
        count = write_seeds(folder)
        notes = Path(name, 'notes')
        notes.write_text('{}')
        words = [
            *(f'-max_total_time={args.seconds}', f'-seed={args.seed}'),
            *(f'-timeout={HANG}', f'-rss_limit_mb={MEMORY}', f'-max_len={LONGEST}'),
            *('-print_final_stats=1', f'-artifact_prefix={args.output.parent}/'),
        ]
        command = [sys.executable, __file__, 'child', str(notes), *words, str(folder)]
        done = subprocess.run(command, stderr=subprocess.PIPE, text=True)
        found = json.loads(notes.read_text())
    stats = dict(re.findall(r'stat::(\w+):\s+(\d+)', done.stderr))
    coverage = re.findall(r'cov: (\d+) ft: (\d+)', done.stderr)
    result = {
        'command': recorded_command(sys.argv, ROOT),
        'commit': recorded_commit(ROOT),
        'python': platform.python_version(),
        'pillow': version('pillow'),
        'atheris': version('atheris'),
        'seconds': args.seconds,
        'seed': args.seed,
        'whole files to begin with': count,
        'exit code': done.returncode,
        'crashes, hangs or too much memory': int(done.returncode != 0),
        'last words': '' if done.returncode == 0 else done.stderr[-2000:],
        'executions': int(stats.get('number_of_executed_units', 0)),
        'new files kept': int(stats.get('new_units_added', 0)),
        'peak_mb': int(stats.get('peak_rss_mb', 0)),
        'branches reached at first and at last': [
            int(pair[0]) for pair in coverage[:: max(len(coverage) - 1, 1)][:2]
        ],
        'last count': found,
    }
    args.output.write_text(json.dumps(result, indent=2) + '\n')


if __name__ == '__main__':
    if sys.argv[1:2] == ['child']:
        child(Path(sys.argv[2]), sys.argv[3:])
    else:
        main()
