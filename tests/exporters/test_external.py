"""Graphs that are split, and the search of a bank outside of them."""

import json
import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import onnx
import pytest
from click.testing import CliRunner, Result
from numpy.typing import NDArray

from tests.perturbed import prove_with_each_matrix_off
from tests.tiny_bundle import rehash, rewrite_manifest
from tests.tiny_checkpoint import TEXTS, D, N, make_bank, make_model
from xadapter_export import FeatureBank, XAdapterSession, export
from xadapter_export.bank.convert import convert_bank
from xadapter_export.bank.index import IndexOptions, build_index
from xadapter_export.bundle import pictures
from xadapter_export.bundle.bank_rows import BankRows
from xadapter_export.bundle.folder import read_bundle
from xadapter_export.bundle.manifest import ExpertSet
from xadapter_export.bundle.pictures import PictureFile, read_pictures
from xadapter_export.cli.bank import bank as bank_command
from xadapter_export.cli.run import run as run_command
from xadapter_export.errors import (
    BundleError,
    CheckpointError,
    ConfigError,
    HashMismatchError,
    OutputExistsError,
    ParityError,
)
from xadapter_export.exporters.pipeline import ExportResult
from xadapter_export.model.builtin import builtin_folder
from xadapter_export.model.x_adapter_model import XAdapterModel
from xadapter_export.parity import prove_bundle
from xadapter_export.runtime.picture_index import KINDS, LanceIndex, open_index
from xadapter_export.sessions.split_session import MemoryCache, SplitSession

SETS: tuple[ExpertSet, ...] = ("vt", "v", "t")
Float32 = NDArray[np.float32]


@pytest.fixture(scope="session")
def model(tiny_model: XAdapterModel) -> XAdapterModel:
    return tiny_model


@pytest.fixture
def whole(tiny_export: ExportResult) -> Path:
    return tiny_export.folder


@pytest.fixture(scope="module")
def result(model: XAdapterModel, tmp_path_factory: pytest.TempPathFactory) -> ExportResult:
    folder = tmp_path_factory.mktemp("external") / "bundle"
    return export(model, folder, (*SETS, "none"), retrieval="external")


@pytest.fixture(scope="module")
def external(result: ExportResult) -> Path:
    return result.folder


@pytest.fixture(scope="module")
def inside(model: XAdapterModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Split, with the bank in the query graph."""
    folder = tmp_path_factory.mktemp("inside") / "bundle"
    return export(model, folder, "v", split=True).folder


def run_all(folder: Path, experts: ExpertSet, **options: Any) -> dict[str, NDArray[Any]]:
    options = {"variant": "onnx-fp32", **options}
    session = XAdapterSession.load(folder, experts=experts, num_threads=1, **options)
    return dict(session.run(session.text_encoder(experts).encode(TEXTS)))


def flat_index() -> Any:
    index = faiss.IndexFlatIP(D)
    index.add(make_bank().unit_rows())
    return index


def test_the_pair_is_proven_with_every_tap(result: ExportResult, whole: Path) -> None:
    assert result.parity.passed
    cells = {(c.expert_set, c.case, c.output) for c in result.parity.cells if c.expert_set != "none"}
    of_whole = prove_bundle(whole, SETS, variants=["onnx-fp32"]).cells
    assert cells == {(c.expert_set, c.case, c.output) for c in of_whole}
    assert ("vt", "batch_padded", "x_adapter.2.v") in cells
    again = prove_bundle(result.folder)
    assert again.passed
    assert len(again.cells) == len(result.parity.cells)


def test_the_contract_of_the_whole_is_that_of_one_graph(result: ExportResult, whole: Path) -> None:
    of_whole = read_bundle(whole).manifest.expert_sets
    assert result.manifest.expert_sets["none"].split is None
    for name in SETS:
        spec = result.manifest.expert_sets[name]
        assert (spec.inputs, spec.outputs, spec.taps) == (
            of_whole[name].inputs,
            of_whole[name].outputs,
            of_whole[name].taps,
        )
        assert spec.split is not None
        assert "bank" not in spec.component_parameters
    split = result.manifest.expert_sets["vt"].split
    assert split is not None
    assert [t.name for t in split.query.inputs] == ["clip_input_ids"]
    assert [t.name for t in split.query.outputs] == ["query", "memory_t", "memory_t_mask"]
    assert [t.axes for t in split.answer.inputs[-3:]] == [
        ("batch", 4, D),
        ("batch", "clip_seq", 16),
        ("batch", "clip_seq"),
    ]


@pytest.mark.parametrize("experts", ["v", "vt", "t"])
@pytest.mark.parametrize("index", ["none", "flat"])
def test_answers_equal_those_of_one_graph_to_the_bit(
    whole: Path, external: Path, experts: ExpertSet, index: str
) -> None:
    one = run_all(whole, experts)
    two = run_all(external, experts, index=flat_index() if index == "flat" else None)
    assert one.keys() == two.keys()
    assert np.array_equal(one["logits"], two["logits"])
    if "v" in experts:
        assert np.array_equal(one["retrieved"], two["retrieved"])
        assert np.abs(one["retrieved_scores"] - two["retrieved_scores"]).max() < 1e-6


def test_split_alone_keeps_the_search_in_the_query_graph(whole: Path, inside: Path) -> None:
    spec = read_bundle(inside).manifest.expert_sets["v"]
    assert spec.split is not None
    assert [t.name for t in spec.split.query.outputs] == ["memory_v", "retrieved", "retrieved_scores"]
    assert not (inside / "bank.safetensors").exists()
    assert np.array_equal(run_all(whole, "v")["logits"], run_all(inside, "v")["logits"])
    with pytest.raises(ConfigError, match="no graph of this bundle uses an index"):
        XAdapterSession.load(inside, index=flat_index())


def test_a_matrix_of_an_expert_that_is_off_fails_the_proof_of_the_pair(
    external: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(external, tmp_path / "bundle"))
    outcomes = prove_with_each_matrix_off(folder)
    assert len(outcomes) == 2 * 2 * 4
    assert not any(outcomes.values())


def test_rows_of_another_bank_fail_the_proof(external: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(external, tmp_path / "bundle"))
    data = bytearray((folder / "bank.safetensors").read_bytes())
    data[-4 * D * N : -4 * D] = data[-4 * D * (N - 1) :]  # every row is the one after it
    (folder / "bank.safetensors").write_bytes(data)
    assert not prove_bundle(folder, ["v"], verify=False).passed
    with pytest.raises(HashMismatchError, match=r"has changed: .*bank\.safetensors"):
        XAdapterSession.load(folder, experts="v")


class Counting:
    """A graph that counts the texts it reads."""

    def __init__(self, graph: Any) -> None:
        self.graph, self.texts = graph, 0

    def run(self, names: Sequence[str], feed: dict[str, NDArray[Any]]) -> Any:
        self.texts += len(next(iter(feed.values())))
        return self.graph.run(names, feed)


def counting(session: XAdapterSession) -> tuple[Counting, Counting]:
    pair = session._graphs.session(session.experts)
    assert isinstance(pair, SplitSession)
    pair._query, pair._answer = Counting(pair._query), Counting(pair._answer)  # type: ignore[assignment]  # stand-ins
    return pair._query, pair._answer  # type: ignore[return-value]  # as just set


@pytest.mark.parametrize("experts", ["vt", "t"])
def test_a_text_that_comes_again_runs_the_answer_graph_alone(external: Path, experts: ExpertSet) -> None:
    session = XAdapterSession.load(external, experts=experts, num_threads=1, share_weights=False)
    query, answer = counting(session)
    first = session.fill_mask(TEXTS[:2])
    assert (query.texts, answer.texts) == (2, 2)
    assert session.fill_mask([TEXTS[1], TEXTS[0]]) == [first[1], first[0]]
    assert session.fill_mask(TEXTS[0])[0].token == first[0][0].token
    assert (query.texts, answer.texts) == (2, 5)
    session.fill_mask([TEXTS[2]] * 3)  # the same text three times is asked once
    assert query.texts == 3
    if "v" in experts:
        session.retrieve(TEXTS)  # no graph runs at all
        assert (query.texts, answer.texts) == (3, 8)


def test_without_a_cache_every_text_is_asked(external: Path) -> None:
    session = XAdapterSession.load(external, cache_size=0, num_threads=1, share_weights=False)
    query, _ = counting(session)
    first = session.fill_mask(TEXTS)
    assert session.fill_mask(TEXTS) == first
    assert query.texts == 6
    with pytest.raises(ConfigError, match="cache_size must be at least 0"):
        XAdapterSession.load(external, cache_size=-1)


def test_sets_do_not_share_memories_and_the_oldest_text_goes_first(external: Path, whole: Path) -> None:
    session = XAdapterSession.load(external, experts="v", variant="onnx-fp32", cache_size=2, num_threads=1)
    plain = XAdapterSession.load(whole, variant="onnx-fp32", num_threads=1)
    for experts in ("v", "vt", "t", "v"):
        assert session.fill_mask(TEXTS, experts=experts) == plain.fill_mask(TEXTS, experts=experts)
    cache = MemoryCache(2)
    for key in ("a", "b", "a", "c"):
        if cache.get((key, b"")) is None:
            cache.put((key, b""), {"row": np.zeros(1, np.float32)})
    assert [cache.get((key, b"")) is not None for key in "abc"] == [True, False, True]
    assert len(cache) == 2


def test_threads_share_a_session(external: Path) -> None:
    session = XAdapterSession.load(external, experts="vt", cache_size=2, num_threads=1)
    alone = [session.fill_mask(text) for text in TEXTS]
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(session.fill_mask, TEXTS * 10))
    tokens = [[a.token for a in answer] for answer in answers]
    assert tokens == [[a.token for a in answer] for answer in alone] * 10


class Anything:
    """An index of somebody's own: exact, in whatever form it is told to answer."""

    def __init__(self, form: Any = None) -> None:
        self.form = form

    def search(self, queries: Float32, k: int) -> Any:
        rows = make_bank().unit_rows()
        scores = queries @ rows.T
        best = np.argsort(-scores, axis=1)[:, : k + 3][:, ::-1]  # more than k, the best last
        found = np.take_along_axis(scores, best, 1), best
        return found if self.form is None else self.form(found, rows)


@pytest.mark.parametrize(
    "form",
    [
        None,
        lambda found, rows: (*found, rows[found[1]]),
        lambda found, _: (found[0], np.repeat(found[1], 3, axis=1)),  # each of them three times
    ],
)
def test_any_object_that_searches_is_an_index(external: Path, whole: Path, form: Any) -> None:
    one, two = run_all(whole, "v"), run_all(external, "v", index=Anything(form))
    assert np.array_equal(one["retrieved"], two["retrieved"])
    assert np.array_equal(one["logits"], two["logits"])


@pytest.mark.parametrize("weight", ["clip", "adapters"])
def test_both_graphs_are_checked_when_they_are_opened(external: Path, tmp_path: Path, weight: str) -> None:
    folder = Path(shutil.copytree(external, tmp_path / "bundle"))
    variant = read_bundle(folder).manifest.variant("vt")
    assert variant.query_file is not None
    graph = onnx.load(
        folder / (variant.query_file if weight == "clip" else variant.file), load_external_data=False
    ).graph
    tensor = next(
        t for t in graph.initializer if t.name.startswith(weight) and len(t.dims) == 2 and t.external_data
    )
    offset = next(int(entry.value) for entry in tensor.external_data if entry.key == "offset")
    with (folder / variant.weight_files[0]).open("r+b") as stream:
        stream.seek(offset)
        stream.write(np.full(tensor.dims, 0.5, np.float32).tobytes())
    rehash(folder)
    with pytest.raises(ParityError, match=r"wrong outputs on this processor: onnx-fp32, experts vt"):
        XAdapterSession.load(folder, experts="vt", variant="onnx-fp32", num_threads=1)


def test_an_index_that_finds_only_some_of_it_does_not_fail_the_check(external: Path) -> None:
    class Last:
        """Always proposes the last rows of the bank."""

        def search(self, queries: Float32, k: int) -> tuple[Float32, NDArray[np.int64]]:
            rows = np.tile(np.arange(N - k, N), (len(queries), 1))
            return np.zeros(rows.shape, np.float32), rows

    session = XAdapterSession.load(external, experts="v", index=Last(), num_threads=1, check="always")
    assert [check.passed for check in session.checks] == [True]
    assert {picture.row for picture in session.retrieve(TEXTS[0])} <= set(range(N - 4, N))


def test_features_that_an_index_returns_stand_for_the_bundles_own(external: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(external, tmp_path / "bundle"))
    (folder / "bank.safetensors").unlink()
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["files"]["bank.safetensors"]
    rewrite_manifest(folder, files=manifest["files"], bank={**manifest["bank"], "features": None})
    found = run_all(folder, "v", index=Anything(lambda found, rows: (*found, rows[found[1]])))
    assert np.array_equal(found["logits"], run_all(external, "v")["logits"])
    with pytest.raises(BundleError, match="has no features to search"):
        run_all(folder, "v")
    with pytest.raises(BundleError, match="neither the bundle nor the index has features"):
        run_all(folder, "v", index=Anything())


@pytest.mark.parametrize(
    ("form", "message"),
    [
        (lambda found, _: found[1], r"expected \(scores, rows\) or .*got ndarray"),
        (lambda found, _: (found[0], found[0]), r"expected rows as \(3, 4 or more\) integers, got .*float32"),
        (
            lambda found, _: (found[0][:, :2], found[1][:, :2]),
            r"found too few images: .*expected 4 .*got 2",
        ),
        (
            lambda found, _: (found[0], np.where(found[1] < 15, -1, -1)),
            "too few images: .*raise its nprobe",
        ),
        (lambda found, _: (found[0], found[1][:, [0, 0, 1, 2]]), "too few images: .*4 different .*got 3"),
        (lambda found, _: found[0][9], r"the index failed: Anything \(got IndexError\('index 9 is out"),
        (lambda found, _: (found[0], found[1] + N), "expected rows below 30"),
        (lambda found, rows: (*found, rows), r"expected features \(3, 7, 24\), got \(30, 24\)"),
    ],
)
def test_an_index_that_does_not_answer_as_one(external: Path, form: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        run_all(external, "v", index=Anything(form))


def test_an_index_of_another_bank_is_refused(external: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"made from another bank: IndexFlatIP.ntotal \(expected 30, got 0"):
        XAdapterSession.load(external, index=faiss.IndexFlatIP(D))
    with pytest.raises(ConfigError, match=r"a method search\(queries, k\)"):
        XAdapterSession.load(external, index=3)  # type: ignore[arg-type]  # no index
    with pytest.raises(BundleError, match=r"this is not an index: .*xad-bank index"):
        XAdapterSession.load(external, index=tmp_path)
    other = tmp_path / "other"
    other.mkdir()
    swapped = make_bank().features[::-1].copy()
    FeatureBank(swapped, make_bank().pictures).save(other)
    build_index(other, tmp_path / "index", "flat", IndexOptions(num_queries=0))
    with pytest.raises(ConfigError, match=r"made from another bank: FaissIndex\.bank_sha256"):
        XAdapterSession.load(external, index=tmp_path / "index")


@pytest.fixture(scope="module")
def indices(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Indices of the built-in bank, by their kinds; ``lists`` is LanceDB's with lists."""
    folder = tmp_path_factory.mktemp("indices")
    for kind in KINDS:
        build_index(builtin_folder(), folder / kind, kind, IndexOptions(num_queries=50))
    options = IndexOptions(num_lists=8, num_probes=8, num_queries=50)
    build_index(builtin_folder(), folder / "lists", "lancedb", options)
    return folder


@pytest.mark.parametrize(
    ("name", "recall"), [("flat", 1.0), ("ivf-pq", 0.98), ("lancedb", 1.0), ("lists", 0.98)]
)
def test_indices_of_the_builtin_bank_find_its_rows(indices: Path, name: str, recall: float) -> None:
    record = json.loads((indices / name / "index.json").read_text())
    assert set(record["recall"]) == {"1", "5", "10"}
    assert min(record["recall"].values()) >= recall
    rows = BankRows(builtin_folder() / "bank.safetensors")
    queries = rows.take(np.arange(0, rows.num_pictures, 100))
    exact = rows.search(queries, 1)[1][:, 0]
    _, found, *_ = open_index(indices / name).search(queries, 4)
    assert (found == exact[:, None]).any(axis=1).all()


def test_the_database_gives_the_same_top_rows_and_the_same_features(indices: Path) -> None:
    rows = BankRows(builtin_folder() / "bank.safetensors")
    rng = np.random.default_rng(0)
    queries = rng.standard_normal((20, rows.dim)).astype(np.float32)
    queries /= np.linalg.norm(queries, axis=1, keepdims=True)
    scores, found = rows.search(queries, 5)
    index = open_index(indices / "lancedb")
    assert isinstance(index, LanceIndex)
    got_scores, got, features = index.search(queries, 5)
    assert np.array_equal(got, found)
    assert np.abs(got_scores - scores).max() < 1e-5
    assert np.array_equal(features, rows.take(found))
    assert LanceIndex(index.table).bank_sha256 == index.bank_sha256 is not None  # the table says so itself


def test_ivf_pq_is_smaller_and_says_what_it_costs(indices: Path) -> None:
    sizes = {name: (indices / name / "bank.faiss").stat().st_size for name in ("flat", "ivf-pq")}
    assert sizes["ivf-pq"] < sizes["flat"] / 5


def test_a_broken_index_is_one_clear_error(indices: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(indices / "flat", tmp_path / "index"))
    data = bytearray((folder / "bank.faiss").read_bytes())
    data[-1] ^= 1
    (folder / "bank.faiss").write_bytes(data)
    with pytest.raises(HashMismatchError, match=r"a file of the index has changed: .*bank\.faiss"):
        open_index(folder)
    (folder / "bank.faiss").write_bytes(data[:-1])
    with pytest.raises(BundleError, match=r"a file of the index is truncated: .*bank\.faiss"):
        open_index(folder, verify=False)
    shutil.move(folder / "bank.faiss", tmp_path / "bank.faiss")
    with pytest.raises(BundleError, match=r"a file of the index is missing: .*bank\.faiss"):
        open_index(folder)
    (folder / "bank.faiss").symlink_to(tmp_path / "bank.faiss")
    with pytest.raises(BundleError, match=r"a file of the index is outside its folder: .*bank\.faiss"):
        open_index(folder)
    for kind, name in (("flat", "bank.faiss"), ("lancedb", "bank.lancedb/pictures.lance")):
        record = json.loads((indices / kind / "index.json").read_text()) | {"files": {}}
        copy = Path(shutil.copytree(indices / kind, tmp_path / kind))
        (copy / "index.json").write_text(json.dumps(record))
        with pytest.raises(BundleError, match=rf"a file that its record does not list, .*{name}"):
            open_index(copy)
    (folder / "index.json").write_text('{"kind": "tree"}')
    with pytest.raises(BundleError, match=r"the index's record is not valid: .*kind"):
        open_index(folder)


def test_options_of_an_index_that_make_no_sense(tmp_path: Path) -> None:
    bank = tmp_path / "bank"
    bank.mkdir()
    make_bank().save(bank)
    with pytest.raises(ConfigError, match=r"index of kind ivf-pq .*expected 256 .*got 30.*--kind flat"):
        build_index(bank, tmp_path / "index", "ivf-pq")
    with pytest.raises(ConfigError, match=r"too many lists for the bank \(expected at most 68, got 5000"):
        build_index(builtin_folder(), tmp_path / "index", "ivf-pq", IndexOptions(num_lists=5000))
    with pytest.raises(ConfigError, match="num_probes must be at least 1"):
        build_index(bank, tmp_path / "index", "flat", IndexOptions(num_probes=0))
    with pytest.raises(ConfigError, match=r"num_lists goes with .*: flat \(got 5\); .*choose ivf-pq"):
        build_index(bank, tmp_path / "index", "flat", IndexOptions(5, 3, 17))
    with pytest.raises(ConfigError, match=r"candidates goes with .*: lancedb \(got 17\); .*give num_lists"):
        build_index(bank, tmp_path / "index", "lancedb", IndexOptions(candidates=17))
    with pytest.raises(OutputExistsError, match="xadapter-export did not write"):
        build_index(bank, bank, "flat", force=True)
    with pytest.raises(CheckpointError, match="is missing"):
        build_index(tmp_path, tmp_path / "index", "flat")
    assert [path.name for path in tmp_path.iterdir()] == ["bank"]


def invoke(command: Any, *arguments: object) -> Result:
    return CliRunner().invoke(command, [str(argument) for argument in arguments])


def test_commands_from_bundle_to_answer(external: Path, tmp_path: Path) -> None:
    made = invoke(bank_command, "index", external, "--kind", "flat", "-o", tmp_path / "index", "--queries", 9)
    assert made.exit_code == 0, made.output
    assert "flat: 30 pictures, 24 wide" in made.stdout
    assert "recall against exact search, 9 queries: @1 1.0000, @5 1.0000, @10 1.0000" in made.stdout
    asked = ("--json", "--experts", "v", "--variant", "onnx-fp32")
    with_index = invoke(run_command, external, TEXTS[0], "--index", tmp_path / "index", *asked)
    assert with_index.exit_code == 0, with_index.output
    assert json.loads(with_index.stdout) == json.loads(invoke(run_command, external, TEXTS[0], *asked).stdout)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"experts": ("t",), "retrieval": "external"}, "nothing to move out.*--split alone"),
        ({"experts": ("none",), "split": True}, "no graph uses CLIP, so there is nothing to split"),
        ({"split": True, "targets": ("openvino",)}, r"cannot be made from split graphs .*got openvino-fp32"),
        ({"split": True, "precisions": ("int8",), "targets": ("onnx",)}, "got onnx-int8"),
    ],
)
def test_what_cannot_be_split(
    model: XAdapterModel, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        export(model, tmp_path / "bundle", **options)
    assert not any(tmp_path.iterdir())


def test_a_static_bank_has_no_search_to_move(tmp_path: Path) -> None:
    static = make_model(tmp_path / "model", experts="v", retrieval={"mode": "static"})
    with pytest.raises(ConfigError, match="a static bank, all of which is read"):
        export(static, tmp_path / "bundle", retrieval="external")


def test_int8_of_both_graphs_is_held_to_its_gate(model: XAdapterModel, tmp_path: Path) -> None:
    found = export(
        model, tmp_path / "b", "v", retrieval="external", precisions=("int8",), min_agreement=0.5
    ).manifest
    (variant,) = found.variants
    assert (variant.file, variant.query_file) == ("onnx/model_quantized.onnx", "onnx/query_quantized.onnx")
    assert variant.agreement is not None
    assert variant.agreement.same_rows is not None
    session = XAdapterSession.load(tmp_path / "b", variant="cpu-int8", num_threads=1)
    assert len(session.retrieve(TEXTS[0])) == 4


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "int8"])
def test_rows_are_read_from_disk_as_they_are_in_memory(dtype: Any, tmp_path: Path) -> None:
    made = tmp_path / "made"
    made.mkdir()
    make_bank().save(made)
    convert_bank(made, tmp_path / "bank", dtype)
    loaded, rows = FeatureBank.load(tmp_path / "bank"), BankRows(tmp_path / "bank" / "bank.safetensors")
    assert isinstance(loaded.features, np.memmap)
    everything = loaded.unit_rows()
    assert np.array_equal(rows.take(np.arange(N)), everything)
    assert rows.take(np.array([[3, 1], [0, 29]])).shape == (2, 2, D)
    scores, found = rows.search(everything[:5], 3)
    assert np.array_equal(found, np.argsort(-(everything[:5] @ everything.T), axis=1)[:, :3])
    assert scores == pytest.approx(np.sort(everything[:5] @ everything.T, axis=1)[:, :-4:-1], abs=1e-6)
    loaded.save(made)
    assert (made / "bank.safetensors").read_bytes() == (tmp_path / "bank" / "bank.safetensors").read_bytes()


def test_a_large_bank_is_mapped_and_not_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    in_memory = make_bank().unit_rows()
    monkeypatch.setattr("xadapter_export.bank.feature_bank._MOST_VALUES_IN_MEMORY", 10)
    mapped = make_bank().unit_rows()
    assert isinstance(mapped, np.memmap)
    assert np.array_equal(mapped, in_memory)


def test_a_long_list_of_pictures_stays_on_disk(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "bank.jsonl"
    lines = [json.dumps({"id": f"p{i}", "caption": "é\u2028" * i}, ensure_ascii=False) for i in range(6)]
    for end in ("\n", ""):
        path.write_text("\n".join(lines) + end, encoding="utf-8")
        short = read_pictures(path, num_pictures=6)
        monkeypatch.setattr(pictures, "_MOST_IN_MEMORY", 5)
        long = read_pictures(path, num_pictures=6)
        assert isinstance(long, PictureFile)
        assert tuple(long) == short
        assert (long[-1], long[1:3]) == (short[-1], short[1:3])
        monkeypatch.undo()
    with pytest.raises(BundleError, match=r"wrong number of images: .*expected 7, got 6"):
        PictureFile(path, num_pictures=7)
    path.write_text("\n".join([*lines[:2], "{}", *lines[3:]]))
    with pytest.raises(BundleError, match=r"not a valid image entry: .*line 3"):
        PictureFile(path, num_pictures=6)[2]
