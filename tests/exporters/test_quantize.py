"""Lossy graphs: what became int8, int4 and fp16, how far it is off, what is kept, and the way to a bundle."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from click.testing import CliRunner, Result
from numpy.typing import NDArray
from onnxruntime.transformers.float16 import convert_float_to_float16

from tests.tiny_checkpoint import TEXTS, make_bank, make_clip, make_plm, randomize_plugin
from xadapter_export import XAdapterSession, export
from xadapter_export.bundle.machine import read_machine
from xadapter_export.bundle.manifest import Agreement, ExpertSet, Manifest, Variant
from xadapter_export.bundle.model_card import describe_agreement
from xadapter_export.cli.export import export as export_command
from xadapter_export.cli.parity import parity as parity_command
from xadapter_export.cli.run import run as run_command
from xadapter_export.errors import BundleError, ParityError
from xadapter_export.exporters import pipeline
from xadapter_export.exporters.judge import agreement, judge
from xadapter_export.exporters.judge.judge import Judge, LeftOutWarning
from xadapter_export.exporters.passes import half as half_pass
from xadapter_export.exporters.passes.quantize import RECIPES, Recipe, Rounding, measure_products, quantize
from xadapter_export.exporters.pipeline import ExportResult
from xadapter_export.exporters.portable.trace import trace
from xadapter_export.model.config import XAdapterConfig
from xadapter_export.model.plm import load_plm
from xadapter_export.model.x_adapter_model import XAdapterModel
from xadapter_export.parity import check_lossy
from xadapter_export.sessions.onnx_session import open_onnx
from xadapter_export.targets import Precision, VariantName

SETS: tuple[ExpertSet, ...] = ("vt", "none")
PRECISIONS: tuple[Precision, ...] = ("fp32", "fp16", "int8", "int4")
CLIP_KEPT = ("clip.text.text_projection", "clip.text.positional_embedding")
KEPT = ("adapters.", "bank", *CLIP_KEPT, "candidate_decoder.")
SENTENCES = (
    "the color of a banana is yellow.",
    "a cherry is red and a lime is green.",
    "a very very red cherry",
    "the fruit of a lime is green.",
    "banana and cherry and lime",
    "a fruit is very green and very yellow.",
    "the lime is a fruit.",
    "the banana is a very yellow fruit.",
)
ANY: dict[str, Any] = {"min_agreement": 0.0, "max_points_lost": 100.0}  # gates that a random model passes


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> XAdapterModel:
    """A tiny model whose CLIP is wide enough to be quantized."""
    folder = tmp_path_factory.mktemp("model")
    config = XAdapterConfig(experts="vt", layers=(1, 2), adapter_width=32, num_heads=2)
    plm = load_plm(make_plm("bert", folder / "plm"), "fill-mask")
    model = randomize_plugin(XAdapterModel(config, plm, make_clip(width=32), make_bank()))
    model.save_pretrained(folder / "checkpoint", self_contained=True)
    return XAdapterModel.from_pretrained(folder / "checkpoint")


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("texts") / "texts.txt"
    path.write_text("\n".join(SENTENCES) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def result(model: XAdapterModel, texts: Path, tmp_path_factory: pytest.TempPathFactory) -> ExportResult:
    """Two expert sets in every precision; not to be changed."""
    folder = tmp_path_factory.mktemp("export") / "bundle"
    return export(
        model,
        folder,
        SETS,
        variants=["onnx-int8"],
        precisions=PRECISIONS,
        targets=("onnx", "cpu", "cuda"),
        calibration=texts,
        **ANY,
    )


def load(result: ExportResult, name: str, experts: ExpertSet = "vt") -> ir.Model:
    return ir.load(result.folder / result.manifest.variant(experts, name).file)


def arrays(model: ir.Model) -> dict[str, NDArray[Any]]:
    return {str(v.name): v.const_value.numpy() for v in model.graph.initializers.values() if v.const_value}


def large(weights: dict[str, NDArray[Any]]) -> dict[str, NDArray[np.float32]]:
    """Matrices that are quantized: not the small ones, nor what is kept."""
    return {
        name: array
        for name, array in weights.items()
        if array.dtype == np.float32
        and array.ndim == 2
        and min(array.shape) >= 32
        and not name.startswith(KEPT)
        and not name.endswith(".scales")
    }


def products(model: ir.Model, op_type: str) -> list[ir.Node]:
    return [node for node in model.graph if node.op_type == op_type]


def constant(value: ir.Value | None) -> NDArray[Any]:
    assert value is not None
    assert value.const_value is not None
    return value.const_value.numpy()


def unpack(packed: NDArray[np.uint8]) -> NDArray[np.int8]:
    """``(N, K / 2) uint8`` to ``(N, K)`` numbers from -8 to 7, the low half first."""
    numbers = np.stack([packed & 15, packed >> 4], -1).reshape(len(packed), -1)
    return numbers.astype(np.int8) - 8


# ------------------------------------------------------------------------------------------ graphs


def test_every_large_matrix_is_quantized_and_what_is_kept_is_not(result: ExportResult) -> None:
    for experts in SETS:
        fp32 = arrays(load(result, "onnx-fp32", experts))
        names = set(large(fp32))
        assert any(name.startswith("clip") for name in names) == (experts == "vt")
        for name, dtype, kind in (("cpu-int8", np.int8, "int8"), ("cpu-int4", np.uint8, "int4")):
            got = arrays(load(result, name, experts))
            assert not large(got), name
            assert {n for n in names if f"{n}.{kind}" in got} == names
            assert all(got[f"{n}.{kind}"].dtype == dtype for n in names)
            for kept in [n for n in fp32 if n.startswith(("adapters.", "clip.text.text_projection"))]:
                np.testing.assert_array_equal(got[kept], fp32[kept])


def test_a_table_stands_once_though_the_decoder_reads_it_too(result: ExportResult) -> None:
    for name, kind in (("cpu-int8", "int8"), ("cpu-int4", "int4")):
        graph = load(result, name, "none")
        (table,) = [
            v for v in graph.graph.initializers.values() if f"word_embeddings.weight.{kind}" in str(v.name)
        ]
        users = sorted(user.op_type for user, _ in table.uses())
        assert users == {"int8": ["Gather", "Transpose"], "int4": ["GatherBlockQuantized", "Reshape"]}[kind]
        rows = constant(table)
        same = [
            n for n, a in arrays(graph).items() if a.shape in (rows.shape, rows.T.shape) and n != table.name
        ]
        assert not any(np.array_equal(arrays(graph)[n], other) for n in same for other in (rows, rows.T))
        decoder = products(graph, "MatMulIntegerToFloat" if kind == "int8" else "MatMulNBits")[-1]
        producer = None if decoder.inputs[1] is None else decoder.inputs[1].producer()
        assert producer is not None
        assert producer.inputs[0] is table


def test_int8_weights_are_near_and_no_pair_of_a_product_overflows(result: ExportResult) -> None:
    for experts in SETS:
        fp32, got = (arrays(load(result, name, experts)) for name in ("onnx-fp32", "cpu-int8"))
        graph = load(result, "cpu-int8", experts)
        multiplied = {
            str(value.name) for node in products(graph, "Transpose") for value in node.inputs if value
        }
        for name, matrix in large(fp32).items():
            is_table = "embedding" in name
            rows = got[f"{name}.int8"] if is_table else got[f"{name}.int8"].T
            wanted = matrix if is_table else matrix.T / got.get(f"{name}.factors", np.float32(1))
            scales = got[f"{name}.scales"].reshape(-1, 1)
            error = np.abs(rows * scales - wanted) / scales
            assert np.median(error) < 0.5, name
            if not is_table or f"{name}.int8" in multiplied:
                pairs = rows.astype(int).reshape(len(rows), -1, 2)
                assert 255 * np.maximum(pairs, 0).sum(-1).max() <= 32767, name
                assert 255 * np.minimum(pairs, 0).sum(-1).min() >= -32768, name


def test_int4_tables_are_within_a_step_and_products_near_it(result: ExportResult) -> None:
    fp32, got = (arrays(load(result, name)) for name in ("onnx-fp32", "cpu-int4"))
    assert len(large(fp32)) > 10
    for name, matrix in large(fp32).items():
        numbers, scales = unpack(got[f"{name}.int4"]).astype(np.float32), got[f"{name}.scales"]
        rows = matrix if "embedding" in name else matrix.T
        size = rows.shape[1] // scales.shape[1]
        assert size in (16, 32, 64)
        blocks = rows.reshape(*scales.shape, size)
        error = np.abs(numbers.reshape(blocks.shape) * scales[..., None] - blocks)
        if "embedding" not in name:  # rounded together
            assert 0.2 < np.median(error / np.abs(scales[..., None])) < 0.5, name
            continue
        assert (error <= np.abs(scales[..., None]) * 1.0001).all(), name  # 7 is the last number above 0
        largest = np.abs(blocks).argmax(-1)[..., None]
        np.testing.assert_allclose(np.take_along_axis(error, largest, -1), 0, atol=1e-6)


def test_fp16_halves_the_weights_and_keeps_its_inputs_and_outputs(result: ExportResult) -> None:
    half, whole = arrays(load(result, "onnx-fp16")), arrays(load(result, "onnx-fp32"))
    for name, matrix in large(whole).items():
        assert half[name].dtype == np.float16
        np.testing.assert_allclose(half[name], matrix, rtol=1e-3, atol=1e-6)
    session = open_onnx(result.folder / result.manifest.variant("vt", "onnx-fp16").file)
    kinds = {value.name: value.type for value in (*session.get_inputs(), *session.get_outputs())}
    assert kinds["logits"] == kinds["retrieved_scores"] == "tensor(float)"
    assert kinds["input_ids"] == "tensor(int64)"


def test_the_fp16_graph_for_cuda_is_fused_and_casts_only_for_the_search(result: ExportResult) -> None:
    graph = load(result, "cuda-fp16")
    fused = load(result, "cuda-fp32")
    for op_type in ("MultiHeadAttention", "BiasGelu", "LayerNormalization"):
        assert len(products(graph, op_type)) == len(products(fused, op_type)) > 0
    assert not products(graph, "Softmax")
    # The mask of either memory, the norm of the query, bank and outputs; the portable graph has far more.
    casts = len(products(graph, "Cast"))
    assert casts <= 10 < len(products(load(result, "onnx-fp16"), "Cast")) / 3
    (top,) = products(graph, "TopK")
    scores = top.inputs[0].producer() if top.inputs[0] is not None else None
    assert scores is not None
    assert scores.op_type == "MatMul"  # no cast between the two: scores are fp32
    weights = arrays(graph)
    assert weights["bank"].dtype == np.float16
    assert all(array.dtype == np.float16 for name, array in weights.items() if array.dtype.kind == "f")


def test_no_number_goes_to_fp16_and_back_between_operators_that_stay_fp32(result: ExportResult) -> None:
    for name in ("onnx-fp16", "cuda-fp16"):
        for node in products(load(result, name), "Cast"):
            before = node.inputs[0].producer() if node.inputs[0] is not None else None
            assert before is None or before.op_type != "Cast"


def test_numbers_that_were_integers_are_still_cast_before_an_operator_that_stays_fp32() -> None:
    nodes = [
        onnx.helper.make_node("Cast", ["x"], ["f"], to=onnx.TensorProto.FLOAT),
        onnx.helper.make_node("ReduceSum", ["f"], ["s"], keepdims=1),
        onnx.helper.make_node("Div", ["s", "s"], ["y"]),
    ]
    x = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.INT64, ["n"])
    y = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1])
    opset = [onnx.helper.make_opsetid("", 17)]
    whole = onnx.helper.make_model(onnx.helper.make_graph(nodes, "g", [x], [y]), opset_imports=opset)
    half = half_pass.to_half(ir.from_proto(whole), half_pass.FP32_ISLANDS)
    proto = ir.to_proto(half)
    onnx.checker.check_model(proto, full_check=True)
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    assert session.run(None, {"x": np.array([2, 3])})[0].item() == 1
    sums = products(half, "ReduceSum")[0].outputs[0]
    assert all(use.node.op_type == "Div" for use in sums.uses())  # and nothing between two that stay


def test_a_bundle_for_cuda_alone_says_how_it_is_asked(model: XAdapterModel, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "checkpoint", self_contained=True)
    flags = ["--experts", "none", "--precision", "fp16", "--target", "cuda", "--min-agreement", "0"]
    out = tmp_path / "bundle"
    done = call(tmp_path / "checkpoint", *flags, "-o", out)
    assert done.exit_code == 0, done.stderr
    assert '[MASK]." --provider CUDAExecutionProvider' in done.stdout.replace("\n", " ")
    card = (out / "README.md").read_text(encoding="utf-8")
    assert 'pip install "xadapter-export[gpu]"' in card
    assert "--provider CUDAExecutionProvider" in card
    assert "standard operators" not in card
    with pytest.raises(
        BundleError,
        match=r"no suitable variant for this machine.*needs a GPU: export again .*--provider",
    ):
        XAdapterSession.load(out)


def test_casts_that_onnxruntime_writes_twice_stand_once(
    model: XAdapterModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def convert(*args: Any, **options: Any) -> Any:
        half = convert_float_to_float16(*args, **options)
        for node in [node for node in half.graph.node if node.op_type == "Cast"]:  # as 1.31 does
            half.graph.node.append(node)
        return half

    monkeypatch.setattr(half_pass, "convert_float_to_float16", convert)
    twice = export(model, tmp_path / "bundle", "t", precisions=["fp16"], **ANY)
    onnx.checker.check_model(twice.folder / "onnx/model_fp16.onnx")


def graph_of(table: NDArray[np.float32], matrix: NDArray[np.float32], bias: NDArray[np.float32]) -> ir.Model:
    """``table[ids] @ matrix + bias``, and that times the transposed table."""

    def weight(name: str, array: NDArray[Any]) -> ir.Value:
        tensor = ir.tensor(array, name=name)
        return ir.Value(
            name=name, const_value=tensor, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype)
        )

    ids = ir.Value(name="ids", shape=ir.Shape(("n",)), type=ir.TensorType(ir.DataType.INT64))
    weights = [weight("table", table), weight("matrix", matrix), weight("bias", bias)]
    gather = ir.node("Gather", [weights[0], ids])
    product = ir.node("MatMul", [gather.outputs[0], weights[1]])
    add = ir.node("Add", [product.outputs[0], weights[2]])
    transpose = ir.node("Transpose", [weights[0]], {"perm": [1, 0]})
    decoder = ir.node("MatMul", [add.outputs[0], transpose.outputs[0]])
    out = decoder.outputs[0]
    out.name, out.shape, out.type = (
        "out",
        ir.Shape(("n", table.shape[0])),
        ir.TensorType(ir.DataType.FLOAT),
    )
    graph = ir.Graph(
        [ids],
        [out],
        nodes=[gather, product, add, transpose, decoder],
        initializers=weights,
        opset_imports={"": 17},
        name="g",
    )
    return ir.Model(graph, ir_version=9)


FEEDS = [{"ids": np.arange(start, start + 8)} for start in range(0, 32, 8)]  # what ``graph_of`` reads


def quantize_with_feeds(model: ir.Model, recipe: Recipe, feeds: Sequence[Mapping[str, Any]]) -> None:
    rounding = Rounding()
    quantize(model, recipe, measure_products(model, feeds, rounding), rounding)


def answers(model: ir.Model, folder: Path, ids: NDArray[np.int64]) -> NDArray[np.float32]:
    ir.save(model, folder / "graph.onnx")
    (got,) = open_onnx(folder / "graph.onnx").run(["out"], {"ids": ids})
    return np.asarray(got, np.float32)


@pytest.mark.parametrize(
    ("bits", "rows", "width"), [(8, 33, 37), (8, 51, 32), (4, 33, 48), (4, 35, 64), (4, 50, 80)]
)
def test_odd_sizes_and_rows_of_zeros(bits: int, rows: int, width: int, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    table = rng.normal(0, 1, (rows, width)).astype(np.float32)
    matrix = rng.normal(0, width**-0.5, (width, width)).astype(np.float32)
    table[3], table[4], matrix[:, 5], matrix[7] = 0, 1e-45, 0, 0
    bias = rng.normal(0, 1, width).astype(np.float32)
    ids = np.arange(rows)
    expected = answers(graph_of(table, matrix, bias), tmp_path, ids)
    model = graph_of(table, matrix, bias)
    quantize_with_feeds(model, Recipe("all", bits, bits, bits), [{"ids": ids}])
    assert not large(arrays(model))
    got = answers(model, tmp_path, ids)
    assert np.isfinite(got).all()
    error = np.abs(got - expected).mean() / np.abs(expected).mean()
    assert error < {8: 0.02, 4: 0.2}[bits]
    assert error > 1e-4  # it is not the same graph


@pytest.mark.parametrize("width", [128, 96, 48, 40])  # the last does not divide into blocks
def test_blocks_of_8_bits_keep_what_lies_beside_a_large_number(width: int, tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    table = rng.normal(0, 1, (50, width)).astype(np.float32)
    matrix = rng.normal(0, width**-0.5, (width, width)).astype(np.float32)
    table[7] *= 50  # one scale for all texts makes the others coarse
    bias, ids = np.zeros(width, np.float32), np.arange(50)
    expected = answers(graph_of(table, matrix, bias), tmp_path, ids)
    others = np.arange(50) != 7
    errors = []
    for block, rounds_activations in ((0, True), (32, True), (16, False)):
        model = graph_of(table, matrix, bias)
        quantize_with_feeds(
            model, Recipe("all", 8, 8, 8, block=block, rounds_activations=rounds_activations), FEEDS
        )
        in_blocks = int(block > 0 and width % 16 == 0)
        expanded = in_blocks * (not rounds_activations)
        nodes = products(model, "MatMulNBits")
        assert [len(nodes), len(products(model, "MatMul"))] == [2 * (in_blocks - expanded), 2 * expanded]
        assert len(products(model, "GatherBlockQuantized")) == in_blocks
        assert all(node.attributes.get_int("block_size") <= block for node in nodes)
        got = answers(model, tmp_path, ids)
        errors.append(np.abs(got - expected)[others].mean())
    assert errors[2] <= errors[1] <= errors[0]
    assert width % 16 or errors[1] < 0.9 * errors[0]
    assert width % 16 or errors[2] < 0.9 * errors[1]


def test_four_bits_need_rows_that_divide_into_blocks() -> None:
    matrix = np.ones((40, 40), np.float32)
    with pytest.raises(ParityError, match=r"4 bits need rows of a multiple of 16 \(got 40\); choose"):
        quantize_with_feeds(graph_of(matrix, matrix, np.ones(40, np.float32)), Recipe("all", 4, 4, 4), FEEDS)


def test_a_recipe_may_leave_parts_in_fp32() -> None:
    rng = np.random.default_rng(1)
    model = graph_of(*(rng.normal(0, 1, shape).astype(np.float32) for shape in ((40, 32), (32, 32), (32,))))
    for name in ("table", "matrix"):
        value = model.graph.initializers[name]
        value.name = f"clip.{name}"
    quantize_with_feeds(model, Recipe("rest only", 8, 32, 8), FEEDS)
    assert set(large(arrays(model))) == {"clip.table", "clip.matrix"}
    assert not products(model, "MatMulIntegerToFloat")


def test_a_decoder_that_is_tied_to_a_table_stays_fp32_with_it() -> None:
    rng = np.random.default_rng(1)
    model = graph_of(*(rng.normal(0, 1, shape).astype(np.float32) for shape in ((40, 32), (32, 32), (32,))))
    quantize_with_feeds(model, Recipe("products", 32, 32, 8, block=16, rounds_activations=False), FEEDS)
    assert set(large(arrays(model))) == {"table"}
    assert len(products(model, "MatMul")) == 2
    assert arrays(model)["matrix.int8"].dtype == np.uint8


# ------------------------------------------------------------------------------------------ bundles


def test_files_have_the_names_that_transformers_js_looks_for(result: ExportResult) -> None:
    manifest = result.manifest
    assert {v.name: v.file for v in manifest.variants_of("vt")} == {
        "onnx-fp32": "onnx/model.onnx",
        "cpu-fp32": "onnx/model_cpu.onnx",
        "cuda-fp32": "onnx/model_cuda.onnx",
        "onnx-fp16": "onnx/model_fp16.onnx",
        "cuda-fp16": "onnx/model_cuda_fp16.onnx",
        "onnx-int8": "onnx/model_int8.onnx",
        "cpu-int8": "onnx/model_quantized.onnx",
        "cpu-int4": "onnx/model_q4.onnx",
    }
    assert {v.file for v in manifest.variants_of("none")} == {
        v.file.replace("model", "model_none") for v in manifest.variants_of("vt")
    }
    on_disk = {f"onnx/{path.name}" for path in (result.folder / "onnx").iterdir()}
    assert on_disk == {p for v in manifest.variants for p in (v.file, *v.weight_files)}


def test_expert_sets_and_fp32_variants_share_their_weights(result: ExportResult) -> None:
    named = {v.name: v.weight_files for v in result.manifest.variants}
    assert named["onnx-fp32"] == named["cpu-fp32"] == named["cuda-fp32"] == ("onnx/model.onnx_data",)
    assert named["onnx-fp16"] == named["cuda-fp16"] == ("onnx/model_fp16.onnx_data",)
    assert len(set(named.values())) == 5
    for variant in result.manifest.variants_of("vt"):
        places: dict[str, set[int]] = {}
        for experts in SETS:
            for value in load(result, variant.name, experts).graph.initializers.values():
                if isinstance(value.const_value, ir.ExternalTensor):
                    places.setdefault(str(value.name), set()).add(value.const_value.offset or 0)
        assert places
        assert all(len(found) == 1 for found in places.values())
    data = {name: (result.folder / files[0]).stat().st_size for name, files in named.items()}
    assert data["cpu-int4"] < data["cpu-int8"] < data["onnx-fp16"] < data["onnx-fp32"]


def test_lossy_variants_carry_agreement_and_fp32_ones_a_proof(result: ExportResult) -> None:
    assert len(result.manifest.variants) == 8 * len(SETS)
    for variant in result.manifest.variants:
        assert (variant.parity is None) == (variant.precision != "fp32")
        assert (variant.agreement is None) == (variant.precision == "fp32")
        assert variant.parity is None or variant.parity.passed
        if variant.agreement is not None:
            assert variant.agreement.num_texts >= len(SENTENCES) // 2
            assert variant.agreement.cosine > {"fp16": 0.999, "int8": 0.9, "int4": 0.5}[variant.precision]
            assert variant.agreement.gate_lowered
            assert (variant.agreement.same_rows is None) == (variant.expert_set == "none")
            (step,) = [step for step in variant.optimizations if not step.lossless]
            assert step.after < step.before
            known = {"fp16_weights", "int8_qdq"} | {r.name for recipes in RECIPES.values() for r in recipes}
            assert step.name in known
    assert {cell.variant for cell in result.parity.cells} == {"onnx-fp32", "cpu-fp32", "cuda-fp32"}


def test_every_variant_answers_like_the_fp32_one(result: ExportResult) -> None:
    def logits(name: str) -> NDArray[np.float32]:
        session = XAdapterSession.load(result.folder, variant=name)
        return np.array([[a.score for a in answers] for answers in [session.fill_mask(TEXTS[0], top_k=40)]])

    expected = logits("onnx-fp32")
    for name, most in (("cpu-fp32", 1e-4), ("cpu-int8", 0.2), ("cpu-int4", 0.6)):
        assert np.abs(logits(name) - expected).max() < most, name


def test_what_lossy_variants_say_is_recorded_and_comes_again(result: ExportResult) -> None:
    lossy = [v for v in result.manifest.variants if v.agreement is not None]
    with np.load(result.folder / "reference.npz") as reference:
        for variant in lossy:
            key = f"single_typical/{variant.expert_set}/{variant.name}/out/logits"
            assert reference[key].shape[-1] <= 300
            assert 0 < float(reference[f"{key}#noise"][0]) < 2
    checks = check_lossy(result.folder)
    assert {(c.expert_set, c.variant) for c in checks} == {(v.expert_set, v.name) for v in lossy}
    assert all(check.passed for check in checks), [c for c in checks if not c.passed]


@pytest.fixture(scope="module")
def small(model: XAdapterModel, texts: Path, tmp_path_factory: pytest.TempPathFactory) -> ExportResult:
    """A bundle of int8 alone; not to be changed."""
    folder = tmp_path_factory.mktemp("small") / "bundle"
    return export(model, folder, "t", precisions=["int8"], calibration=texts, **ANY)


def test_int8_alone_leaves_no_fp32_file_and_answers(small: ExportResult) -> None:
    assert [variant.name for variant in small.manifest.variants] == ["cpu-int8"]
    assert sorted(path.name for path in (small.folder / "onnx").iterdir()) == [
        "model_quantized.onnx",
        "model_quantized.onnx_data",
    ]
    run = CliRunner().invoke(run_command, [str(small.folder), "the color of a banana is [MASK].", "--json"])
    assert run.exit_code == 0, run.stderr
    (reply,) = json.loads(run.stdout)["replies"]
    assert (reply["variant"], reply["experts"]) == ("cpu-int8", "t")
    parity = CliRunner().invoke(parity_command, [str(small.folder)])
    assert parity.exit_code == 0, parity.stderr
    assert "cpu-int8" in parity.stdout
    assert small.parity.passed  # the portable graph was proven before it was removed
    assert small.parity.variant_parity("t").num_cells > 0


# ------------------------------------------------------------------------------------------ recipes


@pytest.fixture
def embed(model: XAdapterModel, texts: Path, tmp_path: Path) -> Callable[..., ExportResult]:
    """Exports embeddings in int4, whose gate is a cosine and so tells recipes apart."""

    def run(name: str, **options: Any) -> ExportResult:
        return export(
            model,
            tmp_path / name,
            "t",
            task="feature-extraction",
            precisions=["int4"],
            calibration=texts,
            **options,
        )

    return run


def recipe_and_cosine(manifest: Manifest) -> tuple[str, float]:
    """What became of the one variant of a bundle."""
    (variant,) = manifest.variants
    assert variant.agreement is not None
    (step,) = [step for step in variant.optimizations if not step.lossless]
    return step.name, variant.agreement.cosine


def test_a_recipe_that_fails_its_gate_gives_way_to_the_next(
    embed: Callable[..., ExportResult], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names, cosines = [recipe.name for recipe in RECIPES["int4"]], []

    def compare(*arguments: Any, **options: Any) -> Agreement:
        measured = agreement.compare(*arguments, **options)
        cosines.append(measured.cosine)
        return measured

    with monkeypatch.context() as patch:
        patch.setattr(judge, "agreement", SimpleNamespace(**{**vars(agreement), "compare": compare}))
        with pytest.raises(
            ParityError, match=r"a variant failed its accuracy check: cpu-int4, experts t"
        ) as error:
            embed("none", min_agreement=1)
    message = str(error.value)
    assert "\n" not in message
    assert "--min-agreement" in message
    assert message.endswith(f"the bundle was rejected; its files are kept in {tmp_path / 'none.rejected'}")
    assert not (tmp_path / "none").exists()
    manifest = Manifest.from_json((tmp_path / "none.rejected/manifest.json").read_text("utf-8"))
    assert recipe_and_cosine(manifest) == (names[-1], cosines[-1])

    assert len(cosines) == len(names)  # each was tried
    assert cosines[0] < cosines[-1] < 1
    gate = (cosines[0] + cosines[-1]) / 2
    chosen = next(place for place, cosine in enumerate(cosines) if cosine >= gate)
    result = embed("gated", min_agreement=gate)
    name, cosine = recipe_and_cosine(result.manifest)
    assert name == names[chosen]
    assert cosine == pytest.approx(cosines[chosen])


# ------------------------------------------------------------------------------------------ what is asked for


# ------------------------------------------------------------------------------------------ command line


def call(*arguments: object) -> Result:
    return CliRunner().invoke(export_command, [*map(str, arguments), "--quiet"])


def test_the_flags_reach_the_bundle(model: XAdapterModel, texts: Path, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    model.save_pretrained(folder, self_contained=True)
    questions = tmp_path / "questions.jsonl"
    rows = [
        {"color": "yellow", "sentences": ["a banana is [MASK]."], "distribution": {"red": 0.5, "green": 0.5}},
        {"color": "red", "sentences": ["a cherry is [MASK].", "[MASK] cherry"]},
    ]
    questions.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    flags = ["--precision", "fp32", "--precision", "int8", "--target", "onnx", "--target", "cpu"]
    flags += ["--variant", "onnx-int8"]
    flags += ["--calibration", str(texts), "--evaluate", str(questions), "--min-agreement", "0.25"]
    flags += ["--max-points-lost", "99", "--without", "packed_projections"]
    done = call(folder, "--experts", "t", "-o", tmp_path / "bundle", *flags, "--json")
    assert done.exit_code == 0, done.stderr
    manifest = Manifest.model_validate_json(json.dumps(json.loads(done.stdout)["manifest"]))
    assert [v.name for v in manifest.variants] == ["onnx-fp32", "cpu-fp32", "cpu-int8", "onnx-int8"]
    assert manifest.variant("t", "onnx-int8").file == "onnx/model_int8.onnx"
    agreement = manifest.variant("t", "cpu-int8").agreement
    assert agreement is not None
    assert (agreement.min_same_top, agreement.max_points_lost, agreement.gate_lowered) == (0.25, 99, True)
    assert agreement.num_questions == 3
    assert agreement.accuracy_fp32 is not None
    assert agreement.num_texts > len(SENTENCES) // 2  # up to three masks of a text, each in a copy
    assert "packed_projections" not in {s.name for v in manifest.variants for s in v.optimizations}
    text = call(
        folder, "--experts", "t", "-o", tmp_path / "bundle", "--force", "--precision", "int8", *flags[10:]
    )
    assert text.exit_code == 0, text.stderr
    assert "experts t, cpu-int8: bundle/onnx/model_quantized.onnx" in text.stdout
    assert "same top answer in" in text.stdout


def test_a_variant_below_its_gate_is_one_line_and_exit_1(
    model: XAdapterModel, texts: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "checkpoint"
    model.save_pretrained(folder, self_contained=True)
    flags = ["--task", "feature-extraction", "--precision", "int8", "--calibration", texts]
    done = call(folder, "--experts", "none", "-o", tmp_path / "bundle", *flags, "--min-agreement", "1")
    assert done.exit_code == 1
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith(
        "Error: a variant failed its accuracy check: cpu-int8, experts none (expected a mean cosine"
    )
    assert not (tmp_path / "bundle").exists()
    assert (tmp_path / "bundle.rejected/onnx/model_quantized.onnx").is_file()


@pytest.mark.parametrize(
    ("flags", "code", "message"),
    [
        (["--variant", "bf16"], 2, "Invalid value for '--variant'"),
        (["--precision", "bf16"], 2, "Invalid value for '--precision'"),
        (["--target", "tpu"], 2, "Invalid value for '--target'"),
        (["--without", "luck"], 2, "Invalid value for '--without'"),
        (["--min-agreement", "1.5"], 2, "Invalid value for '--min-agreement'"),
        (["--max-points-lost", "-1"], 2, "Invalid value for '--max-points-lost'"),
        (["--calibration", "missing.txt"], 2, "Invalid value for '--calibration'"),
        (["--evaluate", "missing.csv"], 2, "Invalid value for '--evaluate'"),
        (
            ["--precision", "fp16", "--target", "cpu"],
            1,
            "Error: precision fp16 is not available for target cpu",
        ),
        (["--precision", "int8", "--calibration", "empty.txt"], 1, "Error: the file has no text: empty.txt"),
        (
            ["--precision", "int8", "--calibration", "one.txt"],
            1,
            "Error: too few different sentences: some are needed",
        ),
        (
            ["--calibration", "one.txt"],
            1,
            "Error: only fp16, int8 and int4 variants are calibrated and judged, and none was requested (got "
            "calibration)",
        ),
        (["--precision", "fp32", "--min-agreement", "0.9"], 1, "(got min_agreement)"),
    ],
)
def test_flags_that_make_no_sense(
    flags: list[str],
    code: int,
    message: str,
    model: XAdapterModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    model.save_pretrained(tmp_path / "checkpoint", self_contained=True)
    Path("empty.txt").touch()
    Path("one.txt").write_text("the\n", encoding="utf-8")
    done = call("checkpoint", "--experts", "t", "-o", "bundle", *flags)
    assert done.exit_code == code, done.output
    assert message in done.stderr
    assert not Path("bundle").exists()


# ------------------------------------------------------------------------------------------ left out


def fail(monkeypatch: pytest.MonkeyPatch, *failing: tuple[str, Precision]) -> None:
    """Makes variants of these sets and precisions give another answer than fp32 to most texts."""
    compare = Judge.compare

    def spoiled(self: Judge, session: Any, experts: ExpertSet, name: VariantName) -> Agreement:
        measured = compare(self, session, experts, name)
        same = 0.25 if (experts, name.precision) in failing else 1.0
        return measured.model_copy(update={"same_top": same})

    monkeypatch.setattr(Judge, "compare", spoiled)


def test_a_variant_below_its_gate_is_left_out_and_the_others_are_written(
    model: XAdapterModel, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail(monkeypatch, ("none", "int8"), ("vt", "int4"), ("none", "int4"))
    variants = ["onnx-fp32", "cpu-int8", "cpu-int4", "triton-int8"]
    options: dict[str, Any] = {"variants": variants, "calibration": texts}
    with pytest.warns(LeftOutWarning) as warned:
        done = export(model, tmp_path / "bundle", SETS, skip_failed=True, **options)
    assert [(v.expert_set, v.name) for v in done.manifest.variants] == [
        ("vt", "onnx-fp32"),
        ("vt", "cpu-int8"),
        ("none", "onnx-fp32"),
    ]
    assert [(made.expert_set, made.source) for made in done.manifest.deployments] == [("vt", "cpu-int8")]
    assert tuple(str(warning.message) for warning in warned) == done.left_out
    assert len(done.left_out) == 4
    first, *_, last = sorted(done.left_out, key=lambda line: "triton" in line)
    assert first.startswith(
        "left out: a variant failed its accuracy check: cpu-int4, experts vt (expected the same "
    )
    assert last == "left out: triton-int8, experts none, because cpu-int8, its source, was left out"
    assert not any("q4" in path.name or "none_quantized" in path.name for path in done.folder.rglob("*"))
    assert XAdapterSession.load(done.folder, variant="cpu-int8").fill_mask(TEXTS[0])
    with pytest.raises(ParityError, match=r"failed its accuracy check: cpu-int4, experts vt .*was rejected"):
        export(model, tmp_path / "strict", SETS, **options)


def test_an_export_that_would_leave_a_set_with_nothing_fails(
    model: XAdapterModel, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail(monkeypatch, ("none", "int8"))
    with (
        pytest.warns(LeftOutWarning),
        pytest.raises(
            ParityError, match=r"every variant failed its accuracy check, .*: experts none .*got cpu-int8"
        ),
    ):
        export(model, tmp_path / "b", SETS, variants=["cpu-int8"], calibration=texts, skip_failed=True)
    assert not any(tmp_path.iterdir())


def test_a_graph_in_fp32_that_is_wrong_is_never_left_out(
    model: XAdapterModel, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoiled(*arguments: Any) -> ir.Model:
        graph = trace(*arguments)
        name = next(name for name in graph.graph.initializers if name.startswith("adapters."))
        weights = graph.graph.initializers[name]
        weights.const_value = ir.tensor(2 * constant(weights), name=name)
        return graph

    monkeypatch.setattr(pipeline, "trace", spoiled)
    variants = ["onnx-fp32", "cpu-int8"]
    with pytest.raises(ParityError, match="rejected"):
        export(model, tmp_path / "b", variants=variants, calibration=texts, skip_failed=True, **ANY)


@pytest.mark.filterwarnings("default")  # as outside pytest, where a warning is no error
def test_skip_failed_is_a_warning_line_and_exit_0(
    model: XAdapterModel, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail(monkeypatch, ("none", "int8"))
    model.save_pretrained(tmp_path / "checkpoint", self_contained=True)
    flags = ["--experts", "none", "-o", tmp_path / "bundle", "--calibration", texts, "--skip-failed"]
    done = call(tmp_path / "checkpoint", *flags, "--variant", "onnx-fp32", "--variant", "cpu-int8", "--json")
    assert done.exit_code == 0, done.output
    (line,) = done.stderr.splitlines()
    assert line.startswith("Warning: left out: a variant failed its accuracy check: cpu-int8, experts none")
    found = json.loads(done.stdout)
    assert [v["target"] for v in found["manifest"]["variants"]] == ["onnx"]
    assert [f"Warning: {line}" for line in found["left_out"]] == [line]


def test_a_lossy_variant_says_what_it_was_judged_on(result: ExportResult) -> None:
    for variant in result.manifest.variants:
        agreement = variant.agreement
        if agreement is None:
            continue
        judged = agreement.judged_on
        assert judged is not None
        assert (judged.texts, judged.questions) == ("texts.txt", None)
        assert judged.processor == str(read_machine())
        assert agreement.same_top_interval is not None
        low, high = agreement.same_top_interval
        assert 0 <= low <= (agreement.same_top or 0) <= high <= 1
        line = describe_agreement(agreement)
        assert f"95 % interval {low:.1%} to {high:.1%}" in line
        assert f"judged on texts.txt, on {judged.processor}" in line
        assert line in (result.folder / "README.md").read_text("utf-8")


# ------------------------------------------------------------------------------------------ calibration.jsonl


@pytest.fixture
def with_texts(model: XAdapterModel, tmp_path: Path) -> Path:
    """A checkpoint that carries texts, as training writes them."""
    folder = tmp_path / "checkpoint"
    lines = "".join(json.dumps({"sentence": text}) + "\n" for text in SENTENCES[:6])
    model.save_pretrained(folder, self_contained=True, more_files={"calibration.jsonl": lines})
    return folder


def test_the_texts_of_a_checkpoint_are_what_its_lossy_export_is_compared_on(
    with_texts: Path, texts: Path, tmp_path: Path
) -> None:
    def num_texts(name: str, **options: Any) -> int:
        (variant,) = export(
            with_texts,
            tmp_path / name,
            "none",
            task="feature-extraction",
            precisions=["int8"],
            min_agreement=0,
            **options,
        ).manifest.variants
        assert isinstance(variant, Variant)
        assert variant.agreement is not None
        return variant.agreement.num_texts

    assert num_texts("own") == 3  # half of six
    assert num_texts("given", calibration=texts) == 4
    record = json.loads((with_texts / "xadapter.json").read_text())
    (with_texts / "xadapter.json").write_text(json.dumps(record | {"calibration_sha256": None}))
    (with_texts / "calibration.jsonl").unlink()
    assert XAdapterModel.from_pretrained(with_texts).calibration is None
    assert num_texts("ours") > 100
