"""What an attacker puts into a bundle, a bank or a text is refused or only shown; nothing of it is obeyed."""

import errno
import io
import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from click.testing import CliRunner, Result
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from tests.tiny_bundle import rehash, rewrite_manifest
from xadapter_export import XAdapterSession
from xadapter_export.bank.contact_sheet import Hit, render_sheet
from xadapter_export.bank.reader import BankReader
from xadapter_export.bank.thumbnails import read_thumbnails
from xadapter_export.bank_builder.work_folder import WorkFolder
from xadapter_export.bundle.folder import read_bundle
from xadapter_export.bundle.graph_check import check_onnx, check_openvino
from xadapter_export.bundle.graph_file import Field, serialize
from xadapter_export.bundle.pictures import Picture
from xadapter_export.bundle.staging import staged_file
from xadapter_export.cli.main import xad
from xadapter_export.errors import BundleError, CheckpointError, ConfigError, InputTextError, OutputWriteError
from xadapter_export.evaluation.thumbnails import load_thumbnails
from xadapter_export.model.builtin import builtin_folder
from xadapter_export.runtime.answers import RetrievedPicture
from xadapter_export.runtime.explain import (
    ExplainedAnswer,
    ExplainedExpert,
    ExplainedItem,
    Explanation,
    Without,
)
from xadapter_export.runtime.explanation_page import render_explanations
from xadapter_export.tasks.text_classification import LabelAnswer

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


def test_a_link_to_itself_is_one_line(broken: Path) -> None:
    for name in ("tokenizer.json", "manifest.json"):
        (broken / name).unlink()
        (broken / name).symlink_to(name)
        with pytest.raises(BundleError) as caught:
            read_bundle(broken)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 10**5 + "]" * 10**5, "too many levels"),
        ('{"a": ' * 10**5 + "1" + "}" * 10**5, "too many levels"),
        ('{"format_version": 1, "task": "x", "task": "y"}', "the key 'task' is there twice"),
        ('{"format_version": NaN}', "NaN is no number of JSON"),
        ("[]", "not a JSON object"),
        (" " * (17 << 20), "too large"),
    ],
)
def test_a_manifest_that_is_no_plain_object_is_one_line(broken: Path, text: str, message: str) -> None:
    (broken / "manifest.json").write_text(text, encoding="utf-8")
    with pytest.raises(BundleError, match=message):
        read_bundle(broken)


@pytest.mark.parametrize(
    "name",
    [
        *("../x", "a/../x", "/etc/passwd", "a//b", "./a", "a/.", "a\\b", "C:x", "a\0b", ""),
        *(
            "CON",
            "con.txt",
            "a/NUL",
            "com1.onnx",
            "LPT\xb9",
            "aux .bin",
            "x.",
            "x ",
            "a?",
            "*/x",
            "a|b",
            "x\x1b",
        ),
        "x" * 256,
    ],
)
def test_a_file_name_that_some_system_takes_for_another_is_refused(broken: Path, name: str) -> None:
    manifest = json.loads((broken / "manifest.json").read_text(encoding="utf-8"))
    rewrite_manifest(broken, files=manifest["files"] | {name: {"size_bytes": 0, "sha256": "0" * 64}})
    with pytest.raises(BundleError, match="must be a relative path"):
        read_bundle(broken)


def test_two_names_that_some_system_takes_for_one_are_refused(broken: Path) -> None:
    (broken / "Tokenizer.json").write_text("{}", encoding="utf-8")
    rehash(broken)
    with pytest.raises(BundleError, match=r"take these files for one: Tokenizer\.json, tokenizer\.json"):
        read_bundle(broken)


@pytest.mark.parametrize("name", ["bank.json", "bank.jsonl"])
def test_a_bank_of_devices_is_not_read(tmp_path: Path, name: str) -> None:
    for file in ("bank.jsonl", "bank.safetensors"):
        shutil.copy(builtin_folder() / file, tmp_path)
    BankReader(tmp_path)
    (tmp_path / name).unlink(missing_ok=True)
    (tmp_path / name).symlink_to("/dev/zero")
    with pytest.raises(CheckpointError, match=r"expected a regular file|is missing"):
        _ = BankReader(tmp_path).clip


def test_a_list_of_images_that_claims_a_terabyte_is_not_read(tmp_path: Path) -> None:
    shutil.copy(builtin_folder() / "bank.safetensors", tmp_path)
    with (tmp_path / "bank.jsonl").open("wb") as stream:
        stream.truncate(1 << 40)  # a sparse file
    with pytest.raises(CheckpointError, match="the list of images is too large"):
        BankReader(tmp_path)


def test_a_tokenizer_whose_expression_never_ends_is_one_line(broken: Path) -> None:
    tokenizer = json.loads((broken / "tokenizer.json").read_text(encoding="utf-8"))
    split = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}
    tokenizer["pre_tokenizer"] = split
    (broken / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    rehash(broken)
    session = XAdapterSession.load(broken, experts="none")
    with pytest.raises(InputTextError, match=r"the tokenizer gives up on a text: .*retry-limit"):
        session.fill_mask("a" * 40 + "! [MASK]")


def give(op_type: str, constant: NDArray[Any], output: str = "logits") -> Change:
    """Put a node with a constant after an output."""

    def change(model: onnx.ModelProto) -> None:
        for node in model.graph.node:
            for names in (node.input, node.output):
                names[:] = ["before" if name == output else name for name in names]
        model.graph.initializer.append(numpy_helper.from_array(constant, "constant"))
        model.graph.node.append(helper.make_node(op_type, ["before", "constant"], [output]))

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (give("Tile", np.array([4, 1, 1])), r"wrong shape or dtype: logits .*\(expected \(1, 1, 21\)"),
        (give("Add", np.array(np.nan, np.float32)), "contain NaN or infinity: logits"),
        (give("Add", np.array(np.inf, np.float32)), "contain NaN or infinity: logits"),
        (give("Add", np.array(1 << 40), "retrieved"), "a picture that the bank does not have: retrieved"),
        (give("Sub", np.array(1), "retrieved"), "a picture that the bank does not have: retrieved"),
    ],
)
def test_what_is_no_answer_to_the_text_is_one_line(broken: Path, change: Change, message: str) -> None:
    change_graph(broken, change)
    session = XAdapterSession.load(broken, experts="vt", check="never")
    with pytest.raises(BundleError, match=message):
        session.fill_mask("the color of a banana is [MASK].")
        session.retrieve("a banana")


@pytest.fixture
def album(tmp_path: Path) -> Path:
    """Return a bank with thumbnails."""
    folder = tmp_path / "bank"
    folder.mkdir()
    for file in ("bank.jsonl", "bank.safetensors"):
        shutil.copy(builtin_folder() / file, folder)
    return folder


def test_a_thumbnail_that_unpacks_to_much_is_refused(album: Path) -> None:
    with zipfile.ZipFile(album / "thumbnails.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("0.webp", bytes(1 << 26))
    with pytest.raises(CheckpointError, match=r"thumbnails cannot be read: .*0\.webp of 67108864 bytes"):
        dict(read_thumbnails(album))


def test_a_picture_of_too_many_pixels_is_not_decoded(album: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    stream = io.BytesIO()
    image.new("1", (9000, 9000)).save(stream, "png")
    with zipfile.ZipFile(album / "thumbnails.zip", "w") as archive:
        archive.writestr("0.webp", stream.getvalue())
    assert load_thumbnails(album, [RetrievedPicture(0, "x", "x", 1.0)]) == {}


def test_an_id_leads_to_no_file_elsewhere_and_no_link_to_itself(tmp_path: Path) -> None:
    pytest.importorskip("PIL.Image")
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "loop.png").symlink_to("loop.png")
    (tmp_path / "out.png").write_bytes(b"")
    pictures = [RetrievedPicture(i, name, "x", 1.0) for i, name in enumerate(("loop", "../out", "a\0b"))]
    assert load_thumbnails(tmp_path / "in", pictures) == {}


def test_a_page_on_a_disk_that_takes_nothing_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    for name in ("open", "unlink"):
        monkeypatch.setattr(Path, name, refuse)
    page = tmp_path / "sheet.html"
    with (
        pytest.raises(OutputWriteError, match=r"output cannot be written: .*Read-only"),
        staged_file(page) as file,
    ):
        file.write_text("")


@pytest.mark.parametrize(
    "arguments",
    [
        ("export", "-o", ""),
        ("inspect", ""),
        ("run", "", BANANA),
        ("bank", "compact", "builtin", "--prototypes", 2, "-o", ""),
        ("train", "-o", ""),
    ],
)
def test_an_empty_path_is_not_the_current_folder(arguments: tuple[object, ...]) -> None:
    result = call(*arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    assert "the path is empty" in result.stderr


NO_TORCH = """
import sys
sys.modules["torch"] = None
from xadapter_export.cli.main import xad
xad()
"""


@pytest.mark.parametrize(
    "arguments",
    [
        ("export", "-o", "taken"),
        ("bank", "build", "pictures", "-o", "taken"),
        ("train", "--plm", "x", "--clip", "x", "--bank", "x", "--train-files", "x", "-o", "taken"),
    ],
)
def test_a_place_that_is_taken_is_refused_before_torch_is_imported(
    tmp_path: Path, arguments: tuple[str, ...]
) -> None:
    (tmp_path / "taken").mkdir()
    line = [sys.executable, "-c", NO_TORCH, *arguments]
    result = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert result.stderr.startswith("Error: the output path already exists: ")
    assert len(result.stderr.splitlines()) == 1


def test_a_shard_that_is_damaged_is_one_line(tmp_path: Path) -> None:
    work = WorkFolder(tmp_path, num_rows=1, shard_rows=1, offsets=(0,))
    work.shard_folder(0).mkdir(parents=True)
    for data in (b"", b"\xff" * 100):
        (work.shard_folder(0) / "features.safetensors").write_bytes(data)
        with pytest.raises(ConfigError, match=r"a shard is damaged: .*run the same command again"):
            work.read_shard(0)


def test_a_page_of_images_holds_no_markup_of_theirs() -> None:
    attack = "\"><script>alert(1)</script>'&"
    hit = Hit(0, Picture(id=attack, caption=attack), 0.5)
    for thumbnails in ({}, {0: b"webp"}):
        page = render_sheet(attack, attack, [hit], thumbnails)
        assert "<script" not in page
        assert 'alt=""' not in page
        assert page.count("&lt;script&gt;") >= 4


def test_a_page_of_explanations_holds_no_markup_of_theirs() -> None:
    attack = "\"><script>alert(1)</script>'&"
    without = Without(LabelAnswer(attack, 0.5, 1.0), attack, 0.25, changes=True)
    items = [
        ExplainedItem(attack, row, attack, 0.5, share=share, by_layer=(share,), without=without)
        for row, share in ((0, 1.5), (None, -0.5))
    ]
    experts = [
        ExplainedExpert(e, (1,), (2.0,), (item,), 0.1, 0.2, without)
        for e, item in zip("vt", items, strict=True)
    ]
    answer = ExplainedAnswer(0, (LabelAnswer(attack, 0.5, 1.0),) * 2, tuple(experts))
    for thumbnails in ({}, {0: b"webp"}):
        page = render_explanations([Explanation(attack, attack, attack, (answer,))], thumbnails)
        assert "<script" not in page
        assert 'alt=""' not in page
        assert page.count("&lt;script&gt;") >= 12
