"""``xad-train`` as its user sees it: settings from file and flags, progress, results, and what goes wrong."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from tests.repository.test_imports import HEAVY
from tests.tiny_checkpoint import make_plm, write_parts
from xadapter_export import XAdapterModel
from xadapter_export.cli.main import xad
from xadapter_export.cli.train import train
from xadapter_export.exporters.judge.calibration import read_calibration
from xadapter_export.training.config import TABLES, TrainConfig, all_flags
from xadapter_export.training.trainer import XAdapterTrainer

pytestmark = pytest.mark.long  # every test exports or trains

TEXTS = "the color of a banana is green.\na fruit is very very green.\nthe banana is a fruit.\n"
CONFIG = """
plm = "plm"
clip = "clip"
bank = "bank"
max_steps = 2
batch_size = 4
log_every = 1

[plugin]
experts = "v"
layers = [1, 2]
adapter_width = 16
num_heads = 2
k = 3

[data]
train_files = ["text.txt"]
"""
LABELED = "a fruit\tno\ngreen banana\tyes\nvery green\tyes\n"

Run = Callable[..., Result]


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("parts")
    write_parts(folder)
    return folder


@pytest.fixture
def run(parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs the command in a folder with parts, texts and ``run.toml``, its config unless told otherwise."""
    for name in ("plm", "clip", "bank"):
        (tmp_path / name).symlink_to(parts / name)
    files = {"text.txt": TEXTS, "run.toml": CONFIG, "labeled.tsv": LABELED}
    for name, text in files.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    monkeypatch.chdir(tmp_path)

    def invoke(*arguments: object, config: str | None = "run.toml") -> Result:
        named = [] if config is None else ["--config", config]
        return CliRunner().invoke(train, [*named, *map(str, arguments)])

    return invoke


def failed(result: Result, code: int = 1) -> str:
    """The one line on stderr of a command that failed as it should."""
    assert result.exit_code == code, result.output
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    lines = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    assert len(lines) == 1, result.stderr
    assert result.stderr.endswith(f"{lines[0]}\n")
    return lines[0]


def calibration() -> list[dict[str, str]]:
    """The texts that the checkpoint carries for its export."""
    text = Path("plugin/calibration.jsonl").read_text("utf-8")
    assert XAdapterModel.from_pretrained("plugin").calibration == text
    return sorted(map(json.loads, text.splitlines()), key=str)


def test_results_are_on_stdout_and_the_rest_on_stderr(run: Run) -> None:
    result = run("-o", "plugin")
    assert result.exit_code == 0, result.stderr
    assert re.match(r"loss: from \d+\.\d{3} to \d+\.\d{3} in 2 steps\n", result.stdout)
    assert "the frozen weights are unchanged (hashes compared)" in result.stdout
    assert re.search(r"^checkpoint: plugin\b", result.stdout, re.MULTILINE)
    assert result.stdout.endswith("\nnext: xad-export plugin\n")
    stages = re.findall(r"^ *\d+\.\d s  (\w+)", result.stderr, re.MULTILINE)
    assert list(dict.fromkeys(stages)) == ["load", "cache", "train", "prove", "save"]
    assert "step 2 of 2" in result.stderr
    assert XAdapterModel.from_pretrained("plugin").config.layers == (1, 2)


def test_json_alone_is_on_stdout(run: Run) -> None:
    result = run("-o", "plugin", "--json", "--quiet")
    assert result.exit_code == 0, result.stderr
    assert result.stderr == ""
    found = json.loads(result.stdout)
    assert found["checkpoint"] == "plugin"
    assert found["record"] == json.loads(Path("plugin/train.json").read_text(encoding="utf-8"))
    assert found["record"]["steps"] == 2
    assert [entry["step"] for entry in found["record"]["curve"] if "loss" in entry] == [1, 2]


def test_flags_win_over_the_config(run: Run) -> None:
    flags = ["--layers", 2, "--max-steps", 3, "--no-cache-hidden", "--favor-words", "green", "--seed", 11]
    result = run("-o", "plugin", *flags, "--json", "--quiet")
    assert result.exit_code == 0, result.stderr
    used = json.loads(result.stdout)["record"]["config"]
    plugin = used["plugin"]
    assert (plugin["layers"], used["max_steps"], used["seed"]) == ([2], 3, 11)
    assert (used["cache_hidden"], used["data"]["favor_words"]) == (False, ["green"])
    assert (plugin["adapter_width"], plugin["k"], used["learning_rate"]) == (
        16,
        3,
        1e-3,
    )  # of file and defaults
    assert not list(Path("plugin.run/cache").glob("hidden-*"))


def test_everything_can_be_said_by_flags(run: Run) -> None:
    result = run(
        *("--plm", "plm", "--clip", "clip", "--experts", "t", "--adapter-width", 8, "--num-heads", 2),
        *("--train-files", "text.txt", "--train-files", "more.jsonl", "--train-weights", 2),
        *("--train-weights", 1, "--max-steps", 1, "-o", "plugin", "--json", "--quiet"),
        config=None,
    )
    assert "no such file: more.jsonl" in failed(result)
    Path("more.jsonl").write_text('{"text": "a [MASK] fruit", "answers": "green"}\n')
    result = run(
        *("--plm", "plm", "--clip", "clip", "--experts", "t", "--adapter-width", 8, "--num-heads", 2),
        *("--train-files", "text.txt", "--train-files", "more.jsonl", "--train-weights", 2),
        *("--train-weights", 1, "--max-steps", 1, "-o", "plugin", "--json", "--quiet"),
        config=None,
    )
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["record"]["config"]["data"]["train_weights"] == [2, 1]
    assert calibration() == sorted(
        [{"sentence": text} for text in (*TEXTS.splitlines(), "a [MASK] fruit")], key=str
    )


def test_a_classifier_says_how_it_does_on_what_was_held_out(run: Run) -> None:
    task = ["--task", "text-classification", "--train-files", "labeled.tsv", "--eval-file", "labeled.tsv"]
    result = run("-o", "plugin", *task)
    assert result.exit_code == 0, result.stderr
    assert re.search(
        r"^held out: loss \d\.\d{4}, accuracy \d\.\d{4}, f1 \d\.\d{4}", result.stdout, re.MULTILINE
    )
    assert XAdapterModel.from_pretrained("plugin").config.labels == ("no", "yes")
    texts = [line.split("\t")[0] for line in LABELED.splitlines()]
    assert calibration() == sorted([{"sentence": text} for text in texts], key=str)


def test_a_classifier_of_pairs_carries_pairs_for_its_export(run: Run) -> None:
    pairs = [("a fruit", "green banana"), ("very green", "a fruit"), ("banana", "a banana")]
    lines = [f"{text},{pair},{number % 2}" for number, (text, pair) in enumerate(pairs)]
    Path("pairs.csv").write_text("sentence1,sentence2,label\n" + "\n".join(lines) + "\n", encoding="utf-8")
    task = ["--task", "text-classification", "--train-files", "pairs.csv", "--text-column", "sentence1"]
    result = run("-o", "plugin", *task, "--pair-column", "sentence2", "--max-steps", 1)
    assert result.exit_code == 0, result.stderr
    assert calibration() == sorted([{"sentence1": a, "sentence2": b} for a, b in pairs], key=str)
    read = read_calibration(XAdapterModel.from_pretrained("plugin"), None, "text-classification")
    found = [(half.texts, half.pairs or ()) for half in (read.made_with, read.compared_on)]
    assert {pair for half in found for pair in zip(*half, strict=True)} == set(pairs)


def test_help_lists_every_setting_and_imports_nothing_heavy() -> None:
    code = """
import sys
from click.testing import CliRunner
from xadapter_export.cli.train import train
print(CliRunner().invoke(train, ["--help"]).output)
print("modules:", *sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    shown, _, modules = done.stdout.partition("modules:")
    options = set(re.findall(r"--[a-z][a-z-]*", shown))
    assert {f"--{name.replace('_', '-')}" for name in all_flags()} <= options
    held = [TrainConfig.model_fields, *(TABLES[table].model_fields for table in TABLES)]
    assert len(all_flags()) == sum(map(len, held)) - len(TABLES) - 1  # the tables themselves, and [trainer]
    words = " ".join(shown.split())
    for name, (_, _, field) in all_flags().items():
        assert str(field.description).split(".")[0][:40].split("-")[0].strip() in words, name
    assert not set(modules.split()) & {*HEAVY, "numpy", "datasets", "accelerate"}


def test_the_group_knows_it() -> None:
    result = CliRunner().invoke(xad, ["train", "--plm", "nowhere"])
    assert result.exit_code == 1
    assert (
        "the setting output is missing: the flags; give --output, or output in the --config file"
        in result.stderr
    )


# ------------------------------------------------------------------------------------------ Ctrl-C


def test_ctrl_c_ends_with_130_and_the_same_command_goes_on(run: Run, tmp_path: Path) -> None:
    arguments = ["--config", "run.toml", "-o", "plugin", "--max-steps", "300", "--log-every", "50"]
    line = [sys.executable, "-m", "xadapter_export.cli.train", *arguments]
    with subprocess.Popen(
        line, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        for text in process.stderr:
            if "step 30 of 300" in text:
                process.send_signal(signal.SIGINT)
                break
        stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    assert stdout == ""
    assert "Traceback" not in stderr
    last = stderr.splitlines()[-1]
    found = re.search(
        r"stopped after step (\d+) of 300: plugin\.run; run the same command again to resume", last
    )
    assert found, last
    assert not Path("plugin").exists()

    other = run("-o", "plugin", "--max-steps", 301)
    assert "unfinished run with other settings" in failed(other)
    again = run("-o", "plugin", "--max-steps", 300, "--log-every", 50)
    assert again.exit_code == 0, again.stderr
    steps = [int(step) for step in re.findall(r"step (\d+) of 300", again.stderr)]
    assert min(steps) > int(found[1]) >= 30
    assert max(steps) == 300
    curve = json.loads(Path("plugin/train.json").read_text(encoding="utf-8"))["curve"]
    assert [entry["step"] for entry in curve if "loss" in entry] == [50, 100, 150, 200, 250, 300]


# ------------------------------------------------------------------------------------------ mistakes


@pytest.mark.parametrize(
    ("table", "line", "message"),
    [
        ("", "learning_rte = 0.1", "unknown setting: bad.toml, learning_rte; did you mean learning_rate?"),
        ("", "batchsize = 4", "unknown setting: bad.toml, batchsize; did you mean batch_size?"),
        ("", "num_heads = 4", "setting: bad.toml, num_heads; did you mean num_heads in [plugin]?"),
        ("", "distill_steps = 4", "bad.toml, distill_steps; did you mean steps in [distill]?"),
        ("plugin", "widht = 4", "unknown setting: bad.toml, plugin.widht; did you mean "),
        ("plugin", "batch_size = 4", "plugin.batch_size; did you mean batch_size above the first table?"),
        ("data", "mask_shar = 0.1", "unknown setting: bad.toml, data.mask_shar; did you mean mask_share?"),
        ("distill", "weigth = 0.1", "unknown setting: bad.toml, distill.weigth; did you mean weight?"),
        ("", 'batch_size = "many"', "batch_size: Input should be a valid integer"),
        ("", "epochs = 0.0", "epochs: Input should be greater than 0"),
        ("", "patience = 3", "patience needs an eval_file: bad.toml"),
        ("", "plugin = 3", "the config cannot be read: bad.toml"),
        ("plugin", "layers = [9]", "layer 9: PLM plm has layers 0 to 2"),
        (
            "plugin",
            "null_rows = 4",
            "layer token-query has no null_rows; choose one that has, such as null-rows",
        ),
        (
            "plugin",
            'layer = "null-rows"\nnull_rows = 0',
            "null_rows: Input should be greater than or equal to 1",
        ),
        ("plugin", "k = 1000", "retrieval k=1000, but the bank has 30 pictures"),
        ("plugin", "k = ", "the config cannot be read: bad.toml"),
        ("trainer", 'optm = "sgd"', "unknown setting of the trainer: [trainer], optm; did you mean optim?"),
        (
            "trainer",
            "learning_rate = 1.0",
            "has another name here: [trainer], learning_rate; use learning_rate",
        ),
        ("trainer", "per_device_train_batch_size = 2", "another name here: [trainer], per_device_train"),
        ("trainer", 'output_dir = "/tmp"', "another name here: [trainer], output_dir; use run"),
        (
            "trainer",
            "push_to_hub = true",
            "xad-train decides this setting of the trainer: [trainer], push_to",
        ),
        ("trainer", 'hub_model_id = "a/b"', "xad-train decides this setting of the trainer: [trainer], hub_"),
        (
            "trainer",
            'deepspeed = "ds.json"',
            "xad-train decides this setting of the trainer: [trainer], deep",
        ),
        ("trainer", 'resume_from_checkpoint = "x"', "xad-train decides this setting of the trainer"),
        (
            "trainer",
            'report_to = "nothing"',
            "transformers refuses the settings: [trainer] (got nothing is not",
        ),
        ("trainer", "label_smoothing_factor = 0.1", "xad-train decides this setting of the trainer"),
        ("trainer", 'optim = "nothing"', "transformers refuses the settings: [trainer] (got "),
    ],
)
def test_a_setting_that_makes_no_sense(table: str, line: str, message: str, run: Run) -> None:
    kept = [entry for entry in CONFIG.splitlines() if entry.split(" ")[0] != line.split(" ")[0]]
    place = kept.index(f"[{table}]") + 1 if f"[{table}]" in kept else 0
    if table and not place:
        kept.append(f"[{table}]")
        place = len(kept)
    kept.insert(place, line)
    Path("bad.toml").write_text("\n".join(kept), encoding="utf-8")
    assert message in failed(run("-o", "plugin", "--quiet", config="bad.toml"))
    assert not Path("plugin").exists()


def test_a_flag_that_does_not_exist_is_a_mistake_of_usage(run: Run) -> None:
    result = run("-o", "plugin", "--learning-rte", 1)
    assert (result.exit_code, result.stdout) == (2, "")
    assert "No such option" in result.stderr
    assert "--learning-rate" in result.stderr
    choice = run("-o", "plugin", "--experts", "tv")
    assert choice.exit_code == 2
    assert "'tv' is not one of" in choice.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--plm no/such/folder", "PLM no/such/folder could not be loaded"),
        ("--clip no/such/folder", "CLIP no/such/folder is neither a folder nor a reachable hub id"),
        ("--bank nowhere", "bank: nowhere/bank.safetensors is missing"),
        ("--train-files nowhere.txt", "no such file: nowhere.txt (expected texts to train on)"),
        ("--train-files empty.txt", "the file has no text: empty.txt"),
        (
            "--train-files labeled.csv",
            "the column with the text is missing: labeled.csv",
        ),
        ("--train-files broken.jsonl", "the file is not JSON lines: broken.jsonl, line 1"),
        ("--task text-classification --train-files nothing.tsv", "the file has no rows: nothing.tsv"),
        (
            "--task text-classification --train-files labeled.tsv --labels no --labels maybe",
            "a label is out of range: labeled.tsv, row 2 (expected one of no, maybe, or 0 to 1, got yes)",
        ),
        ("--task text-classification --glue sst3", "unknown GLUE task (expected one of cola, sst2"),
        (
            "--plm headless",
            "PLM headless has no MLM head, which fill-mask needs (got 6 missing weights, first",
        ),
        ("--max-seq 500", "max_seq is longer than the PLM's longest input"),
    ],
)
def test_what_is_wrong_is_one_line_and_leaves_nothing(
    arguments: str, message: str, run: Run, parts: Path
) -> None:
    if "headless" in arguments:
        plm: Any = make_plm("bert", Path("headless"))
        plm.bert.save_pretrained("headless")
    files = {
        "nothing.tsv": "",
        "empty.txt": "\n  \n\n",
        "labeled.csv": "words,label\na,1\n",
        "broken.jsonl": '{"text": "a',
    }
    for name, text in files.items():
        Path(name).write_text(text, encoding="utf-8")
    before = sorted(Path().iterdir())
    assert message in failed(run("-o", "plugin", "--quiet", *arguments.split()))
    assert sorted(Path().iterdir()) == before


def test_the_trainer_table_goes_to_the_trainer(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    made = XAdapterTrainer.__init__

    def watch(self: XAdapterTrainer, **settings: Any) -> None:
        made(self, **settings)
        seen.append((self.args, dict(os.environ)))

    monkeypatch.setattr(XAdapterTrainer, "__init__", watch)
    monkeypatch.delenv("WANDB_DIR", raising=False)
    table = '[trainer]\noptim = "sgd"\nlr_scheduler_type = "polynomial"\nadam_beta2 = 0.9\n'
    Path("run.toml").write_text(f"{CONFIG}{table}", encoding="utf-8")
    result = run("-o", "plugin", "--quiet", "--json")
    assert result.exit_code == 0, result.stderr
    ((arguments, environment),) = seen
    assert (arguments.optim, arguments.lr_scheduler_type, arguments.adam_beta2) == ("sgd", "polynomial", 0.9)
    assert environment["WANDB_DIR"] == str(Path("plugin.run").resolve())
    assert "WANDB_DIR" not in os.environ
    trainer = json.loads(result.stdout)["record"]["config"]["trainer"]
    assert trainer == {"optim": "sgd", "lr_scheduler_type": "polynomial", "adam_beta2": 0.9}
    assert sorted(path.name for path in Path().iterdir() if "plugin" in path.name) == ["plugin", "plugin.run"]


# ------------------------------------------------------------------------------------------ ablations

ARMS = """
[[arm]]
name = "K = 3"

[[arm]]
name = "wide, no cache"
cache_hidden = false
plugin = { adapter_width = 32 }

[[arm]]
name = "control"
control = true
"""


def test_arms_are_trained_with_each_seed_and_compared(run: Run) -> None:
    config = CONFIG.replace("[data]", '[data]\neval_file = "text.txt"')
    Path("arms.toml").write_text(f"seeds = [1, 2]\n{config}{ARMS}", encoding="utf-8")
    result = run("-o", "ablation", config="arms.toml")
    assert result.exit_code == 0, result.stderr
    assert "ablation: plm on text.txt (3 arms, 2 seeds)" in result.stdout
    assert [name in result.stdout for name in ("K = 3", "wide, no cache", "control")] == [True] * 3
    assert result.stdout.endswith("results: ablation\n")
    found = json.loads(Path("ablation/results.json").read_text("utf-8"))
    rows = {row["name"]: row for row in found["rows"]}
    for name, folder in (("K = 3", "k-3"), ("wide, no cache", "wide-no-cache"), ("control", "control")):
        losses = []
        for seed in (1, 2):
            record = json.loads(Path(f"ablation/{folder}/seed-{seed}/train.json").read_text("utf-8"))
            assert record["config"]["seed"] == seed
            losses.append([entry["eval_loss"] for entry in record["curve"] if "eval_loss" in entry][-1])
            assert rows[name]["seeds"][str(seed)] == {"loss": losses[-1]}
        assert rows[name]["loss"] == pytest.approx(sum(losses) / 2)
        assert rows[name]["loss_sd"] == pytest.approx(abs(losses[0] - losses[1]) / 2**0.5)
    assert rows["wide, no cache"]["trained_parameters"] > rows["K = 3"]["trained_parameters"]
    assert rows["wide, no cache"]["changes"]["plugin"] == {"adapter_width": 32}
    table = Path("ablation/results.md").read_text("utf-8")
    assert f"| K = 3 | {rows['K = 3']['loss']:.4f} | {rows['K = 3']['loss_sd']:.4f} | 2 |" in table
    # The same command again trains nothing, and one more arm trains that one alone.
    before = Path("ablation/k-3/seed-1/xadapter.safetensors").stat().st_mtime_ns
    text = Path("arms.toml").read_text("utf-8")
    Path("arms.toml").write_text(f'{text}\n[[arm]]\nname = "K = 1"\nplugin = {{ k = 1 }}\n', encoding="utf-8")
    again = run("-o", "ablation", "--json", config="arms.toml")
    assert again.exit_code == 0, again.stderr
    assert again.stderr.count("  save ") == 2
    more = {row["name"]: row for row in json.loads(again.stdout)["rows"]}
    assert {name: more[name] for name in rows} == rows
    assert Path("ablation/k-3/seed-1/xadapter.safetensors").stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("arms", "message"),
    [
        ("seeds = [1, 1]", "seeds is no list of different numbers: arms.toml (got [1, 1])"),
        ("seeds = []", "seeds is no list of different numbers"),
        (
            '[[arm]]\nname = "a"\n[[arm]]\nname = "A!"',
            "an arm needs a name that no other has: arms.toml, arm 5",
        ),
        ("[[arm]]\ncontrol = true", "an arm needs a name that no other has: arms.toml, arm 4"),
        ('[[arm]]\nname = "x"\nseed = 3', "output, run and seed are the same for all arms: arms.toml, arm x"),
        ('[[arm]]\nname = "x"\nk = 3', "unknown setting: arms.toml, arm x, k; did you mean k in [plugin]?"),
        ('[[arm]]\nname = "x"\nplugin = { k = 1000 }', "retrieval k=1000, but the bank has 30 pictures"),
    ],
)
def test_arms_that_make_no_sense(arms: str, message: str, run: Run) -> None:
    first = arms if arms.startswith("seeds") else ""
    text = f"{first}\nmax_steps = 1\n{CONFIG.replace('max_steps = 2', '')}"
    text += ARMS if first or "1000" not in arms else ""
    Path("arms.toml").write_text(text + ("" if first else arms), encoding="utf-8")
    assert message in failed(run("-o", "ablation", "--quiet", config="arms.toml"))
    assert not Path("ablation").exists()


def test_what_an_ablation_would_not_write_stays(run: Run) -> None:
    Path("arms.toml").write_text(CONFIG + ARMS, encoding="utf-8")
    Path("ablation").mkdir()
    Path("ablation/letter.txt").write_text("dear", encoding="utf-8")
    line = failed(run("-o", "ablation", "--quiet", config="arms.toml"))
    assert "the output path holds something else: ablation/letter.txt" in line
    assert [path.name for path in Path("ablation").iterdir()] == ["letter.txt"]


def test_data_that_is_not_named_or_not_there(run: Run) -> None:
    Path("bad.toml").write_text(CONFIG.replace('["text.txt"]', "[]"), encoding="utf-8")
    line = failed(run("-o", "plugin", config="bad.toml"))
    assert "train_files: give training data, or name a GLUE task with glue: bad.toml" in line
    glue = ["--task", "text-classification", "--glue", "sst2", "--glue-data", "."]
    line = failed(run("-o", "plugin", *glue, "--quiet", config="bad.toml"))
    assert "no such data: . (expected a file, or a folder with train.tsv" in line
    missing = failed(run("-o", "plugin", config="missing.toml"))
    assert "the config cannot be read: missing.toml" in missing


def test_what_is_in_the_way_stays(run: Run) -> None:
    assert run("-o", "plugin", "--quiet").exit_code == 0
    before = Path("plugin/xadapter.safetensors").read_bytes()
    line = failed(run("-o", "plugin", "--seed", 3))
    assert re.match(r"Error: the output path already exists: \S*plugin; .*--force", line)
    assert Path("plugin/xadapter.safetensors").read_bytes() == before
    assert run("-o", "plugin", "--seed", 3, "--force", "--quiet").exit_code == 0
    assert Path("plugin/xadapter.safetensors").read_bytes() != before
    Path("mine").mkdir()
    Path("mine/letter.txt").write_text("dear", encoding="utf-8")
    assert "xadapter-export did not write" in failed(run("-o", "mine", "--force", "--quiet"))
    assert Path("mine/letter.txt").read_text(encoding="utf-8") == "dear"
    assert "output path already exists" in failed(run("-o", "text.txt", "--quiet"))
