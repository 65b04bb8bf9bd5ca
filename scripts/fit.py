"""Make a metric of one's own photographs and scores; see README.md."""

from pathlib import Path

from pyiqa_clipkd.fit.command import main

if __name__ == '__main__':
    main(Path(__file__).resolve().parents[1] / 'configs')
