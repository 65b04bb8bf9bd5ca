"""Make a metric of one's own photographs and scores; see README.md."""

from pathlib import Path

from pyiqa_clipkd.stops import run_script


def run() -> None:
    from pyiqa_clipkd.fit.command import main

    main(Path(__file__).resolve().parents[1] / 'configs')


if __name__ == '__main__':
    run_script(run, 'The same command with --resume goes on.')
