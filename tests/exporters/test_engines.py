"""Engines for NVIDIA GPUs: built for real, with no GPU; what runs them is compared through onnxruntime."""

import ctypes
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from tests.tiny_checkpoint import TEXTS, make_model
from xadapter_export import XAdapterSession, export
from xadapter_export.bundle.folder import read_bundle
from xadapter_export.bundle.manifest import Deployment
from xadapter_export.errors import (
    BundleError,
    ConfigError,
    HashMismatchError,
    ParityError,
    ProviderError,
    UnsupportedError,
    XAdapterError,
)
from xadapter_export.exporters.makers import engines
from xadapter_export.exporters.makers.axis_profile import AxisRange, parse_profile, plan_axes, profile_shapes
from xadapter_export.exporters.makers.engines import EngineJob, build_engine, split_capabilities
from xadapter_export.exporters.makers.maker import DeployJob, check_options
from xadapter_export.exporters.makers.tensorrt_engines import TensorRtRtxMaker
from xadapter_export.exporters.pipeline import ExportResult
from xadapter_export.exporters.request import ExportRequest
from xadapter_export.parity import prove_engines
from xadapter_export.parity.engines import LOSSY_FACTOR, compare_engine
from xadapter_export.parity.reference import read_reference
from xadapter_export.sessions import shared
from xadapter_export.sessions.onnx_session import open_onnx
from xadapter_export.sessions.open import open_variant
from xadapter_export.sessions.session import Array, OnnxSession
from xadapter_export.sessions.tensorrt_session import EngineSession, find_gpu
from xadapter_export.targets import TARGETS

trt = pytest.importorskip("tensorrt_rtx", reason="the extra tensorrt is not installed")
pytest.importorskip("polygraphy", reason="the extra tensorrt is not installed")


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> ExportResult:
    """A bundle with engines and the folder for TensorRT, of one fp32 and one fp16 graph."""
    return export(
        make_model(tmp_path_factory.mktemp("model")),
        tmp_path_factory.mktemp("engines") / "bundle",
        "vt",
        precisions=("fp32", "fp16"),
        targets=("tensorrt-rtx", "tensorrt"),
        min_agreement=0.0,
        profile={"batch": (1, 4)},
        compute_capabilities=("sm75", "sm86+sm89"),
    )


def made(result: ExportResult, target: str, precision: str) -> Deployment:
    [found] = [d for d in result.manifest.deployments if (d.target, d.precision) == (target, precision)]
    return found


def has_gpu() -> bool:
    try:
        find_gpu()
    except XAdapterError:
        return False
    return True


def test_engines_are_built_without_a_gpu_and_refusals_are_a_line(result: ExportResult) -> None:
    fp32 = made(result, "tensorrt-rtx", "fp32")
    assert fp32.files == ("tensorrt-rtx/model_fp32_sm86-sm89.engine",)
    assert fp32.size_bytes == (result.folder / fp32.files[0]).stat().st_size > 1e5
    assert fp32.refused == (
        "sm75, onnx-fp32, experts vt: TensorRT-RTX has no fp32 matrix products for Turing (sm75); "
        "leave sm75 out, or choose --precision fp16",
    )
    assert fp32.facts["profile batch"] == "1..4"
    assert float(fp32.facts["seconds sm86+sm89"]) > 0
    assert fp32.facts["library"] == f"tensorrt_rtx {trt.__version__}"
    fp16 = made(result, "tensorrt-rtx", "fp16")
    assert set(fp16.facts) >= {"engine sm75", "engine sm86+sm89"}
    assert not fp16.refused
    assert set(fp16.files) <= set(result.manifest.files)  # hashed like everything else


def test_a_machine_without_a_gpu_says_so_in_one_line(result: ExportResult) -> None:
    if has_gpu():
        pytest.skip("this machine has a GPU")
    with pytest.raises(ProviderError, match=r"CUDA finds none on this machine \(got cudaError"):
        prove_engines(result.folder, "tensorrt-rtx")
    with pytest.raises(BundleError, match="does not have this engine: tensorrt-rtx, experts none"):
        prove_engines(result.folder, "tensorrt-rtx", ["none"])


class _Engine:
    """What TensorRT tells of an engine, and the memory of a GPU in the memory of this machine."""

    num_io_tensors = 2

    def __init__(self) -> None:
        self.taken: dict[int, Any] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        codes = SimpleNamespace(cudaMemcpyHostToDevice=1, cudaMemcpyDeviceToHost=2)
        self.cuda = SimpleNamespace(
            cudaMemcpyKind=codes,
            cudaStreamCreate=lambda: (0, 7),
            cudaStreamDestroy=lambda _: (0,),
            cudaStreamSynchronize=lambda _: (0,),
            cudaMalloc=self._take,
            cudaFree=lambda address: (0, self.taken.pop(address))[:1],
            cudaMemcpyAsync=lambda to, source, size, *_: (0, ctypes.memmove(to, source, size))[:1],
        )
        self.library = SimpleNamespace(
            TensorIOMode=SimpleNamespace(INPUT=0), nptype=lambda _: np.float32, __name__="rt", __version__="1"
        )

    def _take(self, size: int) -> tuple[int, int]:
        memory = ctypes.create_string_buffer(size)
        self.taken[ctypes.addressof(memory)] = memory
        return 0, ctypes.addressof(memory)

    def create_execution_context(self) -> "_Engine":
        return self

    def get_tensor_name(self, number: int) -> str:
        return "xy"[number]

    def get_tensor_mode(self, name: str) -> int:
        return "xy".index(name)

    def get_tensor_dtype(self, name: str) -> str:
        return name

    def get_tensor_profile_shape(self, name: str, profile: int) -> list[list[int]]:
        return [[1, 2], [1, 2], [4, 2]]

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.shapes[name] = shape
        return True

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return self.shapes["x"]

    def set_tensor_address(self, name: str, address: int) -> None:
        self.addresses[name] = address

    def execute_async_v3(self, stream: int) -> bool:
        size = 4 * int(np.prod(self.shapes["x"]))
        values = np.frombuffer(ctypes.string_at(self.addresses["x"], size), np.float32)
        ctypes.memmove(self.addresses["y"], (2 * values).ctypes.data, size)
        return True


def test_memory_on_the_gpu_is_kept_grows_and_is_given_back() -> None:
    engine = _Engine()
    session = EngineSession(engine, engine.library, engine.cuda, ())  # type: ignore[arg-type]  # stand-ins
    for batch in (1, 3, 2):
        feed = np.arange(2 * batch, dtype=np.float32).reshape(batch, 2)
        (answer,) = session.run(None, {"x": feed})
        np.testing.assert_array_equal(answer, 2 * feed)
        assert len(engine.taken) == 2
    assert {len(memory) for memory in engine.taken.values()} == {3 * 2 * 4}
    with pytest.raises(BundleError, match=r"not built for this shape: x \(expected \(1, 2\) to \(4, 2\)"):
        session.run(None, {"x": np.zeros((5, 2), np.float32)})
    del session
    assert not engine.taken


def test_a_session_without_a_gpu_says_so_or_lets_the_cpu_answer(result: ExportResult) -> None:
    if has_gpu():
        pytest.skip("this machine has a GPU")
    with pytest.raises(ProviderError, match="an engine needs an NVIDIA GPU, and CUDA finds none"):
        XAdapterSession.load(result.folder, variant="tensorrt-rtx-fp16")
    with pytest.warns(UserWarning, match="CUDA finds none on this machine .* using the CPU instead"):
        session = XAdapterSession.load(result.folder, variant="tensorrt-rtx-fp16", allow_fallback=True)
    assert session.answered_by == "onnx-fp32"


def test_the_engine_for_this_gpu_answers(result: ExportResult, monkeypatch: pytest.MonkeyPatch) -> None:
    """The GPU is a stand-in: onnxruntime runs the graph that the engine was built from."""
    bundle = read_bundle(result.folder)
    opened: list[Path] = []
    sizes: list[int] = []

    class Spy:
        def __init__(self, file: Path, target: str) -> None:
            opened.append(file)
            self._graph = open_variant(bundle, bundle.manifest.variant("vt", "onnx-fp16"))

        def run(self, names: Sequence[str], feed: Mapping[str, Array]) -> list[Array]:
            sizes.append(len(feed["input_ids"]))
            return self._graph.run(names, feed)

    monkeypatch.setattr(shared, "find_gpu", lambda: "sm89")
    monkeypatch.setattr(shared, "open_engine", Spy)
    session = XAdapterSession.load(result.folder, variant="tensorrt-rtx-fp16")
    assert session.answered_by == "tensorrt-rtx-fp16"
    assert [file.name for file in opened] == ["model_fp16_sm86-sm89.engine"]
    again = XAdapterSession.load(result.folder, variant="tensorrt-rtx-fp16")
    assert len(opened) == 1  # sessions share an engine
    fp32 = XAdapterSession.load(result.folder, variant="onnx-fp32")
    texts = [TEXTS[0]] * 9
    answers = [answer[0].token for answer in again.fill_mask(texts)]
    assert answers == [answer[0].token for answer in fp32.fill_mask(texts)]
    assert max(sizes) == 4  # which the engine was planned for
    with pytest.raises(BundleError, match=r"the engine cannot run on this input: tensorrt-rtx-fp16 \(got"):
        session.run(session.text_encoder(None).encode(TEXTS[:1]), outputs=["nonsense"])
    with pytest.raises(ConfigError, match="num_threads must be at least 1"):
        XAdapterSession.load(result.folder, variant="tensorrt-rtx-fp16", num_threads=0)
    monkeypatch.setattr(shared, "find_gpu", lambda: "sm120")
    with pytest.raises(ProviderError, match=r"no engine for this GPU \(sm120\).*one of sm75, sm86\+sm89"):
        XAdapterSession.load(result.folder, variant="tensorrt-rtx-fp16")


def test_an_engine_that_was_changed_is_never_opened(
    result: ExportResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(result.folder, tmp_path / "bundle")
    with (folder / "tensorrt-rtx/model_fp16_sm86-sm89.engine").open("r+b") as stream:
        stream.seek(-1, 2)
        last = stream.read(1)
        stream.seek(-1, 2)
        stream.write(bytes([last[0] ^ 1]))
    monkeypatch.setattr(shared, "find_gpu", lambda: "sm89")
    monkeypatch.setattr(shared, "open_engine", lambda *_: pytest.fail("it was opened"))
    with pytest.raises(HashMismatchError, match=r"model_fp16_sm86-sm89\.engine"):
        XAdapterSession.load(folder, variant="tensorrt-rtx-fp16")


def test_where_every_engine_is_refused_that_is_an_error(result: ExportResult) -> None:
    variant = result.manifest.variant("vt")
    options = ExportRequest(compute_capabilities=("sm75",))
    job = DeployJob(result.folder, result.manifest, variant, options, lambda _: None)
    with pytest.raises(UnsupportedError, match=r"could not build any engine \(got sm75, onnx-fp32, "):
        TensorRtRtxMaker(TARGETS["tensorrt-rtx"]).deploy(job)
    assert not (result.folder / "tensorrt-rtx" / "model_fp32_sm75.engine").exists()


def graph_with(node: onnx.NodeProto, opset: int, folder: Path) -> EngineJob:
    """A job for a product and one node after it; ``(batch, 4, seq, 64)``."""
    axes: list[str | int | None] = ["batch", 4, "seq", 64]
    weight = np.random.default_rng(0).standard_normal((64, 64)).astype(np.float32)
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["q"]), node],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, axes)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, axes)],
        [numpy_helper.from_array(weight, "w")],
    )
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid("ours", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets), folder / "g.onnx")
    shapes = {"x": ([1, 4, 8, 64], [1, 4, 32, 64], [8, 4, 64, 64])}
    return EngineJob("tensorrt_rtx", folder / "g.onnx", folder / "g.engine", shapes, ("sm89",))


def test_attention_of_opset_23_is_refused_whatever_it_does_to_the_builder(tmp_path: Path) -> None:
    job = graph_with(helper.make_node("Attention", ["q", "q", "q"], ["y"]), 23, tmp_path)
    built = build_engine(job, lambda _: None)
    assert built.refused is not None
    assert "Attention of opset 23; export with opset 17 to 21" in built.refused
    assert not job.engine.exists()


def test_an_operator_that_the_parser_does_not_know_is_named(tmp_path: Path) -> None:
    job = graph_with(helper.make_node("Nonsense", ["q"], ["y"], domain="ours", name="n1"), 17, tmp_path)
    built = build_engine(job, lambda _: None)
    assert built.refused is not None
    assert re.match(r"\d parser errors? at Nonsense n1", built.refused)


def test_phases_are_told_and_a_plain_graph_is_built(tmp_path: Path) -> None:
    job = graph_with(helper.make_node("Relu", ["q"], ["y"]), 17, tmp_path)
    phases: list[str] = []
    built = build_engine(job, phases.append)
    assert built.refused is None
    assert built.size_bytes == job.engine.stat().st_size
    assert "g.engine: building engine" in phases
    assert sum(built.layers.values()) >= 2


def test_lines_of_the_builder_that_are_no_events_are_complaints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "builder.py"
    program.write_text("print(123)\nprint([1])\nprint('null')\nprint('\"cudnn\"')\nraise SystemExit(3)\n")
    monkeypatch.setattr(engines, "_PROGRAM", program)
    job = EngineJob("tensorrt_rtx", tmp_path / "g.onnx", tmp_path / "g.engine", {}, ())
    assert build_engine(job, lambda _: None).refused == '"cudnn"'


def compare(
    result: ExportResult, precision: str, session: OnnxSession, longest: int = 512
) -> tuple[list[str], bool]:
    """Compare a session of onnxruntime as if it were the engine: the cases, and whether all passed."""
    bundle = read_bundle(result.folder)
    reference = read_reference(bundle)

    def fits(feed: Mapping[str, Array]) -> bool:
        return int(feed["input_ids"].shape[1]) <= longest

    cells, _ = compare_engine(bundle, made(result, "tensorrt-rtx", precision), session, fits, reference)
    assert {cell.variant for cell in cells} == {f"tensorrt-rtx-{precision}"}
    return sorted({cell.case for cell in cells}), all(cell.passed for cell in cells)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_the_comparison_passes_the_graph_itself_and_fails_one_with_a_weight_off(
    result: ExportResult, precision: str, tmp_path: Path
) -> None:
    bundle = read_bundle(result.folder)
    variant = bundle.manifest.variant("vt", f"onnx-{precision}")
    cases, passed = compare(result, precision, open_variant(bundle, variant))
    assert passed
    assert len(cases) == 5

    graph = onnx.load(result.folder / variant.file)
    largest = max(graph.graph.initializer, key=lambda tensor: len(tensor.raw_data))
    values = numpy_helper.to_array(largest)
    largest.CopyFrom(numpy_helper.from_array((values * 1.1).astype(values.dtype), largest.name))
    onnx.save(graph, tmp_path / "off.onnx")
    assert not compare(result, precision, open_onnx(tmp_path / "off.onnx"))[1]


def test_only_cases_that_the_engine_was_planned_for_are_compared(result: ExportResult) -> None:
    bundle = read_bundle(result.folder)
    session = open_variant(bundle, bundle.manifest.variant("vt"))
    cases, passed = compare(result, "fp32", session, longest=3)
    assert passed
    assert 0 < len(cases) < 5
    with pytest.raises(ParityError, match="no reference input fits the input sizes of the engine"):
        compare(result, "fp32", session, longest=0)


def test_the_folder_for_tensorrt_is_whole_and_polygraphy_reads_it(
    result: ExportResult, tmp_path: Path
) -> None:
    fp16 = made(result, "tensorrt", "fp16")
    assert fp16.prove_with == "sh tensorrt/model_fp16.parity.sh"
    for file in fp16.files:  # alone: what is left behind is not needed
        (tmp_path / Path(file).name).write_bytes((result.folder / file).read_bytes())
    shapes = json.loads((tmp_path / "model_fp16.shapes.json").read_text(encoding="utf-8"))
    assert [shape[0] for shape in shapes["input_ids"]] == [1, 1, 4]
    assert "tensorrt/model_fp16.onnx_data" in fp16.files  # not what other graphs share
    script = (tmp_path / "model_fp16.parity.sh").read_text(encoding="utf-8")
    assert float(re.findall(r"--atol logits:(\S+)", script)[0]) >= 1e-4
    polygraphy = str(Path(sys.executable).with_name("polygraphy"))
    here = script.replace("exec polygraphy", polygraphy).replace(" --trt ", " --onnxrt ")
    (tmp_path / "here.sh").write_text(here)  # onnxruntime twice: there is no TensorRT here
    done = subprocess.run(
        ["sh", str(tmp_path / "here.sh")], capture_output=True, text=True, check=False, cwd="/"
    )
    assert done.returncode == 0, done.stdout[-800:] + done.stderr[-800:]
    assert f"Passed: {len(fp16.facts['cases'].split(', '))}/5 iterations" in done.stdout


def test_a_lossy_engine_may_be_twice_as_far_from_its_graph_as_that_is_from_pytorch(
    result: ExportResult,
) -> None:
    bundle = read_bundle(result.folder)
    variant = bundle.manifest.variant("vt", "onnx-fp16")
    reference = read_reference(bundle)
    session = open_variant(bundle, variant)
    deployment = made(result, "tensorrt-rtx", "fp16")
    _, held = compare_engine(bundle, deployment, session, lambda _: True, reference)
    atol = held["tensorrt-rtx-fp16/logits"].atol
    assert LOSSY_FACTOR == 2
    assert 1e-4 < atol < 0.5


def test_profiles_are_read_and_what_is_wrong_is_named() -> None:
    assert parse_profile(["batch=1..8 seq=8..128", "masks=2"]) == {
        "batch": (1, 8),
        "seq": (8, 128),
        "masks": (2, 2),
    }
    for text, said in {
        "batch": r"a profile must be a list of ranges \(expected .*, got 'batch'\)",
        "batch=1..x": "a profile must be a list of ranges",
        "width=1..2": "unknown axis: profile width",
        "seq=9..8": "the range of an axis is empty: profile seq",
        "seq=0..8": "the range of an axis is empty: profile seq",
        "seq=1..8 seq=2": "two ranges in the profile: seq",
    }.items():
        with pytest.raises(ConfigError, match=said):
            parse_profile([text])


def test_ranges_suit_the_task_and_go_no_further_than_the_models_read(result: ExportResult) -> None:
    manifest = result.manifest
    axes = plan_axes(manifest, {})
    assert manifest.clip is not None
    assert axes["seq"].largest == manifest.plm.max_seq
    assert axes["clip_seq"].largest == manifest.clip.context_length
    assert axes["batch"] == AxisRange(1, 1, 8)
    shapes = profile_shapes(manifest.expert_sets["vt"].inputs, plan_axes(manifest, {"seq": (4, 6)}))
    assert shapes["input_ids"] == ([1, 4], [1, 6], [8, 6])
    with pytest.raises(
        ConfigError, match=r"longer than the model's longest input: profile seq \(expected at most"
    ):
        plan_axes(manifest, {"seq": (1, 10_000)})


def test_compute_capabilities_are_those_that_the_library_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    assert split_capabilities(["SM80", "sm86+sm89"], trt) == [("sm80",), ("sm86", "sm89")]
    [everything] = split_capabilities([], trt)
    assert "sm75" not in everything
    monkeypatch.setattr(engines, "find_gpu", lambda: "sm89")
    assert split_capabilities(["current", "sm86+current"], trt) == [("sm89",), ("sm86", "sm89")]
    monkeypatch.setattr(engines, "find_gpu", lambda: "sm90")
    with pytest.raises(ConfigError, match="cannot build engines for this compute capability: sm90"):
        split_capabilities(["current"], trt)
    assert set(everything) >= {"sm80", "sm86", "sm89", "sm120"}
    for asked, said in {
        ("sm86+sm90",): r"cannot build engines for this compute capability: sm90 \(expected",
        ("sm89+",): r"for this compute capability: an empty name \(expected .*, got sm89\+\)",
        ("sm89+sm89",): r"named twice: sm89\+sm89 ",
        ("sm86+sm89", "sm89+sm86"): r"named twice: sm89\+sm86 ",
    }.items():
        with pytest.raises(ConfigError, match=said):
            split_capabilities(asked, trt)
    with pytest.raises(ConfigError, match="no fp32 matrix products"):
        both = ("tensorrt-rtx-fp16", "tensorrt-rtx-fp32")
        check_options(ExportRequest(variants=both, compute_capabilities=("sm75",)))
    check_options(ExportRequest(variants=("tensorrt-rtx-fp16",), compute_capabilities=("sm75",)))


def test_options_that_a_target_does_not_read_are_refused() -> None:
    triton, tensorrt = "triton-fp32", "tensorrt-fp32"
    with pytest.raises(ConfigError, match="are for the target tensorrt-rtx"):
        check_options(ExportRequest(variants=(tensorrt,), compute_capabilities=("sm89",)))
    with pytest.raises(
        ConfigError, match=r"none of the chosen targets uses a profile for this axis: profile seq"
    ):
        check_options(ExportRequest(variants=(triton, "mobile-fp32"), profile={"seq": (1, 8)}))
    with pytest.raises(ConfigError, match="triton accepts every length of this axis, starting at 1"):
        check_options(ExportRequest(variants=(triton,), profile={"batch": (4, 8)}))
    check_options(ExportRequest(variants=(triton, tensorrt), profile={"batch": (4, 8), "seq": (1, 8)}))


def test_a_profile_that_holds_no_reference_input_is_refused_before_the_trace(tmp_path: Path) -> None:
    model = make_model(tmp_path)
    stages: list[str] = []
    for profile, said in {
        (("seq", (30, 31)),): "no reference input fits the profile.*: seq=30..31; give",
        (("clip_seq", (2, 8)),): "none of the exported graphs has this axis: profile clip_seq",
    }.items():
        with pytest.raises(ConfigError, match=said):
            export(
                model,
                tmp_path / "bundle",
                "none",
                targets=("tensorrt",),
                profile=dict(profile),
                on_stage=lambda stage, _: stages.append(stage),
            )
    assert stages == []
