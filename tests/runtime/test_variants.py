import gc
import json
import platform
from functools import partial
from pathlib import Path

import onnx
import pytest
from archspec import cpu
from archspec.cpu import detect
from click.testing import CliRunner
from onnx import numpy_helper

from tests.tiny_bundle import rehash, rewrite_manifest, write_bundle
from xadapter_export import XAdapterSession
from xadapter_export.bundle import machine
from xadapter_export.bundle.machine import Machine, read_machine
from xadapter_export.bundle.manifest import Deployment, ExpertSet, Variant
from xadapter_export.cli.run import run
from xadapter_export.errors import BundleError, ConfigError, ParityError
from xadapter_export.runtime.choose import choices_by_kind, choose, kind_of
from xadapter_export.sessions import shared
from xadapter_export.targets import all_variants

BANANA = "the color of a banana is [MASK]."
ALL = ("onnx-fp32", "onnx-fp16", "cpu-fp32", "cpu-int8", "cpu-int4", "openvino-fp32", "openvino-int8")
VNNI = Machine("x86-64", frozenset({"avx2", "avx512_vnni"}), runtimes=frozenset())
OPENVINO = Machine("x86-64", frozenset({"avx2", "avx512_vnni"}), runtimes=frozenset({"openvino"}))
AVX2 = Machine("x86-64", frozenset({"avx2"}), runtimes=frozenset({"openvino"}))
OLD = Machine("x86-64", frozenset(), runtimes=frozenset())
CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"


def make_variant(name: str) -> Variant:
    target, precision = all_variants()[name]
    return Variant(
        expert_set="t",
        precision=precision,
        target=target,
        file="f",
        weight_files=(),
        size_bytes=1,
        parity=None,
    )


def chosen(names: tuple[str, ...], name: str, machine: Machine, *providers: str) -> str:
    variants = [make_variant(item) for item in names]
    return choose(variants, name, providers=providers or (CPU,), machine=machine).variant.name


@pytest.mark.parametrize(
    ("machine", "names", "expected"),
    [
        (OPENVINO, ALL, "openvino-int8"),
        (Machine("arm64", frozenset({"asimddp"}), runtimes=frozenset({"openvino"})), ALL, "cpu-int8"),
        (VNNI, ALL, "cpu-int8"),
        (Machine("x86-64", frozenset({"avx_vnni"}), runtimes=frozenset()), ALL, "cpu-int8"),
        (Machine("x86-64", frozenset({"avx2"}), runtimes=frozenset()), ALL, "cpu-int8"),
        (AVX2, ALL, "cpu-int8"),
        (OLD, ALL, "cpu-fp32"),
        (OLD, ("onnx-int8",), "onnx-int8"),
        (OPENVINO, ("onnx-fp32", "cpu-int8"), "cpu-int8"),
        (OPENVINO, ("onnx-fp32", "openvino-fp32"), "openvino-fp32"),
        (
            Machine("arm64", frozenset(), runtimes=frozenset({"openvino"})),
            ("onnx-fp32", "openvino-fp32"),
            "onnx-fp32",
        ),
        (OPENVINO, ("onnx-fp16", "openvino-fp32"), "openvino-fp32"),
        (VNNI, ("onnx-fp32", "onnx-fp16", "cpu-int4", "openvino-int8"), "onnx-fp32"),
    ],
)
def test_auto_on_the_cpu(machine: Machine, names: tuple[str, ...], expected: str) -> None:
    assert chosen(names, "auto", machine) == expected
    assert chosen(tuple(reversed(names)), "auto", machine) == expected


def test_auto_with_another_provider() -> None:
    assert chosen(ALL, "auto", OPENVINO, CUDA, CPU) == "onnx-fp16"
    assert chosen(("onnx-fp32", "cpu-int8", "openvino-int8"), "auto", OPENVINO, CUDA) == "onnx-fp32"
    assert chosen(ALL, "auto", OPENVINO, "XnnpackExecutionProvider") == "onnx-fp32"
    both = (*ALL, "cuda-fp32", "cuda-fp16")
    assert chosen(both, "auto", OPENVINO, CUDA, CPU) == "cuda-fp16"
    assert chosen((*ALL, "cuda-fp32"), "auto", OPENVINO, CUDA) == "cuda-fp32"
    assert chosen(both, "auto", OPENVINO, "DmlExecutionProvider") == "onnx-fp16"
    assert chosen(both, "auto", OPENVINO, "TensorrtExecutionProvider", CUDA) == "onnx-fp16"
    assert chosen(both, "auto", VNNI) == "cpu-int8"
    assert chosen(both, "fp32", OPENVINO, CUDA) == "cuda-fp32"
    for name in ("cuda-fp32", "cuda-fp16"):
        assert chosen(both, name, VNNI, CUDA) == name
    with pytest.raises(ConfigError, match=r"needs onnxruntime's CUDA provider: cuda-fp32 \(got CPUExec"):
        chosen(both, "cuda-fp32", VNNI)


def test_a_precision_alone_takes_the_fastest_target() -> None:
    assert chosen(ALL, "int8", OPENVINO) == "openvino-int8"
    assert chosen(ALL, "int8", VNNI) == "cpu-int8"
    assert chosen(ALL, "int8", OLD) == "cpu-int8"
    assert chosen(("onnx-fp32", "openvino-int8"), "int8", VNNI) == "openvino-int8"
    assert chosen(ALL, "fp32", OPENVINO) == "openvino-fp32"
    assert chosen(ALL, "fp32", VNNI) == "cpu-fp32"
    assert chosen(ALL, "int4", OPENVINO) == "cpu-int4"
    assert chosen(ALL, "fp32", OPENVINO, CUDA) == "onnx-fp32"
    assert chosen(ALL, "fp16", OPENVINO, CUDA) == "onnx-fp16"


@pytest.mark.parametrize("name", ALL)
def test_a_whole_name_is_that_variant(name: str) -> None:
    providers = (CUDA,) if name == "onnx-fp16" else (CPU,)
    assert chosen(ALL, name, OLD, *providers) == name


@pytest.mark.parametrize("name", ["fp16", "onnx-fp16"])
def test_fp16_on_a_cpu_is_refused_whether_it_is_there_or_not(name: str) -> None:
    for names in (ALL, ("onnx-fp32",)):
        with pytest.raises(ConfigError, match=rf"fp16 is slower than fp32 on a CPU.*: {name}; request one"):
            chosen(names, name, VNNI)


def test_engines_answer_where_they_are_named() -> None:
    engines = [
        Deployment(
            target="tensorrt-rtx",
            expert_set="t",
            precision="fp16",
            source="onnx-fp16",
            files=("e",),
            size_bytes=1,
            seconds=1.0,
            facts={"engine sm89": "e"},
            prove_with=None,
        )
    ]
    variants = [make_variant(name) for name in ALL]
    found = choose(variants, "tensorrt-rtx-fp16", providers=(CPU,), machine=VNNI, engines=engines)
    assert (found.name, found.variant.name, found.engine) == ("tensorrt-rtx-fp16", "onnx-fp16", engines[0])
    assert choose(variants, "auto", providers=(CUDA,), machine=VNNI, engines=engines).engine is None
    with pytest.raises(BundleError, match=r"variant: tensorrt-rtx-fp32, .*, tensorrt-rtx-fp16\)"):
        choose(variants, "tensorrt-rtx-fp32", providers=(CPU,), machine=VNNI, engines=engines)
    with pytest.raises(BundleError, match="does not have this variant: tensorrt-rtx-fp16"):
        choose(variants, "tensorrt-rtx-fp16", providers=(CPU,), machine=VNNI)
    with pytest.raises(ConfigError, match="an engine runs on the GPU without"):
        choose(variants, "tensorrt-rtx-fp16", providers=(CUDA,), machine=VNNI, engines=engines)


def test_what_is_not_there() -> None:
    with pytest.raises(BundleError, match=r"this variant: cpu-int8, experts t \(expected one of onnx-fp32\)"):
        chosen(("onnx-fp32",), "cpu-int8", VNNI)
    with pytest.raises(BundleError, match=r"this variant: int9, experts t \(expected one of onnx-fp32\)"):
        chosen(("onnx-fp32",), "int9", VNNI)
    with pytest.raises(BundleError, match=r"this variant: int8, experts t .*export with its --precision"):
        chosen(("cpu-int8", "onnx-fp32"), "int8", VNNI, CUDA)
    with pytest.raises(BundleError, match=r"no suitable variant.*of cpu-int4\); name .*--variant onnx-fp32$"):
        chosen(("cpu-int4",), "auto", VNNI)
    with pytest.raises(
        ConfigError, match=r"only on the CPU, and another provider.*: openvino-int8 \(got CUDA"
    ):
        chosen(ALL, "openvino-int8", OPENVINO, CUDA)


def test_the_reason_is_said() -> None:
    variants = [make_variant(name) for name in ALL]
    assert (
        choose(variants, "auto", providers=(CPU,), machine=VNNI).reason == "int8 products are fast with VNNI"
    )
    assert choose(variants, "int4", providers=(CPU,), machine=VNNI).reason == "the fastest int4 here"


def test_what_the_cpu_has_is_read_once_and_named() -> None:
    here = read_machine()
    assert here is read_machine()
    assert here.architecture in str(here)
    assert here.cpu != Machine.cpu


def test_a_cpu_that_runs_no_code_of_ours_is_read_another_way(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise OSError("no memory may be executed")

    monkeypatch.setattr(detect, "CpuidInfoCollector", refuse)
    name, features = machine._read_cpu("x86-64")
    if platform.system() == "Linux":
        assert "sse2" in features
        assert name
    monkeypatch.setattr(cpu, "host", refuse)
    assert machine._read_cpu("x86-64") == ("unknown CPU", frozenset())


@pytest.mark.parametrize(
    ("architecture", "features", "kind"),
    [
        ("x86-64", {"avx2", "avx_vnni"}, "x86-64 with VNNI"),
        ("x86-64", {"avx2"}, "x86-64 with AVX2"),
        ("x86-64", set(), "x86-64 without AVX2"),
        ("arm64", {"asimddp", "sme"}, "Arm with int8 dot products"),
        ("arm64", set(), "Arm without int8 dot products"),
        ("riscv64", set(), "any other CPU"),
    ],
)
def test_kinds_of_cpu(architecture: str, features: set[str], kind: str) -> None:
    assert kind_of(Machine(architecture, frozenset(features), runtimes=frozenset())) == kind


def test_what_auto_takes_on_each_kind_of_cpu_is_what_it_says() -> None:
    variants = [make_variant(name) for name in ALL]
    said = choices_by_kind(variants)
    assert said["x86-64 with VNNI"] == "cpu-int8"
    assert said["x86-64 with VNNI, OpenVINO installed"] == "openvino-int8"
    assert said["x86-64 with AVX2"] == "cpu-int8"
    assert "x86-64 with AVX2, OpenVINO installed" not in said  # the same
    for here in (VNNI, OLD, OPENVINO, AVX2):
        kind = kind_of(here)
        with_it = f"{kind}, OpenVINO installed"
        expected = said[with_it] if here.runtimes and with_it in said else said[kind]
        assert chosen(ALL, "auto", here) == expected
    assert choices_by_kind([make_variant("onnx-fp16")]) == {}
    assert choices_by_kind([make_variant("onnx-fp32")]) == {"every CPU": "onnx-fp32"}
    only = choices_by_kind([make_variant("openvino-fp32")])
    assert set(only.values()) == {"openvino-fp32"}
    assert all(kind.endswith("OpenVINO installed") for kind in only)


def test_what_was_refused_is_passed_over() -> None:
    variants = [make_variant(name) for name in ("cpu-int8", "cpu-fp32")]
    again = partial(choose, variants, providers=(CPU,), machine=VNNI)
    assert again("auto", refused={"cpu-int8"}).name == "cpu-fp32"
    assert not again("auto").named
    assert again("cpu-int8").named
    with pytest.raises(ParityError, match=r"every suitable variant .*: cpu-int8, cpu-fp32, experts t, unk"):
        again("auto", refused={"cpu-int8", "cpu-fp32"})
    with pytest.raises(ParityError, match="every suitable variant"):
        again("int8", refused={"cpu-int8"})


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle in three variants, whose set ``none`` lacks the int8 one; not to be changed."""
    folder = tmp_path_factory.mktemp("several") / "bundle"
    write_bundle(folder, variants=("onnx-fp32", "cpu-fp32", "cpu-int8"))
    variants = json.loads((folder / "manifest.json").read_text("utf-8"))["variants"]
    kept = [v for v in variants if (v["expert_set"], v["precision"]) != ("none", "int8")]
    rewrite_manifest(folder, variants=kept)
    return folder


def test_a_session_answers_with_the_variant_it_says(several: Path) -> None:
    fp32 = XAdapterSession.load(several, experts="v", variant="onnx-fp32", num_threads=1)
    int8 = XAdapterSession.load(several, experts="v", variant="int8", num_threads=1)
    assert (fp32.variant.name, int8.variant.name) == ("onnx-fp32", "cpu-int8")
    assert (fp32.variant_reason, int8.variant_reason) == ("named", "the fastest int8 here")
    exact, lossy = fp32.fill_mask(BANANA)[0], int8.fill_mask(BANANA)[0]
    assert exact.token == lossy.token == "yellow"
    assert 1e-4 < abs(exact.logit - lossy.logit) < 1


def test_another_set_gets_the_same_variant_or_the_next_best(several: Path) -> None:
    session = XAdapterSession.load(several, experts="vt", variant="cpu-int8", num_threads=1)
    assert session.with_experts("t").variant.name == "cpu-int8"
    assert session.with_experts("none").variant.name == "cpu-fp32"
    assert session.fill_mask(BANANA, experts="none")
    plain = XAdapterSession.load(several, experts="none", variant="onnx-fp32", num_threads=1)
    assert plain.with_experts("vt").variant.name == "onnx-fp32"


def test_a_session_refuses_what_is_not_there(several: Path) -> None:
    with pytest.raises(BundleError, match=r"openvino-int8, experts none \(expected one of onnx-fp32, cpu-fp"):
        XAdapterSession.load(several, experts="none", variant="openvino-int8")
    with pytest.raises(ConfigError, match="fp16 is slower than fp32 on a CPU"):
        XAdapterSession.load(several, variant="fp16", providers=[CPU])


def test_sessions_that_ask_alike_share_one_loaded_graph(several: Path) -> None:
    before = len(shared._loaded)
    first = XAdapterSession.load(several, experts="t", variant="cpu-fp32", num_threads=1)
    again = XAdapterSession.load(several, experts="t", variant="cpu-fp32", num_threads=1)
    assert again._graphs.session("t") is first._graphs.session("t")
    own = XAdapterSession.load(several, experts="t", variant="cpu-fp32", num_threads=1, share_weights=False)
    other = XAdapterSession.load(several, experts="t", variant="cpu-fp32", num_threads=2)
    assert len({id(s._graphs.session("t")) for s in (first, own, other)}) == 3
    assert own.fill_mask(BANANA) == first.fill_mask(BANANA)
    assert len(shared._loaded) == before + 2
    del first, again, own, other
    gc.collect()
    assert len(shared._loaded) == before


def test_a_bundle_written_anew_is_loaded_anew(tmp_path: Path) -> None:
    folder = write_bundle(tmp_path / "b", sets=("none",))
    first = XAdapterSession.load(folder, num_threads=1)
    before = first.fill_mask(BANANA)
    doubled = onnx.load(folder / "onnx/model.onnx")
    weight = next(tensor for tensor in doubled.graph.initializer if tensor.name == "decoder")
    weight.CopyFrom(numpy_helper.from_array(2 * numpy_helper.to_array(weight), "decoder"))
    onnx.save(doubled, folder / "onnx/model.onnx")
    rehash(folder)
    second = XAdapterSession.load(folder, num_threads=1, check="never")
    assert second._graphs.session("none") is not first._graphs.session("none")
    assert second.fill_mask(BANANA)[0].logit == pytest.approx(2 * before[0].logit, abs=1e-4)
    assert first.fill_mask(BANANA) == before


def test_openvino_answers_as_onnxruntime_does(tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    folder = write_bundle(tmp_path / "b", sets=("t",), variants=("onnx-fp32", "openvino-fp32"))
    session = XAdapterSession.load(folder, variant="openvino-fp32", num_threads=1)
    assert session.variant.target == "openvino"
    reference = XAdapterSession.load(folder, variant="onnx-fp32", num_threads=1).fill_mask(BANANA)
    answers = session.fill_mask(BANANA)
    assert [a.token for a in answers] == [a.token for a in reference]
    assert [a.logit for a in answers] == pytest.approx([a.logit for a in reference], abs=1e-4)


def test_what_openvino_compiled_is_kept_by_the_hash_of_the_graph(tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    cache, folder = tmp_path / "cache", tmp_path / "b"
    write_bundle(folder, sets=("none", "t"), variants=("onnx-fp32", "openvino-fp32"))
    load = partial(XAdapterSession.load, folder, variant="openvino-fp32", num_threads=1, cache_dir=str(cache))
    sets: tuple[ExpertSet, ...] = ("none", "t", "none")
    answers = []
    for experts in sets:
        answers.append(load(experts=experts, share_weights=False).fill_mask(BANANA))
        kept = {path.parent.name for path in cache.glob("*/*.blob")}
        assert len(kept) == min(2, len(answers))
    assert answers[2] == answers[0] != answers[1]
    XAdapterSession.load(folder, variant="onnx-fp32", num_threads=1, cache_dir=tmp_path / "unused")
    assert not (tmp_path / "unused").exists()
    arguments = [folder, BANANA, "--variant", "openvino-fp32", "--cache-dir", folder / "manifest.json"]
    ran = CliRunner().invoke(run, [str(argument) for argument in arguments])
    assert ran.exit_code == 1
    assert "compiled graphs cannot be written" in ran.stderr
