import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from tests import ROOT
from tests.runtime.test_batch_mates import ask_in_company
from xadapter_export import XAdapterSession, export
from xadapter_export.bundle.folder import read_bundle
from xadapter_export.bundle.manifest import ExpertSet
from xadapter_export.errors import BundleError, ConfigError, MissingExtraError, UnsupportedError
from xadapter_export.exporters.makers.openvino_ir import convert_to_ir
from xadapter_export.exporters.passes.quantize import RECIPES, Rounding, measure_products, round_products
from xadapter_export.exporters.pipeline import ExportResult
from xadapter_export.model.builtin import builtin_folder
from xadapter_export.parity.compare import TOLERANCES
from xadapter_export.runtime.encoders import load_encoders
from xadapter_export.runtime.text import TextEncoder
from xadapter_export.sessions.onnx_session import open_onnx
from xadapter_export.sessions.openvino_session import (
    _OpenVinoSession,
    import_openvino,
    open_openvino,
)
from xadapter_export.sessions.session import Array, OnnxSession, Opening
from xadapter_export.targets import Precision

pytest.importorskip("nncf")

Feed = dict[str, Array]
LARGE = 8192  # elements


class Case:
    """The built-in checkpoint's portable graph of one expert set, and what is derived from it."""

    def __init__(self, result: ExportResult, experts: ExpertSet, folder: Path) -> None:
        bundle = read_bundle(result.folder, verify=False)
        self.spec = bundle.manifest.expert_sets[experts]
        self.portable = bundle.file(bundle.manifest.variant(experts).file)
        self.encoder: TextEncoder = load_encoders(bundle)[1]
        lines = (builtin_folder() / "heldout.jsonl").read_text("utf-8").splitlines()
        self.texts = [text for line in lines for text in json.loads(line)["sentences"]]
        self.onnx = open_onnx(self.portable, Opening(num_threads=1))
        self.folder = folder

    def feeds(self, texts: Sequence[str], size: int) -> list[Feed]:
        names = [tensor.name for tensor in self.spec.inputs]
        batches = [self.encoder.encode(texts[i : i + size]) for i in range(0, len(texts), size)]
        return [{name: batch[name] for name in names} for batch in batches]

    def convert(self, precision: Precision, *, weights_only: bool = False) -> Path:
        path = self.folder / f"{precision}{'-weights' if weights_only else ''}.xml"
        feeds = [] if weights_only else self.feeds(self.texts[::4], 4)
        rounding = Rounding()
        if precision == "int8" and feeds:
            graph = ir.load(self.portable)
            round_products(graph, measure_products(graph, feeds, rounding), rounding)
        convert_to_ir(self.portable, path, precision, feeds, weights_only=weights_only, rounding=rounding)
        return path


@pytest.fixture(scope="module")
def vt(builtin_export: ExportResult, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(builtin_export, "vt", tmp_path_factory.mktemp("vt"))


@pytest.fixture(scope="module")
def t(builtin_export: ExportResult, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(builtin_export, "t", tmp_path_factory.mktemp("t"))


@pytest.fixture(scope="module")
def vt_fp32(vt: Case) -> Path:
    return vt.convert("fp32")


@pytest.fixture(scope="module")
def vt_int8(vt: Case) -> Path:
    return vt.convert("int8")


@pytest.fixture(scope="module")
def vt_int4(vt: Case) -> Path:
    return vt.convert("int4")


@pytest.fixture(scope="module")
def t_int8(t: Case) -> Path:
    return t.convert("int8")


@pytest.fixture(scope="module")
def t_int4(t: Case) -> Path:
    return t.convert("int4")


def answers(session: OnnxSession, name: str, feeds: Sequence[Feed]) -> Array:
    return np.concatenate([session.run([name], feed)[0] for feed in feeds])


def agreement(case: Case, file: Path, size: int) -> tuple[float, float]:
    """Share of sentences with the same top word as fp32, and the mean cosine of the logits."""
    feeds = case.feeds(case.texts, size)
    before = answers(case.onnx, "logits", feeds)[:, 0]
    after = answers(open_openvino(file, Opening(num_threads=1)), "logits", feeds)[:, 0]
    products = (before * after).sum(-1)
    cosine = products / np.linalg.norm(before, axis=-1) / np.linalg.norm(after, axis=-1)
    return float((before.argmax(-1) == after.argmax(-1)).mean()), float(cosine.mean())


def nodes(file: Path, kind: str) -> list[Any]:
    model = import_openvino().Core().read_model(str(file))
    return [node for node in model.get_ops() if node.get_type_name() == kind]


def large_floats(file: Path) -> list[str]:
    return [
        node.get_friendly_name()
        for node in nodes(file, "Constant")
        if node.get_element_type().get_type_name() == "f32" and math.prod(node.shape) > LARGE
    ]


@pytest.mark.parametrize("size", [1, 3])
def test_fp32_says_what_onnxruntime_says(vt: Case, vt_fp32: Path, size: int) -> None:
    session = open_openvino(vt_fp32, Opening(num_threads=1))
    texts = ["a banana is [MASK].", "the color of the ripe tomato on my plate is [MASK]!", "[MASK] grass."]
    for feed in vt.feeds(texts, size):
        want, got = vt.onnx.run(None, feed), session.run(None, feed)
        for value, a, b in zip(vt.onnx.get_outputs(), want, got, strict=True):
            assert (b.dtype, b.shape) == (a.dtype, a.shape)
            rule = TOLERANCES["fp32"]
            np.testing.assert_allclose(b, a, rule.rtol, rule.atol, err_msg=value.name)


def test_the_v_expert_alone_says_what_onnxruntime_says(builtin_export: ExportResult, tmp_path: Path) -> None:
    """CLIP's last block then runs at one token, and OpenVINO lost the slice before it."""
    v = Case(builtin_export, "v", tmp_path)
    exact = open_openvino(v.convert("fp32"), Opening(num_threads=1))
    feeds = v.feeds(v.texts[:6], 3)
    for name in ("logits", "retrieved_scores"):
        rule = TOLERANCES["fp32"]
        want = answers(v.onnx, name, feeds)
        np.testing.assert_allclose(answers(exact, name, feeds), want, rule.rtol, rule.atol)
    assert agreement(v, v.convert("int8"), 1)[0] >= 0.95


def test_names_shapes_and_types(vt: Case, vt_fp32: Path, vt_int8: Path, vt_int4: Path) -> None:
    types = {"int64": "tensor(int64)", "float32": "tensor(float)"}
    for file in (vt_fp32, vt_int8, vt_int4):
        session = open_openvino(file)
        assert session.get_providers() == ["OpenVINO"]
        for values, specs in (
            (session.get_inputs(), vt.spec.inputs),
            (session.get_outputs(), vt.spec.outputs),
        ):
            want = [
                (s.name, [a if isinstance(a, int) else None for a in s.axes], types[s.dtype]) for s in specs
            ]
            assert [(v.name, v.shape, v.type) for v in values] == want
        feed = vt.feeds(vt.texts[:2], 2)[0]
        rows, logits = session.run(["retrieved", "logits"], feed)
        assert (str(rows.dtype), str(logits.dtype)) == ("int64", "float32")
        assert (rows.shape, logits.shape) == ((2, 4), (2, 1, 4942))


def test_an_answer_is_not_written_over_by_the_next(vt: Case, vt_fp32: Path) -> None:
    session = open_openvino(vt_fp32, Opening(num_threads=1))
    first, second = vt.feeds(["a banana is [MASK].", "the [MASK] frog."], 1)
    answer = session.run(["logits"], first)[0]
    kept = answer.copy()
    session.run(["logits"], second)
    np.testing.assert_array_equal(answer, kept)


@pytest.mark.parametrize("size", [1, 12])
def test_int8_agrees_with_fp32(vt: Case, vt_int8: Path, t: Case, t_int8: Path, size: int) -> None:
    for case, file in ((vt, vt_int8), (t, t_int8)):
        same_top, cosine = agreement(case, file, size)
        assert same_top >= 0.94  # measured 0.96 to 0.98 over a vocabulary of 4,942
        assert cosine >= 0.9995


def test_int8_weights_alone_agree_better_and_need_no_texts(vt: Case, t: Case, t_int8: Path) -> None:
    for case in (vt, t):
        file = case.convert("int8", weights_only=True)
        assert not nodes(file, "FakeQuantize")
        assert large_floats(file) == (["bank"] if case is vt else [])
        same_top, cosine = agreement(case, file, 12)
        assert same_top >= 0.95  # nearly as often, of answers that lie close
        assert cosine >= 0.9999
    assert cosine > agreement(t, t_int8, 12)[1]


def test_int4_agrees_with_fp32(vt: Case, vt_int4: Path, t: Case, t_int4: Path) -> None:
    for case, file in ((vt, vt_int4), (t, t_int4)):
        same_top, cosine = agreement(case, file, 12)
        assert same_top >= 0.8
        assert cosine >= 0.998


def test_the_search_stays_exact(vt: Case, vt_int8: Path, vt_int4: Path) -> None:
    feeds = vt.feeds(vt.texts, 12)
    want = answers(vt.onnx, "retrieved", feeds)
    scores = answers(vt.onnx, "retrieved_scores", feeds)
    for file in (vt_int8, vt_int4):
        assert large_floats(file) == ["bank"]
        read = [[value.get_node() for value in node.input_values()] for node in nodes(file, "MatMul")]
        queries = [query.get_type_name() for query, weight in read if weight.get_friendly_name() == "bank"]
        assert queries == ["Divide"]  # the text's embedding at length 1, and no FakeQuantize
        session = open_openvino(file, Opening(num_threads=1))
        rows, found = answers(session, "retrieved", feeds), answers(session, "retrieved_scores", feeds)
        moved = (rows != want).any(-1)
        assert moved.mean() < 0.15  # the text's embedding is rounded; measured 0.06 to 0.08
        np.testing.assert_allclose(found, scores, atol=0.01)


def test_int8_leaves_no_large_fp32_weight(t: Case, t_int8: Path, t_int4: Path) -> None:
    full = t.convert("fp32").with_suffix(".bin").stat().st_size
    assert len(nodes(t_int8, "FakeQuantize")) > 40
    assert not nodes(t_int4, "FakeQuantize")
    for file, share in ((t_int8, 0.3), (t_int4, 0.2)):
        assert large_floats(file) == []
        assert file.with_suffix(".bin").stat().st_size <= share * full
        tables = [c for c in nodes(file, "Constant") if list(c.shape) == [4942, 128]]
        assert [c.get_element_type().get_type_name() for c in tables] == ["i8"]  # table and decoder are one


def test_int8_has_a_product_for_each_slice_and_all_have_reshapes_that_copy_their_axes(
    t: Case, t_int8: Path, vt: Case, vt_fp32: Path
) -> None:
    def sliced(file: Path) -> int:
        """Slices of what a product and its bias give."""
        sums = [node.input_value(0).get_node() for node in nodes(file, "Slice")]
        return sum(
            node.get_type_name() == "Add" and node.input_value(0).get_node().get_type_name() == "MatMul"
            for node in sums
        )

    def computed(file: Path) -> int:
        """Reshapes to heads, or back, whose target is computed at each run."""
        reshapes = [node for node in nodes(file, "Reshape") if len(node.get_output_partial_shape(0)) >= 3]
        targets = [node.input_value(1).get_node().get_type_name() for node in reshapes]
        return sum(kind != "Constant" for kind in targets)

    assert sliced(vt_fp32) >= 3 * 4  # query, key and value of every layer
    assert sliced(t_int8) == 0
    assert computed(t_int8) < computed(t.portable) / 2
    assert computed(vt_fp32) < computed(vt.portable) / 2


def test_int8_in_blocks_with_exact_activations(t: Case, t_int8: Path) -> None:
    rounding = Rounding()
    measure_products(ir.load(t.portable), t.feeds(t.texts[::8], 4), rounding)
    exact, products_alone = RECIPES["int8"][-2:]
    file = t.folder / "blocks.xml"
    convert_to_ir(t.portable, file, "int8", [], blocks=exact, rounding=rounding)
    assert not nodes(file, "FakeQuantize")
    assert all(name.endswith(".scale") for name in large_floats(file))
    assert agreement(t, file, 1) > agreement(t, t_int8, 1)
    assert agreement(t, file, 1)[0] >= 0.99
    size = file.with_suffix(".bin").stat().st_size
    assert size < 1.5 * t_int8.with_suffix(".bin").stat().st_size
    convert_to_ir(t.portable, file, "int8", [], blocks=products_alone, rounding=rounding)
    floats = large_floats(file)
    assert any("word_embeddings" in name for name in floats)
    assert any(name.startswith("clip") for name in floats)
    assert not any("attention" in name and name.startswith("plm") for name in floats)


def test_openvino_keeps_int8_in_memory(t_int8: Path) -> None:
    ov = import_openvino()
    compiled = ov.Core().compile_model(str(t_int8), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    found = [
        (value.get_element_type().get_type_name(), math.prod(value.get_shape()))
        for node in compiled.get_runtime_model().get_ops()
        for value in node.outputs()
        if node.get_rt_info()["layerType"].astype(str) == "Const"
    ]
    assert sum(kind == "i8" and size > LARGE for kind, size in found) > 20
    assert not [size for kind, size in found if kind == "f32" and size > LARGE]


def test_threads_share_a_session(t: Case, t_int8: Path) -> None:
    session = open_openvino(t_int8, Opening(num_threads=1))
    feeds = t.feeds(t.texts[:60], 1) + t.feeds(t.texts[:60], 5)
    alone = [session.run(["logits"], feed)[0] for feed in feeds]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda feed: session.run(["logits"], feed)[0], feeds))
    for a, b in zip(alone, together, strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_failed_call_does_not_break_the_session(t: Case, t_int8: Path) -> None:
    session = open_openvino(t_int8, Opening(num_threads=1))
    feed = t.feeds(t.texts[:1], 1)[0]
    want = session.run(["logits"], feed)[0]
    with pytest.raises(KeyError, match="no_such"):
        session.run(["no_such"], feed)
    with pytest.raises(RuntimeError, match="no_such"):
        session.run(["logits"], feed | {"no_such": feed["input_ids"]})
    np.testing.assert_array_equal(session.run(["logits"], feed)[0], want)


def test_a_compiled_graph_is_kept_where_it_is_asked_for(t: Case, t_int8: Path, tmp_path: Path) -> None:
    def load(cache_dir: Path | None = tmp_path / "new" / "cache") -> tuple[Array, bool]:
        session = open_openvino(t_int8, Opening(num_threads=1, cache_dir=cache_dir))
        assert isinstance(session, _OpenVinoSession)
        from_cache = session._compiled.get_property("LOADED_FROM_CACHE")
        return answers(session, "logits", t.feeds(t.texts[:8], 4)), from_cache

    want, from_cache = load(None)
    assert not from_cache
    assert not list(tmp_path.iterdir())
    before = t_int8.stat().st_mtime_ns
    assert [load()[1] for _ in range(2)] == [False, True]
    np.testing.assert_array_equal(load()[0], want)
    (blob,) = (tmp_path / "new" / "cache").iterdir()
    assert blob.stat().st_size < t_int8.with_suffix(".bin").stat().st_size  # the weights are not in it
    for damage in (b"", b"garbage", blob.read_bytes()[:50_000]):
        blob.chmod(0o600)
        blob.write_bytes(damage)
        got, from_cache = load()
        assert not from_cache
        np.testing.assert_array_equal(got, want)
    assert load()[1]
    assert t_int8.stat().st_mtime_ns == before


def test_a_place_for_compiled_graphs_that_cannot_be_written(t_int8: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"compiled graphs cannot be written: .*file.*remove cache_dir"):
        open_openvino(t_int8, Opening(cache_dir=tmp_path / "file"))


def test_a_file_that_cannot_be_loaded(vt_fp32: Path, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"the graph cannot be read: .*absent\.xml"):
        open_openvino(tmp_path / "absent.xml")
    (tmp_path / "garbage.xml").write_text("no graph", encoding="utf-8")
    with pytest.raises(BundleError, match="the graph cannot be read"):
        open_openvino(tmp_path / "garbage.xml")
    alone = Path(shutil.copy(vt_fp32, tmp_path / "alone.xml"))
    with pytest.raises(BundleError, match="OpenVINO cannot load the graph"):
        open_openvino(alone)
    alone.with_suffix(".bin").write_bytes(vt_fp32.with_suffix(".bin").read_bytes()[:1000])
    with pytest.raises(BundleError, match="OpenVINO cannot load the graph"):
        open_openvino(alone)


def test_arguments_that_make_no_sense(vt: Case, vt_fp32: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="num_threads must be at least 1"):
        open_openvino(vt_fp32, Opening(num_threads=0))
    with pytest.raises(ConfigError, match="int8 needs texts for calibration"):
        convert_to_ir(vt.portable, tmp_path / "x.xml", "int8", [])
    with pytest.raises(UnsupportedError, match=r"does not support this precision.*got fp16"):
        convert_to_ir(vt.portable, tmp_path / "x.xml", "fp16", [])
    assert not list(tmp_path.iterdir())


def test_openvino_is_not_installed(vt_fp32: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(MissingExtraError, match=r"xadapter-export\[openvino\]"):
        open_openvino(vt_fp32)


_CONVERT = """
import sys
from pathlib import Path
import numpy as np
connected = []
sys.addaudithook(lambda event, args: connected.append(args) if event == "socket.connect" else None)
from xadapter_export.exporters.makers.openvino_ir import convert_to_ir
feeds = [dict(np.load(sys.argv[2]))]
convert_to_ir(Path(sys.argv[1]), Path(sys.argv[3]), "int8", feeds)
assert not connected, connected
assert "openvino_telemetry" not in sys.modules
import openvino_telemetry  # it is there for others
"""


def test_openvino_prints_nothing_and_has_no_telemetry(t: Case, tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    np.savez(tmp_path / "feed.npz", **t.feeds(t.texts[:4], 4)[0])  # type: ignore[arg-type]  # keywords are arrays
    environment = {name: value for name, value in os.environ.items() if name not in ("CI", "PYTEST_VERSION")}
    script = [str(t.portable), str(tmp_path / "feed.npz"), str(tmp_path / "t.xml")]
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", _CONVERT, *script],
        env=environment | {"HOME": str(home)},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    assert not (
        home / "intel"
    ).exists()  # where its telemetry counts and keeps an id, as soon as it is imported
    assert (tmp_path / "t.xml").exists()
    assert str(tmp_path).encode() not in (tmp_path / "t.xml").read_bytes()


@pytest.mark.slow
def test_the_first_answer_is_the_same_alone_and_in_company(tmp_path: Path) -> None:
    bundle = export(
        "builtin", tmp_path / "bundle", "vt", variants=("openvino-int8",), min_agreement=0.9
    ).folder
    session = XAdapterSession.load(bundle, variant="openvino-int8", num_threads=1)
    assert ask_in_company(session, 1000) < 0.5
