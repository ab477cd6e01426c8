"""``python -m train.color``: does a V-expert teach a PLM the colors of objects it was never told about?

Any PLM, CLIP and bank whose captions are the recipe's object names; by default the pretrained MiniLM with the
built-in CLIP and bank. Runs are kept under ``build/color``; an interrupted recipe goes on after the last arm
that was finished.
"""

import hashlib
import json
import tomllib
from pathlib import Path
from statistics import mean
from typing import Any

import click
import torch
from rich.console import Console

from train.color.laboratory import Arm, ArmResult, Laboratory, from_json, to_json
from train.color.mlm_head import HeadSettings, train_head
from train.color.published import hold_out_named, score_published
from train.demo import pictures, text
from train.demo.plm import split_corpus
from train.demo.plugin import (
    CLEAR_PEAK,
    Split,
    color_targets,
    measure_pixel_colors,
    pixel_accuracy,
    split_objects,
)
from train.demo.stages import Stages
from train.minilm import minilm_folder
from train.tables import Grid, print_grid, spread, write_results
from xadapter_export.bank.compact import compact_bank
from xadapter_export.model.builtin import BUILTIN, builtin_folder
from xadapter_export.model.plm import NoMlmHeadError, load_plm

_ROOT = Path(__file__).resolve().parents[2]
_FROZEN, _TEXT_ONLY, _STATIC = "frozen PLM", "same adapter, text only", "V-expert, static (512 prototypes)"
_ROWS = (
    "chance",
    "majority",
    _FROZEN,
    _TEXT_ONLY,
    "V-expert, shuffled pictures",
    "V-expert",
    "T-expert",
    "V + T",
    _STATIC,
    "probe on the pictures' pixels",
)
_NOTES = (
    "Held-out objects share no word of any name with an object that trained the plug-ins, and are asked for "
    "in sentences that nothing was trained on. CLIP has seen their pictures, with captions that name no "
    "color.",
    "The text-only control is the same adapter, trained on the same texts, attending to 16 random rows in "
    "place of pictures; it and the static arm take as many steps as V's weights do in the arm of both "
    "experts.",
    "MiniLM comes without an MLM head. One was trained over the frozen encoder, on facts without colors and "
    "on sentences whose colors have nothing to do with their objects.",
    "The static bank is searched by the PLM's own states: one softmax over all pairs of token and prototype, "
    "with a learned key for each prototype, taught to look where CLIP would search, on sentences that name "
    "all objects but no color. It needs no CLIP to run. Taught on the training objects' names alone it "
    "cannot know where to look for the others: that row is among the ablations.",
)


@click.command()
@click.option("--plm", help="PLM in save_pretrained layout or hub id. [default: MiniLM-L6]")
@click.option("--clip", default=BUILTIN, show_default=True, help="CLIP.")
@click.option("--bank", default=BUILTIN, show_default=True, help="Bank; captions are object names.")
@click.option(
    "--memory-colors", type=click.Path(path_type=Path), help="Memory Colors' JSON lines, to score on as well."
)
@click.option("--color-terms", type=click.Path(path_type=Path), help="ColorTerms' CSV, likewise.")
@click.option("--work", type=click.Path(path_type=Path), default=_ROOT / "build" / "color", help="Runs.")
@click.option(
    "--results", type=click.Path(path_type=Path), default=_ROOT / "docs" / "results.md", help="Tables."
)
@click.option(
    "--recipe",
    type=click.Path(path_type=Path),
    default=Path(__file__).with_name("recipe.toml"),
    help="Settings.",
)
@click.option(
    "--demo-work",
    type=click.Path(path_type=Path),
    default=_ROOT / "build" / "demo",
    help="Where train.demo keeps its pictures.",
)
@click.option(
    "--demo-recipe",
    type=click.Path(path_type=Path),
    default=_ROOT / "train" / "demo" / "recipe.toml",
    help="Which pictures and names.",
)
def main(
    plm: str | None,
    clip: str,
    bank: str,
    memory_colors: Path | None,
    color_terms: Path | None,
    work: Path,
    results: Path,
    recipe: Path,
    demo_work: Path,
    demo_recipe: Path,
) -> None:
    """Train every split and arm, and write the tables."""
    torch.set_num_threads(2)
    console = Console()
    settings: dict[str, Any] = tomllib.loads(recipe.read_text(encoding="utf-8"))
    seed: int = settings["seed"]
    drawn: dict[str, Any] = tomllib.loads(demo_recipe.read_text(encoding="utf-8"))
    material = pictures.gather_material(Stages(demo_work, drawn["seed"], console), drawn)
    facts = text.list_facts(material.objects)
    text.check_colors_untied(facts)
    corpus = split_corpus(facts, 0.1, seed)
    pixel_colors = measure_pixel_colors(material)
    targets = color_targets(material.objects, pixel_colors)

    # The frozen parts
    stages = Stages(work, seed, console)
    source = plm or str(minilm_folder())
    try:
        frozen = load_plm(source, "fill-mask")
    except NoMlmHeadError:
        head = HeadSettings(**settings["head"])
        folder = stages.run(
            "head",
            [settings["head"], plm],
            (),
            lambda place: train_head(source, corpus.training, material.objects, head, seed, console, place),
        )
        source, frozen = str(folder), load_plm(str(folder), "fill-mask")
    prototypes = stages.run(
        "prototypes",
        [settings["prototypes"], bank],
        (),
        lambda place: make_prototypes(bank, settings["prototypes"], seed, place),
    )
    laboratory = Laboratory(
        frozen,
        {"plm": source, "clip": clip, "bank": bank},
        material.objects,
        targets,
        corpus.training,
        corpus.held_out,
        settings["training"],
        work,
        console,
    )

    material_hash = hashlib.sha256(
        json.dumps([corpus.training, corpus.held_out, targets.tolist()]).encode()
    ).hexdigest()
    models = ("head", "prototypes") if "head" in stages.names else ("prototypes",)

    def run(name: str, arm: Arm, split: Split, split_seed: int) -> ArmResult:
        """Train and measure one arm unless it was before."""

        def make(place: Path) -> None:
            model = laboratory.train(arm, split, split_seed, place / "checkpoint")
            result = laboratory.measure(model, arm, split, split_seed)
            (place / "result.json").write_text(json.dumps(to_json(result), indent=1))

        key = [
            settings["training"],
            arm.settings,
            split_seed,
            list(split.held_out),
            plm,
            clip,
            bank,
            material_hash,
        ]
        place = stages.run(name, key, models, make)
        return from_json(json.loads((place / "result.json").read_text()))

    static = {**settings["static"], "experts": "v", "retrieval": "static", "bank": str(prototypes / "bank")}
    # V learns in two of the three expert sets that take turns; what it is compared with gets as many steps.
    as_many = {"max_steps": 2 * settings["training"]["max_steps"]}
    arms = (
        Arm(_TEXT_ONLY, {"experts": "v", "control": True, **as_many}, {"none": _FROZEN, "v": _TEXT_ONLY}),
        Arm("experts", {"experts": "vt"}, {"v": "V-expert", "t": "T-expert", "vt": "V + T"}),
        Arm(_STATIC, {**static, **as_many}, {"v": _STATIC}),
    )
    splits = {
        seed + number: split_objects(material.objects, settings["held_out_share"], (), seed + number)
        for number in range(1, settings["splits"] + 1)
    }
    found: list[ArmResult] = []
    for number, (split_seed, split) in enumerate(splits.items(), 1):
        fixed = {
            "chance": 1 / len(pictures.COLORS),
            "majority": laboratory.majority(split, CLEAR_PEAK),
            "probe on the pictures' pixels": pixel_accuracy(material, pixel_colors, targets, split),
        }
        parts = [
            run(f"split-{number}-{place}", arm, split, split_seed)
            for place, arm in zip("tes", arms, strict=True)
        ]
        found.append(
            ArmResult(
                {**fixed, **{row: value for part in parts for row, value in part.accuracy.items()}},
                {row: check for part in parts for row, check in part.language.items()},
            )
        )
    sizes = sorted(len(split.held_out) for split in splits.values())
    name = plm or "MiniLM-L6"
    grids = [color_grid(found, sizes, name), language_grid(found, name)]
    for grid in grids:
        print_grid(grid, console)

    # What the settings matter
    chosen = list(splits.items())[: settings["ablation_splits"]]
    rows = []
    for title, arm in ablations(static, settings["training"]).items():
        values = [
            run(f"ablation-{number}-{title}".replace(" ", "-"), arm, split, split_seed)
            for number, (split_seed, split) in enumerate(chosen, 1)
        ]
        rows.append((arm.name, [value.accuracy["V-expert"] for value in values], values))
    for row in (_TEXT_ONLY, "V-expert", "T-expert", "V + T", _STATIC):
        rows.append((f"main table: {row}", [entry.accuracy[row] for entry in found[: len(chosen)]], []))
    steps = settings["training"]["ablation_steps"]
    grids.append(ablation_grid(rows, list(chosen), steps))
    print_grid(grids[-1], console)

    # Published test sets
    notes = list(_NOTES)
    files = {"Memory Colors": memory_colors, "ColorTerms": color_terms}
    named = {title: path for title, path in files.items() if path is not None}
    if named:
        notes.append(
            "The published test sets were scored with `--memory-colors FILE --color-terms FILE`, after a "
            "training that held out every object that they name; the files are no part of this project."
        )
        split = hold_out_named(material.objects, list(named.values()))
        folders = {}
        for place, arm in zip("tes", arms, strict=True):
            run(f"published-{place}", arm, split, seed)
            folders[arm.name] = work / f"published-{place}" / "checkpoint"
        for title, path in named.items():
            grid, note = score_published(path, title, folders, arms, material.objects)
            print_grid(grid, console)
            grids.append(grid)
            notes.append(note)
    seeds = f"splits and seeds {', '.join(map(str, splits))}"
    write_results(results, "train.color", grids, notes, seeds)
    total_s = sum(stages.elapsed_s(name) for name in stages.names)
    console.print(f"All stages took {total_s / 60:.1f} min. Runs: {work}; tables: {results}")


def make_prototypes(bank: str, count: int, seed: int, place: Path) -> None:
    """Cluster a bank into ``place / "bank"``."""
    compact_bank(builtin_folder() if bank == BUILTIN else Path(bank), place / "bank", count, seed=seed)


def ablations(static: dict[str, Any], training: dict[str, Any]) -> dict[str, Arm]:
    """Arms that differ from a V-expert alone, as ``[training]`` has it, in one thing each."""
    row: dict[Any, str] = {"v": "V-expert"}
    last = training["layers"][-1]
    changed: dict[str, dict[str, Any]] = {
        "V alone, K = 4": {},
        "K = 1": {"k": 1, "k_drawn_from": 2},
        "K = 2": {"k": 2, "k_drawn_from": 4},
        "K = 8": {"k": 8, "k_drawn_from": 16},
        f"before layer {last} only": {"layers": [last]},
        f"before layers {last - 2} and {last - 1}": {"layers": [last - 2, last - 1]},
        "width 16": {"adapter_width": 16},
        "width 128": {"adapter_width": 128},
        "static, sentence query, distilled on training names alone": {
            **static,
            "texts": ["colors", "facts", "seen_names"],
        },
        "static, sentence query, not distilled": {**static, "distill_weight": 0.0, "distill_steps": 0},
        "static, each token asks, distilled": {**static, "query": "token"},
    }
    steps = training["ablation_steps"]
    return {
        name: Arm(name, {"experts": "v", "max_steps": steps, **settings}, row)
        for name, settings in changed.items()
    }


def color_grid(found: list[ArmResult], sizes: list[int], plm: str) -> Grid:
    """Color accuracy over the splits."""
    return Grid(
        f"Color of held-out objects on {plm}, unseen sentences, 11 colors, % right",
        (
            "",
            *(f"split {n}" for n in range(1, len(found) + 1)),
            f"mean ± sd ({sizes[0]} to {sizes[-1]} objects)",
        ),
        tuple(
            (
                name,
                *(f"{100 * entry.accuracy[name]:.1f}" for entry in found),
                spread([100 * entry.accuracy[name] for entry in found], 1),
            )
            for name in _ROWS
        ),
    )


def language_grid(found: list[ArmResult], plm: str) -> Grid:
    """The language check over the splits."""

    def row(name: str) -> tuple[str, ...]:
        checks = [entry.language[name] for entry in found]
        ratio = mean(entry.language[name].loss / entry.language[_FROZEN].loss for entry in found)
        return (
            name,
            spread([check.loss for check in checks], 3),
            f"{100 * (ratio - 1):+.1f} %",
            spread([100 * check.top1 for check in checks], 1),
            spread([100 * check.color_rate for check in checks], 2),
        )

    return Grid(
        f"Language check on {plm}: one masked word of sentences that were kept from training",
        ("", "MLM loss (nats)", "against frozen PLM", "top-1 %", "answers that are a color %"),
        tuple(row(name) for name in (_FROZEN, _TEXT_ONLY, "V-expert", "T-expert", "V + T", _STATIC)),
    )


def ablation_grid(
    rows: list[tuple[str, list[float], list[ArmResult]]], chosen: list[Any], steps: int
) -> Grid:
    """Accuracy of each ablation on the first splits, and the language check where it was made."""
    return Grid(
        f"Ablations after {steps} steps each, held-out objects, % right (differences under 6 mean nothing)",
        ("", *(f"split {n}" for n in range(1, len(chosen) + 1)), "mean", "answers that are a color %"),
        tuple(
            (
                name,
                *(f"{100 * value:.1f}" for value in values),
                f"{100 * mean(values):.1f}",
                f"{100 * mean(r.language['V-expert'].color_rate for r in results):.1f}" if results else "",
            )
            for name, values, results in rows
        ),
    )


if __name__ == "__main__":
    main()
