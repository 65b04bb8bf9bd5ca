"""Run pyiqa's train pipeline on an option file; see configs/README.md."""

from pyiqa_clipkd.pipeline import train

if __name__ == '__main__':
    train()
