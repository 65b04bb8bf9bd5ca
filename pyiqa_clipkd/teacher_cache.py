"""The teacher's embeddings on disk, found by the pixels that it saw."""

from __future__ import annotations

import hashlib
import logging
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pyiqa_clipkd.network import QualityNetwork
from pyiqa_clipkd.shards import KEY_BYTES, Shard, Writer, split_keys
from pyiqa_clipkd.weights import tensors_hash

logger = logging.getLogger('pyiqa')


def view_key(img: Tensor) -> Tensor:
    """The digest of one image's pixels, type and shape; made for loader workers.

    Args:
        img: (C, H, W), any type.

    Returns:
        uint8, (16,). Equal for equal images, whatever their strides.
    """
    img = img.detach().cpu().contiguous()
    digest = hashlib.blake2b(
        f'{img.dtype} {tuple(img.shape)} '.encode(), digest_size=KEY_BYTES
    )
    digest.update(img.reshape(-1).view(torch.uint8).numpy().data)
    return torch.frombuffer(bytearray(digest.digest()), dtype=torch.uint8)


def teacher_key(network: nn.Module) -> str:
    """A hexadecimal digest of the state dict, which also holds the configuration."""
    return tensors_hash(network.state_dict())


class TeacherCache:
    """A teacher that is asked only once for every view.

    Views are found by `view_key`, so another crop, preprocessing or content of a file
    is another view; another teacher (`teacher_key`) has another folder. Any number of
    processes may share a folder: each appends to a file of its own and reads those of
    all. Damage on disk means that an embedding is computed once more, and a disk that
    takes no more means that none is kept; both are one warning in pyiqa's log.

    Args:
        folder: where to keep embeddings; made when it is needed.
        teacher: in evaluation mode; must not change any more.

    Attributes:
        hits: images whose embedding was found.
        misses: images whose embedding was computed.

    Raises:
        ValueError: if `folder` is a file, or the teacher is in training mode.
    """

    def __init__(self, folder: str | Path, teacher: QualityNetwork) -> None:
        folder = Path(folder).expanduser()
        there = next(p for p in (folder, *folder.parents) if os.path.exists(p))
        if not there.is_dir():
            raise ValueError(
                f'`folder` of a teacher cache must be a folder, but {there} is a file.'
            )
        if teacher.training:
            raise ValueError(
                '`teacher` must be in evaluation mode (`teacher.eval()`), but it is '
                'in training mode.'
            )
        self.teacher = teacher
        self.folder = folder / teacher_key(teacher)[:16]
        self.dim = int(teacher.encoder.embed_dim)  # type: ignore[arg-type]
        self.hits = self.misses = 0
        self._shards: dict[str, Shard] = {}
        # key -> (shard, row); further places of the same key, oldest first.
        self._index: dict[bytes, tuple[str, int]] = {}
        self._older: dict[bytes, list[tuple[str, int]]] = {}
        self._warned: set[str] = set()
        self._writer: Writer | None = None
        self._full = False
        self._refresh()

    def __len__(self) -> int:
        """Embeddings that can be found; damage shows when one is asked for."""
        return len(self._index)

    def __repr__(self) -> str:
        return (
            f'{type(self).__name__}({str(self.folder)!r}, {len(self)} embeddings of '
            f'{self.dim} numbers, {self.hits} hits, {self.misses} misses)'
        )

    def embed(self, img: Tensor, keys: Tensor) -> Tensor:
        """The teacher's embeddings, from disk where they are there.

        Args:
            img: (N, 3 or 1, H, W), values in [0, 1].
            keys: uint8, (N, 16), the `view_key` of every image.

        Returns:
            float32, (N, D), on the device of `img`, without gradient.

        Raises:
            ValueError: if `keys` has another shape or type.
        """
        if keys.shape != (len(img), KEY_BYTES) or keys.dtype != torch.uint8:
            raise ValueError(
                f'`keys` must be uint8 of shape ({len(img)}, {KEY_BYTES}), one '
                f'`view_key` an image, but got {keys.dtype} of shape '
                f'{tuple(keys.shape)}.'
            )
        self._refresh()
        names = list(split_keys(keys.cpu().contiguous().numpy().tobytes()))
        found = [self._find(name) for name in names]
        missing = [i for i, row in enumerate(found) if row is None]
        self.hits += len(names) - len(missing)
        self.misses += len(missing)
        if names and len(missing) == len(names):
            fresh = self._compute(img)
            self._append(names, fresh)
            return fresh
        rows = np.zeros((len(names), self.dim), np.float32)
        for i, row in enumerate(found):
            if row is not None:
                rows[i] = row
        result = torch.from_numpy(rows).to(img.device)
        if missing:
            fresh = self._compute(img[missing])
            self._append([names[i] for i in missing], fresh)
            result[missing] = fresh
        return result

    @torch.no_grad()
    def _compute(self, img: Tensor) -> Tensor:
        with torch.autocast(img.device.type, enabled=False):
            return self.teacher.embed(img).float()

    # --- reading ------------------------------------------------------------------

    def _refresh(self) -> None:
        """Take in what other processes have added since the last look."""
        try:
            with os.scandir(self.folder) as entries:
                sizes = {
                    entry.name: entry.stat().st_size
                    for entry in entries
                    if entry.name.startswith('shard-') and entry.name.endswith('.bin')
                }
        except FileNotFoundError:
            return
        except OSError as error:
            self._warn('', f'{self.folder} can not be read ({error}).')
            return
        for name in sorted(sizes):
            shard = self._shards.get(name)
            if shard is None:
                shard = self._shards[name] = Shard(self.folder / name, self.dim)
            if sizes[name] == shard.size:
                continue
            try:
                first, keys = shard.update()
            except (OSError, ValueError) as error:
                shard.drop(sizes[name])
                self._warn(name, f'{shard.path} is no file of this cache ({error}).')
                continue
            for row, key in enumerate(split_keys(keys), first):
                self._add(key, (name, row))
            if shard.torn:
                self._warn(
                    name,
                    f'{shard.path} ends within an embedding: its process was stopped, '
                    'or is still writing.',
                )

    def _add(self, key: bytes, place: tuple[str, int]) -> None:
        if key in self._index:
            self._older.setdefault(key, []).append(self._index[key])
        self._index[key] = place

    def _find(self, key: bytes) -> NDArray[Any] | None:
        while place := self._index.get(key):
            name, row = place
            embedding = self._shards[name].read(row, key)
            if embedding is not None:
                return embedding
            self._warn(
                name,
                f'{self._shards[name].path} is damaged: what it has lost is computed '
                'once more.',
            )
            if older := self._older.get(key):
                self._index[key] = older.pop()
            else:
                del self._index[key]
        return None

    # --- writing ------------------------------------------------------------------

    def _append(self, keys: list[bytes], embeddings: Tensor) -> None:
        if self._full:
            return
        unique = dict(zip(keys, embeddings.cpu().numpy(), strict=True))
        try:
            if self._writer is None or not self._writer.is_usable():
                self._writer = Writer(self.folder, self.dim)
            first = self._writer.append(unique)
        except OSError as error:
            self._full = True
            self._warn(
                '',
                f'{self.folder} takes no more embeddings ({error}): training goes on '
                'without keeping them.',
            )
            return
        name = self._writer.path.name
        shard = self._shards.setdefault(name, Shard(self._writer.path, self.dim))
        for row, key in enumerate(unique, first):
            self._add(key, (name, row))
        shard.grown(first + len(unique))

    def _warn(self, shard: str, text: str) -> None:
        """One warning a shard (and one for the folder)."""
        if shard not in self._warned:
            self._warned.add(shard)
            logger.warning(f'Teacher cache: {text}')
