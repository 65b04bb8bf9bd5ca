"""Photographs and tiny seeded networks for every test; nothing here needs a network."""

from __future__ import annotations

import json
import os
import signal
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# Before any import that reads them: no downloads, and no files of this machine's user.
_EMPTY = tempfile.TemporaryDirectory()
os.environ['HF_HUB_OFFLINE'] = '1'
os.environ['HF_HUB_CACHE'] = str(Path(_EMPTY.name, 'hub'))
os.environ['PYIQA_CLIPKD_WEIGHTS'] = str(Path(_EMPTY.name, 'weights'))

# Tests side by side (`-n 2`) have a core each, as have the processes that they start.
if 'PYTEST_XDIST_WORKER' in os.environ:
    os.environ.setdefault('OMP_NUM_THREADS', '1')

# What a shell runs in the background ignores Ctrl-C, and so would all that tests start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

import numpy as np  # noqa: E402
import open_clip  # noqa: E402
import pytest  # noqa: E402
import skimage  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402
from torch import Tensor, nn  # noqa: E402

PHOTOGRAPHS = ('astronaut.png', 'coffee.png', 'chelsea.png', 'rocket.jpg')

# OpenAI's class: CLIP(embed_dim, resolution, layers, width, patch, context, vocabulary,
# text width, text heads, text layers), and the same shape for open_clip. Vocabulary and
# context are the real ones, so that the real tokens fit.
TINY_SIZE = 32
TINY_CLIP = (32, TINY_SIZE, 2, 64, 16, 77, 49408, 64, 1, 2)
TINY_CONFIG = {
    'embed_dim': 32,
    'vision_cfg': {'image_size': TINY_SIZE, 'layers': 2, 'width': 64, 'patch_size': 16},
    'text_cfg': {
        'context_length': 77,
        'vocab_size': 49408,
        'width': 64,
        'heads': 1,
        'layers': 2,
    },
}


@pytest.fixture(scope='session')
def photographs() -> dict[str, Image.Image]:
    """Photographs that ship with scikit-image, as eight-bit RGB."""
    folder = Path(skimage.__file__).parent / 'data'
    return {
        Path(name).stem: Image.open(folder / name).convert('RGB')
        for name in PHOTOGRAPHS
    }


@pytest.fixture(scope='session')
def as_tensor() -> Callable[[Image.Image], Tensor]:
    """Eight-bit RGB -> (1, 3, H, W) in [0, 1]."""

    def convert(image: Image.Image) -> Tensor:
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 255

    return convert


@pytest.fixture(scope='session')
def photo(
    photographs: dict[str, Image.Image], as_tensor: Callable[[Image.Image], Tensor]
) -> Tensor:
    """One photograph: (1, 3, 300, 451)."""
    return as_tensor(photographs['chelsea'])


@pytest.fixture(scope='session', autouse=True)
def tiny_open_clip(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Make `open_clip:tiny` (plain GELU) and `open_clip:tiny-quickgelu` resolve."""
    folder = tmp_path_factory.mktemp('open_clip')
    for name, quick_gelu in (('tiny', False), ('tiny-quickgelu', True)):
        config = {**TINY_CONFIG, 'quick_gelu': quick_gelu}
        (folder / f'{name}.json').write_text(json.dumps(config))
    open_clip.add_model_config(folder)
    yield
    _EMPTY.cleanup()


@pytest.fixture(scope='session')
def openai_clip() -> Callable[..., nn.Module]:
    """Build OpenAI's own class with seeded random weights: tiny, or of given shape."""
    from pyiqa.archs.clip_model import CLIP

    def build(*shape: int, seed: int = 0) -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model: nn.Module = CLIP(*(shape or TINY_CLIP)).eval().requires_grad_(False)
            for name, parameter in model.named_parameters():
                # Otherwise zero or tiny, and all prompts and images nearly alike.
                if name.endswith(('bias', 'embedding', 'embedding.weight')):
                    parameter.add_(0.1 * torch.randn_like(parameter))
            model.get_parameter('logit_scale').fill_(np.log(100))  # as released
        return model

    return build


@pytest.fixture(scope='session')
def openai_archive() -> Callable[[nn.Module, int, Path], Path]:
    """Save OpenAI's class as OpenAI does: TorchScript, with three numbers inside."""

    def save(model: nn.Module, size: int, path: Path) -> Path:
        numbers = {
            'input_resolution': size,
            'context_length': model.context_length,
            'vocab_size': model.vocab_size,
        }
        for name, number in numbers.items():
            if hasattr(model, name):
                delattr(model, name)
            model.register_buffer(name, torch.tensor(number))
        example = (torch.rand(1, 3, size, size), open_clip.tokenize(['a photo']))
        torch.jit.save(torch.jit.trace(model, example, check_trace=False), str(path))
        return path

    return save


# --- trainings in the host's loop -----------------------------------------------------


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with images and a teacher; it is the working directory, too."""
    from training_data import write_images, write_teacher

    monkeypatch.chdir(tmp_path)
    write_images(tmp_path / 'data')
    write_teacher(tmp_path / 'data')
    return tmp_path / 'data'


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What every iteration logged."""
    from pyiqa_clipkd.model import CLIPKDModel

    seen: list[dict[str, Any]] = []
    original = CLIPKDModel.optimize_parameters

    def optimize_parameters(self: CLIPKDModel, current_iter: int) -> None:
        original(self, current_iter)
        seen.append({'iter': current_iter, **self.log_dict})

    monkeypatch.setattr(CLIPKDModel, 'optimize_parameters', optimize_parameters)
    return seen
