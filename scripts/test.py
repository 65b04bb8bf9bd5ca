"""Run pyiqa's test pipeline on an option file; see configs/README.md."""

from pyiqa_clipkd.pipeline import test

if __name__ == '__main__':
    test()
