"""S4GAN Job: semi-supervised segmentation training that survives being killed."""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"


def load_model(weights: Any, device: Any = None) -> Any:
    """A trained model as a module of torch, ready to predict: `job.model.load_model`."""
    # By its name: importing torch takes seconds, and what does without it also imports `job`.
    return importlib.import_module("job.model").load_model(weights, device)
