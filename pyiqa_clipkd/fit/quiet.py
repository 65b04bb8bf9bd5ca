"""Keep the host's log off the console: it stays in the file of each training."""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Iterator
from typing import Any
from unittest import mock


@contextlib.contextmanager
def host_log_to_file() -> Iterator[None]:
    """Trainings inside log to files of their own; errors still reach the console.

    The host opens its logger once a process and would add a second training's lines to
    the first one's file.
    """
    import pyiqa.train as host
    from pyiqa.utils.logger import initialized_logger

    original = host.get_root_logger
    logger = logging.getLogger('pyiqa')
    before = list(logger.handlers), dict(initialized_logger), logger.propagate

    def quiet(*args: Any, **kwargs: Any) -> logging.Logger:
        opened: logging.Logger = original(*args, **kwargs)
        for handler in opened.handlers:
            if not isinstance(handler, logging.FileHandler):
                handler.setLevel(logging.ERROR)
        return opened

    logger.handlers.clear()
    initialized_logger.clear()
    try:
        with (
            mock.patch.object(host, 'get_root_logger', quiet),
            contextlib.redirect_stdout(io.StringIO()),  # a line or two of the host's
        ):
            yield
    finally:
        for handler in logger.handlers:
            handler.close()
        logger.handlers[:] = before[0]
        initialized_logger.clear()
        initialized_logger.update(before[1])
        logger.propagate = before[2]
