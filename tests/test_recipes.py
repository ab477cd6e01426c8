"""The recipes run; that of the built-in checkpoint from pictures to checkpoint, on few objects."""

import csv
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from train.demo import pictures
from train.demo.__main__ import main
from train.demo.plugin import split_objects
from xadapter_export import XAdapterModel, export

ROOT = Path(__file__).parents[1]
RECIPE = """
seed = 7
coda_names = {}
[pictures]
packages = ["names@1", "keywords@1", "icons@1"]
groups = ["Objects"]
size = 32
[clip]
embed_dim = 16
patch_size = 16
vision_width = 16
vision_layers = 1
text_width = 16
text_layers = 1
head_width = 8
context_length = 24
batch_size = 8
steps = 3
learning_rate = 1e-3
weight_decay = 0.05
[plm]
hidden_size = 16
layers = 4
heads = 2
max_position_embeddings = 64
batch_size = 8
steps = 3
learning_rate = 1e-3
weight_decay = 0.01
mask_probability = 0.2
spelled_share = 0.1
held_out_share = 0.1
[plugin]
layers = [2, 3]
adapter_width = 8
num_heads = 2
k = 2
k_training = 4
steps = 2
color_batch = 8
fact_batch = 8
num_facts = 40
learning_rate = 2e-3
weight_decay = 0.01
splits = 1
held_out_share = 0.3
always_held_out = []
"""


def draw_packages(packages: Sequence[str], folder: Path) -> None:
    """Writes packages of the three kinds: objects that CoDa knows, each a square of its colour."""
    lines = (ROOT / "train" / "demo" / "coda_colors.csv").read_text(encoding="utf-8").splitlines()
    rows = list(csv.DictReader(line for line in lines if not line.startswith("#")))[:40]
    names = {f"e{i}": {"name": row["object"], "group": "Objects"} for i, row in enumerate(rows)}
    colors = [max(pictures.COLORS, key=lambda color: float(row[color])) for row in rows]  # used at once
    icons = {
        row["object"].replace(" ", "-"): {
            "body": f'<rect x="4" y="4" width="24" height="24" fill="{color}"/>'
        }
        for row, color in zip(rows, colors, strict=True)
    }
    files = {
        "names/package/data-by-emoji.json": names,
        "keywords/package/dist/emoji-en-US.json": {symbol: ["thing", "useful"] for symbol in names},
        "icons/package/icons.json": {"width": 32, "height": 32, "icons": icons},
    }
    assert len(packages) == len(files)
    for path, content in files.items():
        (folder / path).parent.mkdir(parents=True)
        (folder / path).write_text(json.dumps(content), encoding="utf-8")


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")  # a few objects separate anyhow
def test_the_recipe_of_the_builtin_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(pictures, "pack_packages", draw_packages)  # the only step that needs a registry
    (tmp_path / "recipe.toml").write_text(RECIPE, encoding="utf-8")
    places = {name: tmp_path / name for name in ("work", "output", "results", "recipe")}
    places["recipe"] = tmp_path / "recipe.toml"
    arguments = [part for name, path in places.items() for part in (f"--{name}", str(path))]
    monkeypatch.setattr(sys, "argv", ["train.demo", *arguments])
    main()
    assert "untrained PLM + V" in capsys.readouterr().out
    table = places["results"].read_text(encoding="utf-8")
    rows = (
        "chance",
        "majority",
        "frozen PLM",
        "same adapter, text only",
        "V-expert, shuffled pictures",
        "V + T",
    )
    assert all(f"| {row} |" in table for row in rows)
    result = export(XAdapterModel.from_pretrained(places["output"]), tmp_path / "bundle", ("vt", "none"))
    assert result.parity.passed

    main()  # every stage is kept
    assert capsys.readouterr().out.count("kept from an earlier run") == 6


def test_held_out_objects_share_no_word_with_training_objects() -> None:
    def make(name: str, color: int | None) -> pictures.DemoObject:
        shares = tuple(float(i == color) for i in range(11)) if color is not None else ()
        return pictures.DemoObject(name, (name, f"{name}s"), (), "Objects", name, shares)

    names = ["dog", "dog house", "red apple", "green apple", "apple tree", "cherry", "car", "race car"]
    objects = [make(name, index % 11 if index % 3 else None) for index, name in enumerate(names)]
    for seed in range(20):
        split = split_objects(objects, 0.4, (), seed)
        assert split.held_out
        held = {word.rstrip("s") for row in split.held_out for word in names[row].split()}
        assert all(held.isdisjoint(names[row].split()) for row in split.training)


@pytest.mark.parametrize("module", ["train.demo", "export.demo", "export.parity", "benchmarks.latency"])
def test_every_recipe_says_what_it_does(module: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", module, "--help"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "usage" in done.stdout.lower()


def test_recipes_are_not_shipped(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", "import train"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert "No module named 'train'" in done.stderr
