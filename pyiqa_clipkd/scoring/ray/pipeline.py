"""Ray Data at work: tasks that read, actors that score, rows that stream back."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable, Iterator, Sequence

from pyiqa_clipkd.scoring.ray.cluster import Workers
from pyiqa_clipkd.scoring.ray.ledger import Ledger
from pyiqa_clipkd.scoring.ray.worker import (
    BLOCK_BYTES,
    BLOCK_ROWS,
    LINE,
    Container,
    Job,
    Photographs,
    Scorer,
    read,
)
from pyiqa_clipkd.scoring.tables import Row

Task = Photographs | Container

# Tasks a worker at least, where there are few photographs: none should have to wait.
SHARES = 8


def tasks_of(names: Sequence[str], workers: int) -> list[Photographs]:
    """Photographs a few at a time, so that all workers have some to the end."""
    size = min(max(len(names) // (SHARES * workers), 1), BLOCK_ROWS)
    return [Photographs([*names[at : at + size]]) for at in range(0, len(names), size)]


def stream(
    tasks: Sequence[Task], job: Job, workers: Workers, ended: Callable[[str, int], None]
) -> Iterator[Row]:
    """The rows of all photographs, in any order, as they come.

    Reading stops where scoring can't follow: Ray Data holds what waits in between in
    its object store, up to a share of that.

    Args:
        tasks: what to read.
        job: how to score.
        workers: how many processes do so.
        ended: is told of each container that was read to its end, and how many
            photographs it has.

    Raises:
        ValueError: if a worker can't begin; says why.
    """
    import ray

    ray.data.DataContext.get_current().target_max_block_size = BLOCK_BYTES
    dataset = ray.data.from_items(
        [pickle.dumps(task) for task in tasks], override_num_blocks=len(tasks)
    )
    # Reading waits more than it works: it gets no core of its own.
    items = dataset.map_batches(
        read,
        batch_size=1,
        batch_format='pyarrow',
        num_cpus=0,
        concurrency=max(2, workers.number),
    )
    # What dies is begun anew by Ray without an end: the ledger finds one.
    ledger = ray.remote(num_cpus=0, max_restarts=-1)(Ledger).remote()
    lines = items.map_batches(
        Scorer,
        fn_constructor_args=(job, ledger),
        batch_size=None,
        batch_format='pyarrow',
        concurrency=workers.number,
        num_cpus=workers.cpus,
        num_gpus=workers.gpus,
    )
    try:
        for batch in lines.iter_batches(batch_size=None, batch_format='pyarrow'):
            for line in batch[LINE].to_pylist():
                row = json.loads(line)
                if 'path' in row:
                    yield row
                else:  # the end of a container
                    ended(row['source'], row['row'])
    except ray.exceptions.ActorDiedError as error:
        reason = str(error).strip().splitlines()[-1]
        raise ValueError(f'A worker could not begin: {reason}') from error
