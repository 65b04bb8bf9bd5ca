"""`python -m pyiqa_clipkd` is the command `pyiqa-clipkd`."""

from pyiqa_clipkd.command import main

raise SystemExit(main())
