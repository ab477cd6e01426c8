"""The control that a result counts beside: the same training with nothing of CLIP in the memory."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from xadapter_export.errors import CheckpointError
from xadapter_export.training.config import make_config
from xadapter_export.training.run import TRAIN_NAME, OnStage, TrainResult, train


def train_control(
    checkpoint: str | Path,
    output: str | Path,
    *,
    on_stage: OnStage = lambda *_: None,
    on_step: Callable[[int, int, str], None] = lambda *_: None,
) -> TrainResult:
    """Repeat a checkpoint's own training with random rows in place of pictures and text states.

    Texts, labels, seed and the number of steps in all stay as they were: what the checkpoint is better at
    than this control, it has from CLIP. An adapter for both experts becomes one of twice the width, so that
    the number of parameters is about the same.

    Args:
        checkpoint: Folder that ``train`` wrote; its ``train.json`` says how.
        output: Folder of the control's checkpoint.
        on_stage: As for ``train``.
        on_step: As for ``train``.

    Raises:
        CheckpointError: If there is no ``train.json``, or it cannot be read.
        ConfigError: If its files are no longer there.
        OutputExistsError: If ``output`` is in the way.
    """
    path = Path(checkpoint) / TRAIN_NAME
    if not path.is_file():
        raise CheckpointError(
            "the checkpoint does not say how it was trained, so its control cannot be",
            where=path,
            mend="name a control that was trained before",
        )
    try:
        settings: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))["config"]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError("the record of the training cannot be read", where=path, got=error) from error
    changes = {
        "output": str(output),
        "run": None,
        "cache": None,
        "force": False,
        "control": True,
        "distill_steps": 0,
    }
    if settings.get("cache"):
        changes["cache"] = settings["cache"]
    return train(
        make_config({**settings, **changes, "distill_weight": 0.0}, str(path)),
        on_stage=on_stage,
        on_step=on_step,
    )
