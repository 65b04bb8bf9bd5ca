"""Where the weights of a metric are: without torch, for tools that do without it."""

from __future__ import annotations

from pathlib import Path

from pyiqa_clipkd.description import is_plain_name
from pyiqa_clipkd.files import file_hash
from pyiqa_clipkd.names import ATTRIBUTES_SUFFIX, SUFFIX, weights_folder

BUNDLED_FOLDER = Path(__file__).parent / 'bundled'

# In it: what `sha256sum *.onnx *.safetensors` gives.
SUMS = 'SHA256SUMS'


def find_weights(name: str, path: str | Path | None = None) -> Path | None:
    """Where the weights of metric `name` are: `path`, the user's folder, the bundle.

    Returns:
        The file, or `None` if there is none and no `path` was given.

    Raises:
        FileNotFoundError: if `path` was given but isn't there.
        ValueError: if `name` would lead out of these folders.
    """
    if path is None and not is_plain_name(name):
        raise ValueError(
            f'The name of a metric must be a plain word, but got {name!r}.'
        )
    if path is not None:
        path = Path(path).expanduser()
        if not path.is_file():
            raise FileNotFoundError(
                f'`pretrained_model_path` of {name}: there is no file {path}.'
            )
        return path
    for folder in (Path(weights_folder()), BUNDLED_FOLDER):
        candidate = folder / f'{name}{SUFFIX}'
        if candidate.is_file():
            return candidate
    return None


def check_bundled(path: Path, sha256: str) -> None:
    """A file of the package must be as it was released; those of others may be any.

    Args:
        path: of weights or a graph.
        sha256: of the file as it is.

    Raises:
        ValueError: if it is another one.
    """
    folder = BUNDLED_FOLDER.resolve()
    for place in (path, path.resolve()):  # either may be a link to the other
        is_ours = place.parent.resolve() == folder
        if is_ours and _sums().get(place.name, sha256) != sha256:
            raise ValueError(
                f'{path} is damaged or was changed: its SHA-256 is not that in {SUMS}. '
                'Reinstall it: pip install --force-reinstall --no-deps pyiqa-clipkd'
            )


def state_sum(path: Path) -> None:
    """Whoever makes a file of the package states what it is."""
    if path.parent.resolve() == BUNDLED_FOLDER.resolve():
        sums = _sums() | {path.name: file_hash(path)}
        lines = [f'{digest}  {name}\n' for name, digest in sorted(sums.items())]
        (BUNDLED_FOLDER / SUMS).write_text(''.join(lines), encoding='utf-8')


def _sums() -> dict[str, str]:
    """Name -> SHA-256."""
    file = BUNDLED_FOLDER / SUMS
    text = file.read_text(encoding='utf-8') if file.is_file() else ''
    lines = (line.split() for line in text.splitlines())
    return {name: digest for digest, name in lines}


def attributes_file(path: Path) -> Path:
    """Of a weight file or of its graph: the file with its attributes, there or not."""
    return path.with_name(f'{path.stem}{ATTRIBUTES_SUFFIX}{path.suffix}')


def bundled_metrics(ending: str = SUFFIX, *, attributes: bool = False) -> list[str]:
    """Names of the metrics in the package that have a file with this ending.

    Args:
        ending: for instance of graphs.
        attributes: those with such a file of their attributes instead.
    """
    stems = sorted(path.stem for path in BUNDLED_FOLDER.glob(f'*{ending}'))
    names = [stem.removesuffix(ATTRIBUTES_SUFFIX) for stem in stems]
    return [n for n, s in zip(names, stems, strict=True) if (n != s) == attributes]
