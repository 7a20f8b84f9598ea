"""What holds for every test: one thread a process, no hub, and a broken promise is reproducible."""

from __future__ import annotations

import os

# Before torch is imported anywhere: shards that tests start inherit these.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
