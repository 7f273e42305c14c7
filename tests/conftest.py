"""What every test starts from: one compute thread, no network, and `bench` importable from the checkout."""

from __future__ import annotations

import os
import sys
from pathlib import Path

# Read by huggingface_hub when it is first imported.
os.environ["HF_HUB_OFFLINE"] = "1"

import torch

sys.path.append(str(Path(__file__).parents[1]))
torch.set_num_threads(1)
