"""Scores without torch: numpy, Pillow and onnxruntime."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from PIL import Image

from pyiqa_clipkd.attributes.names import ATTRIBUTES, faults, named_attributes
from pyiqa_clipkd.description import ATTRIBUTES as ATTRIBUTE_VALUES
from pyiqa_clipkd.description import (
    EXTERNAL,
    INPUT_NAMES,
    ONNX,
    PHOTOGRAPHS,
    PROBABILITIES,
    SCORE,
    SQUARES,
    Description,
    is_plain_name,
)
from pyiqa_clipkd.files import SHORT_HASH, checked_file, file_hash, one_line
from pyiqa_clipkd.geometry import in_unit_range
from pyiqa_clipkd.images import squares, upright
from pyiqa_clipkd.locations import (
    BUNDLED_FOLDER,
    attributes_file,
    bundled_metrics,
    check_bundled,
)
from pyiqa_clipkd.names import DEFAULT_METRIC, SUFFIX, weights_folder
from pyiqa_clipkd.onnx_file import describe_onnx
from pyiqa_clipkd.scale import level_of, to_100

# Endings of files that onnxruntime can't open, so what has one is no metric's name.
NO_NAMES = ('.pt2', '.pt', '.pth', SUFFIX)

# Score (N,), probabilities (N, L) of metrics with levels, attributes (N, 5) on request.
Outputs = tuple[np.ndarray, np.ndarray | None, np.ndarray | None]


class Score(NamedTuple):
    """What the runtime says of one photograph.

    Attributes:
        score: in [1, 5], higher is better.
        score_100: the same in [0, 100].
        level: the word nearest to the score.
        probabilities: of each level, worst first; empty of a model without them.
        attributes: five values in [0, 1], 1 the good side (`noisiness` 1: free of it);
            empty where they weren't asked for.
        faults: what is wrong, in words: `['too dark', 'noisy']`.
    """

    score: float
    score_100: float
    level: str
    probabilities: dict[str, float]
    attributes: dict[str, float]
    faults: list[str]


class Runtime:
    """A metric in onnxruntime. Threads may share it.

    Args:
        model: name of a metric, or the path of a file that `pyiqa-clipkd export` wrote.
            A name is looked for in the user's weights folder, then in the package.
        threads: of onnxruntime for one call; by default one a core.
        providers: of onnxruntime, in order of preference; by default its CPU's.
        attributes: also say why, of a metric that has heads for it; by default a file
            that was exported with them does, and a name doesn't.

    Attributes:
        name: `onnx`.
        metric: the metric's name; empty of a model made of a network without one.
        weights, sha256: name and SHA-256 of the file that has the numbers: the model's
            own, or of a graph without weights the weight file beside it.
        levels: words for quality, worst first.
        input_size: side in pixels of the squares that the network sees.
        attributes: whether it says why; heads_sha256: of the heads, if they have one.
        description: all that the model says of itself, also what it was made of.

    Raises:
        ImportError: if onnxruntime is missing or broken.
        FileNotFoundError: if there is no such model.
        ValueError: if the file is none of ours, or belongs to other weights.
    """

    name = 'onnx'

    def __init__(
        self,
        model: str | Path = DEFAULT_METRIC,
        *,
        threads: int | None = None,
        providers: Sequence[str] | None = None,
        attributes: bool | None = None,
    ) -> None:
        if threads is not None and (type(threads) is not int or threads < 1):
            raise ValueError(
                f'`threads` must be a whole number >= 1, but got {threads!r}.'
            )
        self.path = find_model(model, attributes=bool(attributes))
        self.description = _describe(self.path)
        self._options: dict[str, Any] = {'threads': threads, 'providers': providers}
        self._session = _session(self.path, threads, providers)
        self._process = os.getpid()
        self._inherited: list[Any] = []  # of processes that this one was forked from
        self._reopening = threading.Lock()
        _check_graph(self._session, self.path, self.description)
        self._outputs = [output.name for output in self._session.get_outputs()]
        has_attributes = bool(self.description.attributes)
        if attributes and not has_attributes:
            raise ValueError(
                f'{self.path} gives no attributes: export it with `--attributes`.'
            )
        self.attributes = has_attributes if attributes is None else attributes
        self.metric = self.description.metric
        if self.description.precision == EXTERNAL:
            self.weights = self.description.weights
            self.sha256 = self.description.sha256
        else:  # an export in eight bits scores otherwise than one in half precision
            self.weights, self.sha256 = self.path.name, file_hash(self.path)
        # Of a model made of a network without a file, its own.
        heads = self.description.heads_sha256 or self.sha256
        self.heads_sha256 = heads if self.attributes else ''
        self.levels = self.description.levels
        self.input_size = self.description.input_size

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy, also in another process, opens the same file anew."""
        again = partial(type(self), **self._options, attributes=self.attributes)
        return again, (self.path,)

    def __call__(self, squares: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """Score squares.

        Args:
            squares: float32 (N, 3, S, S) in [0, 1], S = `input_size`, as
                `images.squares` makes them.

        Returns:
            score (N,) in [1, 5] and probabilities (N, L); `None` of a regression head.

        Raises:
            TypeError: if it is no array.
            ValueError: if the array has another type or shape, or values that are NaN
                or outside [0, 1], or the model takes photographs.
        """
        scores, probabilities, _ = self.explain(squares)
        return scores, probabilities

    def explain(self, squares: np.ndarray) -> Outputs:
        """The same, and attributes (N, 5) in [0, 1]; `None` of a model without them."""
        if self.description.input != SQUARES:
            raise ValueError(
                f'{self.path.name} takes whole photographs: use `score`, or export it '
                'with `--input squares`.'
            )
        side = self.input_size
        if not isinstance(squares, np.ndarray):
            raise TypeError(
                f'`squares` must be a numpy array, but got {type(squares).__name__}.'
            )
        if squares.dtype != np.float32 or squares.shape[1:] != (3, side, side):
            raise ValueError(
                f'`squares` must be float32 of the shape (N, 3, {side}, {side}), but '
                f'got {squares.dtype} {squares.shape}: make them with '
                '`pyiqa_clipkd.images.squares`.'
            )
        if squares.size:
            low, high = squares.min(), squares.max()
            if not in_unit_range(low, high):
                raise ValueError(
                    '`squares` must be in [0, 1], but got values from '
                    f'{low:g} to {high:g}.'
                )
        return self._run(squares)

    def _run(self, batch: np.ndarray) -> Outputs:
        if self._process != os.getpid() and self._options['threads'] != 1:
            self._reopen()
        name = INPUT_NAMES[self.description.input]
        values = self._session.run(None, {name: batch})
        found = dict(zip(self._outputs, values, strict=True))
        why = found.get(ATTRIBUTE_VALUES) if self.attributes else None
        if not np.isfinite(found[SCORE]).all():
            raise ValueError(f'{self.path} gives scores that are no numbers.')
        return found[SCORE], found.get(PROBABILITIES), why

    def _reopen(self) -> None:
        """A forked child has none of the session's threads, but perhaps their locks.

        The session itself is kept: its end would wait for these threads.
        """
        with self._reopening:
            if self._process == os.getpid():  # another thread was first
                return
            self._inherited.append(self._session)
            if _describe(self.path) != self.description:
                raise ValueError(
                    f'{self.path} has changed since the process was forked that opened '
                    'it: make a Runtime of the new file.'
                )
            self._session = _session(self.path, **self._options)
            self._process = os.getpid()

    def score(
        self, source: str | Path | BinaryIO | Image.Image | np.ndarray, crops: int = 0
    ) -> Score:
        """Score one photograph.

        Args:
            source: a path, an open binary file, an image of Pillow, of which all is
                done that is done of a file (EXIF's rotation, transparency, 16 bits), or
                an array, uint8 RGB (H, W, 3).
            crops: squares at the photograph's own resolution that are scored beside
                the whole; the score is the mean.

        Raises:
            UnreadableError: if there are no pixels to score.
            ValueError: if `crops` is none of the model's abilities, or an array has
                another type or shape.
        """
        if type(crops) is not int or crops < 0:
            raise ValueError(f'`crops` must be a whole number >= 0, but got {crops!r}.')
        if isinstance(source, np.ndarray):
            source = _image(source)
        image = upright(source)
        if self.description.input == PHOTOGRAPHS:
            if crops:
                raise ValueError(
                    f'{self.path.name} takes whole photographs only, so `crops` must '
                    f'be 0, but got {crops}: export it with `--input squares`.'
                )
            outputs = self._run(np.asarray(image)[None])
        else:
            outputs = self._run(squares(image, self.input_size, crops=crops))
        return self._of_views(*outputs)

    def _of_views(
        self,
        scores: np.ndarray,
        probabilities: np.ndarray | None,
        attributes: np.ndarray | None,
    ) -> Score:
        """The mean over a photograph's views; attributes of the first, the whole."""
        score = float(scores.mean(dtype=np.float64))
        named = {}
        if probabilities is not None:
            means = probabilities.mean(0, dtype=np.float64).tolist()
            named = dict(zip(self.levels, means, strict=True))
        level = level_of(score, self.levels)
        why = {} if attributes is None else named_attributes(attributes[0])
        return Score(score, to_100(score), level, named, why, faults(why))


def _image(pixels: np.ndarray) -> Image.Image:
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3:
        raise ValueError(
            '`source` as an array must be uint8 RGB of the shape (H, W, 3), but got '
            f'{pixels.dtype} {pixels.shape}.'
        )
    return Image.fromarray(pixels)


def find_model(model: str | Path, *, attributes: bool = False) -> Path:
    """The ONNX file of a metric's name, or the path that was given.

    Args:
        model: the name or path.
        attributes: of a name: the file that also gives these.

    Raises:
        FileNotFoundError: if there is none, with what to do.
    """
    if isinstance(model, Path) or model.lower().endswith(ONNX):
        return checked_file(model, 'model')
    if not is_plain_name(model) or Path(model).suffix.lower() in NO_NAMES:
        raise FileNotFoundError(
            f'`model` must be the name of a metric or an {ONNX} file, but got {model}.'
        )
    own, bundled = (
        Path(f) / f'{model}{ONNX}' for f in (weights_folder(), BUNDLED_FOLDER)
    )
    has_own_weights = own.with_suffix(SUFFIX).is_file()
    if attributes:
        own, bundled = attributes_file(own), attributes_file(bundled)
    if own.is_file():
        return own
    export = f'pyiqa-clipkd export -m {model} {own} --input squares'
    what = 'ONNX model'
    if attributes:
        weights = (own if has_own_weights else bundled).with_suffix(SUFFIX)
        if not weights.is_file():
            raise FileNotFoundError(
                f'{model} has no attribute heads, {weights}: '
                f'{", ".join(bundled_metrics(ONNX, attributes=True))} has. '
                'scripts/attribute_heads.py makes them for weights of your own.'
            )
        export, what = f'{export} --attributes', f'{what} with attributes'
    if has_own_weights:
        raise FileNotFoundError(
            f'{model} has weights of your own in {own.parent}, but no {what} of them. '
            f'Where torch is installed, make one: {export}'
        )
    if bundled.is_file():
        return bundled
    known = ', '.join(bundled_metrics(ONNX, attributes=attributes))
    raise FileNotFoundError(
        f'There is no {what} of {model}: neither {own} nor one in the package, which '
        f'has {known}. Where torch and its weights are, make one: {export}'
    )


def _session(path: Path, threads: int | None, providers: Sequence[str] | None) -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        if isinstance(error, ModuleNotFoundError) and error.name == 'onnxruntime':
            raise ModuleNotFoundError(
                'Scores without torch need onnxruntime: pip install onnxruntime',
                name=error.name,
            ) from error
        raise ImportError(
            f'onnxruntime is installed, but cannot be loaded: {error}'
        ) from error
    providers = list(providers or ['CPUExecutionProvider'])
    known = onnxruntime.get_available_providers()
    if unknown := [name for name in providers if name not in known]:
        raise ValueError(
            f'`providers` must be some of {known}, but got {unknown}: they come with '
            'other builds of onnxruntime.'
        )
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # what it says below that is raised, too
    if threads is not None:
        options.intra_op_num_threads = threads
    try:
        return onnxruntime.InferenceSession(
            str(path), options, providers=providers, enable_fallback=0
        )
    except Exception as error:  # its errors have no common class
        raise ValueError(
            f'{path} is damaged or no ONNX model ({one_line(error)}).'
        ) from error


def _describe(path: Path) -> Description:
    """What the model says of itself, if the weights beside it are its own."""
    checked_file(path, 'model')
    if path.parent == BUNDLED_FOLDER:
        check_bundled(path, file_hash(path))
    description = describe_onnx(path)
    if description.weights:
        weights = path.with_name(description.weights)
        external = description.precision == EXTERNAL
        _check_made_of(path, weights, description.sha256, needed=external)
        if description.heads_sha256:
            heads = attributes_file(weights)
            _check_made_of(path, heads, description.heads_sha256, needed=external)
    return description


def _check_made_of(path: Path, source: Path, sha256: str, *, needed: bool) -> None:
    """A file that lies beside its model must be the one that it was made of."""
    if not needed and not source.is_file():
        return
    try:
        found = file_hash(checked_file(source, 'weight file'))
    except FileNotFoundError as error:
        raise ValueError(
            f'{path} is a graph alone: the weight file beside it is missing. {error}'
        ) from error
    if found != sha256:
        raise ValueError(
            f'{path.name} was made of other weights (SHA-256 {sha256[:SHORT_HASH]}) '
            f'than {source} ({found[:SHORT_HASH]}): export it again.'
        )


def _check_graph(session: Any, path: Path, description: Description) -> None:
    """The graph must take and give what its description says.

    Raises:
        ValueError: if it doesn't.
    """
    side = description.input_size
    square = [3, side, side] if description.input == SQUARES else None
    inputs = [(i.name, i.shape[1:]) for i in session.get_inputs()]
    outputs = {o.name: o.shape[1:] for o in session.get_outputs()}
    fits = (
        len(inputs) == 1
        and inputs[0][0] == INPUT_NAMES[description.input]
        and (square is None or inputs[0][1] == square)
        and outputs.pop(SCORE, None) == []
        and outputs.pop(PROBABILITIES, [len(description.levels)])
        == [len(description.levels)]
        and outputs.pop(ATTRIBUTE_VALUES, [len(ATTRIBUTES)]) == [len(ATTRIBUTES)]
        and tuple(description.attributes) in ((), ATTRIBUTES)
    )
    if not fits:
        raise ValueError(
            f'{path} is damaged: its graph takes or gives something else than it says.'
        )
