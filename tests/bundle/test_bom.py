"""The ML-BOM of a bundle: valid CycloneDX, every part and file with its hash, the same every time."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from cyclonedx.schema import OutputFormat, SchemaVersion
from cyclonedx.validation import make_schemabased_validator

from tests.tiny_bundle import SHA, rehash, rewrite_manifest, write_bundle
from xadapter_export.bundle.bom import make_bom
from xadapter_export.bundle.folder import read_bundle, sha256_file
from xadapter_export.cli.main import xad
from xadapter_export.errors import ConfigError, MissingExtraError


def call(*arguments: object) -> Result:
    return CliRunner().invoke(xad, [str(argument) for argument in arguments])


def parse(bom: str) -> dict[str, Any]:
    """Return a BOM that the schema accepts."""
    validator = make_schemabased_validator(OutputFormat.JSON, SchemaVersion.V1_6)
    assert validator.validate_str(bom) is None
    found: dict[str, Any] = json.loads(bom)
    return found


def test_it_lists_every_part_and_file_with_its_hash(tmp_path: Path) -> None:
    folder = write_bundle(tmp_path / "bundle", variants=("onnx-fp32", "cpu-int8"))
    bom, unknown = make_bom(read_bundle(folder), {})
    found = parse(bom)
    parts = {part["bom-ref"]: part for part in found["components"]}
    kinds = {ref: part["type"] for ref, part in parts.items() if part["type"] != "file"}
    model = "machine-learning-model"
    assert kinds == {"plug-in": model, "plm": model, "clip": model, "bank": "data"}
    assert {parts[ref]["hashes"][0]["content"] for ref in kinds} == {SHA}
    files = {part["name"]: part["hashes"][0]["content"] for part in parts.values() if part["type"] == "file"}
    listed = read_bundle(folder).manifest.files
    assert files == {name: entry.sha256 for name, entry in listed.items()}
    whole = found["metadata"]["component"]
    assert whole["hashes"][0]["content"] == sha256_file(folder / "manifest.json")
    needs = {entry["ref"]: entry.get("dependsOn", []) for entry in found["dependencies"]}
    assert set(needs["bundle"]) == set(parts)
    assert unknown == ["bundle", "plug-in", "plm", "clip", "bank"]


def test_equal_bundles_give_equal_bytes_and_others_another_serial(broken: Path, tmp_path: Path) -> None:
    same = Path(shutil.copytree(broken, tmp_path / "elsewhere" / "bundle"))
    bom, _ = make_bom(read_bundle(broken), {})
    assert make_bom(read_bundle(same), {})[0] == bom
    (same / "bank.jsonl").write_text((same / "bank.jsonl").read_text() + "\n")
    rehash(same)
    other = parse(make_bom(read_bundle(same), {})[0])
    assert other["serialNumber"] != parse(bom)["serialNumber"]


def test_licenses_are_known_given_or_missing(broken: Path) -> None:
    bom, unknown = make_bom(
        read_bundle(broken), {"plm": "apache-2.0", "bank": "CC-BY-4.0 AND MIT", "clip": "our own"}
    )
    parts = {part["bom-ref"]: part.get("licenses") for part in parse(bom)["components"]}
    assert parts["plm"] == [{"license": {"id": "Apache-2.0"}}]
    assert parts["bank"] == [{"expression": "CC-BY-4.0 AND MIT"}]
    assert parts["clip"] == [{"license": {"name": "our own"}}]
    assert unknown == ["bundle", "plug-in"]
    rewrite_manifest(broken, checkpoint={"source": "builtin", "sha256": SHA})
    bom, unknown = make_bom(read_bundle(broken), {"bank": "MIT"})
    parts = {part["bom-ref"]: part.get("licenses") for part in parse(bom)["components"]}
    assert parts["bank"] == [{"license": {"id": "MIT"}}]
    assert unknown == []
    with pytest.raises(ConfigError, match=r"no such part \(expected one of bundle, plug-in, plm.*got plmm"):
        make_bom(read_bundle(broken), {"plmm": "MIT"})


def test_a_model_of_the_hub_has_a_package_url(broken: Path) -> None:
    manifest = json.loads((broken / "manifest.json").read_text())
    rewrite_manifest(broken, plm=manifest["plm"] | {"source": "google-bert/bert-base-uncased"})
    parts = {part["bom-ref"]: part for part in parse(make_bom(read_bundle(broken), {})[0])["components"]}
    assert parts["plm"]["purl"] == "pkg:huggingface/google-bert/bert-base-uncased"
    assert "purl" not in parts["clip"]


def test_the_command_writes_it_whole_and_outside_the_bundle(broken: Path, tmp_path: Path) -> None:
    file = tmp_path / "bom.json"
    result = call("inspect", broken, "--bom", file, "--license", "plm=MIT")
    assert result.exit_code == 0
    assert "no license known for bundle, plug-in, clip, bank" in result.stderr
    assert "plm" in {part["bom-ref"] for part in parse(file.read_text())["components"]}
    before = file.read_text()
    assert call("inspect", broken, "--bom", file, "--license", "nothing=MIT").exit_code == 1
    assert file.read_text() == before
    assert call("inspect", broken, "--bom", broken / "bom.json").exit_code == 2
    assert call("inspect", broken, "--license", "plm=MIT").exit_code == 2
    read_bundle(broken)


def test_without_the_extra_its_name_is_given(broken: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cyclonedx.model.bom", None)
    with pytest.raises(MissingExtraError, match=r'pip install "xadapter-export\[bom\]"'):
        make_bom(read_bundle(broken), {})
