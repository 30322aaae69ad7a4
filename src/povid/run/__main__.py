"""``python -m povid.run``, or ``povid train``: the same as ``train.py``, without a checkout."""

import sys

from povid.run.command import main

if __name__ == "__main__":
    sys.exit(main())
