"""Where the weights of a metric are: without torch, for tools that do without it."""

from __future__ import annotations

from pathlib import Path

from pyiqa_clipkd.names import ATTRIBUTES_SUFFIX, SUFFIX, weights_folder

BUNDLED_FOLDER = Path(__file__).parent / 'bundled'


def find_weights(name: str, path: str | Path | None = None) -> Path | None:
    """Where the weights of metric `name` are: `path`, the user's folder, the bundle.

    Returns:
        The file, or `None` if there is none and no `path` was given.

    Raises:
        FileNotFoundError: if `path` was given but isn't there.
    """
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
