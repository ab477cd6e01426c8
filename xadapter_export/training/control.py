"""The control that a result counts beside: the same training with nothing of CLIP in the memory."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

from xadapter_export.bundle.small_files import read_object
from xadapter_export.errors import CheckpointError, ConfigError
from xadapter_export.experts import reads_bank, reads_text
from xadapter_export.training.config import lay_over, make_config
from xadapter_export.training.run import TRAIN_NAME, OnStage, TrainResult, file_hashes, train

# Settings of the checkpoint that its control has otherwise, and those that only say where something is.
_CHANGES: Final = {"run": None, "force": False, "control": True, "distill": {"steps": 0, "weight": 0.0}}
_PLACES: Final = ("output", "cache", "plm", "clip", "bank")
_PLACES_OF_DATA: Final = ("train_files", "eval_file", "glue_data")


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
    the number of parameters is about the same. PLM, CLIP and bank are the checkpoint's own where it stores
    them, else those that its record names; they and the texts must have the hashes in the record.

    Args:
        checkpoint: Folder that ``train`` wrote; its ``train.json`` says how.
        output: Folder of the control's checkpoint.
        on_stage: As for ``train``.
        on_step: As for ``train``.

    Raises:
        CheckpointError: If there is no ``train.json``, or it cannot be read.
        ConfigError: If its texts are no longer there, or are others.
        HashMismatchError: If PLM, CLIP or bank is not the one that the checkpoint was trained with.
        OutputExistsError: If ``output`` is in the way.
    """
    folder = Path(checkpoint)
    record = _read_record(folder)
    trained = make_config(record["config"], str(folder / TRAIN_NAME))
    settings = lay_over(trained.model_dump(mode="json"), {**_CHANGES, "output": str(output)})
    settings |= {name: str(folder / name) for name in ("plm", "clip") if (folder / name).is_dir()}
    if not reads_text(trained.plugin.experts) and trained.plugin.retrieval == "static":
        settings["clip"] = None  # it taught the checkpoint where to look
    if reads_bank(trained.plugin.experts):
        settings["bank"] = str(folder)
    if trained.self_contained:  # its record has names, and no places
        settings["cache"] = None
    config = make_config(settings, str(folder / TRAIN_NAME))
    found = {Path(name).name: sha256 for name, sha256 in file_hashes(config).items()}
    for name, sha256 in record["files"].items():
        if found.get(Path(name).name) != sha256:
            raise ConfigError(
                "a training file is missing or has changed",
                where=name,
                expected=f"SHA-256 {sha256[:12]}",
                got=found.get(Path(name).name, "none")[:12],
                hint="restore the original file, or use an existing control",
            )
    return train(config, frozen_sha256=record["frozen_sha256_before"], on_stage=on_stage, on_step=on_step)


def is_control_of(control: Path, checkpoint: Path) -> bool:
    """Return whether a checkpoint is what ``train_control`` makes of another.

    Raises:
        CheckpointError: If one of them does not say how it was trained.
    """
    return _what_counts(_read_record(control)) == _what_counts(_read_record(checkpoint))


def _what_counts(record: Mapping[str, Any]) -> tuple[object, ...]:
    nowhere = {**dict.fromkeys(_PLACES), "data": dict.fromkeys(_PLACES_OF_DATA)}
    settings = lay_over(record["config"], {**_CHANGES, **nowhere})
    files = {Path(name).name: sha256 for name, sha256 in record["files"].items()}
    texts = [Path(name).name for name in record["config"].get("data", {}).get("train_files", ())]
    return settings, files, texts, record["frozen_sha256_before"].get("plm")


def _read_record(checkpoint: Path) -> dict[str, Any]:
    path = checkpoint / TRAIN_NAME
    if not path.is_file():
        raise CheckpointError(
            "the checkpoint has no record of its training, so its control cannot be trained",
            where=path,
            hint="use an existing control",
        )
    try:
        record = read_object(path, "the record of the training", CheckpointError)
        if not all(isinstance(record[name], dict) for name in ("config", "files", "frozen_sha256_before")):
            raise TypeError("config, files and frozen_sha256_before are objects")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError("the record of the training cannot be read", where=path, got=error) from error
    return record
