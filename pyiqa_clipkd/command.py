"""The command `pyiqa-clipkd`: a subcommand is a module that is imported when asked for.

Each has `add_arguments(parser)` and `run(arguments)`, which returns the exit code. None
of them imports pyiqa, and those that score with onnxruntime don't import torch either.
"""

from __future__ import annotations

import argparse
import io
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import TextIO

from pyiqa_clipkd import __version__
from pyiqa_clipkd.stops import INTERRUPTED, die_at_once, stoppable

# Subcommand -> its module in this package, and what it does in a few words.
SUBCOMMANDS = {
    'score': ('scoring.command', 'score photographs: files, folders, lists'),
    'report': ('report.command', 'one page with all results of a run, or of two'),
    'compare': ('compare.command', 'do two folders or runs differ, and how surely?'),
    'label': (
        'attributes.command',
        'pseudo-labels of five attributes for a folder, as Parquet',
    ),
    'export': ('export.command', 'write a metric as ONNX, for servers and phones'),
    'models': ('models', 'the metrics, their weights and where they come from'),
    'map': ('maps.command', 'where a photograph is good and bad: a heat map'),
    'doctor': ('doctor', 'versions, hook, weights, devices: for a bug report'),
}

# Modules whose library has another name.
LIBRARIES = {'PIL': 'pillow', 'open_clip': 'open_clip_torch', 'yaml': 'pyyaml'}

# Exit codes that subcommands share.
FINE, WRONG_USAGE, UNREADABLE, BUG = 0, 2, 3, 70


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    _prepare_streams()
    # Photographs are resized by several threads at once: numpy's own would be in their
    # way. Only what is set before its first import counts.
    os.environ.setdefault('OPENBLAS_NUM_THREADS', '1')
    words = sys.argv[1:] if arguments is None else list(arguments)
    chosen = next((word for word in words if word in SUBCOMMANDS), None)
    with stoppable() as stop:
        code = _guarded(lambda: _run(words, chosen), chosen)
        if code == INTERRUPTED:
            code = stop.code
    if arguments is None:  # nothing is left to do, but for Python's own end
        die_at_once()
    return code


def _prepare_streams() -> None:
    """Streams that take all that is printed: closed ones, and names of any bytes."""
    for name in ('stdout', 'stderr'):
        if getattr(sys, name) is None:
            nothing = Path(os.devnull).open('w', encoding='utf-8')  # noqa: SIM115
            setattr(sys, name, nothing)
        stream = getattr(sys, name)
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors='backslashreplace')


def silence(stream: TextIO) -> None:
    """Throw away what is printed from now on, and what waits to be."""
    nothing = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, stream.fileno())
    os.close(nothing)


def _run(words: Sequence[str], chosen: str | None) -> int:
    parser = argparse.ArgumentParser(
        prog='pyiqa-clipkd',
        description='No-reference image quality: scores from 1 (bad) to 5 (perfect).',
    )
    parser.add_argument(
        '--version', action='version', version=f'%(prog)s {__version__}'
    )
    subparsers = parser.add_subparsers(title='commands', metavar='COMMAND', dest='name')
    modules = {}
    for name, (module, text) in SUBCOMMANDS.items():
        subparser = subparsers.add_parser(name, help=text)
        if name == chosen:
            modules[name] = import_module(f'pyiqa_clipkd.{module}')
            subparser.description = modules[name].__doc__
            subparser.formatter_class = argparse.RawDescriptionHelpFormatter
            modules[name].add_arguments(subparser)
    parsed = parser.parse_args(words)
    if parsed.name is None:
        parser.print_help()
        return WRONG_USAGE
    code: int = modules[parsed.name].run(parsed)
    sys.stdout.flush()
    return code


def _remedy(error: Exception) -> str:
    """What to install, where the library itself doesn't say so."""
    missing = error.name if isinstance(error, ModuleNotFoundError) else None
    if missing is None or 'pip install' in str(error):
        return ''
    library = missing.partition('.')[0]
    return f': `pip install {LIBRARIES.get(library, library)}`'


def _guarded(run: Callable[[], int], name: str | None) -> int:
    """The exit code of what is run; a user's mistake is one line, not a traceback."""
    try:
        return run()
    except KeyboardInterrupt:
        print('\nStopped.', file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # `| head` has seen enough
        silence(sys.stdout)
        silence(sys.stderr)
        return 0
    except (OSError, ValueError, ImportError) as error:
        command = f'pyiqa-clipkd {name}' if name else 'pyiqa-clipkd'
        print(f'{command}: error: {error}{_remedy(error)}', file=sys.stderr)
        return WRONG_USAGE
    except Exception:
        traceback.print_exc()
        return BUG
