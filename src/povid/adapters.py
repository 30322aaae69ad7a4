"""``python -m povid.adapters``: merge and convert adapters; see :mod:`povid.model.adapters`."""

import sys

from povid.model.adapters import main

if __name__ == "__main__":
    sys.exit(main())
