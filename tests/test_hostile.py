"""What an attacker puts into a bundle, a bank or a text is refused or only shown; nothing of it is obeyed."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from click.testing import CliRunner, Result
from onnx import TensorProto, helper, numpy_helper

from tests.tiny_bundle import rehash, rewrite_manifest
from xadapter_export import XAdapterSession
from xadapter_export.bundle.graph_check import check_onnx, check_openvino
from xadapter_export.bundle.graph_file import Field, serialize
from xadapter_export.cli.main import xad
from xadapter_export.errors import BundleError

BANANA = "the color of a banana is [MASK]."
CONTROLS = "\x1b[2J\x07\x9b31m\u202e"


def call(*arguments: object) -> Result:
    return CliRunner().invoke(xad, [str(argument) for argument in arguments])


def is_plain(text: str) -> bool:
    return not set(text) & set(CONTROLS.replace("[2J", "").replace("31m", ""))


@pytest.fixture
def painted(broken: Path) -> Path:
    """Return a bundle whose captions, vocabulary and names hold what a terminal obeys."""
    lines = [json.dumps({"id": f"{i}{CONTROLS}", "caption": f"picture {i}{CONTROLS}"}) for i in range(3)]
    (broken / "bank.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    tokenizer = json.loads((broken / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary = tokenizer["model"]["vocab"]
    tokenizer["model"]["vocab"] = {
        f"{word}{CONTROLS}" if word == "yellow" else word: i for word, i in vocabulary.items()
    }
    (broken / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    manifest = json.loads((broken / "manifest.json").read_text(encoding="utf-8"))
    for part in ("plm", "clip", "checkpoint"):
        manifest[part]["source"] += CONTROLS
    rewrite_manifest(broken, **manifest)
    rehash(broken)
    return broken


@pytest.mark.parametrize(
    "arguments", [("run",), ("run", "--compare"), ("run", "--json"), ("inspect",), ("inspect", "--json")]
)
def test_nothing_that_a_terminal_obeys_comes_out_of_a_bundle(
    painted: Path, arguments: tuple[str, ...]
) -> None:
    command, *options = arguments
    texts = [f"{BANANA}{CONTROLS}"] if command == "run" else []
    result = call(command, painted, *texts, *options)
    assert result.exit_code == 0, result.output
    assert is_plain(result.output)
    assert "x1b" in result.stdout or "u001b" in result.stdout


def test_an_error_obeys_no_terminal_and_stays_short(painted: Path) -> None:
    manifest = json.loads((painted / "manifest.json").read_text(encoding="utf-8"))
    rewrite_manifest(painted, task=f"{CONTROLS}{'x' * 10**5}", created_with=manifest["created_with"])
    result = call("inspect", painted)
    assert result.exit_code == 1
    assert is_plain(result.output)
    assert len(result.output) < 5000
    assert len(result.output.splitlines()) == 1


Change = Callable[[onnx.ModelProto], None]


def change_graph(folder: Path, change: Change) -> None:
    """Change the default graph of a bundle, and make every hash right again."""
    file = folder / "onnx" / "model.onnx"
    model = onnx.load_model(file, load_external_data=False)
    change(model)
    file.write_bytes(model.SerializeToString())
    rehash(folder)


def add_endless_loop(model: onnx.ModelProto) -> None:
    """Make the logits wait for a loop of 2^60 turns."""
    body = helper.make_graph(
        [helper.make_node("Identity", ["go"], ["again"])],
        "body",
        [
            helper.make_tensor_value_info("turn", TensorProto.INT64, []),
            helper.make_tensor_value_info("go", TensorProto.BOOL, []),
        ],
        [helper.make_tensor_value_info("again", TensorProto.BOOL, [])],
    )
    model.graph.initializer.append(numpy_helper.from_array(np.array(1 << 60), "turns"))
    model.graph.initializer.append(numpy_helper.from_array(np.array(True), "yes"))
    model.graph.node.append(helper.make_node("Loop", ["turns", "yes"], [], body=body))


def add_node(op_type: str, domain: str = "", **attributes: Any) -> Change:
    def change(model: onnx.ModelProto) -> None:
        node = helper.make_node(op_type, ["input_ids"], ["more"], domain=domain, **attributes)
        model.graph.node.append(node)
        if domain:
            model.opset_import.append(helper.make_opsetid(domain, 1))

    return change


def add_function(model: onnx.ModelProto) -> None:
    identity = helper.make_node("Identity", ["x"], ["y"])
    opsets = [helper.make_opsetid("", 17)]
    model.functions.append(helper.make_function("mine", "F", ["x"], ["y"], [identity], opsets))


def move_weights(location: str) -> Change:
    def change(model: onnx.ModelProto) -> None:
        weight = next(tensor for tensor in model.graph.initializer if tensor.external_data)
        next(entry for entry in weight.external_data if entry.key == "location").value = location

    return change


def move_constant(model: onnx.ModelProto) -> None:
    """Put the number of a node's attribute, not of an initializer, into a file."""
    value = TensorProto(name="c", data_type=TensorProto.FLOAT, dims=[1], data_location=TensorProto.EXTERNAL)
    value.external_data.add(key="location", value="elsewhere.bin")
    add_node("Constant", value=value)(model)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (add_endless_loop, "a graph in a node|ai.onnx::Loop"),
        (add_node("If", then_branch=helper.make_graph([], "a", [], [])), "a graph in a node"),
        (add_node("Scan"), "ai.onnx::Scan"),
        (add_node("Loop", "ai.onnx"), "ai.onnx::Loop"),
        (add_node("EPContext", "com.microsoft", ep_cache_context="../x"), "com.microsoft::EPContext"),
        (add_node("PythonOp", "com.microsoft"), "com.microsoft::PythonOp"),
        (add_node("Anything", "com.attacker"), "com.attacker::Anything"),
        (add_function, "a function of its own"),
        (move_weights("more.onnx_data"), r"does not list: .*model\.onnx, more\.onnx_data;"),
        (move_weights("../tokenizer.json"), "does not list"),
        (move_weights("/etc/passwd"), "does not list"),
        (move_weights("*/_ORT_MEM_ADDR_/*"), "does not list"),
        (move_constant, "does not list: .*elsewhere"),
    ],
)
def test_a_graph_that_could_do_harm_is_not_opened(broken: Path, change: Change, message: str) -> None:
    (broken / "onnx" / "more.onnx_data").write_bytes((broken / "onnx" / "model.onnx_data").read_bytes())
    change_graph(broken, change)
    with pytest.raises(BundleError, match=message) as caught:
        XAdapterSession.load(broken)
    assert "\n" not in str(caught.value)


def test_a_graph_of_another_format_is_not_opened(broken: Path) -> None:
    (broken / "onnx" / "model.onnx").rename(broken / "onnx" / "model.ort")
    manifest = (
        (broken / "manifest.json").read_text(encoding="utf-8").replace("onnx/model.onnx", "onnx/model.ort")
    )
    (broken / "manifest.json").write_text(
        manifest.replace("model.ort_data", "model.onnx_data"), encoding="utf-8"
    )
    rehash(broken)
    with pytest.raises(BundleError, match=r"wrong file name: .*model\.ort \(expected a name with \.onnx"):
        XAdapterSession.load(broken)


def test_a_field_whose_number_other_readers_cut_is_no_way_around(tmp_path: Path) -> None:
    graph = add_field(7, add_field(1, add_field(4, b"Loop")))
    hidden = bytes([graph[0] | 0x80, 0x80, 0x80, 0x80, 0x10]) + graph[1:]  # the number plus 2^29
    for data, message in ((graph, "ai.onnx::Loop"), (hidden, "number is too large"), (b"", "cannot be read")):
        (tmp_path / "model.onnx").write_bytes(data)
        with pytest.raises(BundleError, match=message):
            check_onnx(tmp_path / "model.onnx", None)


def add_field(number: int, data: bytes) -> bytes:
    return serialize([Field(number, 2, data)])


LAYER = '<layer id="0" name="x" type="{}" version="{}"/>'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (LAYER.format("Loop", "opset5"), "Loop of opset5"),
        (LAYER.format("&#76;oop", "opset5"), "Loop of opset5"),
        (LAYER.format("If", "opset8"), "If of opset8"),
        (LAYER.format("Mine", "extension"), "Mine of extension"),
        ('<!DOCTYPE x [<!ENTITY a "aaaa"><!ENTITY b "&a;&a;">]><net>&b;</net>', "a document type"),
        ("<net>", "cannot be read"),
    ],
)
def test_an_openvino_graph_that_could_do_harm_is_not_opened(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "model.xml").write_text(text, encoding="utf-8")
    with pytest.raises(BundleError, match=message):
        check_openvino(tmp_path / "model.xml")


def test_an_openvino_graph_of_its_own_operators_is_opened(tmp_path: Path) -> None:
    (tmp_path / "model.xml").write_text(LAYER.format("MatMul", "opset1"), encoding="utf-8")
    check_openvino(tmp_path / "model.xml")
