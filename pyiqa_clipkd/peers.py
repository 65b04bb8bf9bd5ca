"""The other processes of a training: noticed when they are gone.

Who waits for a process that has ended is told by the network, and by torchrun. Nobody
tells of a machine that lost its power or its cable, and torchrun's children outlive it
when it is killed with `kill -9`. So each process says now and then that it is there.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import get_error_handler

# Seconds between two signs of life, and after how many without any a process counts as
# gone. A process may be kept from its sign by a swapping machine, not for this long.
BEAT, SILENCE = 5.0, 120.0

RESUME = 'Start the same command again on all machines, with --auto_resume.'

# What gloo, nccl and the store say where the other end of a connection is gone.
LOST = (
    'closed by',
    'connection reset',
    'connection was',
    'broken pipe',
    'timed out',
    'remote process exited',
)


class PeerLostError(ConnectionError):
    """Another process of the training has ended, or can't be reached."""


@contextmanager
def explained() -> Iterator[None]:
    """Say what a lost connection means, and leave the error for torchrun's last words.

    Raises:
        PeerLostError: instead of what the network says.
    """
    try:
        with _translated():
            yield
    except Exception as error:
        get_error_handler().record_exception(error)
        raise


@contextmanager
def _translated() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        text = str(error).lower()
        if not dist.is_initialized() or not any(words in text for words in LOST):
            raise
        raise PeerLostError(
            'Another process of this training has ended or lost its connection; if it '
            f'met an error, its machine shows it. {RESUME}'
        ) from error


@contextmanager
def watched() -> Iterator[None]:
    """End this process where torchrun or another process of the training is gone."""
    watch = Watch()
    watch.start()
    try:
        yield
    finally:
        watch.stopped.set()


class Watch(threading.Thread):
    """Signs of life of this process, and a look at those of the others."""

    def __init__(self) -> None:
        super().__init__(name='peers', daemon=True)
        self.stopped = threading.Event()
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.parent = os.getppid()
        now = time.monotonic()
        self.heard = dict.fromkeys(range(self.world_size), (-1, now))
        self.store: dist.Store | None = None

    def run(self) -> None:
        # In a thread of its own: without a cable it waits for an answer forever.
        threading.Thread(target=self._beat, daemon=True).start()
        while not self.stopped.wait(BEAT):
            if os.getppid() != self.parent:
                self._end('torchrun, which started this process, has ended.')
            if silent := self._silent():
                self._end(
                    f'Nothing was heard of process {", ".join(map(str, silent))} of '
                    f'{self.world_size} for {SILENCE:.0f} seconds: its machine or the '
                    f'network is gone. {RESUME}'
                )

    def _beat(self) -> None:
        while not self.stopped.is_set():
            try:
                self._listen()
            except RuntimeError:  # its machine may be the one that is gone
                self.store = None
            self.stopped.wait(BEAT)

    def _listen(self) -> None:
        if self.store is None:
            self.store = _connected()
        for rank in self.heard:
            count = self.store.add(f'clipkd/alive/{rank}', int(rank == self.rank))
            if count != self.heard[rank][0]:
                self.heard[rank] = count, time.monotonic()

    def _silent(self) -> list[int]:
        """Of the others; where the store is gone, that is all of them."""
        now = time.monotonic()
        return [
            rank
            for rank, (_, heard) in self.heard.items()
            if rank != self.rank and now - heard > SILENCE
        ]

    def _end(self, text: str) -> None:
        """At once: the main thread may wait for the network, which can't be stopped."""
        try:
            with explained():
                raise PeerLostError(text)
        finally:
            print(f'Process {self.rank}: {text}', file=sys.stderr, flush=True)
            os._exit(1)


def _connected() -> dist.Store:
    """A connection of our own: that of torch may wait for the others for hours."""
    return dist.TCPStore(
        os.environ['MASTER_ADDR'],
        int(os.environ['MASTER_PORT']),
        is_master=False,
        timeout=timedelta(seconds=BEAT),
        wait_for_workers=False,
    )
