"""Run pyiqa's train_nsplits pipeline on an option file; see configs/README.md."""

from pyiqa_clipkd.stops import run_script


def run() -> None:
    from pyiqa_clipkd.pipeline import train_nsplits

    train_nsplits()


if __name__ == '__main__':
    run_script(run, 'The splits that ended are in their folders.')
