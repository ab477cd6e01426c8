"""``xad-eval``: tables, JSON, folders, and one clear line for whatever is wrong."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from tests.repository.test_imports import HEAVY
from tests.tiny_bundle import write_bundle
from tests.tiny_checkpoint import make_model, write_parts
from xadapter_export.cli.evaluate import TRAINED_CONTROL, evaluate

COLORS = "object,color\nbanana,yellow\ncherry,red\nlime,green\n"
CODA = """object,plural,green,red,yellow
banana,bananas,0.1,0,0.9
cherry,cherry,0.1,0.8,0.1
lime,limes,0.7,0.1,0.2
"""
PROMPTS = "[DESCRIPTOR] [ITEM] is [MASK].\nthe color of [ITEM] is\n"
LABELED = "the lime is green\t0\na cherry\t1\nvery yellow banana\t1\n"

Run = Callable[..., Result]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs the command in a folder with small files of every kind."""
    files = {
        "colors.csv": COLORS,
        "coda.csv": CODA,
        "prompts.txt": PROMPTS,
        "text.txt": "the lime is green.\na cherry is red.\n",
        "labeled.tsv": LABELED,
        "empty.csv": "",
        "shades.csv": "object,shade\nbanana,yellow\n",
        "mauve.csv": "object,color\nbanana,mauve\n",
        "bad.tsv": "the lime\t7\n" + LABELED,
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return lambda *arguments: CliRunner().invoke(evaluate, [str(a) for a in arguments])


def color(model: Path | str, *options: str) -> list[str]:
    return ["color", str(model), "--data", "colors.csv", "--prompts", "prompts.txt", "--quiet", *options]


def rows(result: Result) -> dict[str, dict[str, Any]]:
    assert result.exit_code == 0, result.stderr
    return {row["name"]: row for row in json.loads(result.stdout)["rows"]}


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bundle(tmp_path_factory.mktemp("cli") / "classifier", task="text-classification")


def test_color_of_a_bundle(run: Run, tiny: Path) -> None:
    result = run(*color(tiny, "--controls", "--experts", "v"))
    assert result.exit_code == 0, result.stderr
    lines = [line.split("\u2502") for line in result.stdout.splitlines() if "\u2502" in line]
    table = {name.strip(): [cell.strip() for cell in cells] for name, *cells in lines}
    assert table["chance"] == ["33.3", "-"]
    assert table["V-expert"] == ["100.0", "0.0"]
    assert table["V-expert, shuffled memory"][0] == "0.0"
    assert "frozen PLM" in table
    assert "3 objects, 2 prompts, 3 colors" in result.stdout
    assert "candidates: green, red, yellow" in result.stdout
    assert TRAINED_CONTROL in result.stderr


def test_the_old_spelling_of_color_still_works_and_is_not_shown(run: Run, tiny: Path) -> None:
    new = color(tiny, "--json")
    assert rows(run("colour", *new[1:])) == rows(run(*new))
    assert "colour" not in run("--help").stdout


def test_an_empty_candidate_is_ignored(run: Run, tiny: Path) -> None:
    found = [
        run(*color(tiny, "--json", "--candidates", words))
        for words in ("green,red,yellow", "green, red,yellow,")
    ]
    assert rows(found[0]) == rows(found[1])


def test_json_alone_is_on_stdout(run: Run, tiny: Path) -> None:
    result = run(*color(tiny, "--json")[:-1], "--json", "--published")
    found = rows(result)
    assert found["V + T"]["answers"] == {
        "banana": ["yellow"] * 2,
        "cherry": ["red"] * 2,
        "lime": ["green"] * 2,
    }
    assert found["V + T"]["accuracy"] == 1.0
    assert found["published: X-adapter on BERT (Yariv et al.)"]["accuracy"] == 0.6


def test_progress_is_a_line_for_each_row_on_stderr(run: Run, tiny: Path) -> None:
    result = run(*[option for option in color(tiny) if option != "--quiet"])
    lines = [line.split("s  ")[1] for line in result.stderr.splitlines()]
    rows = ("frozen PLM", "V-expert", "T-expert", "V + T")
    assert [line.split(",")[0] for line in lines] == [
        "loading",
        *(part for row in rows for part in (row, "6 of 6")),
    ]


def test_objects_are_chosen(run: Run, tiny: Path) -> None:
    def asked(*options: str) -> list[str]:
        return list(rows(run(*color(tiny, "--json", "--experts", "v", *options)))["V-expert"]["answers"])

    Path("seen.txt").write_text("Limes\n")
    Path("colors.csv").write_text(COLORS + "fruit,red\n")
    assert asked("--in-bank") == ["banana", "cherry", "lime"]
    assert asked("--objects", "lime,fruit") == ["lime", "fruit"]
    assert asked("--in-bank", "--not-in", "seen.txt") == ["banana", "cherry"]
    nothing = run(*color(tiny, "--objects", "cloud"))
    assert nothing.exit_code == 1
    assert "no objects are left to evaluate: colors.csv" in nothing.stderr


def test_a_folder_of_results(run: Run, tiny: Path, tmp_path: Path) -> None:
    result = run(*color(tiny, "-o", "results"))
    assert result.exit_code == 0, result.stderr
    assert "results: results" in result.stdout
    names = {"results.json", "results.md", "confusion.png", "objects.png"}
    assert {path.name for path in (tmp_path / "results").iterdir()} == names
    stored = json.loads((tmp_path / "results" / "results.json").read_text(encoding="utf-8"))
    assert stored == json.loads(run(*color(tiny, "--json")).stdout)
    assert "| V-expert | 100.0 | 0.0 |" in (tmp_path / "results" / "results.md").read_text(encoding="utf-8")

    again = run(*color(tiny, "-o", "results"))
    assert again.exit_code == 1
    assert "output path already exists" in again.stderr
    assert run(*color(tiny, "-o", "results", "--force")).exit_code == 0
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    refused = run(*color(tiny, "-o", "mine", "--force"))
    assert "xadapter-export did not write" in refused.stderr
    assert (tmp_path / "mine" / "letter.txt").exists()


def test_coda_reports_how_near_the_distributions_are(run: Run, tiny: Path, tmp_path: Path) -> None:
    arguments = ["coda", tiny, "--data", "coda.csv", "--templates", "prompts.txt", "--quiet"]
    found = rows(run(*arguments, "--json", "-o", "results", "--controls"))
    assert found["V-expert"]["accuracy"] == 1.0
    assert found["V-expert"]["jensen_shannon"] < found["V-expert, shuffled memory"]["jensen_shannon"]
    assert found["chance"]["spearman"] is None
    assert (tmp_path / "results" / "objects.png").stat().st_size > 5000
    table = run(*arguments)
    assert "Kendall tau" in table.stdout
    assert "divergence, base 2" in table.stdout


def test_mlm_reports_pseudo_perplexity(run: Run, tiny: Path, tmp_path: Path) -> None:
    result = run("mlm", tiny, "--data", "text.txt", "--limit", "1", "--quiet", "--json", "-o", "results")
    found = rows(result)
    assert json.loads(result.stdout)["counts"] == {"texts": 1, "tokens": 5}
    assert found["frozen PLM"]["pseudo_perplexity"] > 1
    assert (tmp_path / "results" / "results.md").is_file()
    one = run("mlm", tiny, "--data", "text.txt", "--limit", "1", "--controls", "--quiet")
    assert one.exit_code == 1
    assert "a shuffled memory needs at least two texts" in one.stderr


def test_glue_scores_a_classifier(run: Run, classifier: Path, tmp_path: Path) -> None:
    arguments = ["--quiet", "--json"]
    found = rows(run("glue", classifier, "--data", "labeled.tsv", *arguments))
    assert set(found) == {"majority", "experts off", "V-expert", "T-expert", "V + T"}
    assert found["majority"]["accuracy"] == pytest.approx(2 / 3)
    assert {"accuracy", "f1"} <= set(found["V + T"])
    folder = tmp_path / "sst2"
    folder.mkdir()
    (folder / "dev.tsv").write_text("sentence\tlabel\n" + LABELED)
    wrong = run("glue", classifier, "--task", "sst2", "--data", folder, *arguments)
    assert wrong.exit_code == 1
    assert "the model and the data have different labels" in wrong.stderr
    assert "(expected sweet, sour, got negative, positive)" in wrong.stderr


def test_mnli_has_two_validation_sets(run: Run, tmp_path: Path) -> None:
    labels = ("entailment", "neutral", "contradiction")
    model = make_model(tmp_path / "parts", task="text-classification", labels=labels)
    model.save_pretrained(tmp_path / "checkpoint", self_contained=True)
    data = tmp_path / "mnli"
    data.mkdir()
    for name in ("dev_matched", "dev_mismatched"):
        text = "".join(
            f"a lime is {word}\tthe lime is green\t{label}\n"
            for word, label in zip("aaa", labels, strict=True)
        )
        (data / f"{name}.tsv").write_text("sentence1\tsentence2\tgold_label\n" + text)
    arguments = [
        "glue",
        "checkpoint",
        "--task",
        "mnli",
        "--data",
        data,
        "--quiet",
        "--json",
        "--experts",
        "vt",
    ]
    result = run(*arguments)
    assert set(rows(result)["V + T"]) == {"name", "experts", "accuracy", "accuracy_mismatched"}
    assert rows(result)["V + T"]["accuracy"] == pytest.approx(1 / 3)
    assert json.loads(result.stdout)["counts"] == {"texts": 3, "mismatched texts": 3}
    (data / "dev_mismatched.tsv").unlink()
    assert set(rows(run(*arguments))["V + T"]) == {"name", "experts", "accuracy"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("color TINY --data empty.csv", "the data is empty: empty.csv"),
        ("color TINY --data missing.csv", "the file cannot be read: missing.csv"),
        (
            "color TINY --data shades.csv",
            "a column is missing: shades.csv (expected label or color or colour",
        ),
        ("color TINY --data mauve.csv", "a candidate is not one token of the language model: 'mauve'"),
        (
            "color TINY --data mauve.csv --candidates red,green",
            "an object's color is not among the candidates: mauve.csv, banana",
        ),
        ("color TINY --data colors.csv --prompts nowhere", "the prompts cannot be read: nowhere"),
        (
            "color CLASSIFIER --data colors.csv",
            "the model was made for another task: classifier (expected fill-mask",
        ),
        (
            "color ONLY_T --data colors.csv --experts v",
            "does not have this expert set: v (expected one of t)",
        ),
        (
            "color ONLY_T --data colors.csv --in-bank",
            "--in-bank needs a model that retrieves images: only_t",
        ),
        ("color . --data colors.csv", "xadapter.json is missing"),
        ("coda TINY --data colors.csv", "a column is missing: colors.csv (expected plural"),
        ("mlm TINY --data empty.csv", "the file has no text: empty.csv"),
        (
            "glue CLASSIFIER --task sst3 --data labeled.tsv",
            "one of cola, sst2, mrpc, qqp, stsb, mnli, qnli, rte, wnli",
        ),
        ("glue CLASSIFIER --data bad.tsv", "a label is out of range: bad.tsv, row 1"),
        ("glue CLASSIFIER --data empty.csv", "the file has no rows: empty.csv"),
        ("glue CLASSIFIER --data labeled.tsv --text-column words", "the column with the text is missing"),
        (
            "glue TINY --data labeled.tsv",
            "for another task: bundle (expected text-classification, got fill-mask)",
        ),
        ("mlm TINY --data text.txt --control broken", "--control broken: expected NAME=MODEL."),
        (
            "mlm TINY --data text.txt --control V-expert=TINY",
            "--control V-expert: the table already has a row with this name.",
        ),
    ],
)
def test_what_is_wrong_is_one_line_and_leaves_nothing(
    arguments: str, message: str, run: Run, tiny: Path, classifier: Path, tmp_path: Path
) -> None:
    models = {"TINY": tiny, "CLASSIFIER": classifier}
    if "ONLY_T" in arguments:
        models["ONLY_T"] = write_bundle(tmp_path.with_name(f"{tmp_path.name}-models") / "only_t", sets=("t",))
    for name, folder in models.items():
        arguments = arguments.replace(name, str(folder))
    before = sorted(tmp_path.iterdir())
    result = run(*arguments.split(), "-o", "results", "--quiet")
    assert result.exit_code in {1, 2}
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert result.stdout == ""
    assert sorted(tmp_path.iterdir()) == before


def test_a_control_is_another_model(run: Run, tiny: Path) -> None:
    found = rows(run(*color(tiny, "--json", "--experts", "v", "--control", f"{TRAINED_CONTROL}={tiny}")))
    assert found[TRAINED_CONTROL]["experts"] == "vt"
    assert found[TRAINED_CONTROL]["accuracy"] == 1.0


def test_a_checkpoint_without_a_record_has_no_trained_control(run: Run, tmp_path: Path) -> None:
    make_model(tmp_path / "parts").save_pretrained(tmp_path / "checkpoint", self_contained=True)
    text = ["mlm", "checkpoint", "--data", "text.txt", "--controls", "--experts", "v", "--quiet", "--json"]
    untrained = run(*text)
    assert TRAINED_CONTROL not in rows(untrained)
    assert "checkpoint has no train.json" in untrained.stderr


@pytest.mark.long
def test_the_control_of_a_checkpoint_is_trained_once(run: Run, tmp_path: Path) -> None:
    from xadapter_export.training import read_config, train

    def train_for(seed: int) -> None:
        plm, clip, bank = (str(tmp_path / "parts" / name) for name in ("plm", "clip", "bank"))
        settings = {
            **{"output": "checkpoint", "plm": plm, "clip": clip, "bank": bank, "train_files": ["text.txt"]},
            **{"experts": "vt", "layers": [1, 2], "adapter_width": 8, "num_heads": 2, "k": 3, "force": True},
            **{"max_steps": 2, "batch_size": 2, "learning_rate": 5e-2, "seed": seed},
        }
        train(read_config(None, settings))

    write_parts(tmp_path / "parts")
    train_for(1)
    text = ["mlm", "checkpoint", "--data", "text.txt", "--controls", "--experts", "v", "--quiet", "--json"]
    first = run(*text)
    assert "trained control: checkpoint-control" in first.stderr
    record = json.loads(Path("checkpoint-control/train.json").read_text(encoding="utf-8"))
    assert record["config"]["control"]
    assert record["config"]["seed"] == 1
    written = Path("checkpoint-control/xadapter.safetensors").stat().st_mtime_ns
    second = run(*text)
    assert "trained control" not in second.stderr
    assert Path("checkpoint-control/xadapter.safetensors").stat().st_mtime_ns == written
    assert rows(first)[TRAINED_CONTROL] == rows(second)[TRAINED_CONTROL]
    losses = {name: row["loss"] for name, row in rows(first).items()}
    names = {"frozen PLM", "V-expert", "V-expert, shuffled memory", TRAINED_CONTROL}
    assert set(losses) == names
    assert len({round(loss, 9) for loss in losses.values()}) == 4  # every row is another model or memory
    train_for(2)
    other = run(*text)
    assert other.exit_code == 1
    assert "the existing control belongs to another training run: checkpoint-control" in other.stderr
    assert Path("checkpoint-control/xadapter.safetensors").stat().st_mtime_ns == written


@pytest.mark.long
def test_the_control_of_a_distilled_checkpoint_is_found_again(run: Run, tmp_path: Path) -> None:
    from xadapter_export.training import read_config, train

    plm, clip, bank = write_parts(tmp_path / "parts")
    settings = {
        **{"output": "checkpoint", "plm": str(plm), "clip": str(clip), "bank": str(bank)},
        **{"train_files": ["text.txt"], "experts": "v", "retrieval": "static", "layers": [1, 2]},
        **{"adapter_width": 8, "num_heads": 2, "max_steps": 1, "batch_size": 2},
        **{"distill_weight": 1.0, "distill_steps": 2},
    }
    train(read_config(None, settings))
    text = ["mlm", "checkpoint", "--data", "text.txt", "--controls", "--experts", "v", "--quiet", "--json"]
    assert "trained control: checkpoint-control" in run(*text).stderr
    assert TRAINED_CONTROL in rows(run(*text))


@pytest.mark.long
def test_a_bundle_is_scored_with_everything_heavy_blocked(run: Run, tiny: Path, classifier: Path) -> None:
    blocked = [name for name in HEAVY if name != "sklearn"]
    code = f"""
import sys
class Blocked:  # scipy looks for torch in sys.modules, so a None there would not do
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {blocked}:
            raise ImportError(name)
sys.meta_path.insert(0, Blocked())
from xadapter_export.cli.evaluate import evaluate
tiny, classifier = {str(tiny)!r}, {str(classifier)!r}
prompts = ["prompts.txt", "--controls", "-o", "results"]
for arguments in (
    ["color", tiny, "--data", "colors.csv", "--prompts", *prompts],
    ["coda", tiny, "--data", "coda.csv", "--templates", "prompts.txt"],
    ["mlm", tiny, "--data", "text.txt"],
    ["glue", classifier, "--data", "labeled.tsv"],
):
    evaluate(arguments, standalone_mode=False)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("frozen PLM") == 3


def test_help_imports_nothing_heavy() -> None:
    code = """
import sys
from click.testing import CliRunner
from xadapter_export.cli.evaluate import evaluate
for command in ("color", "coda", "glue", "mlm"):
    assert "--control NAME=MODEL" in CliRunner().invoke(evaluate, [command, "--help"]).output
print(*sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not set(done.stdout.split()) & {
        *HEAVY,
        "numpy",
        "scipy",
        "matplotlib",
        "PIL",
        "onnxruntime",
        "rich.table",
    }
