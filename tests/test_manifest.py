import json
from pathlib import Path
from typing import Any

import pytest

from xadapter_export.bundle.manifest import Manifest
from xadapter_export.errors import BundleError


def fields(bundle: Path) -> dict[str, Any]:
    parsed: dict[str, Any] = json.loads((bundle / "manifest.json").read_text("utf-8"))
    return parsed


def test_round_trip(tiny: Path) -> None:
    text = (tiny / "manifest.json").read_text("utf-8")
    assert Manifest.from_json(text).to_json() == text


def test_it_is_frozen(tiny: Path) -> None:
    manifest = Manifest.from_json((tiny / "manifest.json").read_text("utf-8"))
    with pytest.raises(ValueError, match="frozen"):
        manifest.opset = 18


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"surprise": 1}, "surprise: Extra inputs are not permitted"),
        ({"opset": "17"}, "opset: Input should be a valid integer"),
        ({"format_version": 2}, r"another format version: .*\(expected 1, got 2\).*export the bundle again"),
        ({"default_expert_set": "w"}, "default_expert_set: Input should be 'none'"),
        ({"task": "text-classification"}, "labels go with text-classification"),
        ({"labels": ["a"]}, "labels go with text-classification"),
        ({"clip": None}, "clip is null but a set takes clip_input_ids"),
        ({"bank": None}, "bank is null but a set gives retrieved"),
        ({"variants": []}, "variants and expert_sets do not name the same sets"),
        ({"candidates": [{"word": "x", "token_id": 999}]}, r"candidates outside the vocabulary: \['x'\]"),
        ({"files": {"../../etc/passwd": {"size_bytes": 1, "sha256": "0" * 64}}}, "stays inside the bundle"),
        ({"files": {"C:/x": {"size_bytes": 1, "sha256": "0" * 64}}}, "stays inside the bundle"),
        ({"files": {"/x": {"size_bytes": 1, "sha256": "0" * 64}}}, "stays inside the bundle"),
        ({"files": {"x": {"size_bytes": 1, "sha256": "0" * 64}}}, "variants name a file that files lacks"),
        ({"files": {"x": {"size_bytes": 1, "sha256": "zz"}}}, r"files.x.sha256: String should match"),
    ],
)
def test_a_wrong_key_is_named(tiny: Path, change: dict[str, object], message: str) -> None:
    with pytest.raises(BundleError, match=message):
        Manifest.from_json(json.dumps(fields(tiny) | change))


def test_a_missing_key_is_named(tiny: Path) -> None:
    manifest = fields(tiny)
    del manifest["plm"]["max_seq"]
    with pytest.raises(BundleError, match=r"plm\.max_seq: Field required"):
        Manifest.from_json(json.dumps(manifest))


@pytest.mark.parametrize("text", ["", "{", "[]", "\x00"])
def test_what_is_no_json_object_is_one_clear_error(text: str) -> None:
    with pytest.raises(BundleError, match=r"not a JSON object: m\.json"):
        Manifest.from_json(text, where="m.json")


def test_a_set_that_is_not_there_lists_those_that_are(tiny: Path) -> None:
    manifest = fields(tiny)
    manifest["expert_sets"] = {"t": manifest["expert_sets"]["t"]}
    manifest["variants"] = [v for v in manifest["variants"] if v["expert_set"] == "t"]
    manifest["default_expert_set"] = "t"
    with pytest.raises(BundleError, match=r"does not hold this expert set: vt \(expected one of t\)"):
        Manifest.from_json(json.dumps(manifest)).variant("vt")
