"""Train on two machines that are two network namespaces; kill one, and go on.

    python scripts/two_nodes.py -o configs/results/distributed/two_nodes.json

Each of the two has its own network, joined by a virtual cable, its own copy of the
photographs and its own working folder, as machines without a shared disk. As root on
Linux with `ip` (iproute2). Tiny photographs and networks, minutes on a processor.

What happens: the training in one process, on two machines, and then on two machines
that something befalls (`kill -9` of torchrun on either one, the cable pulled). Measured
are the seconds until the survivor ends, its words, and how far the weights of the
resumed job are from those of the one that nothing befell.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import skimage
import torch
import yaml
from PIL import Image

from pyiqa_clipkd.experiment import recorded_command, recorded_commit

ROOT = Path(__file__).resolve().parents[1]
TRAIN = ROOT / 'scripts' / 'train.py'
SIDE, IMAGES = 32, 32
PORT = 29511
STATES = Path('experiments', 'two_nodes', 'training_states')
MODELS = STATES.with_name('models')


class Node(NamedTuple):
    """A machine: how commands are run there, its network card, its folder."""

    prefix: list[str]
    card: str
    address: str
    folder: Path


def can_split() -> bool:
    """Whether this user may make networks here."""
    return shutil.which('ip') is not None and os.geteuid() == 0


@contextmanager
def two_nodes(folder: Path) -> Iterator[list[Node]]:
    """Two network namespaces with a cable, or two loopback addresses without them."""
    nodes = []
    own = can_split()
    for number in (0, 1):
        name = f'ckd{os.getpid()}n{number}'
        (folder / f'node{number}').mkdir(parents=True)
        nodes.append(
            Node(
                ['ip', 'netns', 'exec', name] if own else [],
                f'c{os.getpid()}v{number}' if own else 'lo',
                f'10.77.0.{number + 1}' if own else f'127.0.0.{number + 2}',
                folder / f'node{number}',
            )
        )
    try:
        if own:
            _join(nodes)
        yield nodes
    finally:
        if own:
            for node in nodes:
                subprocess.run(['ip', 'netns', 'del', node.prefix[-1]], check=False)


def _join(nodes: Sequence[Node]) -> None:
    def ip(words: str) -> None:
        subprocess.run(['ip', *words.split()], check=True)

    for node in nodes:
        ip(f'netns add {node.prefix[-1]}')
    ip(f'link add {nodes[0].card} type veth peer name {nodes[1].card}')
    for node in nodes:
        inside = f'-n {node.prefix[-1]}'
        ip(f'link set {node.card} netns {node.prefix[-1]}')
        ip(f'{inside} addr add {node.address}/24 dev {node.card}')
        ip(f'{inside} link set {node.card} up')
        ip(f'{inside} link set lo up')


def pull_cable(node: Node) -> None:
    words = ['ip', '-n', node.prefix[-1], 'link', 'set', node.card, 'down']
    subprocess.run(words, check=True)


# --- the training ---------------------------------------------------------------------


def write_data(folder: Path) -> None:
    """Parts of photographs with noise; the less of it, the better the label."""
    (folder / 'images').mkdir(parents=True)
    rng = np.random.default_rng(0)
    source = Image.open(Path(skimage.__file__).parent / 'data' / 'coffee.png')
    pixels = np.asarray(source.convert('RGB')).astype(float)
    lines = ['img_name,mos,ratio802_seed123_split_01']
    for number in range(IMAGES):
        top, left = rng.integers(300), rng.integers(500)
        mos = float(rng.uniform())
        part = pixels[top : top + 40, left : left + 48]
        part = (part + rng.normal(0, 99 * (1 - mos), part.shape)).clip(0, 255)
        Image.fromarray(part.astype(np.uint8)).save(folder / f'images/{number}.png')
        lines.append(f'{number}.png,{mos:.4f},{"train" if number < 24 else "test"}')
    (folder / 'meta.csv').write_text('\n'.join(lines) + '\n')


def option_file(processes: int, epochs: int, every: int) -> str:
    """Four photographs a step, however many processes; no batch norm, no Adam."""
    data = {
        'name': 'tiny',
        'type': 'GeneralNRDataset',
        'dataroot_target': 'data/images',
        'meta_info_file': 'data/meta.csv',
        'split_index': 1,
        'mos_normalize': True,
        'mos_range': [0, 1],
        'lower_better': False,
        'batch_size_per_gpu': 4 // processes,
        'num_worker_per_gpu': 0,
    }
    train = {**data, 'augment': {'hflip': True, 'random_crop': SIDE}}
    val = {**data, 'override_phase': 'test', 'augment': {'center_crop': SIDE}}
    return yaml.safe_dump(
        {
            'name': 'two_nodes',
            'model_type': 'CLIPKDModel',
            'num_gpu': 0,
            'manual_seed': 7,
            'datasets': {'train': train, 'val': val},
            'network': {
                'type': 'CLIPLikert',
                'encoder': 'timm:test_vit',
                'input_size': SIDE,
                'embed_dim': 24,
            },
            'path': {'pretrain_network': None, 'resume_state': None},
            'train': {
                'total_epoch': epochs,
                'optim': {'type': 'SGD', 'lr': 0.02},
                'scheduler': {'type': 'CosinePerIteration', 'min_ratio': 0.1},
                'mos_loss_opt': {'type': 'MSELoss'},
            },
            'val': {
                'val_freq': 1000000,
                'save_img': False,
                'key_metric': 'srcc',
                'metrics': {'srcc': {'type': 'calculate_srcc'}},
            },
            'logger': {
                'print_freq': 20,
                'save_checkpoint_freq': every,
                'save_latest_freq': 1000000,
                'use_tb_logger': False,
            },
        }
    )


def alone(folder: Path, options: str) -> None:
    """The same training in one process."""
    write_data(folder / 'data')
    (folder / 'o.yml').write_text(options)
    subprocess.run(
        [sys.executable, str(TRAIN), '-opt', 'o.yml'],
        cwd=folder,
        check=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def start(
    node: Node, rank: int, first: Node, *flags: str, script: Path = TRAIN
) -> subprocess.Popen[bytes]:
    """torchrun on a node; what it prints goes to its `log`."""
    words = [*node.prefix, sys.executable, '-m', 'torch.distributed.run']
    words += ['--nnodes', '2', '--nproc-per-node', '1']
    if '--rdzv-backend' in flags:
        words += ['--rdzv-endpoint', f'{first.address}:{PORT}']
        # It would ask for the computer's name, which both have.
        words += ['--rdzv-conf', f'is_host={int(rank == 0)}']
        words += ['--local-addr', node.address]
    else:
        words += ['--node-rank', str(rank), '--master-addr', first.address]
        words += ['--master-port', str(PORT)]
    cut = flags.index('--') if '--' in flags else 0
    words += [*flags[:cut], str(script), '-opt', 'o.yml', '--launcher', 'pytorch']
    words += flags[cut + 1 :] if '--' in flags else flags
    with (node.folder / 'log').open('ab') as log:
        return subprocess.Popen(
            words,
            cwd=node.folder,
            env={**os.environ, 'GLOO_SOCKET_IFNAME': node.card},
            stdout=log,
            stderr=subprocess.STDOUT,
        )


def prepare(nodes: Sequence[Node], options: str) -> None:
    """Photographs and options on both; nothing else is shared."""
    for node in nodes:
        write_data(node.folder / 'data')
        (node.folder / 'o.yml').write_text(options)


def wait_for(path: Path, process: subprocess.Popen[bytes], log: Path) -> None:
    while not path.exists():
        if process.poll() is not None:
            raise SystemExit(f'The training ended too soon:\n{log.read_text()[-3000:]}')
        time.sleep(0.02)


def workers(agent: subprocess.Popen[bytes]) -> list[int]:
    """The processes that torchrun has started."""
    path = Path(f'/proc/{agent.pid}/task/{agent.pid}/children')
    return [int(pid) for pid in path.read_text().split()]


def kill(agent: subprocess.Popen[bytes]) -> None:
    agent.send_signal(signal.SIGKILL)


def is_there(pid: int) -> bool:
    """Whether a process runs; one that has ended and waits for its parent doesn't."""
    try:
        return Path(f'/proc/{pid}/stat').read_text().rsplit(')')[1].split()[0] != 'Z'
    except FileNotFoundError:
        return False


def weights(folder: Path) -> dict[str, torch.Tensor]:
    path = folder / MODELS / 'net_latest.pth'
    found: dict[str, torch.Tensor] = torch.load(path, weights_only=True)['params']
    return found


def farthest(one: Path, other: Path) -> float:
    """The greatest difference of a weight."""
    first, second = weights(one), weights(other)
    return max(float((first[k].float() - second[k].float()).abs().max()) for k in first)


# --- what is shown --------------------------------------------------------------------


def uninterrupted(folder: Path, options: str) -> Path:
    with two_nodes(folder) as nodes:
        prepare(nodes, options)
        agents = [start(node, rank, nodes[0]) for rank, node in enumerate(nodes)]
        if any(agent.wait(600) for agent in agents):
            raise SystemExit((nodes[0].folder / 'log').read_text()[-3000:])
    return nodes[0].folder


def befallen(folder: Path, options: str, what: str, every: int) -> dict[str, Any]:
    """Train, let it happen after a checkpoint, see the survivor end, and go on."""
    with two_nodes(folder) as nodes:
        prepare(nodes, options)
        agents = [start(node, rank, nodes[0]) for rank, node in enumerate(nodes)]
        log = nodes[0].folder / 'log'
        wait_for(nodes[0].folder / STATES / f'{every}.state', agents[0], log)
        children = [pid for agent in agents for pid in workers(agent)]
        begin = time.monotonic()
        victim = 0 if 'node 0' in what else 1
        if what == 'cable pulled':
            pull_cable(nodes[1])
        else:
            kill(agents[victim])
        code = agents[1 - victim].wait(600)
        seconds = time.monotonic() - begin
        agents[victim].wait(600)
        while any(map(is_there, children)) and time.monotonic() < begin + 600:
            time.sleep(0.1)
        all_gone = time.monotonic() - begin
        words = last_words(nodes[1 - victim].folder / 'log')
    with two_nodes(folder / 'again') as again:
        for node, old in zip(again, nodes, strict=True):
            shutil.rmtree(node.folder)
            shutil.move(old.folder, node.folder)
        agents = [
            start(node, rank, again[0], '--auto_resume')
            for rank, node in enumerate(again)
        ]
        codes = [agent.wait(600) for agent in agents]
    return {
        'what': what,
        'survivor_ended_after_s': round(seconds, 1),
        'survivor_exit_code': code,
        'survivor_said': words,
        'all_processes_gone_after_s': round(all_gone, 1),
        'resumed_exit_codes': codes,
        'folder': str(again[0].folder),
    }


def last_words(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(errors='replace').splitlines()]
    return next((line for line in lines[::-1] if '--auto_resume' in line), '')


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add('-o', '--output', type=Path, help='JSON file for the figures')
    add('--epochs', type=int, default=40, help='of six steps')
    args = parser.parse_args(argv)
    if not can_split():
        raise SystemExit('This needs root and `ip` (Debian: iproute2).')
    every = 25
    two, one = (option_file(n, args.epochs, every) for n in (2, 1))
    with tempfile.TemporaryDirectory() as place:
        alone(Path(place, 'one'), one)
        whole = uninterrupted(Path(place, 'whole'), two)
        rows = []
        for number, what in enumerate(
            (
                'kill -9 of torchrun on node 1',
                'kill -9 of torchrun on node 0',
                'cable pulled',
            )
        ):
            row = befallen(Path(place, f'run{number}'), two, what, every)
            row['farthest_from_uninterrupted'] = farthest(whole, Path(row['folder']))
            rows.append({k: v for k, v in row.items() if k != 'folder'})
            print(json.dumps(rows[-1]), flush=True)
        figures = {
            'command': recorded_command(sys.argv, ROOT),
            'commit': recorded_commit(ROOT),
            'torch': torch.__version__,
            'machines': 'two network namespaces on one computer',
            'steps': 6 * args.epochs,
            'seed': 7,
            'two_nodes_farthest_from_one_process': farthest(Path(place, 'one'), whole),
            'befallen': rows,
        }
    print(json.dumps(figures, indent=1))
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(figures, indent=1) + '\n')


if __name__ == '__main__':
    main()
