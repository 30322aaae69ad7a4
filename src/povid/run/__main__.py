"""``python -m povid.run``, or ``povid train``: what ``train.py`` does, where there is no checkout."""

import sys

from povid.run.command import main

if __name__ == "__main__":
    sys.exit(main())
