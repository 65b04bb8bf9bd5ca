"""Reproduce the paper's tables; see configs/README.md."""

import sys
from pathlib import Path

from pyiqa_clipkd.reproduce.command import main

if __name__ == '__main__':
    sys.exit(main(Path(__file__).resolve().parents[1]))
