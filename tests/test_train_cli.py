"""``xad-train`` as its user sees it: settings from file and flags, progress, results, and what goes wrong."""

import json
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from tests.test_imports import HEAVY
from tests.tiny_checkpoint import make_plm, write_parts
from xadapter_export import XAdapterModel
from xadapter_export.cli.main import xad
from xadapter_export.cli.train import train
from xadapter_export.exporters.judge.calibration import read_calibration
from xadapter_export.training.config import TrainConfig

TEXTS = "the color of a banana is green.\na fruit is very very green.\nthe banana is a fruit.\n"
CONFIG = """
plm = "plm"
clip = "clip"
bank = "bank"
experts = "v"
layers = [1, 2]
adapter_width = 16
num_heads = 2
k = 3
train_files = ["text.txt"]
max_steps = 2
batch_size = 4
log_every = 1
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
    assert (used["layers"], used["max_steps"], used["seed"]) == ([2], 3, 11)
    assert (used["cache_hidden"], used["favor_words"]) == (False, ["green"])
    assert (used["adapter_width"], used["k"], used["learning_rate"]) == (16, 3, 1e-3)  # of file and defaults
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
    assert json.loads(result.stdout)["record"]["config"]["train_weights"] == [2, 1]
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
    assert {f"--{name.replace('_', '-')}" for name in TrainConfig.model_fields} <= options
    words = " ".join(shown.split())
    for name, field in TrainConfig.model_fields.items():
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
    ("line", "message"),
    [
        ("learning_rte = 0.1", "unknown setting: bad.toml, learning_rte; did you mean learning_rate?"),
        ("batchsize = 4", "unknown setting: bad.toml, batchsize; did you mean batch_size?"),
        ('batch_size = "many"', "batch_size: Input should be a valid integer"),
        ("epochs = 0.0", "epochs: Input should be greater than 0"),
        ("patience = 3", "patience needs an eval_file: bad.toml"),
        ("layers = [9]", "layer 9: PLM plm has layers 0 to 2"),
        ("k = 1000", "retrieval k=1000, but the bank has 30 pictures"),
        ("k = ", "the config cannot be read: bad.toml"),
    ],
)
def test_a_setting_that_makes_no_sense(line: str, message: str, run: Run) -> None:
    kept = [entry for entry in CONFIG.splitlines() if entry.split(" ")[0] != line.split(" ")[0]]
    Path("bad.toml").write_text("\n".join([*kept, line]), encoding="utf-8")
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
