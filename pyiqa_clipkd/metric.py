"""A metric by name: from a weight file to a network that is ready to score."""

from __future__ import annotations

import logging
import os
from functools import partial
from pathlib import Path
from typing import Any

import torch

from pyiqa_clipkd.attributes.readout import find_readout
from pyiqa_clipkd.files import file_hash
from pyiqa_clipkd.locations import BUNDLED_FOLDER, check_bundled, find_weights
from pyiqa_clipkd.names import RELEASED, SUFFIX, weights_folder
from pyiqa_clipkd.network import QualityNetwork, build_from_config, load_network
from pyiqa_clipkd.weights import read_weights

logger = logging.getLogger('pyiqa')

# Threads of OpenMP don't come along with a fork: a child that asked for several would
# wait for them forever. torch's own loaders do the same in their workers.
if hasattr(os, 'register_at_fork'):
    os.register_at_fork(after_in_child=partial(torch.set_num_threads, 1))


def CLIPKDMetric(  # noqa: N802 - the host builds it by this name, like a class
    name: str, *, pretrained_model_path: str | Path | None = None, **changes: Any
) -> QualityNetwork:
    """The network of a metric, with its weights.

    They are looked for in this order: `pretrained_model_path`, the user's weights
    folder (`PYIQA_CLIPKD_WEIGHTS`), the files in the package. `clipkd_zeroshot` is CLIP
    itself: without a file its weights come from open_clip's cache or download.

    Args:
        name: name of the metric, for instance `clipkd_mobilevit`.
        pretrained_model_path: a weight file to use instead of the metric's own.
        changes: options of the network that replace the stored ones: `input_size`,
            `crops`, `mirror_invariant`.

    Returns:
        The network in evaluation mode, its weights frozen: (N, 3 or 1, H, W) in [0, 1]
        -> (N, 1) in [1, 5]. Attribute heads that lie beside the weights come along.

    Raises:
        FileNotFoundError: if there are no weights, with what to do.
        ValueError: if the file is refused, damaged or not a network of ours.
    """
    network = _network(name, pretrained_model_path, changes).eval()
    if path := find_weights(name, pretrained_model_path):
        network.readout = find_readout(path)
    # A gradient to the image takes a quarter of the time so, and a score takes less.
    return network.requires_grad_(False).to(memory_format=torch.channels_last)


def _network(
    name: str, file: str | Path | None, changes: dict[str, Any]
) -> QualityNetwork:
    path = find_weights(name, file)
    if path is None and name not in RELEASED:
        raise FileNotFoundError(
            f'There are no weights for {name}: neither {name}{SUFFIX} in '
            f'{weights_folder()} nor in {BUNDLED_FOLDER}. Give a file with '
            f'`pretrained_model_path=` (in commands `--weights`), or train one and '
            f'publish it under this name (scripts/train.py, scripts/publish.py).'
        )
    if path is None:
        options = {**RELEASED[name], **changes}
        logger.info(f'{name}: weights {options["pretrained"]!r} of open_clip.')
        return build_from_config(options)
    weights = read_weights(path)
    sha256 = file_hash(path)
    check_bundled(path, sha256)
    logger.info(f'{name}: weights {path.name}, SHA-256 {sha256[:8]}.')
    if name in RELEASED and 'config' not in weights.metadata:
        return build_from_config({**RELEASED[name], **changes, 'pretrained': weights})
    return load_network(weights, **changes)
