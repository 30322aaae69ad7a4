"""What every test shares: quiet threads, no network, and the way to the shared material beside the project."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # the models are so small that threads only get in each other's way
os.environ.setdefault("WANDB_MODE", "disabled")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
_copies = tempfile.TemporaryDirectory()  # of the pictures in parquet files; removed at the end
os.environ["HF_DATASETS_CACHE"] = _copies.name
sys.path.insert(0, str(Path(__file__).parent))
