"""``python -m train.demo``: build the built-in checkpoint, say where it is and how good it is.

Stages are kept under ``build/demo``; an interrupted run goes on after the last stage that was finished.
"""

import argparse
import json
import logging
import shutil
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console

from xadapter_export.torchvision_cure import cure_torchvision

cure_torchvision()

from transformers import BertConfig, BertForMaskedLM  # noqa: E402  # torchvision must be cured first
from transformers.utils import logging as transformers_logging  # noqa: E402

from material import pictures, text  # noqa: E402
from material.splits import Split, split_objects  # noqa: E402
from material.stages import Stages  # noqa: E402
from material.tables import Grid, language_grid, print_grid, write_results  # noqa: E402
from train.demo import clip, plm, plugin, results, shipping  # noqa: E402
from xadapter_export.bank import FeatureBank  # noqa: E402
from xadapter_export.bundle.pictures import Picture  # noqa: E402
from xadapter_export.bundle.staging import staged_folder  # noqa: E402
from xadapter_export.model.checkpoint import RECORD_NAME  # noqa: E402
from xadapter_export.model.config import RetrievalConfig, XAdapterConfig  # noqa: E402
from xadapter_export.model.x_adapter_model import XAdapterModel  # noqa: E402

_ROOT = Path(__file__).resolve().parents[2]
_NOTES = (
    "Held-out objects share no word of any name with an object that trained the plug-ins. The language model "
    "and CLIP have read their names, but no sentence that ties one to a color.",
    "The V-expert answers from the held-out objects' own pictures, which are in the bank. The probe on those "
    "pictures' pixels is the ceiling: how often emoji are drawn in the color that CoDa's annotators named.",
    "The T-expert knows colors because CLIP's text tower was trained to match these objects' names to their "
    "pictures, with captions that name no color.",
    "An untrained language model with a V-expert answers colors too: the color flows from the pictures "
    "through the plug-in. What the trained language model adds is language, which is the second table.",
    "Training objects that CoDa does not know are labeled with the main color of their pictures.",
)


def main() -> None:
    """Run all stages."""
    parser = argparse.ArgumentParser(prog="python -m train.demo", description=__doc__)
    parser.add_argument(
        "--work", type=Path, default=_ROOT / "build" / "demo", help="where the stages are kept"
    )
    parser.add_argument(
        "--output", type=Path, default=_ROOT / "xadapter_export" / "builtin", help="where the checkpoint goes"
    )
    parser.add_argument(
        "--results", type=Path, default=_ROOT / "docs" / "results.md", help="where the tables go"
    )
    parser.add_argument(
        "--recipe", type=Path, default=Path(__file__).with_name("recipe.toml"), help="all settings"
    )
    options = parser.parse_args()
    logging.getLogger().setLevel(logging.WARNING)
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # transformers
    torch.set_num_threads(2)  # a sum in another order is another number: the same on every machine
    recipe: dict[str, Any] = tomllib.loads(options.recipe.read_text(encoding="utf-8"))
    Build(recipe, Stages(options.work, recipe["seed"], Console())).run(options.output, options.results)


class Build:
    """All stages, in their order.

    Args:
        recipe: All settings.
        stages: Where the stages are kept.
    """

    def __init__(self, recipe: dict[str, Any], stages: Stages) -> None:
        self.recipe, self.stages = recipe, stages
        self.seed: int = recipe["seed"]
        self.console = stages.console
        self.material = pictures.gather_material(stages, recipe)
        self.console.print(f"  {len(self.material.objects)} objects, {len(self.material.images)} pictures")

    def run(self, output: Path, results_file: Path) -> None:
        """Train the frozen models and the plug-ins, and write the checkpoint and the tables."""
        clip_folder, trained_clip, retrieval = self._train_clip()
        facts = text.list_facts(self.material.objects)
        text.check_colors_untied(facts)
        plm_settings = plm.PlmSettings(**self.recipe["plm"])
        plm_folder = self.stages.run(
            "plm",
            self.recipe["plm"],
            ("pictures",),
            lambda folder: plm.train_plm(
                self.material.objects, facts, plm_settings, self.seed, self.console, folder
            ),
        )
        corpus = text.split_corpus(facts, plm_settings.held_out_share, self.seed)
        features = trained_clip.encode_images(self.material.images).numpy().astype(np.float16)
        laboratory = self._make_laboratory(plm_folder, clip_folder, features, corpus)
        folders = self._run_splits(laboratory, clip_folder)
        self._report(folders, retrieval, output, results_file)

    def _train_clip(self) -> tuple[Path, clip.Clip, Grid]:
        """Train CLIP, and return its folder, itself, and how well it finds pictures."""
        settings = clip.ClipSettings(**self.recipe["clip"])
        folder = self.stages.run(
            "clip",
            self.recipe["clip"],
            ("pictures",),
            lambda folder: clip.train_clip(self.material, settings, self.seed, self.console, folder),
        )
        trained = clip.Clip.load(folder)
        measured = clip.measure_clip(trained, self.material)
        retrieval = results.measure_grid(
            "CLIP: pictures found by name and by sentence",
            {name: f"{100 * value:.1f} %" for name, value in measured.items()},
        )
        print_grid(retrieval, self.console)
        return folder, trained, retrieval

    def _make_laboratory(
        self, plm_folder: Path, clip_folder: Path, features: NDArray[np.float16], corpus: text.Corpus
    ) -> plugin.Laboratory:
        """Return what trains plug-ins: the model, and one with a PLM that was never trained."""
        settings, material = plugin.PluginSettings(**self.recipe["plugin"]), self.material
        bank = FeatureBank(
            features=features,
            pictures=tuple(
                Picture(id=picture_id, caption=material.objects[row].name)
                for picture_id, row in zip(material.picture_ids, material.object_of.tolist(), strict=True)
            ),
        )
        config = XAdapterConfig(
            experts="vt",
            layers=tuple(settings.layers),
            adapter_width=settings.adapter_width,
            num_heads=settings.num_heads,
            retrieval=RetrievalConfig(mode="topk", k=settings.k),
            task="fill-mask",
        )
        model = XAdapterModel.create(plm=plm_folder, clip=clip_folder, config=config, bank=bank)
        torch.manual_seed(self.seed)
        random_plm = BertForMaskedLM(BertConfig.from_pretrained(plm_folder))
        random_plm.name_or_path = str(plm_folder)  # where its tokenizer is
        untrained = XAdapterModel.create(plm=random_plm, clip=clip_folder, config=config, bank=bank)
        return plugin.Laboratory(model, untrained, material, corpus, settings, self.seed, self.console)

    def _run_splits(self, laboratory: plugin.Laboratory, clip_folder: Path) -> list[Path]:
        """Train and measure on every split, the one that is shipped last, and return their folders."""
        settings, objects = laboratory.settings, self.material.objects

        def run_split(name: str, split: Split, split_seed: int) -> Path:
            def make(folder: Path) -> None:
                result = laboratory.run(split, split_seed, name)
                (folder / "result.json").write_text(json.dumps(results.to_json(result), indent=1))
                if name == "shipped":
                    held_out = [objects[row] for row in split.held_out]
                    size = shipping.write_checkpoint(
                        laboratory.model, clip_folder, objects, held_out, self.seed, folder / "checkpoint"
                    )
                    answers = laboratory.answers(split)
                    (folder / "eval.json").write_text(json.dumps(answers, indent=1))
                    self.console.print(f"  checkpoint of {size / 1e6:.2f} MB")

            return self.stages.run(name, [self.recipe["plugin"], split_seed], ("clip", "plm"), make)

        share, seed = settings.held_out_share, self.seed
        folders = [
            run_split(f"split-{number}", split_objects(objects, share, (), seed + number), seed + number)
            for number in range(1, settings.splits + 1)
        ]
        shipped = split_objects(objects, share, settings.always_held_out, seed)
        return [*folders, run_split("shipped", shipped, seed)]

    def _report(self, folders: list[Path], retrieval: Grid, output: Path, results_file: Path) -> None:
        """Put the checkpoint in its place, and write the tables."""
        *_, shipped_folder = folders
        with staged_folder(output, force=True, marker=RECORD_NAME) as staged:
            shutil.copytree(shipped_folder / "checkpoint", staged.path, dirs_exist_ok=True)
        *splits, shipped = (
            results.from_json(json.loads((folder / "result.json").read_text())) for folder in folders
        )
        grids = (
            results.color_grid(shipped, splits),
            language_grid([split.language for split in splits]),
            retrieval,
        )
        for grid in grids[:2]:
            print_grid(grid, self.console)
        write_results(results_file, "train.demo", grids, _NOTES, f"seed {self.seed}")
        total_s = sum(self.stages.elapsed_s(name) for name in self.stages.names)
        self.console.print(
            f"All stages took {total_s / 60:.1f} min. Checkpoint: {output}; tables: {results_file}; "
            f"questions and answers of the shipped split: {shipped_folder / 'eval.json'}"
        )


if __name__ == "__main__":
    main()
