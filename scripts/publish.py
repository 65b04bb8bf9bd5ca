"""Turn a training checkpoint into a metric that pyiqa finds by name."""

from pyiqa_clipkd.publish import main

if __name__ == '__main__':
    main()
