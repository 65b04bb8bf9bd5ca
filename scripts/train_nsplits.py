"""Run pyiqa's train_nsplits pipeline on an option file; see configs/README.md."""

from pyiqa_clipkd.pipeline import train_nsplits

if __name__ == '__main__':
    train_nsplits()
