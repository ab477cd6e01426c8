"""A bundle with a swapped bank is the one that an export with that bank would have made, or it stays."""

import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from shutil import copytree
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from tests.perturbed import prove_with_each_matrix_off
from tests.repository.test_imports import HEAVY
from tests.tiny_bundle import rehash, rewrite_manifest
from tests.tiny_checkpoint import TEXTS, make_model
from xadapter_export import XAdapterSession, export
from xadapter_export.bank import BankClip, FeatureBank
from xadapter_export.bank.convert import convert_bank
from xadapter_export.bundle.folder import read_bundle
from xadapter_export.bundle.graph_file import Field, GraphFile, parse, serialize
from xadapter_export.bundle.manifest import ExpertSet
from xadapter_export.bundle.pictures import Picture
from xadapter_export.cli.bank import bank as bank_command
from xadapter_export.cli.inspect import inspect as inspect_command
from xadapter_export.cli.parity import parity as parity_command
from xadapter_export.errors import (
    BundleError,
    ConfigError,
    OutputExistsError,
    ParityError,
    UnsupportedError,
    XAdapterError,
)
from xadapter_export.model.config import RetrievalConfig
from xadapter_export.model.x_adapter_model import XAdapterModel
from xadapter_export.parity import check_lossy, prove_bundle
from xadapter_export.runtime.encoders import load_encoders
from xadapter_export.runtime.how_to_open import HowToOpen
from xadapter_export.sessions.open import open_variant
from xadapter_export.sessions.session import Array, Opening
from xadapter_export.swap.swap import SwapResult, swap_bank

D = 24
VARIANTS = ("onnx-fp32", "cpu-fp32", "cuda-fp32", "cpu-int8", "onnx-fp16", "cuda-fp16")


@dataclass(frozen=True)
class Exported:
    """The same plug-in exported with two banks, and the banks."""

    first: Path
    second: Path
    banks: Mapping[str, Path]


def write_bank(folder: Path, num_rows: int, seed: int, clip: BankClip | None) -> FeatureBank:
    features = np.random.default_rng(seed).standard_normal((num_rows, D)).astype(np.float32)
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    pictures = tuple(Picture(id=f"{seed}-{i}", caption=f"picture {i} of {seed}") for i in range(num_rows))
    bank = FeatureBank(features, pictures, clip=clip)
    folder.mkdir(parents=True)
    bank.save(folder)
    return bank


def export_both(folder: Path, sets: tuple[ExpertSet, ...], **settings: Any) -> Exported:
    model = make_model(folder, experts=sets[0], **settings)
    clip = model.frozen_parts()[1] if model.clip is not None else None
    named = BankClip(source="tiny-clip", sha256="c" * 64 if clip is None else clip.sha256)
    texts = folder / "texts.txt"
    texts.write_text("".join(f"{text}\n" for text in TEXTS * 4), encoding="utf-8")
    banks, paths = {}, {}
    for seed, (name, num_rows) in enumerate({"first": 30, "second": 77}.items()):
        paths[name] = folder / "banks" / name
        banks[name] = write_bank(paths[name], num_rows, seed, named)
    for name, bank in banks.items():
        part = XAdapterModel(model.config, model.plm, model.clip, bank)
        part.adapters.load_state_dict(model.adapters.state_dict())
        export(
            part,
            folder / name,
            sets if name == "first" else sets[:1],
            variants=["onnx-int8"],
            precisions=("fp32", "int8", "fp16"),
            targets=("onnx", "cpu", "cuda"),
            calibration=texts,
            min_agreement=0,
            max_points_lost=100,
        )
    return Exported(folder / "first", folder / "second", paths)


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return export_both(tmp_path_factory.mktemp("searched"), ("vt", "none"))


@pytest.fixture(scope="module")
def static(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return export_both(tmp_path_factory.mktemp("static"), ("v",), retrieval={"mode": "static"})


def contents(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }


def swap(bundle: Path, bank: Path, output: Path | None = None) -> SwapResult:
    return swap_bank(bundle, bank, output, leave_out=["onnx-int8"] if _holds(bundle, "onnx-int8") else [])


def answers(folder: Path, expert_set: ExpertSet, name: str, inputs: Mapping[str, Array]) -> dict[str, Array]:
    bundle = read_bundle(folder)
    spec = bundle.manifest.expert_sets[expert_set]
    names = [tensor.name for tensor in spec.outputs]
    session = open_variant(bundle, bundle.manifest.variant(expert_set, name), Opening(num_threads=1))
    values = session.run(names, {tensor.name: inputs[tensor.name] for tensor in spec.inputs})
    return dict(zip(names, values, strict=True))


def _holds(bundle: Path, name: str) -> bool:
    return any(v.name == name and "v" in v.expert_set for v in read_bundle(bundle).manifest.variants)


@pytest.mark.parametrize("kind", ["searched", "static"])
def test_it_answers_as_if_exported_with_that_bank(
    kind: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    made: Exported = request.getfixturevalue(kind)
    result = swap(made.first, made.banks["second"], tmp_path / "bundle")
    manifest = result.manifest
    want_manifest = read_bundle(made.second).manifest
    assert result.num_cells > 0
    assert (result.num_searched > 0) == (kind == "searched")
    changed = 0
    encoder = load_encoders(read_bundle(made.second))[1]
    for expert_set in want_manifest.expert_sets:
        for name in VARIANTS:
            inputs = encoder.encode(TEXTS)
            outputs, expected = (
                answers(folder, expert_set, name, inputs) for folder in (result.folder, made.second)
            )
            assert set(outputs) == set(expected)
            for key, reference in expected.items():
                if key == "retrieved":
                    assert np.array_equal(outputs[key], reference)
                    assert reference.max() >= 30  # rows that the first bank did not have
                    changed += 1
                got = outputs[key].astype(np.float64)
                if name == "cpu-int8" and key == "logits":  # the scales stay those of the first bank's texts
                    assert (got * reference).sum() > 0.85 * np.linalg.norm(got) * np.linalg.norm(reference)
                    continue
                limit = 1e-4 + 1e-4 * np.abs(reference.astype(np.float64))
                assert (np.abs(got - reference) <= limit).all(), (name, key)
            sizes = [m.variant(expert_set, name).size_bytes for m in (manifest, want_manifest)]
            # Which products divide their inputs first is decided by the texts, read with the first bank.
            assert sizes[0] == pytest.approx(sizes[1], abs=2048 if name == "cpu-int8" else 256)
        counts = [m.expert_sets[expert_set].component_parameters for m in (manifest, want_manifest)]
        assert counts[0] == counts[1]
    assert changed == (len(VARIANTS) if kind == "searched" else 0)
    assert manifest.bank is not None
    assert want_manifest.bank is not None
    assert manifest.bank.model_copy(update={"swapped_from": None}) == want_manifest.bank
    if kind == "searched":
        assert (result.folder / "bank.jsonl").read_bytes() == (made.second / "bank.jsonl").read_bytes()
        session = XAdapterSession.load(result.folder, experts="vt")
        assert session.retrieve(TEXTS[0])[0].caption.endswith("of 1")


def _check_every_variant(bundle: Path) -> None:
    """Every graph gives here what it gave with the new bank, and one that gives something else is refused."""
    for variant in read_bundle(bundle).manifest.variants:
        if not variant.is_for_gpu:
            session = XAdapterSession.load(
                bundle, experts=variant.expert_set, variant=variant.name, num_threads=1, check="always"
            )
            assert [check.passed for check in session.checks] == [True]
    assert all(check.passed for check in check_lossy(bundle))
    unchecked = read_bundle(bundle)
    experts = unchecked.manifest.default_expert_set
    path = bundle / "reference_swapped.npz"
    recorded = path.read_bytes()
    with np.load(path) as archive:
        arrays = dict(archive)
    for key in arrays:
        if key.endswith("/out/logits"):
            arrays[key] = arrays[key] + np.float32(1)
    np.savez(path, **arrays)
    with pytest.raises(ParityError, match="wrong outputs on this processor: cpu-fp32"):
        XAdapterSession(
            unchecked, HowToOpen(experts=experts, variant="cpu-fp32", num_threads=1, verify=False)
        )
    path.write_bytes(recorded)


@pytest.mark.parametrize("kind", ["searched", "static"])
def test_the_first_bank_swapped_in_again_gives_the_first_bundle(
    kind: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    made: Exported = request.getfixturevalue(kind)
    bundle = tmp_path / "first"
    swap_bank(made.first, made.banks["first"], bundle, leave_out=["onnx-int8"])  # the same but for that
    before = contents(bundle)
    assert "reference_bank.npz" not in before
    swap(bundle, made.banks["second"])
    after = contents(bundle)
    assert after["onnx/model.onnx"] != before["onnx/model.onnx"]
    assert "reference_bank.npz" in after
    assert "reference_swapped.npz" in after
    _check_every_variant(bundle)
    swap(bundle, made.banks["first"])
    assert contents(bundle) == before
    untouched = (
        "onnx/model.onnx",
        "onnx/model_cpu.onnx",
        "onnx/model.onnx_data",
        "onnx/model_quantized.onnx_data",
    )
    assert {name: before[name] for name in untouched} == {
        name: (made.first / name).read_bytes() for name in untouched
    }


@pytest.mark.parametrize(
    ("experts", "settings"),
    [
        ("v", {"retrieval": "external"}),
        pytest.param("v", {"split": True}, marks=pytest.mark.slow),
        ("vt", {"split": True}),  # static: the bank is in the answer graph
    ],
    ids=["external", "split", "split-static"],
)
def test_graphs_that_are_split_take_another_bank(
    experts: ExpertSet, settings: dict[str, Any], tmp_path: Path
) -> None:
    static = settings == {"split": True} and experts == "vt"
    changes: dict[str, Any] = {"retrieval": {"mode": "static"}} if static else {}
    model = make_model(tmp_path, experts=experts, **changes)
    _, clip, _ = model.frozen_parts()
    assert clip is not None
    named = BankClip(source="tiny-clip", sha256=clip.sha256)
    write_bank(tmp_path / "fp32", 77, 1, named)
    convert_bank(tmp_path / "fp32", tmp_path / "second", "fp16")  # rows are not quite of length 1
    banks = [write_bank(tmp_path / "first", 30, 0, named), FeatureBank.load(tmp_path / "second")]
    made = []
    for name, bank in zip(("a", "b"), banks, strict=True):
        part = XAdapterModel(model.config, model.plm, model.clip, bank)
        part.adapters.load_state_dict(model.adapters.state_dict())
        made.append(export(part, tmp_path / name, experts, targets=("onnx", "cpu"), **settings))
    before = contents(made[0].folder)
    result = swap_bank(made[0].folder, tmp_path / "second", tmp_path / "swapped")
    for name in ("onnx-fp32", "cpu-fp32"):
        session = XAdapterSession.load(result.folder, variant=name, num_threads=1, check="always")
        assert [check.passed for check in session.checks] == [True]
    assert result.num_cells == len(made[0].parity.cells)
    assert (result.num_searched == 0) == static
    inputs = load_encoders(read_bundle(made[1].folder))[1].encode(TEXTS)
    for variant in ("onnx-fp32", "cpu-fp32"):
        got, expected, first = (
            answers(folder, experts, variant, inputs)
            for folder in (result.folder, made[1].folder, made[0].folder)
        )
        for key, reference in expected.items():
            assert np.array_equal(got[key], reference), key
            assert not np.array_equal(got[key], first[key]), key
        sizes = [m.variant(experts, variant).size_bytes for m in (result.manifest, made[1].manifest)]
        assert sizes[0] == pytest.approx(sizes[1], abs=256)
    assert result.manifest.bank is not None
    assert result.manifest.bank.model_copy(update={"swapped_from": None}) == made[1].manifest.bank
    if "retrieval" in settings:
        want = contents(made[1].folder)
        after = contents(result.folder)
        assert {name for name in before if after[name] != before[name]} == {
            *("bank.safetensors", "bank.jsonl", "README.md", "manifest.json")
        }
        assert all(after[name] == want[name] for name in ("bank.safetensors", "bank.jsonl"))
    outcomes = prove_with_each_matrix_off(result.folder, experts)
    assert outcomes
    assert not any(outcomes.values())
    swap_bank(result.folder, tmp_path / "first")
    assert {**contents(result.folder), "README.md": b""} == {**before, "README.md": b""} | {
        "manifest.json": contents(result.folder)["manifest.json"]
    }
    assert read_bundle(result.folder).manifest.bank == made[0].manifest.bank


def test_what_does_not_fit_is_refused_and_the_bundle_stays(searched: Exported, tmp_path: Path) -> None:
    bundle = copytree(searched.first, tmp_path / "bundle")
    before = contents(bundle)
    manifest = read_bundle(bundle).manifest
    assert manifest.clip is not None
    own = BankClip(source="tiny-clip", sha256=manifest.clip.sha256)
    write_bank(tmp_path / "other", 40, 3, BankClip(source="other-clip", sha256="d" * 64))
    write_bank(tmp_path / "silent", 40, 4, None)
    write_bank(tmp_path / "few", 3, 5, own)
    wide = FeatureBank(
        np.eye(32, dtype=np.float32), tuple(Picture(id=str(i), caption="") for i in range(32)), clip=own
    )
    (tmp_path / "wide").mkdir()
    wide.save(tmp_path / "wide")
    out = ["onnx-int8"]
    cases: list[tuple[str, dict[str, Any], type[XAdapterError], str]] = [
        ("other", {}, ConfigError, "made with different CLIPs.*got other-clip"),
        ("other", {"assume_clip": True}, ConfigError, "made with different CLIPs"),
        ("silent", {}, ConfigError, "does not record which CLIP.*--assume-clip"),
        ("few", {}, ConfigError, "fewer images than the bundle retrieves.*at least 4, got 3"),
        ("wide", {}, ConfigError, "another width.*expected 24, got 32"),
        ("few", {"leave_out": ["nothing"]}, ConfigError, "no variant or deployment of this name.*: nothing"),
        ("few", {"leave_out": [*VARIANTS, *out]}, ConfigError, "without a graph: vt"),
    ]
    for name, options, kind, message in cases:
        with pytest.raises(kind, match=message):
            swap_bank(bundle, tmp_path / name, **{"leave_out": out, **options})
        assert contents(bundle) == before
    with pytest.raises(UnsupportedError, match=r"onnx-int8 was calibrated .* --leave-out onnx-int8"):
        swap_bank(bundle, searched.banks["second"])
    with pytest.raises(ConfigError, match=r"output lies inside the bundle: .*bundle/a/new; choose a folder"):
        swap_bank(bundle, searched.banks["second"], bundle / "a" / "new", leave_out=out)
    assert contents(bundle) == before
    (bundle / "notes.txt").write_text("years")  # in a new bundle it would be hashed as if it belonged there
    with pytest.raises(OutputExistsError, match=r"manifest does not list, .*: .*notes\.txt; move it away"):
        swap_bank(bundle, searched.banks["second"], leave_out=out)
    assert contents(bundle) == {**before, "notes.txt": b"years"}
    made = swap_bank(bundle, tmp_path / "silent", tmp_path / "new", leave_out=out, assume_clip=True)
    assert made.manifest.bank is not None
    assert set(contents(made.folder)) == {"manifest.json", *made.manifest.files}
    assert "notes.txt" not in made.manifest.files
    assert list(tmp_path.glob(".*")) == []


def test_what_is_left_out_is_gone_with_its_bank(searched: Exported, tmp_path: Path) -> None:
    result = swap(searched.first, searched.banks["second"], tmp_path / "bundle")
    names = {(v.expert_set, v.name) for v in result.manifest.variants}
    assert ("none", "onnx-int8") in names
    assert ("vt", "onnx-int8") not in names
    assert not (result.folder / "onnx/model_int8.onnx").exists()
    rows = FeatureBank.load(searched.banks["first"]).unit_rows().tobytes()
    assert rows in (searched.first / "onnx/model_int8.onnx_data").read_bytes()
    assert not any(rows in data for data in contents(result.folder).values())
    session = XAdapterSession.load(result.folder, experts="none", variant="onnx-int8")
    want = XAdapterSession.load(searched.first, experts="none", variant="onnx-int8")
    assert session.fill_mask(TEXTS[0]) == want.fill_mask(TEXTS[0])


def test_a_deployment_is_left_out_by_the_name_that_is_shown(searched: Exported, tmp_path: Path) -> None:
    bundle = Path(copytree(searched.first, tmp_path / "bundle"))
    (bundle / "engine").write_bytes(b"engine")
    rewrite_manifest(bundle, deployments=[_engine("fp32"), _engine("fp16")])
    rehash(bundle)
    names = [made.name for made in read_bundle(bundle).manifest.deployments]
    assert names == ["tensorrt-rtx-fp32", "tensorrt-rtx-fp16"]
    with pytest.raises(UnsupportedError) as caught:
        swap_bank(bundle, searched.banks["second"], leave_out=["onnx-int8", names[0]])
    assert caught.value.hint is not None
    assert f"--leave-out {names[1]}" in caught.value.hint
    result = swap_bank(bundle, searched.banks["second"], leave_out=["onnx-int8", *names])
    assert result.manifest.deployments == ()


def _engine(precision: str) -> dict[str, object]:
    made = {
        "target": "tensorrt-rtx",
        "expert_set": "vt",
        "precision": precision,
        "source": f"onnx-{precision}",
    }
    facts = {"engine sm89": "engine"}
    return {**made, "files": ["engine"], "size_bytes": 6, "seconds": 1.0, "facts": facts, "prove_with": None}


def test_many_pictures_are_proven_too(tmp_path: Path) -> None:
    """The proof of a swap needs every row that the reference retrieved: none may be sampled away."""
    plain = make_model(tmp_path, experts="v")
    part = plain.frozen_parts()[1]
    assert part is not None
    clip = BankClip(source="tiny-clip", sha256=part.sha256)
    first = write_bank(tmp_path / "first", 150, 0, clip)
    write_bank(tmp_path / "second", 150, 1, clip)
    config = plain.config.model_copy(update={"retrieval": RetrievalConfig(k=100)})
    model = XAdapterModel(config, plain.plm, plain.clip, first)
    model.adapters.load_state_dict(plain.adapters.state_dict())
    bundle = export(model, tmp_path / "bundle").folder
    assert swap_bank(bundle, tmp_path / "second", tmp_path / "new").num_cells > 0


def test_keys_that_were_learned_for_their_prototypes_cannot_be_swapped(tmp_path: Path) -> None:
    model = make_model(tmp_path, experts="v", retrieval={"mode": "static"}, layer="sentence-query")
    export(model, tmp_path / "bundle", "v")
    write_bank(tmp_path / "bank", 30, 6, None)
    before = contents(tmp_path / "bundle")
    with pytest.raises(UnsupportedError, match="keys were learned for its prototypes"):
        swap_bank(tmp_path / "bundle", tmp_path / "bank", assume_clip=True)
    assert contents(tmp_path / "bundle") == before


@pytest.mark.parametrize("kind", ["searched", "static"])
def test_the_proof_still_sees_a_changed_weight(
    kind: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    made: Exported = request.getfixturevalue(kind)
    folder = swap(made.first, made.banks["second"], tmp_path / "bundle").folder
    assert prove_bundle(folder).passed
    shown = CliRunner().invoke(parity_command, [str(folder)])
    assert shown.exit_code == 0
    assert "was swapped. Expert sets with the V-expert were checked with rows of the old bank" in shown.stderr
    facts = CliRunner().invoke(inspect_command, [str(folder)])
    assert "it replaced the 30 that the bundle was exported with" in facts.stdout
    assert "The bank was swapped: it has 77 pictures, and had 30 others" in (folder / "README.md").read_text()
    outcomes = prove_with_each_matrix_off(folder, "vt" if kind == "searched" else "v")
    assert len(outcomes) == (16 if kind == "searched" else 4)  # a static bank is folded: two matrices a layer
    assert not any(outcomes.values())
    assert prove_bundle(folder).passed


def test_it_needs_nothing_heavy(searched: Exported, tmp_path: Path) -> None:
    code = f"""
import sys
for name in {(*HEAVY, "onnx_ir")}:
    sys.modules[name] = None
from xadapter_export.cli.bank import bank
bank(["swap", {str(searched.first)!r}, {str(searched.banks["second"])!r}, "-o", {str(tmp_path / "out")!r},
      "--leave-out", "onnx-int8"])
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "77 pictures, topk retrieval, k = 4" in result.stdout
    again = CliRunner().invoke(bank_command, ["swap", str(searched.first), str(searched.banks["second"])])
    assert again.exit_code != 0


def test_a_graph_file_is_read_and_written_as_it_was(searched: Exported, tmp_path: Path) -> None:
    for path in (searched.first / "onnx").glob("*.onnx"):
        data = path.read_bytes()
        graph = GraphFile(data, path)
        for weight in list(graph.weights.values()):
            if weight.location is not None:
                graph.put_outside(weight.name, weight.shape, weight.offset, weight.size_bytes)
            elif weight.dtype and weight.size_bytes:
                graph.put_inside(weight.name, graph.array(weight.name))
        assert graph.to_bytes() == data
    fields = [Field(1, 0, 2**63), Field(2, 2, b"abc"), Field(3, 5, b"1234"), Field(4, 1, b"12345678")]
    assert parse(serialize(fields)) == fields
    for wrong in (b"\xff", b"\x3a\x05ab", b"", data[:-3]):
        with pytest.raises(BundleError, match=r"the graph cannot be read: here"):
            GraphFile(wrong, "here")
