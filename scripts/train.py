"""Run pyiqa's train pipeline on an option file; see configs/README.md."""

from pyiqa_clipkd.stops import run_script


def run() -> None:
    from pyiqa_clipkd.pipeline import train

    train()


if __name__ == '__main__':
    run_script(run, 'The same command with --auto_resume goes on.')
