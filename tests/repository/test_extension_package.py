"""``examples/extension``: installed beside the library, and used from the command line from start to end."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from tests import ROOT
from tests.repository.test_imports import HEAVY
from tests.tiny_checkpoint import write_parts, write_tokenizer
from xadapter_export.bundle.folder import read_bundle
from xadapter_export.errors import BundleError

from transformers import AlbertConfig, AlbertForMaskedLM  # isort: skip  # cured by tests.tiny_checkpoint

PACKAGE = ROOT / "examples" / "extension"
SCRIPTS = Path(sysconfig.get_path("scripts"))
BLOCKED = "import sys\nfor name in {}:\n    sys.modules[name] = None\n"
LABELS = "the banana is green\tyes\na cherry is very red\tno\nvery very green\tyes\na red fruit\tno\n"


class Installed:
    """The package in a folder of its own, and the library's commands, which find it there."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.site = folder / "site"
        source = shutil.copytree(PACKAGE, folder / "source")  # pip builds in it
        alone = ["--no-deps", "--no-build-isolation", "--no-index", "--quiet", "--disable-pip-version-check"]
        pip = [sys.executable, "-m", "pip", "install", *alone, "--target", str(self.site), str(source)]
        subprocess.run(pip, check=True, capture_output=True)
        (folder / "blocked").mkdir()
        (folder / "blocked" / "sitecustomize.py").write_text(BLOCKED.format(HEAVY))

    def run(self, command: str, *arguments: str, without_torch: bool = False) -> str:
        """Run a command, which must succeed, and return what it wrote."""
        paths = [self.folder / "blocked"] if without_torch else []
        path = os.pathsep.join([*map(str, [*paths, self.site]), os.environ.get("PYTHONPATH", "")])
        done = subprocess.run(
            [SCRIPTS / command, *arguments],
            cwd=self.folder,
            env={**os.environ, "PYTHONPATH": path},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout


def write_albert(folder: Path) -> None:
    """A PLM of the family that the package adds, in place of one of ours."""
    shutil.rmtree(folder)
    torch.manual_seed(0)
    config = AlbertConfig(
        vocab_size=40,
        embedding_size=16,
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=40,
        pad_token_id=0,
    )
    model = AlbertForMaskedLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name.lower():
                parameter.normal_(std=0.2)
    model.save_pretrained(folder)
    write_tokenizer(folder)


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Installed:
    """The package, with a checkpoint and a bundle made of everything that it adds."""
    folder = tmp_path_factory.mktemp("extension")
    installed = Installed(folder)
    write_parts(folder)
    write_albert(folder / "plm")
    (folder / "labels.tsv").write_text(LABELS, encoding="utf-8")
    parts = [f"--{part}={part}" for part in ("plm", "clip", "bank")]
    shape = ["--experts=vt", "--layers=1", "--layers=2", "--adapter-width=16", "--num-heads=2"]
    added = ["--layer=gated", "--task=mean-classification", "--train-files=labels.tsv"]
    how = ["--max-steps=4", "--learning-rate=0.05", "--quiet", "-o", "plugin"]
    installed.run("xad-train", *parts, *shape, *added, *how)
    variants = [f"--variant={name}" for name in ("onnx-fp32", "cpu-fp32", "single-file-fp32")]
    installed.run("xad-export", "plugin", "--experts=vt", *variants, "-o", "bundle")
    return installed


def test_the_checkpoint_and_the_bundle_name_what_was_added(installed: Installed) -> None:
    config = json.loads((installed.folder / "plugin" / "xadapter.json").read_text("utf-8"))["config"]
    assert (config["layer"], config["task"]) == ("gated", "mean-classification")
    manifest = json.loads((installed.folder / "bundle" / "manifest.json").read_text("utf-8"))
    assert (manifest["task"], manifest["plm"]["family"]) == ("mean-classification", "albert")
    portable, fused, single = manifest["variants"]
    assert (single["target"], single["file"]) == ("single-file", "single-file/model.onnx")
    assert (single["weight_files"], portable["weight_files"]) == ([], ["onnx/model.onnx_data"])
    assert "fused_attention" in [step["name"] for step in fused["optimizations"]]


def test_where_the_package_is_not_installed_the_error_names_what_is_missing(installed: Installed) -> None:
    with pytest.raises(BundleError, match=r"no such task .*got mean-classification"):
        read_bundle(installed.folder / "bundle")


def test_the_gate_was_trained(installed: Installed) -> None:
    state = load_file(installed.folder / "plugin" / "xadapter.safetensors")
    gates = {name: tensor for name, tensor in state.items() if ".gate." in name}
    assert len(gates) == 2 * 2 * 2  # weight and bias, of two experts before two layers
    assert all(np.abs(gate).max() > 0 for gate in gates.values())
    assert all(np.abs(state[name.replace(".gate.", ".out.")]).max() > 1e-3 for name in gates)


def test_it_is_proven_and_answers_without_pytorch(installed: Installed) -> None:
    report = json.loads(installed.run("xad-parity", "bundle", "--json", without_torch=True))["bundle"]
    assert report["passed"]
    proven = {(cell["variant"], cell["output"]) for cell in report["cells"]}
    assert {("single-file-fp32", "logits"), ("onnx-fp32", "x_adapter.1.v"), ("cpu-fp32", "logits")} <= proven
    text = "the banana is very green"
    answers = []
    for variant in ("onnx-fp32", "single-file-fp32"):
        command = ["bundle", text, "--variant", variant, "--json"]
        answers.append(json.loads(installed.run("xad-run", *command, without_torch=True)))
        assert answers[-1]["replies"][0]["variant"] == variant
    first, second = (said["replies"][0]["answers"] for said in answers)
    assert [answer["label"] for answer in first] == [answer["label"] for answer in second]
    assert {answer["label"] for answer in first} == {"yes", "no"}
    for one, other in zip(first, second, strict=True):
        assert one["logit"] == pytest.approx(other["logit"], abs=1e-4)


def test_the_commands_list_what_was_added(installed: Installed) -> None:
    shown = " ".join(installed.run("xad-export", "--help").split())
    assert "one .onnx file with its weights inside" in shown
    assert "mean-classification" in shown
    manifest = json.loads(installed.run("xad-inspect", "bundle", "--json", without_torch=True))
    assert "single-file" in {variant["target"] for variant in manifest["variants"]}
