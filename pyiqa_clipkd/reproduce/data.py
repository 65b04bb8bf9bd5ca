"""The images of a run: counted, missing, downloaded, split; tables of one's own."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd  # type: ignore[import-untyped]
import yaml

from pyiqa_clipkd.experiment import loop_iterations
from pyiqa_clipkd.files import written_whole
from pyiqa_clipkd.reproduce.plan import Run
from pyiqa_clipkd.reproduce.recipe import Recipe, short_hash
from pyiqa_clipkd.splits import add_splits

PATHS = ('meta_info_file', 'dataroot_target', 'dataroot_ref')
ARCHIVES = 'https://huggingface.co/datasets/chaofengc/IQA-PyTorch-Datasets'
ROOT = Path('datasets')
OWN = ROOT / 'own'  # tables of one's own, the same for all tables of results


def iterations(options: dict[str, Any]) -> int:
    """How many iterations a training will run; 0 for a test.

    The images are counted in the data; where it is missing, the recipe's `images` is
    taken.

    Raises:
        ValueError: if the data has no such split.
    """
    if 'train' not in options['datasets']:
        return 0
    data = options['datasets']['train']
    images = _training_images(data) * data.get('dataset_enlarge_ratio', 1)
    return loop_iterations(options['train'], images, data['batch_size_per_gpu'])


def _training_images(data: dict[str, Any]) -> int:
    file = Path(data['meta_info_file'])
    if not file.is_file():
        return round(0.8 * data.get('images', 0)) or data['batch_size_per_gpu']
    table = _read(str(file), file.stat().st_mtime)
    column = data.get('split_index')
    if column is None:
        return len(table)
    if isinstance(column, int):
        column = f'ratio{data.get("split_ratio", "802")}_seed123_split_{column:02d}'
    if column not in table:
        raise ValueError(f'{file} has no column {column}: choose other `--splits`.')
    return int((table[column] == data.get('override_phase', 'train')).sum())


@functools.cache
def _read(path: str, changed: float) -> pd.DataFrame:
    return pd.read_csv(path)


def missing(options: dict[str, Any]) -> list[Path]:
    """Files and folders of the data sets that aren't there."""
    paths = (d.get(key) for d in options['datasets'].values() for key in PATHS)
    return [Path(p) for p in dict.fromkeys(paths) if p and not Path(p).exists()]


def make_split_file(recipe: Recipe, run: Run, write: bool = True) -> Path | None:
    """Splits by image for a protocol whose file isn't there, from the recipe's own.

    Returns:
        The file that has been made (or could be, if not `write`).
    """
    original = _meta_info(recipe.options(run.files[0].name))
    wanted = _meta_info(run.options)
    if wanted.exists() or not original.is_file():
        return None
    if write:
        with written_whole(wanted) as partial:
            add_splits(pd.read_csv(original), None).to_csv(partial, index=False)
        print(f'Wrote {wanted}: splits by image.')
    return wanted


def _meta_info(options: dict[str, Any]) -> Path:
    return Path(next(iter(options['datasets'].values()))['meta_info_file'])


def explain(run: Run, paths: Sequence[Path]) -> str:
    """What to download, from where, and where to put it."""
    source = next(iter(run.options['datasets'].values())).get('source') or {}
    lines = [f'{run.data}: there is no {", ".join(map(str, paths))}.']
    if page := source.get('page'):
        lines.append(f'  The data set is at {page}.')
    if hint := source.get('hint'):
        lines.append(f'  {hint}')
    if name := source.get('pyiqa'):
        lines.append(
            f"  pyiqa's archive of it ({name}.tgz) is at {ARCHIVES}, its tables of "
            f'labels at {ARCHIVES}-metainfo. Unpack them to {ROOT} and '
            f'{ROOT / "meta_info"}; the flag --download does it.'
        )
    return '\n'.join(lines)


def download(run: Run) -> None:
    """Let the host download a data set to where its recipe reads it.

    Raises:
        ValueError: if the host doesn't have this one.
        RuntimeError: if the download failed.
    """
    import pyiqa

    name = (run.options['datasets']['train'].get('source') or {}).get('pyiqa')
    if name is None:
        raise ValueError(f'pyiqa has no download of {run.data}.')
    try:
        pyiqa.load_dataset(name, data_root=str(ROOT))
    except Exception as error:
        raise RuntimeError(
            f'The download of {name} failed ({type(error).__name__}: {error}).'
        ) from error


def own_data(
    table: Path,
    images: Path,
    folder: Path,
    *,
    mos_range: Sequence[float] | None = None,
    group: str | None = None,
) -> Path:
    """An option file for a CSV whose first two columns are image and score.

    Args:
        table: the CSV.
        images: folder of the images.
        folder: where the option file and a copy of the CSV with ten splits are written.
        mos_range: lowest and highest score; `None`: those of the table.
        group: column whose equal words stay on one side.

    Raises:
        FileNotFoundError: if the CSV or the folder isn't there.
        ValueError: if the second column has no numbers; if there is no such group.
    """
    from pyiqa_clipkd.files import file_hash

    if not table.is_file() or not images.is_dir():
        raise FileNotFoundError(
            f'`--csv` must be a file and `--images` a folder, but got {table} and '
            f'{images}.'
        )
    rows = pd.read_csv(table)
    if rows.shape[1] < 2:
        raise ValueError(
            f'{table} must have the columns image and score, but got {", ".join(rows)}.'
        )
    if group and group not in rows:
        raise ValueError(
            f'`--group` must be one of {", ".join(rows)}, but got {group!r}.'
        )
    if not pd.api.types.is_numeric_dtype(rows.iloc[:, 1]):
        raise ValueError(
            f'The second column of {table} must be the score, but got '
            f'{rows.columns[1]!r}, which has other words than numbers.'
        )
    scores = rows.iloc[:, 1]
    folder.mkdir(parents=True, exist_ok=True)
    text = add_splits(rows, group).to_csv(index=False)
    # Named by its content, which so is part of the hash of each run.
    splits = _write_once(folder / f'{table.stem}_{short_hash(text)}.csv', text)
    data = {
        'name': table.stem,
        'protocol': 'by_group' if group else 'by_image',
        'source': None,
        'table': file_hash(table)[:8],  # other scores are another configuration
        'type': 'GeneralNRDataset',
        'dataroot_target': str(images),
        'meta_info_file': str(splits),
        'mos_range': [float(v) for v in mos_range or (scores.min(), scores.max())],
        'lower_better': False,
        'split_index': 1,
        'override_phase': 'val',
    }
    options = yaml.safe_dump({'data': data}, sort_keys=False)
    return _write_once(folder / f'{table.stem}_{short_hash(options)}.yml', options)


def _write_once(path: Path, text: str) -> Path:
    """Write a file that is named by its content, whole or not at all."""
    if not path.is_file():
        with written_whole(path) as partial:
            partial.write_text(text, encoding='utf-8')
    return path
