"""The rewritten search of the bank answers as the traced one does; a graph it does not know is refused."""

import json
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from click.testing import CliRunner
from numpy.typing import NDArray

from benchmarks import bank_search as benchmark
from benchmarks.bank_search import search_graph, unit, write_search
from xadapter_export import XAdapterSession
from xadapter_export.errors import ParityError
from xadapter_export.exporters.passes.bank_search import BankPrecision, search_bank
from xadapter_export.exporters.pipeline import ExportResult
from xadapter_export.sessions.onnx_session import open_onnx
from xadapter_export.sessions.session import Array, Opening

Arrays = dict[str, Array]
PRECISIONS: tuple[BankPrecision, ...] = ("fp32", "int8")
SCORE_LIMIT = {"fp32": 1e-5, "int8": 2e-5}
N, D = 5000, 512
COLORS = ("red", "green", "blue", "yellow", "black", "white", "brown", "purple", "orange", "pink")
THINGS = ("banana", "cherry", "lime", "sky", "grass", "car", "dog", "night", "tree", "flower")


def make_rows(num_rows: int, dim: int) -> NDArray[np.float32]:
    return unit(np.random.default_rng(0).standard_normal((num_rows, dim), dtype=np.float32))


def answer(graph: Path, queries: NDArray[np.float32]) -> Arrays:
    names = ["retrieved", "retrieved_scores", "pictures"]
    values = open_onnx(graph, Opening(num_threads=1)).run(names, {"query": queries})
    return dict(zip(names, values, strict=True))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_builtin_bundle_retrieves_the_same_pictures(
    builtin_export: ExportResult, tmp_path: Path, precision: BankPrecision
) -> None:
    session = XAdapterSession.load(builtin_export.folder, experts="v", num_threads=1)
    model = ir.load(session.bundle.file(session.manifest.variant("v").file))
    before = [(value.name, value.shape, value.dtype) for value in model.graph.outputs]
    search_bank(model, precision)
    assert [(value.name, value.shape, value.dtype) for value in model.graph.outputs] == before
    ir.save(model, tmp_path / "model.onnx", external_data="model.onnx_data")
    texts = [f"a {color} {thing} is [MASK]." for color in COLORS for thing in THINGS]
    inputs = session.text_encoder("v").encode(texts)
    want = session.run(inputs)
    values = open_onnx(tmp_path / "model.onnx", Opening(num_threads=1)).run(list(want), inputs)
    got = dict(zip(want, values, strict=True))
    assert len(np.unique(want["retrieved"])) > 40  # the sentences ask for different pictures
    assert got["retrieved"].dtype == np.int64
    assert [set(row) for row in got["retrieved"].tolist()] == [set(row) for row in want["retrieved"].tolist()]
    if precision == "fp32":
        assert np.array_equal(got["retrieved"], want["retrieved"])
    limit = SCORE_LIMIT[precision]
    assert np.abs(got["retrieved_scores"] - want["retrieved_scores"]).max() < limit
    assert np.abs(got["logits"] - want["logits"]).max() < 50 * limit


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(
    ("num_rows", "dim"),
    [(N, D), (4099, 48), (7, 24), (2049, 200)],
    ids=["plain", "rows left over", "few rows", "width left over"],
)
def test_rows_scores_and_pictures_are_the_exact_ones(
    tmp_path: Path, precision: BankPrecision, num_rows: int, dim: int
) -> None:
    rows = make_rows(num_rows, dim)
    queries = unit(-rows[: min(num_rows, 50)] + 0.5 * make_rows(num_rows + 50, dim)[num_rows:][:num_rows])
    cosines = queries.astype(np.float64) @ rows.T.astype(np.float64)
    graph, _ = write_search(tmp_path, rows, precision)
    for batch in (queries, queries[:1]):
        got = answer(graph, batch)
        found = got["retrieved"].astype(np.int64)
        assert found.shape == (len(batch), 4)
        best = -np.sort(-cosines[: len(batch)], axis=1)[:, :4]
        limit = SCORE_LIMIT[precision]
        assert np.abs(np.take_along_axis(cosines[: len(batch)], found, 1) - best).max() < limit
        assert np.abs(got["retrieved_scores"] - best).max() < limit
        assert (np.diff(got["retrieved_scores"]) <= 0).all()
        assert all(len(set(row)) == 4 for row in found.tolist())
        assert np.abs(got["pictures"] - rows[found]).max() < limit * np.abs(rows).max() * 5


def test_int8_keeps_rows_that_one_byte_would_swap(tmp_path: Path) -> None:
    """Neighbors are 1e-4 apart: less than rounding to a byte moves a cosine, more than the rest leaves."""
    rng = np.random.default_rng(1)
    query = unit(rng.standard_normal((1, D), dtype=np.float32))
    other = rng.standard_normal((40, D), dtype=np.float32)
    other = unit(other - (other @ query.T) * query)
    cosines = (0.8 - 1e-4 * rng.permutation(40)[:, None]).astype(np.float32)
    rows = unit((cosines * query + np.sqrt(1 - cosines**2) * other).astype(np.float32))
    expected = np.argsort(-(rows @ query[0]))[:4]
    scales = np.abs(rows).max(1, keepdims=True) / 127
    coarse = np.argsort(-((np.rint(rows / scales) * scales) @ query[0]))[:4]
    assert coarse.tolist() != expected.tolist()
    graph, _ = write_search(tmp_path, rows, "int8")
    assert answer(graph, query)["retrieved"][0].tolist() == expected.tolist()


def test_a_bank_takes_the_bytes_of_its_precision(tmp_path: Path) -> None:
    rows = make_rows(N, D)
    sizes = {precision: write_search(tmp_path, rows, precision)[1] for precision in PRECISIONS}
    assert sizes == {"fp32": 4 * N * D, "int8": 2 * N * D + 4 * N * D // 128}


def test_the_traced_pattern_is_gone_and_only_int8_leaves_the_standard() -> None:
    for precision in PRECISIONS:
        model = search_graph(make_rows(100, 32))
        search_bank(model, precision)
        assert "Transpose" not in {node.op_type for node in model.graph}
        assert set(model.opset_imports) == ({"", "com.microsoft"} if precision == "int8" else {""})
        assert not [value.name for value in model.graph.initializers.values() if not value.uses()]
        with pytest.raises(ParityError, match="does not search its bank exactly once"):
            search_bank(model, precision)


def test_a_graph_without_a_bank_or_with_two_searches_is_refused() -> None:
    model = search_graph(make_rows(100, 32))
    bank = model.graph.initializers.pop("bank")
    with pytest.raises(ParityError, match="no bank"):
        search_bank(model, "fp32")
    model.graph.register_initializer(bank)
    model.graph.append(ir.node("Transpose", [bank], {"perm": [1, 0]}))
    with pytest.raises(ParityError, match=r"got GatherND, Transpose, Transpose"):
        search_bank(model, "fp32")


def test_the_benchmark_compares_and_judges() -> None:
    arguments = [
        "--sizes",
        "1000,2000,4000",
        "--rounds",
        "3",
        "--rows",
        "clustered",
        "--queries",
        "20",
        "--json",
    ]
    result = CliRunner().invoke(benchmark.main, [*arguments, "--threads", "1"], catch_exceptions=False)
    assert result.exit_code == 0
    found = json.loads(result.stdout)
    assert [(row["N"], row["search"]) for row in found["rows"]] == [
        (n, precision) for n in (1000, 2000, 4000) for precision in PRECISIONS
    ]
    for row in found["rows"]:
        assert row["recall"] >= 0.95
        assert 0 < row["ms, lowest"] <= row["ms"] <= row["ms, highest"]
    for row in found["rows"][-len(PRECISIONS) :]:  # the memory is that of the largest bank
        assert 0 < row["anonymous (MB)"] <= row["resident (MB)"] <= row["peak (MB)"]
    names = [gate["name"] for gate in found["gates"]]
    assert "int8: speed to fp32, N = 4,000" in names
    assert "int8, clustered rows: R2 of time over N" in names
    for gate in found["gates"]:
        holds = (
            gate["measured"] <= gate["gate"] if gate["relation"] == "<=" else gate["measured"] >= gate["gate"]
        )
        assert gate["passed"] == holds


def test_the_recall_counts_each_row_once_and_ties_as_found() -> None:
    rows = np.eye(512, dtype=np.float32)[:8]
    query = np.zeros((1, 512), np.float32)
    query[0, :4] = 0.5
    bounds = benchmark.lowest_best(rows, query)
    assert bounds.tolist() == [0.5]
    for found, share in (([0, 1, 2, 3], 1.0), ([0, 1, 2, 7], 0.75), ([0, 0, 0, 0], 0.25)):
        assert benchmark.recall(lambda _, found=found: np.array([found]), rows, query, bounds) == share  # type: ignore[misc]  # a lambda's default


def test_a_straight_line_explains_times_that_grow_with_the_bank() -> None:
    assert benchmark.r_squared([1, 10, 100], [3.0, 12.0, 102.0]) == pytest.approx(1)
    assert benchmark.r_squared([1, 10, 100], [3.0, 30.0, 3.0]) < 0.5
