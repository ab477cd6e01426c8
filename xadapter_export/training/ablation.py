"""An ablation: several trainings that differ in a few settings, each with several seeds, and their table.

A config file with ``[[arm]]`` tables is one. Each arm has a ``name`` and lays its settings over the file's;
``seeds`` at the top of the file says how often each is trained.
"""

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any, Final

from xadapter_export.errors import ConfigError, OutputExistsError
from xadapter_export.evaluation.results import MARKDOWN_NAME, RESULTS_NAME, Evaluation, Metric, Row
from xadapter_export.training.config import TrainConfig, lay_over, make_config, nest, read_file
from xadapter_export.training.run import (
    TRAIN_NAME,
    OnStage,
    OnStep,
    held_out,
    recorded_settings,
    settings_of_run,
    train,
)

_SD: Final = "_sd"


@dataclass(frozen=True)
class Arm:
    """One arm.

    Attributes:
        name: What its row is called.
        changes: The settings that it lays over the file's.
        configs: All settings, by seed.
    """

    name: str
    changes: Mapping[str, Any]
    configs: Mapping[int, TrainConfig]


@dataclass(frozen=True)
class Ablation:
    """Arms to train, and where their folders and their table go."""

    output: Path
    arms: tuple[Arm, ...]


def read_ablation(path: Path, flags: Mapping[str, Any]) -> Ablation:
    """Read a config file with ``[[arm]]`` tables.

    Args:
        path: The file.
        flags: Settings by the names of their flags; they win over the file and its arms.

    Raises:
        ConfigError: If the file cannot be read, an arm has no name of its own, ``seeds`` is no list of
            different numbers, or the settings of an arm make no sense.
    """
    values = read_file(path)
    arms, seeds = values.pop("arm", None), values.pop("seeds", None)
    if not (isinstance(arms, list) and arms and all(isinstance(arm, dict) for arm in arms)):
        hint = "give each arm a table [[arm]] with a name and the settings that it changes"
        raise ConfigError("seeds are for arms, and there is none", where=path, got=arms, hint=hint)
    given = nest(flags)
    seeds = [given["seed"]] if "seed" in given else _check_seeds(seeds, path)
    names = [arm.pop("name", None) for arm in arms]
    for number, name in enumerate(names):
        if not isinstance(name, str) or not _slug(name) or _slug(name) in map(_slug, names[:number]):
            where = f"{path}, arm {number + 1}"
            raise ConfigError("an arm needs a name that no other has", where=where, got=name)
        if {"output", "run", "seed"} & set(arms[number]):
            where = f"{path}, arm {name}"
            raise ConfigError(
                "output, run and seed are the same for all arms", where=where, hint="remove them"
            )
    base = lay_over(values, given)
    whole = make_config(base, str(path))
    made = tuple(
        Arm(name, changes, _make_configs(whole, lay_over(lay_over(base, changes), given), name, seeds, path))
        for name, changes in zip(names, arms, strict=True)
    )
    return Ablation(whole.output, made)


def _check_seeds(seeds: object, path: Path) -> list[int | None]:
    if seeds is None:
        return [None]
    if not isinstance(seeds, list) or not seeds or len(set(map(repr, seeds))) < len(seeds):
        raise ConfigError("seeds is no list of different numbers", where=path, got=seeds)
    return seeds


def _make_configs(
    whole: TrainConfig, values: Mapping[str, Any], name: str, seeds: Sequence[int | None], path: Path
) -> dict[int, TrainConfig]:
    """Return the settings of an arm by seed: its folders are inside those of the whole."""
    configs = {}
    for seed in seeds:
        number = whole.seed if seed is None else seed
        place = Path(_slug(name)) / f"seed-{number}"
        changes = {
            "output": str(whole.output / place),
            "run": str(whole.run_folder / place),
            "cache": str(whole.cache_folder),
            "seed": number,
        }
        config = make_config(lay_over(values, changes), f"{path}, arm {name}")
        configs[config.seed] = config
    return configs


def _slug(name: str) -> str:
    """Return a name as a folder has it: letters, digits and dashes."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def run_ablation(
    ablation: Ablation, *, on_stage: OnStage = lambda *_: None, on_step: OnStep = lambda *_: None
) -> Evaluation:
    """Train every arm with every seed, and write ``results.json`` and ``results.md``.

    A checkpoint that an earlier start finished with the same settings and texts is kept, and a training that
    was stopped is resumed.

    Args:
        ablation: The arms.
        on_stage: As for ``train``.
        on_step: As for ``train``.

    Returns:
        A row for each arm: the mean over the seeds of what was measured on the held-out data, or of the loss
        where there is none, and the standard deviation with n - 1.

    Raises:
        OutputExistsError: If something else is at ``output``.
        As ``train``.
    """
    _check_output(ablation)
    rows: list[Row] = []
    for arm in ablation.arms:
        records: dict[int, dict[str, Any]] = {}
        for seed, config in arm.configs.items():
            on_stage("arm", f"{arm.name}, seed {seed}")
            records[seed] = _kept(config) or train(config, on_stage=on_stage, on_step=on_step).record
            found = _evaluation(ablation, [*rows, _row(arm, records)])
            if os.environ.get("RANK", "0") == "0":
                found.write(ablation.output)
        rows = list(found.rows)
    return found


def _check_output(ablation: Ablation) -> None:
    """Refuse a folder with anything in it that this ablation would not write.

    Raises:
        OutputExistsError: If it is one.
    """
    ours = {RESULTS_NAME, MARKDOWN_NAME, *(_slug(arm.name) for arm in ablation.arms)}
    output = ablation.output
    others = [path for path in output.iterdir() if path.name not in ours] if output.is_dir() else []
    if others or (output.exists() and not output.is_dir()):
        where = others[0] if others else output
        raise OutputExistsError("the output path holds something else", where=where, hint="choose another")


def _kept(config: TrainConfig) -> dict[str, Any] | None:
    """Return the record of an earlier start with the same settings and texts, unless another is forced."""
    path = config.output / TRAIN_NAME
    if config.force or not path.is_file():
        return None
    record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    settings, files = recorded_settings(config)
    same = settings_of_run(record["config"]) == settings_of_run(settings) and record["files"] == files
    return record if same else None


def _row(arm: Arm, records: Mapping[int, dict[str, Any]]) -> Row:
    measured = {seed: held_out(record) or _last_loss(record) for seed, record in records.items()}
    values: dict[str, float | None] = {}
    for metric in next(iter(measured.values())):
        numbers = [found[metric] for found in measured.values()]
        values[metric] = mean(numbers)
        values[metric + _SD] = stdev(numbers) if len(numbers) > 1 else None
    last = list(records.values())[-1]
    values |= {"steps": last["steps"], "trained_parameters": last["trained_parameters"]}
    details = {"changes": dict(arm.changes), "seeds": {str(seed): found for seed, found in measured.items()}}
    return Row(arm.name, values, details=details)


def _last_loss(record: Mapping[str, Any]) -> dict[str, float]:
    return {"loss": [entry["loss"] for entry in record["curve"] if "loss" in entry][-1]}


def _evaluation(ablation: Ablation, rows: Sequence[Row]) -> Evaluation:
    config = next(iter(ablation.arms[0].configs.values()))
    metrics: dict[str, Metric] = {}
    for key in dict.fromkeys(key for row in rows for key in row.values):
        is_count = key in ("steps", "trained_parameters")
        title = f"{key.removesuffix(_SD)} sd" if key.endswith(_SD) else key.replace("_", " ")
        metrics[key] = Metric(title, decimals=0 if is_count else 4)
    data = config.data.glue or config.data.eval_file
    return Evaluation(
        kind="ablation",
        model=Path(config.plm).name,
        data="no held-out data" if data is None else Path(data).name,
        counts={"arms": len(ablation.arms), "seeds": len(ablation.arms[0].configs)},
        settings={
            "measured": "on held-out data, at the last evaluation, or the best one with patience"
            if data is not None
            else "the loss at the last point of its curve",
            "sd": "over the seeds, with n - 1",
        },
        metrics=metrics,
        rows=tuple(rows),
    )
