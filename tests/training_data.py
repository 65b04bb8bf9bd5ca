"""A tiny data set and tiny option files, for tests that train in the host's loop."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image

from pyiqa_clipkd import pipeline
from pyiqa_clipkd.network import CLIPLikert
from pyiqa_clipkd.weights import read_weights

SIZE = 32
ENCODER = 'timm:test_efficientnet'


def write_images(folder: Path, train: int = 22, test: int = 6) -> Path:
    """Noisy images whose label is their sharpness; returns the CSV in `folder`."""
    (folder / 'images').mkdir(parents=True)
    rng = np.random.default_rng(0)
    with (folder / 'meta.csv').open('w', newline='') as file:
        writer = csv.writer(file)
        splits = [f'ratio802_seed123_split_{i:02d}' for i in (1, 2)]
        writer.writerow(['img_name', 'mos', *splits])
        for i in range(train + test):
            mos = float(rng.uniform())
            noise = rng.uniform(0, 255, (40, 48, 3)) * mos + 128 * (1 - mos)
            Image.fromarray(noise.astype(np.uint8)).save(folder / f'images/{i}.png')
            side = 'train' if i < train else 'test'
            writer.writerow([f'{i}.png', f'{mos:.4f}', side, side])
    return folder / 'meta.csv'


def data_options(folder: Path, **changes: Any) -> dict[str, Any]:
    """`datasets` of an option file; `folder` is that of `write_images`."""
    train = {
        'name': 'tiny',
        'type': 'GeneralNRDataset',
        'dataroot_target': str(folder / 'images'),
        'meta_info_file': str(folder / 'meta.csv'),
        'split_index': 1,
        'mos_normalize': True,
        'mos_range': [0, 1],
        'lower_better': False,
        'augment': {'hflip': True, 'random_crop': SIZE},
        'batch_size_per_gpu': 4,
        'num_worker_per_gpu': 0,
        **changes,
    }
    val = {**train, 'override_phase': 'test', 'augment': {'center_crop': SIZE}}
    return {'train': train, 'val': val}


def student_options(folder: Path, **train: Any) -> dict[str, Any]:
    """A whole option file for stage 3; `teacher.pth` must be in `folder`."""
    metrics = {'srcc': {'type': 'calculate_srcc'}, 'plcc': {'type': 'calculate_plcc'}}
    return {
        'name': 'student',
        'model_type': 'CLIPKDModel',
        'num_gpu': 0,
        'manual_seed': 7,
        'datasets': data_options(folder),
        'network': {'type': 'CLIPKDStudent', 'encoder': ENCODER, 'input_size': SIZE},
        'teacher': {'weights': str(folder / 'teacher.pth')},
        'path': {'pretrain_network': None, 'resume_state': None},
        'train': {
            'total_epoch': 2,
            'optim': {'type': 'AdamW', 'lr': 1e-3},
            'scheduler': {'type': 'CosinePerIteration', 'min_ratio': 0.1},
            'distillation_loss_opt': {'type': 'CosineSoftHardLoss'},
            **train,
        },
        'val': {
            'val_freq': 5,
            'save_img': False,
            'key_metric': 'srcc',
            'metrics': metrics,
        },
        'logger': {
            'print_freq': 1,
            'save_checkpoint_freq': 7,
            'save_latest_freq': 1000,
            'use_tb_logger': True,
        },
    }


def write_teacher(folder: Path) -> Path:
    """A seeded teacher with a timm encoder, in the form of a training checkpoint."""
    torch.manual_seed(0)
    teacher = CLIPLikert('timm:test_resnet', input_size=SIZE, embed_dim=24)
    torch.save({'params': teacher.state_dict()}, folder / 'teacher.pth')
    return folder / 'teacher.pth'


def write_options(path: Path, options: dict[str, Any]) -> Path:
    """Write an option file, without YAML's references."""

    class Plain(yaml.SafeDumper):
        def ignore_aliases(self, data: Any) -> bool:
            return True

    path.write_text(yaml.dump(options, Dumper=Plain, sort_keys=False))
    return path


def run(options: dict[str, Any], *arguments: str) -> Any:
    """Train in this process, in the working directory."""
    file = write_options(Path('options.yml'), options)
    return pipeline.train(['-opt', str(file), *arguments])


def checkpoint(name: str, label: str = 'net_latest') -> dict[str, torch.Tensor]:
    """The tensors that a training left."""
    return read_weights(f'experiments/{name}/models/{label}.pth').tensors


def start(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    """A Python process in `folder`, with one thread and one stream of output."""
    folder.mkdir(exist_ok=True)
    return subprocess.Popen(
        [sys.executable, *arguments],
        cwd=folder,
        env={**os.environ, 'OMP_NUM_THREADS': '1'},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finished(process: subprocess.Popen[str], timeout: float = 300) -> str:
    """What a process printed, once it has ended well."""
    output, _ = process.communicate(timeout=timeout)
    assert process.returncode == 0, output
    return output
