import json
import shutil
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from rich.console import Console
from rich.table import Table

from tests.tiny_bundle import CASES, rehash, rewrite_manifest, write_bundle
from xadapter_export.bundle.graph_file import extra_outputs
from xadapter_export.bundle.manifest import Task
from xadapter_export.errors import (
    BundleError,
    ConfigError,
    HashMismatchError,
    MissingExtraError,
    ParityError,
    ProviderError,
)
from xadapter_export.parity import ParityReport, prove, prove_bundle
from xadapter_export.parity.table import parity_table
from xadapter_export.sessions import onnx_session
from xadapter_export.sessions import open as door
from xadapter_export.sessions.onnx_session import open_onnx


def scale_weight(path: Path, name: str, factor: float) -> None:
    """Multiply a weight of a graph, and write the graph with its weights inside."""
    model = onnx.load(path)
    tensor = next(t for t in model.graph.initializer if t.name == name)
    tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) * np.float32(factor), name))
    onnx.save(model, path)


def change_reference(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = folder / "reference.npz"
    with np.load(path) as archive:
        arrays = dict(archive)
    change(arrays)
    np.savez(path, **arrays)
    rehash(folder)


def render(table: Table) -> str:
    console = Console(width=200)
    with console.capture() as capture:
        console.print(table)
    return capture.get()


@pytest.fixture(scope="module")
def report(tiny: Path) -> ParityReport:
    return prove_bundle(tiny)


def test_every_output_and_tap_of_every_set_is_compared_in_every_case(report: ParityReport) -> None:
    assert report.passed
    seen = {(cell.expert_set, cell.output, cell.case) for cell in report.cells}
    outputs = {
        "none": ["logits"],
        "v": ["logits", "retrieved", "retrieved_scores", "x_adapter.0.v"],
        "t": ["logits", "x_adapter.0.t"],
        "vt": ["logits", "retrieved", "retrieved_scores", "x_adapter.0.v", "x_adapter.0.t"],
    }
    assert seen == {(s, o, case) for s, names in outputs.items() for o in names for case in CASES}


@pytest.mark.parametrize("task", ["text-classification", "feature-extraction"])
def test_the_other_tasks(tmp_path: Path, task: Task) -> None:
    report = prove_bundle(write_bundle(tmp_path / "b", task=task))
    assert report.passed
    logits = [cell for cell in report.cells if cell.output == "logits"]
    assert bool(logits) == (task == "text-classification")
    assert all(cell.argmax_agreement == 1 for cell in logits)


@pytest.mark.parametrize(
    ("experts", "weight"), [("v", "adapter_v"), ("t", "adapter_t"), ("vt", "adapter_t"), ("none", "plm")]
)
def test_a_weight_that_is_off_by_five_percent_fails(tmp_path: Path, experts: str, weight: str) -> None:
    folder = write_bundle(tmp_path / "b", sets=(experts,))
    scale_weight(folder / "onnx/model.onnx", weight, 1.05)
    rehash(folder)
    report = prove_bundle(folder)
    assert not report.passed
    failed = {cell.output for cell in report.failures}
    assert "logits" in failed
    assert experts == "none" or f"x_adapter.0.{weight[-1]}" in failed
    with pytest.raises(
        ParityError, match=r"outputs differ from PyTorch's in \d+ of \d+ comparisons: worst: "
    ):
        report.raise_if_failed()


def test_only_the_sets_that_are_asked_for(tiny: Path) -> None:
    assert {cell.expert_set for cell in prove_bundle(tiny, ["t", "none"]).cells} == {"t", "none"}


def test_a_set_that_is_not_there(tmp_path: Path) -> None:
    folder = write_bundle(tmp_path / "b", sets=("t",))
    with pytest.raises(BundleError, match=r"this expert set: v \(expected one of t\)"):
        prove_bundle(folder, ["v"])


def test_a_changed_file_is_found_first(broken: Path) -> None:
    scale_weight(broken / "onnx/model_t.onnx", "adapter_t", 1.05)
    with pytest.raises(BundleError, match=r"wrong size: .*model_t\.onnx"):
        prove_bundle(broken)


def test_a_same_sized_change_is_found_first(broken: Path) -> None:
    path = broken / "reference.npz"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(HashMismatchError, match=r"has changed: .*reference\.npz"):
        prove_bundle(broken)


def test_a_reference_that_lacks_an_array(broken: Path) -> None:
    change_reference(broken, lambda arrays: arrays.pop("batch_padded/t/tap/0.t"))
    with pytest.raises(ParityError, match=r"the reference lacks an array: batch_padded/t/tap/0\.t"):
        prove_bundle(broken)


def test_a_reference_with_no_case(broken: Path) -> None:
    change_reference(broken, dict.clear)
    with pytest.raises(ParityError, match="there was nothing to compare"):
        prove_bundle(broken)


def test_a_reference_that_lost_a_case(broken: Path) -> None:
    def lose_a_case(arrays: dict[str, Any]) -> None:
        for key in [key for key in arrays if key.startswith("batch_padded/")]:
            del arrays[key]

    change_reference(broken, lose_a_case)
    with pytest.raises(
        ParityError, match=r"lacks cases .*reference\.npz, set vt \(expected 25 cells, got 20\)"
    ):
        prove_bundle(broken, ["vt"])


def test_a_bundle_without_a_proof_yet_is_compared_with_what_there_is(broken: Path) -> None:
    variants = json.loads((broken / "manifest.json").read_text("utf-8"))["variants"]
    rewrite_manifest(broken, variants=[variant | {"parity": None} for variant in variants])
    change_reference(broken, lambda arrays: [arrays.pop(k) for k in list(arrays) if k[:6] != "single"])
    assert len(prove_bundle(broken, ["vt"]).cells) == 15


def test_a_reference_of_another_shape_is_a_failed_cell(broken: Path) -> None:
    def shorten(arrays: dict[str, Any]) -> None:
        arrays["batch_padded/none/out/logits"] = arrays["batch_padded/none/out/logits"][:, :1]

    change_reference(broken, shorten)
    (cell,) = prove_bundle(broken, ["none"]).failures
    assert cell.problem == "shape (2, 2, 21), expected (2, 1, 21)"
    table = render(parity_table({"b": prove_bundle(broken, ["none"])}))
    assert "shape (2, 2, 21), expected (2, 1, 21)" in table


def test_a_reference_that_is_a_pickle_is_refused(broken: Path) -> None:
    np.save(broken / "reference.npz", np.array([{}]), allow_pickle=True)
    (broken / "reference.npz.npy").rename(broken / "reference.npz")
    rehash(broken)
    with pytest.raises(BundleError, match="the reference cannot be read"):
        prove_bundle(broken)


def test_inputs_that_the_graph_cannot_compute(broken: Path) -> None:
    def out_of_vocabulary(arrays: dict[str, Any]) -> None:
        arrays["single_typical/in/input_ids"] = arrays["single_typical/in/input_ids"] + 1000

    change_reference(broken, out_of_vocabulary)
    with pytest.raises(ParityError, match=r"cannot compute the reference inputs: .*case single_typical"):
        prove_bundle(broken)


def test_report_round_trip_and_what_the_manifest_keeps(report: ParityReport, tmp_path: Path) -> None:
    (tmp_path / "parity.json").write_text(report.to_json())
    assert json.loads(report.to_json())["passed"] is True
    assert ParityReport.read(tmp_path / "parity.json") == report
    kept = report.variant_parity("vt")
    assert kept.passed
    assert kept.num_cells == 5 * len(CASES)
    with pytest.raises(ParityError, match="nothing was compared: vt, cpu-fp32"):
        report.variant_parity("vt", "cpu-fp32")
    (tmp_path / "parity.json").write_text("{}")
    with pytest.raises(BundleError, match="not a parity report"):
        ParityReport.read(tmp_path / "parity.json")


def test_the_table_has_a_line_for_each_set_and_output_or_for_each_cell(report: ParityReport) -> None:
    lines = render(parity_table({"b": report})).splitlines()
    assert sum("yes" in line for line in lines) == 12
    every = render(parity_table({"b": report, "c": report}, every_cell=True)).splitlines()
    assert sum("yes" in line for line in every) == 2 * len(report.cells)
    assert "bundle" in every[0]


def test_extra_outputs_are_what_protobuf_would_write() -> None:
    names = ["x_adapter.0.v", "x" * 300]
    extra = onnx.ModelProto(graph=onnx.GraphProto(output=[onnx.ValueInfoProto(name=name) for name in names]))
    assert extra_outputs(names) == extra.SerializeToString()


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a bundle of one set in three variants, one of them lossy; not to be changed."""
    folder = tmp_path_factory.mktemp("several") / "bundle"
    return write_bundle(folder, sets=("vt",), variants=("onnx-fp32", "cpu-fp32", "cpu-int8"))


def test_every_fp32_variant_is_proven_and_no_lossy_one(several: Path) -> None:
    report = prove_bundle(several)
    assert report.passed
    assert report.variants == ("onnx-fp32", "cpu-fp32")
    for name in report.variants:
        assert len(report.cells_of("vt", name)) == 5 * len(CASES)
        assert report.variant_parity("vt", name).num_cells == 5 * len(CASES)
    assert prove_bundle(several, variants=["cpu-fp32"]).variants == ("cpu-fp32",)
    with pytest.raises(
        ConfigError, match="a lossy variant cannot be checked with the fp32 tolerance: cpu-int8"
    ):
        prove_bundle(several, variants=["cpu-int8"])
    with pytest.raises(BundleError, match=r"this variant: cpu-fp16, experts vt \(expected one of onnx-fp32,"):
        prove_bundle(several, variants=["cpu-fp16"])


def test_a_variant_that_is_wrong_fails_beside_one_that_is_right(several: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(several, tmp_path / "bundle")
    scale_weight(folder / "onnx/model_cpu_fp32.onnx", "adapter_v", 1.05)
    rehash(folder)
    report = prove_bundle(folder)
    assert report.variant_parity("vt").passed
    assert not report.variant_parity("vt", "cpu-fp32").passed
    with pytest.raises(ParityError, match=r"worst: vt/.* of cpu-fp32"):
        report.raise_if_failed()


def test_of_a_fused_graph_only_the_taps_that_are_left_are_read(several: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(several, tmp_path / "bundle")
    model = onnx.load(folder / "onnx/model_cpu_fp32.onnx")
    for node in model.graph.node:
        for names in (node.input, node.output):
            names[:] = ["fused" if name == "x_adapter.0.v" else name for name in names]
    onnx.save(model, folder / "onnx/model_cpu_fp32.onnx")
    variants = json.loads((folder / "manifest.json").read_text("utf-8"))["variants"]
    rewrite_manifest(folder, variants=[variant | {"parity": None} for variant in variants])
    rehash(folder)
    taps = {cell.output for cell in prove_bundle(folder).cells_of("vt", "cpu-fp32")}
    assert taps == {"logits", "retrieved", "retrieved_scores", "x_adapter.0.t"}
    rewrite_manifest(folder, variants=variants)
    with pytest.raises(ParityError, match=r"lacks cases .* \(expected 25 cells, got 20\)"):
        prove_bundle(folder)


def test_one_graph_is_open_at_a_time(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[weakref.ref[Any]] = []

    def open_one(*arguments: Any, **options: Any) -> Any:
        assert not [session for session in opened if session() is not None]
        session = door.open_variant(*arguments, **options)
        opened.append(weakref.ref(session))
        return session

    monkeypatch.setattr(prove, "open_variant", open_one)
    assert prove_bundle(tiny).passed
    assert len(opened) > 4  # with taps and without


def test_a_graph_of_openvino_is_proven_by_its_outputs(tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    folder = write_bundle(tmp_path / "b", sets=("t",), variants=("onnx-fp32", "openvino-fp32"))
    report = prove_bundle(folder)
    assert report.passed
    assert {cell.output for cell in report.cells_of("t", "openvino-fp32")} == {"logits"}
    assert len(report.cells_of("t", "openvino-fp32")) == len(CASES)
    assert set(report.created_with) == {"numpy", "onnxruntime", "openvino"}
    assert report.providers == ("CPUExecutionProvider", "OpenVINO")


def test_a_bundle_with_only_lossy_variants_has_nothing_to_prove(tmp_path: Path) -> None:
    folder = write_bundle(tmp_path / "b", sets=("t",), variants=("cpu-int8",))
    with pytest.raises(ParityError, match=r"nothing to compare.*\(got no fp32 variant that runs here\)"):
        prove_bundle(folder)


def test_a_tap_that_is_not_in_the_graph(broken: Path) -> None:
    manifest = json.loads((broken / "manifest.json").read_text())
    manifest["expert_sets"]["t"]["taps"][0]["name"] = "no_such_value"
    rewrite_manifest(broken, expert_sets=manifest["expert_sets"])
    with pytest.raises(BundleError, match=r"onnxruntime cannot load the graph.*no_such_value"):
        prove_bundle(broken, ["t"])


def test_a_file_that_is_no_graph(tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_bytes(b"not a graph")
    with pytest.raises(BundleError, match=r"the graph cannot be read: .*m\.onnx"):
        open_onnx(tmp_path / "m.onnx")


def test_a_provider_that_is_not_there_is_named(tiny: Path) -> None:
    with pytest.raises(
        ProviderError, match=r"CUDAExecutionProvider is not in this onnxruntime.*got .*CPU.*\[gpu\]"
    ):
        prove_bundle(tiny, providers=["CUDAExecutionProvider", "CPUExecutionProvider"])


def test_a_provider_that_does_not_start_is_an_error(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import onnxruntime

    monkeypatch.setattr(onnxruntime.InferenceSession, "get_providers", lambda _: [])
    with pytest.raises(ProviderError, match="CPUExecutionProvider did not start"):
        prove_bundle(tiny)


def test_threads_below_one(tiny: Path) -> None:
    with pytest.raises(ConfigError, match=r"num_threads must be at least 1 \(got 0\)"):
        prove_bundle(tiny, num_threads=0)


def test_without_onnxruntime_both_extras_are_named(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MissingExtraError, match=r'\[cpu\]" or pip install "xadapter-export\[gpu\]"'):
        prove_bundle(tiny)
    monkeypatch.setattr(onnx_session, "installed_version", lambda name: "1.0")
    with pytest.raises(MissingExtraError, match="overwrite each other's files: run pip uninstall -y"):
        prove_bundle(tiny)


def test_both_onnxruntimes_at_once_is_a_warning_where_it_works(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnx_session, "installed_version", lambda name: "1.0")
    with pytest.warns(UserWarning, match="onnxruntime and onnxruntime-gpu are both installed"):
        open_onnx(tiny / "onnx/model.onnx")
