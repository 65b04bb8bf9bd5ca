"""From a training checkpoint to one self-contained file that is a metric by name."""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from pyiqa_clipkd import __version__
from pyiqa_clipkd.encoders import PRESETS
from pyiqa_clipkd.files import file_hash
from pyiqa_clipkd.head import LikertHead
from pyiqa_clipkd.locations import state_sum
from pyiqa_clipkd.models import card_text
from pyiqa_clipkd.names import PREFIX, SUFFIX, weights_folder
from pyiqa_clipkd.network import QualityNetwork, load_network
from pyiqa_clipkd.preprocessing import CLIP_MEAN, CLIP_STD
from pyiqa_clipkd.weights import (
    CONFIG_KEY,
    pack_int8,
    read_weights,
    tensors_hash,
    unpack_int8,
    write_weights,
)

NAME = re.compile(rf'{PREFIX}[A-Za-z0-9][A-Za-z0-9._+-]*')
PRECISIONS = ('float16', 'float32', 'int8')


def publish(
    checkpoint: str | Path,
    name: str,
    *,
    folder: str | Path | None = None,
    precision: str = 'float16',
    card: Mapping[str, Any] | None = None,
    input_size: int | None = None,
    mirror_invariant: bool | None = None,
) -> Path:
    """Turn a checkpoint into a metric.

    Args:
        checkpoint: of `CLIPLikert` or `CLIPKDStudent`.
        name: of the metric, `clipkd_...`; also the file's name.
        folder: where to put the file; by default the user's weights folder, where
            `pyiqa.create_metric(name)` and `pyiqa NAME -t FILE` find it.
        precision: of the matrices and kernels on disk; `int8` of the large ones, with
            one scale an output channel, and float16 of the others. Vectors (biases,
            normalization statistics) stay in float32. In memory everything is float32.
        card: what a reader should know: data, licence, results, command.
        input_size: in pixels; by default that of the training.
        mirror_invariant: whether a photograph and its mirror image get the same score
            (`QualityNetwork`); by default as in the checkpoint.

    Returns:
        The file. Beside it stands the same as a model card, `NAME.md`.

    Raises:
        FileNotFoundError: if there is no checkpoint.
        ValueError: if an argument is wrong or the checkpoint isn't ours.
    """
    if not NAME.fullmatch(name):
        raise ValueError(
            f"`name` must start with '{PREFIX}' and go on with letters, digits or "
            f'._+-, but got {name!r}.'
        )
    if precision not in PRECISIONS:
        raise ValueError(
            f'`precision` must be one of {PRECISIONS}, but got {precision!r}.'
        )
    changes = {'input_size': input_size, 'mirror_invariant': mirror_invariant}
    network = load_network(
        checkpoint, **{name: v for name, v in changes.items() if v is not None}
    )
    tensors = _stored(network, precision)
    metadata = {
        'name': name,
        'config': _config(network),
        'preprocessing': {
            'resize': f'shorter side to {network.config["input_size"]}, bicubic, '
            'antialiased; centre crop'
            + '; mirrored where its light lies left of the centre'
            * network.preprocessing.mirror_invariant,
            'mean': CLIP_MEAN,
            'std': CLIP_STD,
        },
        'output': 'score in [1, 5], higher is better',
        'precision': precision,
        'parameters': sum(p.numel() for p in network.parameters()),
        'tensors_sha256': tensors_hash(unpack_int8(tensors)),
        'made_with': f'pyiqa-clipkd {__version__}',
        'card': dict(card or {}),
    }
    path = Path(folder or weights_folder()).expanduser() / f'{name}{SUFFIX}'
    write_weights(path, tensors, metadata)
    state_sum(path)
    path.with_suffix('.md').write_text(model_card(path, metadata), encoding='utf-8')
    if host_table := sys.modules.get('pyiqa.default_model_configs'):
        from pyiqa_clipkd.host import add_metrics

        add_metrics(host_table.DEFAULT_CONFIGS)
    return path


def _config(network: QualityNetwork) -> dict[str, Any]:
    """How to build the network, with the temperature that its weights hold."""
    if not isinstance(network.head, LikertHead):
        return network.config
    temperature = float(f'{network.head.temperature.item():.6g}')
    return {**network.config, 'temperature': temperature}


def _stored(network: QualityNetwork, precision: str) -> dict[str, Tensor]:
    state = network.state_dict()
    state.pop(CONFIG_KEY)
    if precision == 'float32':
        return dict(state)
    half = {
        name: tensor.half()
        if tensor.is_floating_point() and tensor.dim() > 1
        else tensor
        for name, tensor in state.items()
    }
    return pack_int8(half) if precision == 'int8' else half


def model_card(
    path: Path, metadata: Mapping[str, Any], measured: Mapping[str, Any] | None = None
) -> str:
    """The file's metadata for people, as Markdown, and what was measured since."""
    config = metadata['config']
    rows = {
        'Score': metadata['output'],
        'Encoder': f'{config["encoder"]}, {metadata["parameters"] / 1e6:.2f} million '
        'parameters with its head',
        'Levels': ', '.join(config['levels']),
        'Input': metadata['preprocessing']['resize'],
        'File': f'{path.name}, {path.stat().st_size / 1e6:.2f} MB, '
        f'{metadata["precision"]}',
        'SHA-256': f'`{file_hash(path)}`',
        **metadata['card'],
        **(measured or {}),
    }
    return card_text(metadata['name'], rows)


def main(argv: Sequence[str] | None = None) -> None:
    """The command behind scripts/publish.py."""
    parser = argparse.ArgumentParser(
        description='Turn a training checkpoint into a metric that pyiqa finds by name.'
    )
    parser.add_argument('checkpoint', help='experiments/NAME/models/net_best.pth')
    parser.add_argument('--name', required=True, help=f'{PREFIX}...')
    parser.add_argument('--folder', help=f'default: {weights_folder()}')
    parser.add_argument('--precision', default='float16', choices=PRECISIONS)
    parser.add_argument('--input-size', type=int, help='default: of the training')
    parser.add_argument(
        '--mirror-invariant',
        action=argparse.BooleanOptionalAction,
        help='a photograph and its mirror image get the same score',
    )
    parser.add_argument('--data', default='not stated', help='what it was trained on')
    parser.add_argument('--licence', default='not stated', help='terms of the weights')
    parser.add_argument('--results', default='not stated', help='for instance SRCC')
    parser.add_argument('--card', help='JSON file with further rows of the model card')
    args = parser.parse_args(argv)
    card = {'Data': args.data, 'Licence': args.licence, 'Results': args.results}
    try:
        if args.card:
            card |= json.loads(Path(args.card).read_text(encoding='utf-8'))
        path = publish(
            args.checkpoint,
            args.name,
            folder=args.folder,
            precision=args.precision,
            card=card,
            input_size=args.input_size,
            mirror_invariant=args.mirror_invariant,
        )
    except (OSError, ValueError) as error:
        parser.error(str(error))
    print(f'{path} ({path.stat().st_size / 1e6:.2f} MB, SHA-256 {file_hash(path)})')
    preset = args.name.removeprefix(PREFIX).split('-')[0]
    encoder = read_weights(path).metadata['config']['encoder']
    if PRESETS.get(preset, encoder) != encoder:
        print(f'Mind the name: this is {encoder}, not {PRESETS[preset]}.')
    print(f'Try it: pyiqa {args.name} -t PHOTO')
