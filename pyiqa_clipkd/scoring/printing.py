"""Names of strangers' files as they can be shown, and handed on."""

from __future__ import annotations

import os
import unicodedata

# What programs take for an option, and spreadsheets for a formula.
RISKY = ('-', '=', '+', '@', '\t', '\r')


def safe_name(path: str) -> str:
    """A path that is neither option nor formula, whatever takes it: `./-x.jpg`."""
    return os.path.join(os.curdir, path) if path.startswith(RISKY) else path


def printable(path: str) -> str:
    """A path in one line, without what commands a terminal or turns text around."""
    text = path.encode(errors='backslashreplace').decode()
    return ''.join(
        c.encode('unicode_escape').decode() if unicodedata.category(c)[0] == 'C' else c
        for c in text
    )
