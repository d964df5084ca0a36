"""Settings for processes that are forked; they must be in place before torch is imported."""

import os

os.environ.update(DS_ACCELERATOR="cpu", OMP_NUM_THREADS="1")
