"""The recipes run, from data to table: on a few objects, on a few sentences."""

import csv
import json
import runpy
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from material import pictures
from material.splits import split_objects
from tests import ROOT
from train.demo.__main__ import main
from train.glue import __main__ as glue
from train.sst2_minilm.__main__ import main as sst2_minilm
from xadapter_export import XAdapterModel, export

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


def coda_rows() -> list[dict[str, str]]:
    lines = (ROOT / "material" / "coda_colors.csv").read_text(encoding="utf-8").splitlines()
    return list(csv.DictReader(line for line in lines if not line.startswith("#")))


def draw_packages(packages: Sequence[str], folder: Path) -> None:
    """Writes packages of the three kinds: objects that CoDa knows, each a square of its color."""
    rows = coda_rows()[:40]
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


COLOR_RECIPE = """
seed = 7
splits = 1
ablation_splits = 1
held_out_share = 0.3
prototypes = 16
[head]
steps = 2
batch_size = 8
learning_rate = 1e-3
mask_probability = 0.2
[training]
num_facts = 30
language_questions = 10
layers = [2, 3]
adapter_width = 8
num_heads = 2
k = 2
k_drawn_from = 4
max_steps = 1
ablation_steps = 1
batch_size = 8
learning_rate = 1e-3
mask_share = 0.01
favor_share = 0.0
[static]
layers = [2]
num_heads = 1
adapter_width = 16
layer = "sentence-query"
distill_weight = 1.0
distill_steps = 2
"""


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")  # a few objects separate anyhow
def test_the_color_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from train.color.__main__ import main as color

    monkeypatch.setattr(pictures, "pack_packages", draw_packages)
    (tmp_path / "demo.toml").write_text(RECIPE, encoding="utf-8")
    (tmp_path / "color.toml").write_text(COLOR_RECIPE, encoding="utf-8")
    items = [{"descriptor": "a", "item": row["object"], "label": "red"} for row in coda_rows()[:3]]
    (tmp_path / "memory.jsonl").write_text("\n".join(map(json.dumps, items)), encoding="utf-8")
    arguments = {
        "plm": "builtin",
        "memory-colors": tmp_path / "memory.jsonl",
        "work": tmp_path / "work",
        "results": tmp_path / "results.md",
        "recipe": tmp_path / "color.toml",
        "demo-work": tmp_path / "demo",
        "demo-recipe": tmp_path / "demo.toml",
    }
    given = [part for name, value in arguments.items() for part in (f"--{name}", str(value))]
    color(given, standalone_mode=False)
    printed = capsys.readouterr().out
    assert "9 prompts (VaLM)" in printed
    table = (tmp_path / "results.md").read_text(encoding="utf-8")
    nulls = (
        "V-expert, trained alone, 16 null rows",
        "same adapter, text only, 16 null rows",
        "null rows, M = 4",
    )
    for row in ("same adapter, text only", "V-expert, shuffled pictures", "K = 8", "V + T", *nulls):
        assert f"| {row} |" in table
    color(given, standalone_mode=False)
    assert "done in" not in capsys.readouterr().out  # every arm was kept


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


PLUGIN = """
layers = [4, 5]
adapter_width = 16
num_heads = 2
max_seq = 32
max_steps = 3
batch_size = 4
learning_rate = 1e-3
"""
REVIEWS = {
    "a warm and funny film": 1,
    "a joy to watch from the first scene": 1,
    "the best story of the year": 1,
    "bright , clever and moving": 1,
    "a dull and lazy film": 0,
    "a bore to watch from the first scene": 0,
    "the worst story of the year": 0,
    "flat , clumsy and cold": 0,
}
ARMS = ("frozen MiniLM + head", "+ same-size adapter without CLIP", "+ T-expert (built-in CLIP)")


def write_table(path: Path, rows: Iterable[Sequence[object]]) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join("\t".join(map(str, row)) + "\n" for row in rows), encoding="utf-8")


def accuracy(model: XAdapterModel, rows: Iterable[Sequence[object]]) -> float:
    """Share of texts, the last column of each row its label, that a model gets right, one at a time."""
    labels = model.config.labels
    right = []
    for *texts, label in rows:
        inputs = model.encode(*([str(text)] for text in texts))
        inputs.pop("mask_positions", None)
        with torch.no_grad():
            said = int(model(**inputs).logits.argmax())
        right.append(label in (said, labels[said]))
    return sum(right) / len(right)


def table_of(markdown: str) -> dict[str, list[str]]:
    """Cells of every row, by the row's name."""
    lines = [line for line in markdown.splitlines() if line.startswith("| ")]
    rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
    return {name: cells for name, *cells in rows}


@pytest.mark.slow
def test_the_recipe_of_sst2(tmp_path: Path) -> None:
    test = [*REVIEWS.items(), ("a film", 0), ("watch", 1)]  # whatever is said, not all of it is right
    for split, rows in (("train", REVIEWS.items()), ("dev", REVIEWS.items()), ("test", test)):
        write_table(tmp_path / "data" / f"{split}.tsv", rows)
    recipe = f"seeds = [5]\neval_every = 2\npatience = 2\n{PLUGIN}"
    (tmp_path / "recipe.toml").write_text(recipe, encoding="utf-8")
    places = {name: tmp_path / name for name in ("data", "work", "results")}
    places["recipe"] = tmp_path / "recipe.toml"
    arguments = [part for name, path in places.items() for part in (f"--{name}", str(path))]
    done = CliRunner().invoke(sst2_minilm, arguments)
    assert done.exit_code == 0, done.output
    text = places["results"].read_text(encoding="utf-8")
    table = table_of(text)
    bundle = "T-expert's bundle, onnxruntime fp32"
    assert {*ARMS, bundle} <= set(table)
    for number, arm in enumerate(ARMS):
        model = XAdapterModel.from_pretrained(places["work"] / "seed-5" / f"arm-{number}")
        found = accuracy(model, test)
        assert table[arm] == [f"{100 * found:.2f}", f"{100 * found:.2f} ± 0.00"], arm
    assert table[bundle] == table[ARMS[2]]
    assert "### SST-2 test accuracy, 10 sentences, %" in text

    again = CliRunner().invoke(sst2_minilm, arguments)
    assert again.exit_code == 0, again.output
    assert "load" not in again.output  # every run is kept
    assert places["results"].read_text(encoding="utf-8") == text
    lost = CliRunner().invoke(sst2_minilm, [*arguments, "--data", str(tmp_path / "nowhere")])
    assert lost.exit_code == 1
    assert "Error: no such data" in lost.output


def test_the_recipe_of_glue(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    header = ("index", "sentence1", "sentence2", "gold_label")
    pairs = [("it rains", "it is wet", "entailment"), ("it rains", "it is dry", "contradiction")]
    pairs += [("a dog runs", "it is brown", "neutral"), ("a dog runs", "an animal moves", "entailment")]
    other = [("she sings", "she is silent", "contradiction"), ("he cooks", "he likes it", "neutral")]
    other += [("he cooks", "he makes food", "entailment")]
    for stem, rows in (("train", pairs), ("dev_matched", pairs), ("dev_mismatched", other)):
        write_table(tmp_path / "data" / f"{stem}.tsv", [header, *((0, *row) for row in rows)])
    (tmp_path / "recipe.toml").write_text(f"seeds = [1, 2]\n{PLUGIN}", encoding="utf-8")
    places = {name: tmp_path / name for name in ("data", "work", "results")}
    places["recipe"] = tmp_path / "recipe.toml"
    arguments = [part for name, path in places.items() for part in (f"--{name}", str(path))]
    monkeypatch.setattr(sys, "argv", ["train.glue", "--task", "mnli", "--seeds", "5", *arguments])
    glue.main()
    text = places["results"].read_text(encoding="utf-8")
    matched, mismatched = text.split("### ")[1:]
    assert matched.startswith("GLUE mnli, dev set, 4 texts, accuracy, %")
    assert mismatched.startswith("GLUE mnli, mismatched, dev set, 3 texts, accuracy, %")
    models = [XAdapterModel.from_pretrained(places["work"] / "seed-5" / f"arm-{i}") for i in range(3)]
    for section, rows in ((matched, pairs), (mismatched, other)):
        table = table_of(section)
        for arm, model in zip(ARMS, models, strict=True):
            found = accuracy(model, rows)
            assert table[arm] == [f"{100 * found:.2f}", f"{100 * found:.2f} ± 0.00"], arm
    capsys.readouterr()
    glue.main()
    assert "load" not in capsys.readouterr().out  # every run is kept
    assert places["results"].read_text(encoding="utf-8") == text  # its section was replaced, not added

    monkeypatch.setattr(sys, "argv", ["train.glue", "--task", "mnli", "--data", str(tmp_path / "nowhere")])
    with pytest.raises(SystemExit, match="1"):
        glue.main()
    assert "no such data" in capsys.readouterr().err


RECIPES = [f"train.{name}" for name in ("demo", "color", "glue", "sst2_minilm")]


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")  # by another test
@pytest.mark.parametrize("module", [*RECIPES, "export.demo", "export.parity", "benchmarks.latency"])
def test_every_recipe_says_what_it_does(
    module: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [module, "--help"])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    assert stopped.value.code == 0
    assert "usage" in capsys.readouterr().out.lower()


def test_recipes_are_not_shipped(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", "import train"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert "No module named 'train'" in done.stderr
