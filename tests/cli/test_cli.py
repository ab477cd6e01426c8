import importlib
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result
from huggingface_hub import ModelCard

from tests.parity.test_prove import scale_weight
from tests.tiny_bundle import CASES, rehash, rewrite_manifest, write_bundle
from xadapter_export import XAdapterSession
from xadapter_export.bundle.folder import read_bundle
from xadapter_export.bundle.machine import read_machine
from xadapter_export.bundle.manifest import Agreement, JudgedOn, Task
from xadapter_export.bundle.model_card import model_card
from xadapter_export.cli import command
from xadapter_export.cli.main import _COMMANDS, xad
from xadapter_export.experts import EXPERT_SETS

BANANA = "the color of a banana is [MASK]."


def call(*arguments: object, stdin: str | bytes | None = None) -> Result:
    return CliRunner().invoke(xad, [str(argument) for argument in arguments], input=stdin)


def script(*arguments: object) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-c", "from xadapter_export.cli.main import xad; xad()", *map(str, arguments)]
    return subprocess.run(line, capture_output=True, text=True, check=False)


def test_run_prints_the_answer_its_score_and_the_pictures(tiny: Path) -> None:
    result = call("run", tiny, BANANA, "--experts", "v")
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[0] == BANANA
    assert lines[1].split()[:2] == ["yellow", "55.5%"]
    assert lines[-1].strip().startswith("looked at: banana 0.33, ")
    assert result.stderr == ""


def test_run_reads_texts_from_stdin(tiny: Path) -> None:
    texts = f"{BANANA}\n\na cherry is [MASK]\n"
    result = call("run", tiny, "-", "--json", "--top-k", 1, "--experts", "v", stdin=texts)
    replies = json.loads(result.stdout)["replies"]
    assert [reply["answers"][0]["token"] for reply in replies] == ["yellow", "red"]
    assert replies[1]["pictures"][0]["caption"] == "cherry"
    assert [reply["experts"] for reply in replies] == ["v", "v"]
    assert result.stderr == "Warning: blank lines of stdin have no answer: 1\n"


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a bundle of two sets in three variants, one of them lossy; not to be changed."""
    folder = tmp_path_factory.mktemp("several") / "bundle"
    return write_bundle(folder, sets=("none", "v"), variants=("onnx-fp32", "cpu-fp32", "cpu-int8"))


@pytest.mark.parametrize(("asked", "answered"), [("onnx-fp32", "onnx-fp32"), ("int8", "cpu-int8")])
def test_run_says_which_variant_answered(several: Path, asked: str, answered: str) -> None:
    result = call("run", several, BANANA, "--compare", "--variant", asked, "--json")
    replies = json.loads(result.stdout)["replies"]
    assert [(r["experts"], r["variant"]) for r in replies] == [("none", answered), ("v", answered)]


def test_run_reads_only_utf8_from_stdin(tiny: Path) -> None:
    result = call("run", tiny, "-", stdin="a caf\xe9 is [MASK]\n".encode("latin-1"))
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith("Error: the texts on stdin are not UTF-8 (got 'utf-8' codec can't decode")
    assert len(result.stderr.splitlines()) == 1
    assert call("run", tiny, "-", stdin="a caf\xe9 is [MASK]\r\n".encode()).stdout.startswith("a caf\xe9 is")


def test_run_does_not_mind_a_comma_too_many(tiny: Path) -> None:
    result = call("run", tiny, BANANA, "--candidates", "red, yellow,", "--json")
    answers = json.loads(result.stdout)["replies"][0]["answers"]
    assert {answer["token"] for answer in answers} == {"red", "yellow"}


def test_run_compares_the_expert_sets(tiny: Path) -> None:
    result = call("run", tiny, BANANA, "[MASK] lime", "--compare", "--candidates", "yellow,green,fruit")
    head = result.stdout.splitlines()[1]
    assert [name in head for name in EXPERT_SETS] == [True] * 4
    best = result.stdout.splitlines()[3]
    assert [cell.split()[0] for cell in best.split("\u2502")][1:] == ["yellow", "fruit", "fruit"]


def test_run_numbers_several_masks(tiny: Path) -> None:
    result = call("run", tiny, "[MASK] lime is [MASK]", "--top-k", 1)
    assert [line.split()[:2] for line in result.stdout.splitlines()[1:3]] == [["mask", "1"], ["mask", "2"]]


@pytest.mark.parametrize(
    ("task", "arguments", "expected"),
    [
        ("text-classification", ["a lime", "--pair", "a cherry"], "sweet"),
        ("feature-extraction", ["a lime", "a cherry"], "21 numbers"),
        ("feature-extraction", ["a lime", "--compare"], "vt: 21 numbers"),
    ],
)
def test_run_of_the_other_tasks(tmp_path: Path, task: Task, arguments: list[str], expected: str) -> None:
    result = call("run", write_bundle(tmp_path / "b", task=task), *arguments)
    assert result.exit_code == 0, result.output
    assert expected in result.stdout


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["nowhere", BANANA], 1, "Error: this is not a bundle: nowhere"),
        (["{tiny}", "a lime"], 1, "Error: the text has no mask to fill: 'a lime'; write [MASK]"),
        (["{tiny}", ""], 1, "Error: text 1 of 1 is empty"),
        (["{tiny}", BANANA, "--candidates", "mauve"], 1, "Error: a candidate is not one token"),
        (["{tiny}", BANANA, "--candidates", ","], 1, "Error: no candidate was given"),
        (["{tiny}", BANANA, "--provider", "CUDAExecutionProvider"], 1, "Error: the execution provider CUDA"),
        (
            ["{tiny}", BANANA, "--variant", "cpu-int8"],
            1,
            "Error: the bundle does not have this variant: cpu-",
        ),
        (["{tiny}", BANANA, "--variant", "fp16"], 1, "Error: fp16 is slower than fp32 on a CPU, and no GPU"),
        (
            ["{tiny}", BANANA, "--pair", "x"],
            1,
            "Error: the bundle's task does not use second texts (got fill-mask)",
        ),
        (["{tiny}"], 2, "Error: Missing argument 'TEXT...'"),
        (["{tiny}", BANANA, "--experts", "w"], 2, "Error: Invalid value for '--experts': 'w' is not one of"),
        (["{tiny}", BANANA, "--experts", "v", "--compare"], 2, "Error: --compare shows all expert sets"),
        (["{tiny}", BANANA, "--top-k", "0"], 2, "Error: Invalid value for '--top-k'"),
        (["{tiny}", BANANA, "--explain"], 1, "Error: the bundle was exported without explanations"),
        (["{tiny}", BANANA, "--explain", "--compare"], 2, "Error: one expert set is explained at a time"),
        (["{tiny}", BANANA, "--explain-html", "{tiny}"], 1, "Error: the output path already exists"),
    ],
)
def test_what_goes_wrong_is_one_line_on_stderr(
    tiny: Path, arguments: list[str], code: int, message: str
) -> None:
    result = call("run", *(argument.format(tiny=tiny) for argument in arguments))
    assert result.exit_code == code
    assert result.stdout == ""
    assert result.stderr.splitlines()[-1].startswith(message)
    assert code == 2 or len(result.stderr.splitlines()) == 1


def test_candidates_of_another_task(tmp_path: Path) -> None:
    result = call("run", write_bundle(tmp_path / "b", task="feature-extraction"), "a", "--candidates", "red")
    assert result.stderr == "Error: the bundle's task does not use candidates (got feature-extraction)\n"


def test_debug_shows_the_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    assert type(call("run", "nowhere", "x", "--debug").exception).__name__ == "BundleError"
    monkeypatch.setenv("XAD_DEBUG", "1")
    assert type(call("inspect", "nowhere").exception).__name__ == "BundleError"


def test_a_warning_is_one_line_on_stderr(tiny: Path) -> None:
    result = script("run", tiny, "very " * 30 + BANANA, "--experts", "none")
    assert result.returncode == 0
    assert result.stderr.startswith(
        "Warning: 1 of 1 texts (longest: 40 tokens) were truncated to the 15 tokens"
    )
    assert len(result.stderr.splitlines()) == 1


def test_ctrl_c_is_one_line_and_130(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_arguments: object, **_settings: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(XAdapterSession, "load", stop)
    result = call("run", tiny, BANANA)
    assert (result.exit_code, result.stdout, result.stderr) == (130, "", "xad run: stopped\n")


def test_a_command_is_named_as_it_can_be_typed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "venv" / "bin" / "xad-run"
    file.parent.mkdir(parents=True)
    file.touch(mode=0o755)
    monkeypatch.setattr(sys, "executable", str(file.with_name("python")))
    monkeypatch.setenv("PATH", "")
    assert command.as_typed("xad-run") == str(file)
    monkeypatch.chdir(tmp_path)
    assert command.as_typed("xad-run") == str(Path("venv/bin/xad-run"))
    assert command.as_typed("xad-eval") == "xad-eval"
    monkeypatch.setenv("PATH", str(file.parent))
    assert command.as_typed("xad-run") == "xad-run"


def test_a_reader_that_goes_away_gets_no_traceback(tiny: Path) -> None:
    python = f"{sys.executable} -c 'from xadapter_export.cli.main import xad; xad()'"
    line = f"{python} run {tiny} - --json | head -c 1"
    result = subprocess.run(
        line, shell=True, input=f"{BANANA}\n" * 2000, capture_output=True, text=True, check=True
    )
    assert result.stderr == ""


def test_a_long_proof_counts_its_graphs(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("xadapter_export.cli.parity.QUICK_S", 0.0)
    assert "4 of 4 graphs" in call("parity", tiny).stderr
    assert "graphs" not in call("parity", tiny, "--quiet").stderr


def test_parity_prints_a_table_and_passes(tiny: Path) -> None:
    result = call("parity", tiny)
    assert result.exit_code == 0, result.output
    assert "x_adapter.0.v" in result.stdout
    assert result.stderr == f"parity: passed, 60 comparisons; on {read_machine()}\n"
    report = json.loads(call("parity", tiny, "--json", "--experts", "t").stdout)[str(tiny)]
    assert report["passed"] is True
    assert {cell["expert_set"] for cell in report["cells"]} == {"t"}
    assert "batch_padded" in call("parity", tiny, "--every-cell").stdout


def test_parity_that_fails_is_exit_1_with_its_table(broken: Path) -> None:
    data = broken / "onnx/model_t.onnx_data"
    data.write_bytes(data.read_bytes().replace(b"\x00\x00\x80\x40", b"\x00\x00\x86\x40"))  # 4.0 to 4.19
    rehash(broken)
    result = call("parity", broken)
    assert result.exit_code == 1
    assert "NO" in result.stdout
    assert result.stderr.startswith(
        "Error: the graph's outputs differ from PyTorch's in 10 of 60 comparisons: worst: t/"
    )


def test_parity_proves_each_fp32_variant_and_says_how_lossy_ones_agree(several: Path) -> None:
    result = call("parity", several)
    assert result.exit_code == 0, result.output
    rows = [line.split("\u2502")[:3] for line in result.stdout.splitlines() if " yes " in line]
    for name in ("onnx-fp32", "cpu-fp32"):
        proven = {(row[0].strip(), row[2].strip()) for row in rows if row[1].strip() == name}
        assert proven >= {("none", "logits"), ("v", "logits"), ("v", "retrieved"), ("v", "x_adapter.0.v")}
    recorded = f"2 lossy variants unchanged, 10 cases; on {read_machine()}"
    assert result.stderr == f"parity: passed, 50 comparisons; {recorded}\n"
    lines = [line for line in result.stdout.splitlines() if "cpu-int8" in line]
    assert [line.split("\u2502")[0].strip() for line in lines] == ["none", "v"]
    agreement = "same top answer in 99.7% of 320 (gate 99.0%), cosine 0.9991, 79.6% of 255 questions right"
    assert all(agreement in line for line in lines)
    assert all("passed, 5 cases, 0.0e+00 of " in line for line in lines)
    report = json.loads(call("parity", several, "--json", "--experts", "v").stdout)[str(several)]
    assert {cell["variant"] for cell in report["cells"]} == {"onnx-fp32", "cpu-fp32"}
    assert [(v["expert_set"], v["variant"]) for v in report["lossy"]] == [("v", "cpu-int8")]
    assert report["lossy"][0]["agreement"]["same_top"] == 0.997
    assert {check["case"] for check in report["lossy"][0]["checks"]} == set(CASES)
    assert report["processor"] == str(read_machine())
    only = call("parity", several, "--variant", "cpu-fp32")
    assert only.stderr == f"parity: passed, 25 comparisons; on {read_machine()}\n"
    assert "int8" not in only.stdout
    only = call("parity", several, "--variant", "cpu-int8", "--experts", "v")
    assert only.stderr.startswith("parity: no fp32 variant to check; 1 lossy variants unchanged, 5 cases;")
    unknown = call("parity", several, "--variant", "cpu-int8", "--variant", "cpu-int9")
    assert unknown.stderr.startswith("Error: the bundle does not have this variant: cpu-int9")


def test_parity_of_a_bundle_with_only_lossy_variants(tmp_path: Path) -> None:
    folder = write_bundle(tmp_path / "b", sets=("t",), variants=("cpu-int8",))
    result = call("parity", folder)
    assert result.exit_code == 0, result.output
    assert "cpu-int8" in result.stdout
    recorded = f"1 lossy variants unchanged, 5 cases; on {read_machine()}"
    assert result.stderr == f"parity: no fp32 variant to check; {recorded}\n"
    of_bundle = json.loads(call("parity", folder, "--json").stdout)[str(folder)]
    assert list(of_bundle) == ["processor", "lossy"]
    graph = folder / "onnx/model_cpu_int8.onnx"
    graph.write_bytes(graph.read_bytes()[:-1] + b"x")
    assert call("parity", folder).stderr.startswith("Error: a file of the bundle has changed")


def test_parity_fails_where_a_lossy_variant_gives_other_numbers(several: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(several, tmp_path / "b"))
    scale_weight(folder / read_bundle(folder).manifest.variant("v", "cpu-int8").file, "adapter_v", 1.05)
    rehash(folder)
    result = call("parity", folder)
    assert result.exit_code == 1
    assert "FAILED: " in result.stdout
    line = f"Error: a lossy variant gives other outputs here than at export: {folder}, cpu-int8, experts v"
    assert result.stderr.startswith(line)
    assert str(read_machine()) in result.stderr


def test_parity_fails_where_a_lossy_variant_was_not_measured(several: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(several, tmp_path / "b"))
    variants = json.loads((folder / "manifest.json").read_text("utf-8"))["variants"]
    rewrite_manifest(folder, variants=[variant | {"agreement": None} for variant in variants])
    result = call("parity", folder)
    assert result.exit_code == 1
    assert "NOT MEASURED" in result.stdout
    line = f"Error: the agreement of a lossy variant with fp32 was never measured: {folder}, cpu-int8, "
    "experts none; export"
    assert result.stderr.startswith(line)


def test_inspect_shows_variants_what_was_saved_and_how_they_agree(several: Path) -> None:
    text = call("inspect", several, "--verbose").stdout
    answers = {
        line.split("\u2502")[0].strip(): line.split("\u2502")[1].strip()
        for line in text.splitlines()
        if line.strip().startswith(("x86-64", "Arm"))
    }
    assert answers["x86-64 with AVX2"] == "cpu-int8"
    assert answers["x86-64 without AVX2"] == "cpu-fp32"
    assert [name in text for name in ("onnx-fp32", "cpu-fp32", "cpu-int8")] == [True] * 3
    assert "passed, 20 comparisons, max abs 1.0e-07" in text
    assert "same top answer in 99.7% of 320" in text
    assert text.count("nodes 20 to 15, 25.0% less") == 4
    short = call("inspect", several).stdout
    assert max(map(len, short.splitlines())) <= 100
    assert "passed, 20 comparisons, max abs 1.0e-07" in short
    assert "same top answer in 99.7% of 320" in short
    assert "nodes" not in short


def test_inspect_shows_what_is_in_a_bundle(tiny: Path, tmp_path: Path) -> None:
    result = call("inspect", tiny, "--verbose")
    assert result.exit_code == 0, result.output
    for fact in (
        "fill-mask",
        "hashes verified",
        "vt (default)",
        "logits (batch, masks, 21) float32",
        "3 pictures",
    ):
        assert fact in result.stdout
    assert json.loads(call("inspect", tiny, "--json").stdout)["opset"] == 17
    text = call("inspect", write_bundle(tmp_path / "b", candidates=("red", "green")), "--no-verify").stdout
    assert "red, green" in text
    assert "hashes not verified" in text
    text = call("inspect", write_bundle(tmp_path / "c", task="text-classification")).stdout
    assert "sweet, sour" in text


def test_inspect_times_variants(several: Path) -> None:
    assert "not measured here; add --time" in call("inspect", several).stdout
    shown = call("inspect", several, "--time").stdout
    timed = json.loads(call("inspect", several, "--time", "--json").stdout)["timed"]
    assert sorted(timed) == ["none", "v"]
    for experts, measured in timed.items():
        assert re.search(rf"^ {experts} +\u2502 \w+-\w+ [\d.]+ ms", shown, re.MULTILINE)
        assert re.match(r"measured: \w+-\w+ [\d.]+ ms", measured)


def test_inspect_and_the_card_show_deployments(broken: Path) -> None:
    made: dict[str, object] = {
        "target": "tensorrt-rtx",
        "expert_set": "v",
        "precision": "fp32",
        "source": "onnx-fp32",
    }
    files, refused = ["onnx/model_v.onnx"], ["sm75: no fp32 products for Turing"]
    prove = "xad-parity . --engine tensorrt-rtx"
    made |= {"files": files, "size_bytes": 3 << 20, "seconds": 1.0, "facts": {}, "refused": refused}
    rewrite_manifest(broken, deployments=[{**made, "prove_with": prove}])
    shown = call("inspect", broken, "--verbose").stdout
    assert re.search(rf"v +│ tensorrt-rtx-fp32 │ onnx-fp32 +│ 3\.1 │ {files[0]} │ {prove}", shown)
    assert re.search(
        r"v +│ tensorrt-rtx-fp32 │ onnx-fp32 +│ 3\.1 *$", call("inspect", broken).stdout, re.MULTILINE
    )
    assert re.search(rf"tensorrt-rtx-fp32 │ {refused[0]}", shown)
    card = model_card(read_bundle(broken).manifest, "b", {"a CPU": "onnx-fp32"})
    assert "| a CPU | onnx-fp32 |" in card
    assert f"| tensorrt-rtx-fp32 | v | onnx-fp32 | 1 | 3.1 | `{prove}` |" in card
    assert f"- tensorrt-rtx-fp32: {refused[0]}" in card
    assert 'pip install "xadapter-export[cpu]"' in card
    assert 'pip install "./xadapter-export[cpu]"' in card
    ignored = call("parity", broken, "--engine", "tensorrt-rtx", "--threads", 1)
    assert ignored.exit_code == 2
    assert "remove --provider and --threads" in ignored.stderr


def test_the_card_names_the_engine_that_runs_the_bundle(tiny: Path) -> None:
    manifest = read_bundle(tiny).manifest
    ours = manifest.variants[0].model_copy(update={"target": "openvino", "file": "openvino/model_fp32.xml"})
    card = model_card(manifest.model_copy(update={"variants": (ours,)}), "b", {})
    assert 'pip install "xadapter-export[openvino]"' in card
    assert "It runs with OpenVINO;" in card
    assert "ONNX" not in card
    assert "onnxruntime" not in card


def test_the_card_says_in_the_hubs_words_what_the_bundle_is_and_what_was_measured(tiny: Path) -> None:
    manifest = read_bundle(tiny).manifest
    plain = ModelCard(model_card(manifest, "b", {})).data
    assert [plain.get(key) for key in ("library_name", "pipeline_tag")] == ["xadapter-export", "fill-mask"]
    assert plain.get("tags") == ["x-adapter", "onnx"]
    assert plain.get("license") is plain.get("eval_results") is None
    agreement = Agreement(
        num_texts=10,
        num_answers=10,
        same_top=0.99,
        cosine=0.9,
        num_questions=4,
        accuracy_fp32=1.0,
        accuracy=0.75,
        min_same_top=0.9,
        max_points_lost=30,
        gate_lowered=False,
        judged_on=JudgedOn(texts="texts.txt", questions="dev.tsv", processor="x86-64"),
    )
    lossy = manifest.variants[0].model_copy(
        update={"precision": "int8", "parity": None, "agreement": agreement}
    )
    changes: dict[str, object] = {"variants": (*manifest.variants, lossy)}
    changes["plm"] = manifest.plm.model_copy(update={"source": "someone/bert"})
    changes["checkpoint"] = manifest.checkpoint.model_copy(update={"source": "builtin"})
    data = ModelCard(model_card(manifest.model_copy(update=changes), "b", {})).data
    assert (data.get("base_model"), data.get("license")) == (["someone/bert"], "apache-2.0")
    found = {(r.dataset_name, r.metric_type, r.metric_value) for r in data.get("eval_results")}
    assert found == {("texts.txt", "agreement", 0.99), ("dev.tsv", "accuracy", 0.75)}
    assert all(lossy.name in r.metric_name for r in data.get("eval_results"))


@pytest.mark.parametrize("name", ["run", "parity", "inspect"])
def test_every_help_shows_an_example_whose_options_exist(name: str) -> None:
    text = call(name, "--help").stdout
    example = text.split("Example:")[1]
    line = shlex.split(example.splitlines()[-1])
    assert line[:2] == [f"xad-{name}", "bundle"]
    module, attribute = _COMMANDS[name][0].split(":")
    getattr(importlib.import_module(module), attribute).make_context(name, line[1:])


def test_the_group_lists_its_commands_without_importing_them() -> None:
    result = script("--help")
    assert result.returncode == 0
    assert [name in result.stdout for name in ("export", "parity", "run", "inspect")] == [True] * 4
    code = """
import sys
from xadapter_export.cli.main import xad
xad(["--help"], standalone_mode=False)
heavy = {"numpy", "pydantic", "rich", "onnxruntime", "tokenizers", "torch"} & set(sys.modules)
assert not heavy, heavy
"""
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_version_and_an_unknown_command() -> None:
    assert call("--version").stdout.startswith("xadapter-export ")
    result = call("fly")
    assert result.exit_code == 2
    assert "No such command 'fly'" in result.stderr


def test_the_choices_are_those_of_the_table() -> None:
    assert f"--experts [{'|'.join(EXPERT_SETS)}]" in call("run", "--help").stdout


def test_commands_can_be_entry_points_of_their_own() -> None:
    from xadapter_export.cli.inspect import inspect
    from xadapter_export.cli.parity import parity
    from xadapter_export.cli.run import run

    assert all(isinstance(entry, click.Command) for entry in (run, parity, inspect))
    result = CliRunner().invoke(run, [str(Path("nowhere")), "x"])
    assert result.exit_code == 1


@pytest.mark.long
def test_export_takes_settings_from_a_file_and_flags_win(tmp_path: Path) -> None:
    config = tmp_path / "small.toml"
    config.write_text(
        f'experts = "none"\nmax_seq = 16\nopset = 18\noutput = "{tmp_path / "bundle"}"\nquiet = true'
        '\ncandidates = ["yellow", "green"]'
    )
    result = call("export", "--config", config, "--opset", 20)
    assert result.exit_code == 0, result.output
    manifest = json.loads((tmp_path / "bundle" / "manifest.json").read_text(encoding="utf-8"))
    assert (manifest["default_expert_set"], manifest["plm"]["max_seq"], manifest["opset"]) == ("none", 16, 20)
    assert [candidate["word"] for candidate in manifest["candidates"]] == ["yellow", "green"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("expert = 't'", "unknown settings: expert; known are "),
        ("opset = ", "is not a TOML file of settings"),
        ("max_seq = 'long'", "Invalid value for '--max-seq'"),
        ("task = ['fill-mask']", "task takes one value, not ['fill-mask']"),
    ],
)
def test_a_wrong_file_of_settings_is_one_line(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "wrong.toml").write_text(text)
    result = call("export", "--config", tmp_path / "wrong.toml")
    assert result.exit_code == 2
    assert said in result.stderr
