"""``xad-parity --all``: a line for each check, and exit 1 where one fails."""

import json
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from tests.bundle.test_signature import write_key
from tests.parity.test_prove import scale_weight
from tests.tiny_bundle import rehash, rewrite_manifest, write_bundle
from xadapter_export.bundle.folder import read_bundle
from xadapter_export.bundle.machine import read_machine
from xadapter_export.bundle.signature import sign_bundle
from xadapter_export.cli.main import xad
from xadapter_export.parity.everything import check_everything


def call(*arguments: object) -> Result:
    return CliRunner().invoke(xad, ["parity", "--all", *map(str, arguments)])


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("keys")
    for name in ("mine", "other"):
        write_key(folder, name)
    return folder


@pytest.fixture(scope="module")
def signed_once(keys: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("all") / "bundle"
    write_bundle(folder, sets=("none", "v"), variants=("onnx-fp32", "cpu-int8"))
    sign_bundle(folder, keys / "mine.pem")
    return folder


@pytest.fixture
def signed(signed_once: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(signed_once, tmp_path / "bundle"))


def lines(result: Result) -> dict[str, str]:
    """Return the verdict of each check by its name."""
    split = [(line[:12].strip(), line[12:].strip().partition(": ")[0]) for line in result.stdout.splitlines()]
    return {check: verdict for verdict, check in split}


VARIANTS = [f"{name}, experts {experts}" for experts in ("none", "v") for name in ("onnx-fp32", "cpu-int8")]


def test_everything_is_a_line(signed_once: Path, keys: Path) -> None:
    result = call(signed_once, "--verify-key", keys / "mine.pub")
    assert result.exit_code == 0, result.output
    assert lines(result) == dict.fromkeys(["hashes", "signature", *VARIANTS], "passed")
    assert "comparisons with PyTorch, max difference" in result.stdout
    assert "against its record: passed, 5 cases" in result.stdout
    assert result.stderr == f"parity: nothing failed; on {read_machine()}\n"
    found = json.loads(call(signed_once, "--verify-key", keys / "mine.pub", "--json").stdout)
    assert {check["verdict"] for check in found["bundles"][str(signed_once)]} == {"passed"}


def test_a_signature_without_a_key_is_read_and_not_trusted(signed_once: Path, tiny: Path) -> None:
    result = call(signed_once, tiny)
    assert result.exit_code == 0, result.output
    shown = [line for line in result.stdout.splitlines() if "signature: " in line]
    assert shown[0].startswith(
        f"not checked  {signed_once}: signature: it is of these files; give --verify-key"
    )
    assert shown[1].endswith("signature: the bundle is not signed")


@pytest.mark.parametrize("with_key", [True, False])
def test_what_is_wrong_with_files_keeps_graphs_shut(signed: Path, keys: Path, with_key: bool) -> None:
    (signed / "bank.jsonl").write_text((signed / "bank.jsonl").read_text().replace("lime", "lame"))
    key = ("--verify-key", keys / "mine.pub") if with_key else ()
    result = call(signed, *key)
    assert result.exit_code == 1
    found = lines(result)
    assert found.pop("hashes") == "FAILED"
    assert found.pop("signature") == ("passed" if with_key else "not checked")
    assert found == dict.fromkeys(VARIANTS, "not checked")
    assert result.stderr.startswith(
        f"Error: 1 of 6 checks failed: {signed}, hashes (got a file of the bundle"
    )
    rehash(signed)
    found = lines(call(signed, *key))
    assert (found["hashes"], found["signature"]) == ("passed", "FAILED")
    assert found[VARIANTS[0]] == "not checked"


def test_another_key_fails(signed_once: Path, keys: Path) -> None:
    result = call(signed_once, "--verify-key", keys / "other.pub")
    assert result.exit_code == 1
    assert lines(result)["signature"] == "FAILED"


@pytest.mark.parametrize("name", ["onnx-fp32", "cpu-int8"])
def test_a_graph_that_is_wrong_fails_alone(signed: Path, name: str) -> None:
    (signed / "model.sig").unlink()
    scale_weight(signed / read_bundle(signed).manifest.variant("v", name).file, "adapter_v", 1.05)
    rehash(signed)
    result = call(signed)
    assert result.exit_code == 1
    wrong = f"{name}, experts v"
    expected = dict.fromkeys(["hashes", *VARIANTS], "passed") | {"signature": "not checked", wrong: "FAILED"}
    assert lines(result) == expected


def test_a_lossy_variant_that_nobody_measured_fails(signed: Path) -> None:
    (signed / "model.sig").unlink()
    variants = json.loads((signed / "manifest.json").read_text("utf-8"))["variants"]
    rewrite_manifest(signed, variants=[variant | {"agreement": None} for variant in variants])
    assert lines(call(signed))["cpu-int8, experts v"] == "FAILED"


def test_what_cannot_run_here_is_not_checked(signed_once: Path) -> None:
    bundle = read_bundle(signed_once)
    found = list(check_everything(bundle, providers=["CUDAExecutionProvider"]))
    of = {finding.check: finding.verdict for finding in found}
    assert of["cpu-int8, experts v"] == "not checked"


def test_options_that_choose_variants_do_not_go_with_all(tiny: Path) -> None:
    for options in (("--experts", "v"), ("--variant", "onnx-fp32"), ("--every-cell",)):
        assert call(tiny, *options).exit_code == 2


def test_the_key_counts_without_all(signed_once: Path, keys: Path) -> None:
    def parity(key: str) -> Result:
        return CliRunner().invoke(xad, ["parity", str(signed_once), "--verify-key", str(keys / key)])

    assert parity("mine.pub").exit_code == 0
    assert parity("other.pub").stderr.startswith("Error: the signature was not made with this key")
