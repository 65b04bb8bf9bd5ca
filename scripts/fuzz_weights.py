"""Do damaged and hostile weight files end in one clear refusal? Two ways to look.

    python scripts/fuzz_weights.py mutate --files 3000
    pip install atheris && python scripts/fuzz_weights.py coverage --minutes 10

`mutate` changes our own kinds of weight files at random (safetensors, a checkpoint of
today's and of old torch, a TorchScript archive, an ONNX graph beside its weights) and
loads each in a process of its own: an error other than ValueError or FileNotFoundError,
and a process that ends, is a crash; more than `--seconds` is a hang. `coverage` lets
atheris (libFuzzer) look for inputs that reach new lines of the readers, which are in
Python; what safetensors, torch and onnxruntime do in C++ and Rust isn't instrumented.
Figures go to configs/results/fuzzing/weights.json.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import random
import re
import resource
import selectors
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from pyiqa_clipkd.experiment import recorded_command, recorded_commit
from pyiqa_clipkd.locations import BUNDLED_FOLDER

ROOT = Path(__file__).resolve().parents[1]
GRAPH = 'clipkd_efficientnet_lite'
OUTPUT = Path('configs', 'results', 'fuzzing', 'weights.json')

# What a reader may say of a file; everything else is a crash.
REFUSALS = (ValueError, FileNotFoundError)
MOST_SAVED = 20


# --- the files that are changed -------------------------------------------------------


def write_seeds(folder: Path) -> list[Path]:
    """One whole file of each kind."""
    import torch

    from pyiqa_clipkd.network import CLIPKDStudent
    from pyiqa_clipkd.publish import publish

    torch.manual_seed(0)
    student = CLIPKDStudent('timm:test_resnet', embed_dim=16, input_size=32)
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint = folder / 'zip.pth'
    torch.save({'params': student.state_dict()}, checkpoint)
    files = [checkpoint, folder / 'legacy.pth', folder / 'archive.pt']
    torch.save(student.state_dict(), files[1], _use_new_zipfile_serialization=False)
    module = torch.nn.Sequential(torch.nn.Linear(8, 4), torch.nn.BatchNorm1d(4)).eval()
    torch.jit.save(torch.jit.trace(module, torch.rand(2, 8)), str(files[2]))
    for precision in ('float16', 'int8'):
        name = f'clipkd_{precision}'
        files.append(publish(checkpoint, name, folder=folder, precision=precision))
    files.append(Path(shutil.copy(BUNDLED_FOLDER / f'{GRAPH}.onnx', folder)))
    shutil.copy(BUNDLED_FOLDER / f'{GRAPH}.safetensors', folder)
    return files


def mutated(content: bytes, random: random.Random) -> bytes:
    """One to eight changes, most of them where a file says what it holds."""
    data = bytearray(content)
    for _ in range(random.choice((1, 1, 2, 4, 8))):
        if data:
            data = random.choice(CHANGES)(data, _place(len(data), random), random)
    return bytes(data)


def _place(size: int, random: random.Random) -> int:
    """Headers are at the beginning, a zip file's list of parts at the end."""
    where = random.random()
    if where < 0.45:
        return random.randrange(min(size, 4096))
    if where < 0.7:
        return size - 1 - random.randrange(min(size, 4096))
    return random.randrange(size)


def _flip(data: bytearray, at: int, random: random.Random) -> bytearray:
    data[at] ^= 1 << random.randrange(8)
    return data


def _set(data: bytearray, at: int, random: random.Random) -> bytearray:
    data[at] = random.choice((0, 1, 127, 128, 255, random.randrange(256)))
    return data


def _number(data: bytearray, at: int, random: random.Random) -> bytearray:
    width = random.choice((2, 4, 8))
    value = random.choice((0, 1, -1, 1 << (8 * width - 2), random.getrandbits(15)))
    data[at : at + width] = value.to_bytes(width, 'little', signed=True)
    return data


def _digits(data: bytearray, at: int, random: random.Random) -> bytearray:
    """Another number where a text has one: a size, an offset, a shape."""
    match = re.compile(rb'\d+').search(bytes(data), at)
    number = random.choice((b'0', b'-1', b'1e9', b'99999999999', b'7', b'null', b'[]'))
    if match:
        data[match.start() : match.end()] = number
    return data


def _cut(data: bytearray, at: int, _: random.Random) -> bytearray:
    return data[:at]


def _remove(data: bytearray, at: int, random: random.Random) -> bytearray:
    del data[at : at + random.choice((1, 4, 64, 1000))]
    return data


def _repeat(data: bytearray, at: int, random: random.Random) -> bytearray:
    length = random.choice((1, 4, 64, 1000))
    return data[: at + length] + data[at:]


CHANGES: tuple[Callable[[bytearray, int, random.Random], bytearray], ...] = (
    *(_flip, _flip, _set, _set, _number, _number, _digits, _digits),
    *(_cut, _remove, _repeat),
)


# --- loading --------------------------------------------------------------------------


def load(path: Path) -> str:
    """`loaded`, or the error's first words."""
    from pyiqa_clipkd.network import load_network
    from pyiqa_clipkd.runtime import Runtime
    from pyiqa_clipkd.weights import read_weights

    try:
        if path.suffix == '.onnx':
            Runtime(path)
        elif 'archive' in path.name:
            read_weights(path)
        else:
            load_network(path)
    except REFUSALS as error:
        if str(path.parent) not in str(error):
            raise RuntimeError(f'does not name the file: {error}') from error
        return 'refused'
    return 'loaded'


def work() -> None:
    """Load each file that standard input names; a line of JSON for each."""
    answers = os.fdopen(os.dup(1), 'w')
    os.dup2(2, 1)  # libraries may print
    for line in sys.stdin:
        start = time.perf_counter()
        try:
            result = load(Path(line.rstrip('\n')))
        except Exception as error:
            result = f'{type(error).__name__}: {error}'
        megabytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        seconds = time.perf_counter() - start
        print(json.dumps([result, seconds, megabytes]), file=answers, flush=True)


class Worker:
    """A process that loads files one by one, and is begun anew after a crash."""

    def __init__(self, seconds: float, seeds: list[Path]) -> None:
        self.seconds = seconds
        self.seeds = seeds
        self.process: subprocess.Popen[str] | None = None

    def __call__(self, path: Path) -> tuple[str, float, float]:
        """Result, seconds, megabytes at the peak of the process."""
        if self.process is None or self.process.poll() is not None:
            self._start()
        assert self.process is not None
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(path, file=self.process.stdin, flush=True)
        with selectors.DefaultSelector() as selector:
            selector.register(self.process.stdout, selectors.EVENT_READ)
            answered = selector.select(self.seconds)
        if not answered:
            self.process.kill()
            self.process.wait()
            return 'hang', self.seconds, 0.0
        line = self.process.stdout.readline()
        if not line:
            return f'the process ended with {self.process.wait()}', 0.0, 0.0
        result, seconds, megabytes = json.loads(line)
        return result, seconds, megabytes

    def _start(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, __file__, 'work'],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        # Imports aren't the file's: each kind is loaded before the clock runs.
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        for seed in self.seeds:
            print(seed, file=self.process.stdin, flush=True)
            self.process.stdout.readline()


def mutate(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Change files, load each, count what came of it."""
    seeds = write_seeds(folder / 'seeds')
    worker = Worker(args.seconds, seeds)
    rows = []
    for number, (seed, content) in enumerate(variants(seeds, args.files, args.seed)):
        place = folder / 'changed' / seed.name
        place.parent.mkdir(exist_ok=True)
        beside = seed.with_suffix('.safetensors')
        if seed.suffix == '.onnx' and not place.with_suffix('.safetensors').exists():
            shutil.copy(beside, place.parent)
        place.write_bytes(content)
        row = (seed.name, *worker(place))
        rows.append(row)
        if row[1] not in ('refused', 'loaded'):
            saved = folder / f'{number}_{seed.name}'
            shutil.copy(place, saved)
            print(f'{row[1]}: {saved}')
    return summary(rows)


def variants(seeds: list[Path], files: int, seed: int) -> Iterator[tuple[Path, bytes]]:
    """Changed contents, of each seed in turn."""
    generator = random.Random(seed)
    whole = {path: path.read_bytes() for path in seeds}
    for number in range(files):
        path = seeds[number % len(seeds)]
        content = whole[path]
        if path.name == 'zip.pth' and generator.random() < 0.5:
            yield path, with_pickle(path, generator)
        else:
            yield path, mutated(content, generator)


def with_pickle(path: Path, random: random.Random) -> bytes:
    """A zip file with right sums, but another pickle."""
    content = io.BytesIO()
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(content, 'w') as new:
        for name in old.namelist():
            data = old.read(name)
            new.writestr(name, mutated(data, random) if '.pkl' in name else data)
    return content.getvalue()


def summary(rows: list[tuple[str, str, float, float]]) -> dict[str, Any]:
    """What the README says of it."""
    kinds = Counter(row[0] for row in rows)
    slowest = max(rows, key=lambda row: row[2])
    known = ('refused', 'loaded', 'hang')
    return {
        'files': len(rows),
        'of each kind': dict(kinds),
        'refused': sum(row[1] == 'refused' for row in rows),
        'loaded (the change did no harm)': sum(row[1] == 'loaded' for row in rows),
        'crashes': sum(row[1] not in known for row in rows),
        'hangs': sum(row[1] == 'hang' for row in rows),
        'slowest, seconds': round(slowest[2], 3),
        'slowest kind': slowest[0],
        'peak memory of the process, MB': round(max(row[3] for row in rows)),
        'what crashed': sorted({r[1] for r in rows} - set(known))[:MOST_SAVED],
    }


# --- guided by coverage ---------------------------------------------------------------


def hunt(arguments: list[str]) -> None:
    """What atheris runs: the readers of everything that holds weights."""
    import atheris  # type: ignore[import-not-found,unused-ignore]

    with atheris.instrument_imports(include=['pyiqa_clipkd', 'pickletools', 'zipfile']):
        from pyiqa_clipkd.onnx_file import describe_onnx
        from pyiqa_clipkd.weights import read_weights
    place = Path(tempfile.mkdtemp())

    def one_input(data: bytes) -> None:
        path = place / ('a.onnx' if data[:1] == b'O' else 'a.pth')
        path.write_bytes(data[1:])
        try:
            describe_onnx(path) if path.suffix == '.onnx' else read_weights(path)
        except REFUSALS as error:
            if str(path) not in str(error):
                raise

    atheris.Setup([sys.argv[0], *arguments], one_input)
    atheris.Fuzz()


def coverage(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Run atheris for some minutes; what it counted."""
    corpus = folder / 'corpus'
    corpus.mkdir()
    for seed in write_seeds(folder / 'seeds'):
        start = b'O' if seed.suffix == '.onnx' else b'W'
        (corpus / seed.name).write_bytes(start + seed.read_bytes())
    options = {
        'max_total_time': round(60 * args.minutes), 'seed': args.seed or 1,
        'timeout': round(args.seconds), 'rss_limit_mb': 4096, 'max_len': 400_000,
        'print_final_stats': 1, 'artifact_prefix': f'{folder}/',
    }  # fmt: skip
    words = [f'-{name}={value}' for name, value in options.items()]
    command = [sys.executable, __file__, 'hunt', *words, str(corpus)]
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    said = process.stderr
    found = dict(re.findall(r'stat::(\w+):\s+(\d+)', said))
    reached = re.findall(r'cov: (\d+) ft: (\d+)', said) or [('0', '0')]
    crashes = [
        file.name
        for file in folder.iterdir()
        if file.name.startswith(('crash', 'oom', 'timeout'))
    ]
    if process.returncode:
        print(said[-3000:], file=sys.stderr)
    return {
        'fuzzer': 'atheris (libFuzzer)',
        'minutes': args.minutes,
        'inputs': int(found.get('number_of_executed_units', 0)),
        'new inputs kept': int(found.get('new_units_added', 0)),
        'branches reached: at the start, at the end': [
            int(reached[0][0]), int(reached[-1][0]),
        ],
        'crashes': sum(name.startswith(('crash', 'oom')) for name in crashes),
        'hangs': sum(name.startswith('timeout') for name in crashes),
        'slowest, seconds': int(found.get('slowest_unit_time_sec', 0)),
        'peak memory of the process, MB': int(found.get('peak_rss_mb', 0)),
        'instrumented': 'pyiqa_clipkd, pickletools and zipfile; neither safetensors '
        'nor torch nor onnxruntime',
    }  # fmt: skip


def main() -> None:
    if sys.argv[1:2] == ['work']:
        return work()
    if sys.argv[1:2] == ['hunt']:
        return hunt(sys.argv[2:])
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add('how', choices=('mutate', 'coverage'))
    add('--files', type=int, default=3000)
    add('--minutes', type=float, default=10)
    add('--seed', type=int, default=0)
    add('--seconds', type=float, default=10, help='more is a hang')
    add('-o', '--output', type=Path, default=ROOT / OUTPUT)
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix='fuzz_weights_'))
    found = mutate(args, folder) if args.how == 'mutate' else coverage(args, folder)
    found['command'] = recorded_command(sys.argv, ROOT)
    found['commit'] = recorded_commit(ROOT)
    known = json.loads(args.output.read_text()) if args.output.is_file() else {}
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(known | {args.how: found}, indent=2) + '\n')
    print(json.dumps(found, indent=2))
    if found['crashes'] or found['hangs']:
        sys.exit(f'What crashed is in {folder}.')
    shutil.rmtree(folder)


if __name__ == '__main__':
    main()
