"""``python -m train.color``: does a V-expert teach a PLM the colors of objects it was never told about?

Any PLM, CLIP and bank whose captions are the recipe's object names; by default the pretrained MiniLM with the
built-in CLIP and bank. Runs are kept under ``build/color``; an interrupted recipe goes on after the last arm
that was finished.
"""

import hashlib
import json
import tomllib
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import click
import torch
from rich.console import Console

from material import pictures, text
from material.models import minilm_folder
from material.splits import Split, color_targets, measure_pixel_colors, pixel_accuracy, split_objects
from material.stages import Stages
from material.tables import Grid, language_grid, print_grid, spread, write_results
from train.color.laboratory import Arm, ArmResult, Laboratory, from_json, to_json
from train.color.mlm_head import HeadSettings, train_head
from train.color.published import hold_out_named, score_published
from xadapter_export.bank.compact import compact_bank
from xadapter_export.layers import NULL_ROWS, TOKEN_QUERY
from xadapter_export.model.builtin import BUILTIN, builtin_folder
from xadapter_export.model.plm import NoMlmHeadError, load_plm
from xadapter_export.model.plm_family import PlmFamily

_ROOT = Path(__file__).resolve().parents[2]
_FROZEN, _TEXT_ONLY, _STATIC = "frozen PLM", "same adapter, text only", "V-expert, static (512 prototypes)"
_ALONE = "V-expert, trained alone"
_NULLS = f"{_ALONE}, {NULL_ROWS.null_rows} null rows"
_TEXT_NULLS = f"{_TEXT_ONLY}, {NULL_ROWS.null_rows} null rows"
_CHECKED = (_FROZEN, _TEXT_ONLY, _TEXT_NULLS, "V-expert", "T-expert", "V + T", _ALONE, _NULLS, _STATIC)
_ROWS = (
    "chance",
    "majority",
    _FROZEN,
    _TEXT_ONLY,
    _TEXT_NULLS,
    "V-expert, shuffled pictures",
    "V-expert",
    "T-expert",
    "V + T",
    _ALONE,
    _NULLS,
    _STATIC,
    "probe on the pictures' pixels",
)
_NOTES = (
    "Held-out objects share no word of any name with an object that trained the plug-ins, and the questions "
    "about them are sentences that nothing was trained on. CLIP has seen their pictures, with captions that "
    "name no color.",
    "The text-only control is the same adapter, trained on the same texts, attending to 16 random rows in "
    "place of pictures; it, V trained alone and the static arm take as many steps as V's weights do in the "
    "arm of both experts.",
    "Null rows are learned keys and values alongside the pictures, so that a token can look away. They can "
    "learn from the texts too, so one of the controls has as many.",
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
    memory_colors: Path | None,
    color_terms: Path | None,
    results: Path,
    recipe: Path,
    demo_work: Path,
    demo_recipe: Path,
    **parts: Any,
) -> None:
    """Train every split and arm, and write the tables."""
    torch.set_num_threads(2)
    console = Console()
    settings: dict[str, Any] = tomllib.loads(recipe.read_text(encoding="utf-8"))
    drawn: dict[str, Any] = tomllib.loads(demo_recipe.read_text(encoding="utf-8"))
    material = pictures.gather_material(Stages(demo_work, drawn["seed"], console), drawn)
    comparison = ColorComparison(Parts(**parts), material, settings, console)
    found = comparison.run_splits()
    grids = [
        color_grid(found, comparison.split_sizes, comparison.title),
        language_grid([entry.language for entry in found], _CHECKED, f" on {comparison.title}"),
    ]
    for grid in grids:
        print_grid(grid, console)
    grids.append(comparison.run_ablations(found))
    files = {"Memory Colors": memory_colors, "ColorTerms": color_terms}
    published, notes = comparison.run_published({t: path for t, path in files.items() if path is not None})
    for grid in [grids[-1], *published]:
        print_grid(grid, console)
    seeds = f"splits and seeds {', '.join(map(str, comparison.splits))}"
    write_results(results, "train.color", [*grids, *published], [*_NOTES, *notes], seeds)
    stages, work = comparison.stages, comparison.parts.work
    total_s = sum(stages.elapsed_s(name) for name in stages.names)
    console.print(f"All stages took {total_s / 60:.1f} min. Runs: {work}; tables: {results}")


@dataclass(frozen=True)
class Parts:
    """The frozen parts as the command names them, and the folder of the runs."""

    plm: str | None
    clip: str
    bank: str
    work: Path


class ColorComparison:
    """Every split, arm and ablation, each run once.

    Args:
        parts: The frozen parts.
        material: Objects and pictures.
        settings: The recipe.
        console: Where progress goes.
    """

    def __init__(
        self, parts: Parts, material: pictures.Material, settings: dict[str, Any], console: Console
    ) -> None:
        self.parts, self.material, self.settings = parts, material, settings
        self.seed: int = settings["seed"]
        self.title = parts.plm or "MiniLM-L6"
        self.stages = Stages(parts.work, self.seed, console)
        facts = text.list_facts(material.objects)
        text.check_colors_untied(facts)
        corpus = text.split_corpus(facts, 0.1, self.seed)
        self.pixel_colors = measure_pixel_colors(material)
        self.targets = color_targets(material.objects, self.pixel_colors)
        source, frozen = self._load_plm(corpus)
        prototypes = self._make_prototypes()
        self.laboratory = Laboratory(
            frozen,
            {"plm": source, "clip": parts.clip, "bank": parts.bank},
            material.objects,
            self.targets,
            corpus.training,
            corpus.held_out,
            settings["training"],
            parts.work,
            console,
        )
        self.splits = {
            self.seed + number: split_objects(
                material.objects, settings["held_out_share"], (), self.seed + number
            )
            for number in range(1, settings["splits"] + 1)
        }
        self.static = {
            **settings["static"],
            "experts": "v",
            "retrieval": "static",
            "bank": str(prototypes / "bank"),
        }
        # V learns in two of the three sets that take turns; what it is compared with gets as many steps.
        alone = {"experts": "v", "max_steps": 2 * settings["training"]["max_steps"]}
        nulls, control = {"layer": NULL_ROWS.name}, {"control": True}
        self.arms = {  # by the letter that their folders end with
            "t": Arm(_TEXT_ONLY, {**alone, **control}, {"none": _FROZEN, "v": _TEXT_ONLY}),
            "e": Arm("experts", {"experts": "vt"}, {"v": "V-expert", "t": "T-expert", "vt": "V + T"}),
            "s": Arm(_STATIC, {**self.static, **alone}, {"v": _STATIC}),
            "a": Arm(_ALONE, alone, {"v": _ALONE}),
            "n": Arm(_NULLS, {**alone, **nulls}, {"v": _NULLS}),
            "c": Arm(_TEXT_NULLS, {**alone, **control, **nulls}, {"v": _TEXT_NULLS}),
        }

    @property
    def split_sizes(self) -> list[int]:
        """How many objects each split holds out, the fewest first."""
        return sorted(len(split.held_out) for split in self.splits.values())

    def _load_plm(self, corpus: text.Corpus) -> tuple[str, PlmFamily]:
        """Return the PLM and where it is, with an MLM head trained for it if it comes without one."""
        source, head = self.parts.plm or str(minilm_folder()), HeadSettings(**self.settings["head"])
        try:
            return source, load_plm(source, "fill-mask")
        except NoMlmHeadError:
            objects, console = self.material.objects, self.stages.console
            folder = self.stages.run(
                "head",
                [self.settings["head"], self.parts.plm],
                (),
                lambda place: train_head(source, corpus.training, objects, head, self.seed, console, place),
            )
            return str(folder), load_plm(str(folder), "fill-mask")

    def _make_prototypes(self) -> Path:
        """Cluster the bank."""
        bank, count = self.parts.bank, self.settings["prototypes"]
        folder = builtin_folder() if bank == BUILTIN else Path(bank)

        def make(place: Path) -> None:
            compact_bank(folder, place / "bank", count, seed=self.seed)

        return self.stages.run("prototypes", [count, bank], (), make)

    def run(self, name: str, arm: Arm, split: Split, split_seed: int) -> ArmResult:
        """Train and measure one arm unless it was before."""
        laboratory, parts = self.laboratory, self.parts

        def make(place: Path) -> None:
            model = laboratory.train(arm, split, split_seed, place / "checkpoint")
            result = laboratory.measure(model, arm, split, split_seed)
            (place / "result.json").write_text(json.dumps(to_json(result), indent=1))

        known = [list(laboratory.sentences), list(laboratory.kept), self.targets.tolist()]
        key = [
            self.settings["training"],
            arm.settings,
            split_seed,
            list(split.held_out),
            parts.plm,
            parts.clip,
            parts.bank,
            hashlib.sha256(json.dumps(known).encode()).hexdigest(),
        ]
        models = ("head", "prototypes") if "head" in self.stages.names else ("prototypes",)
        place = self.stages.run(name, key, models, make)
        return from_json(json.loads((place / "result.json").read_text()))

    def run_splits(self) -> list[ArmResult]:
        """Run every arm on every split, and return the rows of each split together."""
        found: list[ArmResult] = []
        for number, (split_seed, split) in enumerate(self.splits.items(), 1):
            fixed = {
                "chance": 1 / len(pictures.COLORS),
                "majority": split.majority(self.material.objects),
                "probe on the pictures' pixels": pixel_accuracy(
                    self.material, self.pixel_colors, self.targets, split
                ),
            }
            results = [
                self.run(f"split-{number}-{place}", arm, split, split_seed)
                for place, arm in self.arms.items()
            ]
            found.append(
                ArmResult(
                    {**fixed, **{row: value for one in results for row, value in one.accuracy.items()}},
                    {row: check for one in results for row, check in one.language.items()},
                )
            )
        return found

    def run_ablations(self, found: list[ArmResult]) -> Grid:
        """Return the table of what the settings matter, beside the rows of the main one."""
        training, rows = self.settings["training"], []
        chosen = list(self.splits.items())[: self.settings["ablation_splits"]]
        for title, arm in ablations(self.static, training).items():
            values = [
                self.run(f"ablation-{number}-{title}".replace(" ", "-"), arm, split, split_seed)
                for number, (split_seed, split) in enumerate(chosen, 1)
            ]
            rows.append((arm.name, [value.accuracy["V-expert"] for value in values], values))
        for row in (_TEXT_ONLY, "V-expert", "T-expert", "V + T", _STATIC):
            rows.append((f"main table: {row}", [entry.accuracy[row] for entry in found[: len(chosen)]], []))
        return ablation_grid(rows, list(chosen), training["ablation_steps"])

    def run_published(self, named: dict[str, Path]) -> tuple[list[Grid], list[str]]:
        """Score published test sets after a training that held out all that they name: tables and notes."""
        if not named:
            return [], []
        notes = [
            "The published test sets were scored with `--memory-colors FILE --color-terms FILE`, after a "
            "training that held out every object that they name; the files are no part of this project."
        ]
        split = hold_out_named(self.material.objects, list(named.values()))
        folders, grids = {}, []
        for place, arm in self.arms.items():
            self.run(f"published-{place}", arm, split, self.seed)
            folders[arm.name] = self.parts.work / f"published-{place}" / "checkpoint"
        for title, path in named.items():
            grid, note = score_published(
                path, title, folders, list(self.arms.values()), self.material.objects
            )
            grids.append(grid)
            notes.append(note)
        return grids, notes


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
        **{f"null rows, M = {m}": {"layer": NULL_ROWS.name, "null_rows": m} for m in (1, 4, 16)},
        "static, sentence query, distilled on training names alone": {
            **static,
            "texts": ["colors", "facts", "seen_names"],
        },
        "static, sentence query, not distilled": {**static, "distill_weight": 0.0, "distill_steps": 0},
        "static, each token asks, distilled": {**static, "layer": TOKEN_QUERY.name},
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
