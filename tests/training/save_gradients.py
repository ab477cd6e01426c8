"""Run under torchrun, or alone: train, and keep the gradients of every step.

Arguments: a JSON file of settings; where the gradients go.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np

from xadapter_export.training import read_config, run
from xadapter_export.training.trainer import Progress


class KeepGradients(Progress):
    """Keeps gradients before they are used."""

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **settings: Any) -> None:
        found = {
            f"{state.global_step}.{name}": parameter.grad.numpy().copy()
            for name, parameter in settings["model"].named_parameters()
            if parameter.grad is not None
        }
        kept.update(found)


kept: dict[str, Any] = {}
setattr(run, "Progress", KeepGradients)  # noqa: B010  # to look inside
run.train(read_config(None, json.loads(Path(sys.argv[1]).read_text())))
if os.environ.get("RANK", "0") == "0":
    np.savez(sys.argv[2], **kept)
