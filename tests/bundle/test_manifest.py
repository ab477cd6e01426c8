import json
from pathlib import Path
from typing import Any

import pytest

from tests.tiny_bundle import write_bundle
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
        ({"default_expert_set": "w"}, "default_expert_set: .*there is no such expert set"),
        ({"task": "text-classification"}, "text-classification needs labels"),
        ({"labels": ["a"]}, "fill-mask has no labels"),
        (
            {"task": "mask-filling"},
            r"task: .*no such task \(expected fill-mask, text-classification, feature-",
        ),
        ({"clip": None}, "clip is null but a set takes clip_input_ids"),
        ({"bank": None}, "bank is null but a set gives retrieved"),
        ({"variants": []}, "variants and expert_sets do not name the same sets"),
        ({"candidates": [{"word": "x", "token_id": 999}]}, r"candidates outside the vocabulary: \['x'\]"),
        ({"files": {"../../etc/passwd": {"size_bytes": 1, "sha256": "0" * 64}}}, "stays inside the bundle"),
        ({"files": {"C:/x": {"size_bytes": 1, "sha256": "0" * 64}}}, "stays inside the bundle"),
        ({"files": {"/x": {"size_bytes": 1, "sha256": "0" * 64}}}, "stays inside the bundle"),
        ({"files": {"x": {"size_bytes": 1, "sha256": "0" * 64}}}, r"that files lacks: onnx/model\.onnx, "),
        ({"files": {"onnx/\0": {"size_bytes": 1, "sha256": "0" * 64}}}, "stays inside the bundle"),
        ({"candidates": [{"word": "x", "token_id": 5}]}, "set none: logits should be 1 wide, got 21"),
        ({"files": {"x": {"size_bytes": 1, "sha256": "zz"}}}, r"files.x.sha256: String should match"),
    ],
)
def test_a_wrong_key_is_named(tiny: Path, change: dict[str, object], message: str) -> None:
    with pytest.raises(BundleError, match=message):
        Manifest.from_json(json.dumps(fields(tiny) | change))


@pytest.mark.parametrize("key", ["pad_token_id", "mask_token_id"])
def test_special_tokens_lie_in_the_vocabulary(tiny: Path, key: str) -> None:
    manifest = fields(tiny)
    manifest["plm"][key] = 21
    with pytest.raises(BundleError, match=rf"plm\.{key} is outside the vocabulary: 21 of 21"):
        Manifest.from_json(json.dumps(manifest))


@pytest.mark.parametrize(
    ("task", "candidates", "wanted"),
    [("fill-mask", None, 21), ("fill-mask", ("red", "green", "yellow"), 3), ("text-classification", None, 2)],
)
@pytest.mark.parametrize("axis", [1, 20, "vocab"])
def test_there_is_a_logit_for_each_answer(
    tmp_path: Path, task: str, candidates: tuple[str, ...] | None, wanted: int, axis: int | str
) -> None:
    manifest = fields(write_bundle(tmp_path / "b", task=task, candidates=candidates, sets=("none",)))
    manifest["expert_sets"]["none"]["outputs"][0]["axes"][-1] = axis
    with pytest.raises(BundleError, match=f"set none: logits should be {wanted} wide, got {axis}\\)"):
        Manifest.from_json(json.dumps(manifest))
    manifest["expert_sets"]["none"]["outputs"] = []
    with pytest.raises(BundleError, match=f"set none: logits should be {wanted} wide, got none\\)"):
        Manifest.from_json(json.dumps(manifest))


def test_a_manifest_may_list_no_files_while_the_bundle_is_being_made(tiny: Path) -> None:
    assert Manifest.model_validate_json(json.dumps(fields(tiny) | {"files": {}})).files == {}


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
    with pytest.raises(BundleError, match=r"does not have this expert set: vt \(expected one of t\)"):
        Manifest.from_json(json.dumps(manifest)).variant("vt")
