"""A bundle small enough to check by eye: real tokenizers, real graphs, a PLM and a CLIP of one-hot vectors.

The language model repeats the words of its sentence; the V-expert adds the color of the pictures that it
retrieves, the T-expert adds "fruit". The reference outputs come from numpy, written apart from the graphs.
"""

import importlib
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from xadapter_export.bundle.folder import list_files
from xadapter_export.bundle.manifest import Manifest

Arrays = dict[str, NDArray[Any]]
Spec = dict[str, Any]

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "color", "of", "a", "banana", "cherry", "lime"]
WORDS += ["is", ".", "yellow", "red", "green", "fruit", "very", "and", "##s"]
CLIP_WORDS = ["!", "<start>", "<end>", "<unk>", "the", "color", "of", "a", "banana", "cherry", "lime"]
CLIP_WORDS += ["is", ".", "very", "and"]
PICTURES = (("1f34c", "banana", "yellow"), ("1f352", "cherry", "red"), ("1f34b", "lime", "green"))
H, D, K = len(WORDS), len(CLIP_WORDS), 2
MAX_SEQ, CONTEXT = 15, 14
SETS = ("none", "v", "t", "vt")
CASES = {
    "single_shortest": (["[MASK]"], None),
    "single_typical": (["the color of a banana is [MASK]."], None),
    "single_longest": (["very " * 6 + "[MASK] cherry . the lime is ."], None),
    "batch_unpadded": (["a banana is [MASK]", "a cherry is [MASK]"], None),
    "batch_padded": (["the color of a lime is [MASK] and [MASK].", "[MASK] banana"], None),
}


PROOF: Spec = {"passed": True, "max_abs": 1e-7, "atol": 1e-4, "rtol": 1e-4}
STEP: Spec = {"name": "fuse", "lossless": True, "unit": "nodes", "before": 20, "after": 15}
AGREEMENT: Spec = {
    "num_texts": 300,
    "num_answers": 320,
    "same_top": 0.997,
    "cosine": 0.9991,
    "num_questions": 255,
    "accuracy_fp32": 0.8,
    "accuracy": 0.796,
    "min_same_top": 0.99,
    "max_points_lost": 1.0,
    "gate_lowered": False,
}


SHA = "0" * 64
PARTS: Spec = {
    "plm": {
        "family": "bert",
        "source": "tiny",
        "sha256": SHA,
        "hidden_size": H,
        "vocab_size": H,
        "max_seq": MAX_SEQ,
        "mask_token": "[MASK]",
        "mask_token_id": 4,
        "pad_token_id": 0,
        "has_token_type_ids": False,
    },
    "clip": {
        "source": "tiny",
        "sha256": SHA,
        "context_length": CONTEXT,
        "end_token_id": 2,
        "pad_token_id": 0,
        "exact_at_true_length": True,
        "embed_dim": D,
        "text_width": D,
    },
    "bank": {"num_pictures": len(PICTURES), "dim": D, "sha256": SHA, "retrieval": "topk", "k": K},
}


def plm_tokenizer() -> Tokenizer:
    """Return a WordPiece tokenizer over ``WORDS``."""
    tokenizer = Tokenizer(models.WordPiece({w: i for i, w in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.add_special_tokens(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    return tokenizer


class TowerRules(NamedTuple):
    """Facts of a text tower."""

    context_length: int
    end_token_id: int
    pad_token_id: int = 0
    exact_at_true_length: bool = True


def clip_tokenizer() -> Tokenizer:
    """Return a word-level tokenizer over ``CLIP_WORDS`` that adds start and end."""
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(CLIP_WORDS)}, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<start> $A <end>", special_tokens=[("<start>", 1), ("<end>", 2)]
    )
    return tokenizer


def weights() -> dict[str, NDArray[np.float32]]:
    """Return every weight of the model; ``bank`` rows have length 1."""
    bank = np.zeros((len(PICTURES), D), np.float32)
    to_color = np.zeros((D, H), np.float32)
    for row, (_, name, color) in enumerate(PICTURES):
        bank[row, CLIP_WORDS.index(name)] = 1
        to_color[CLIP_WORDS.index(name), WORDS.index(color)] = 10
    to_fruit = np.zeros((D, H), np.float32)
    to_fruit[:, WORDS.index("fruit")] = 4
    clip = np.eye(D, dtype=np.float32) + np.float32(0.01)
    clip[0] = 0  # padding
    rng = np.random.default_rng(0)
    return {
        "plm": np.eye(H, dtype=np.float32) + rng.normal(0, 0.01, (H, H)).astype(np.float32),
        "clip": clip,
        "bank": bank,
        "adapter_v": to_color,
        "adapter_t": to_fruit,
        "head": rng.normal(0, 1, (H, 2)).astype(np.float32),
    }


def reference(
    inputs: Mapping[str, NDArray[Any]], experts: str, task: str, columns: list[int] | None
) -> Arrays:
    """Compute outputs and taps with numpy; taps under ``tap/0.v`` and ``tap/0.t``."""
    w, out = weights(), {}
    hidden = w["plm"][inputs["input_ids"]]  # (B, T, H)
    mask = inputs["attention_mask"][..., None].astype(np.float32)
    added = np.zeros_like(hidden)
    if experts != "none":
        text = w["clip"][inputs["clip_input_ids"]].sum(1)  # (B, D)
        text /= np.linalg.norm(text, axis=-1, keepdims=True)
        if "v" in experts:
            scores = text @ w["bank"].T
            rows = np.argsort(-scores, axis=-1, kind="stable")[:, :K]
            near = np.take_along_axis(scores, rows, axis=-1)
            read = (w["bank"][rows] * near[..., None]).sum(1) @ w["adapter_v"]
            out["tap/0.v"] = np.broadcast_to(read[:, None], hidden.shape)
            out["out/retrieved"], out["out/retrieved_scores"] = rows, near
            added = added + out["tap/0.v"]
        if "t" in experts:
            out["tap/0.t"] = np.broadcast_to((text @ w["adapter_t"])[:, None], hidden.shape)
            added = added + out["tap/0.t"]
    hidden = hidden + added
    pooled = (hidden * mask).sum(1) / mask.sum(1)
    if task == "fill-mask":
        at_masks = np.take_along_axis(hidden, inputs["mask_positions"][..., None], axis=1)
        logits = at_masks @ w["plm"].T
        out["out/logits"] = logits if columns is None else logits[..., columns]
    elif task == "text-classification":
        out["out/logits"] = pooled @ w["head"]
    else:
        out["out/last_hidden_state"] = hidden
        out["out/sentence_embedding"] = pooled / np.linalg.norm(pooled, axis=-1, keepdims=True)
    return {name: np.ascontiguousarray(value) for name, value in out.items()}


def _write_graph(folder: Path, stem: str, graph: onnx.ModelProto, *, to_openvino: bool) -> tuple[str, str]:
    """Write a graph and its weights, and return the paths of both inside the bundle."""
    if to_openvino:
        openvino = importlib.import_module("openvino")  # only the tests of that target need it
        file, data = f"openvino/{stem}.xml", f"openvino/{stem}.bin"
        source = io.BytesIO(graph.SerializeToString())
        openvino.save_model(openvino.convert_model(source), folder / file, compress_to_fp16=False)
        return file, data
    file, data = f"onnx/{stem}.onnx", f"onnx/{stem}.onnx_data"
    onnx.save_model(
        graph, str(folder / file), save_as_external_data=True, location=Path(data).name, size_threshold=64
    )
    return file, data


class _Tape:
    """Nodes and constants of a graph as it is written."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[str, NDArray[Any]] = {"one": np.array([1]), "two": np.array([2])}

    def node(self, op: str, inputs: str, outputs: str, **attributes: Any) -> None:
        self.nodes.append(helper.make_node(op, inputs.split(), outputs.split(), **attributes))


def _graph(experts: str, task: str, columns: list[int] | None, *, rounded: bool = False) -> onnx.ModelProto:
    w = weights()
    if rounded:
        w |= {name: np.round(w[name] * 64) / np.float32(64) for name in ("plm", "adapter_v", "adapter_t")}
    tape = _Tape()
    tape.constants["plm"] = w["plm"]
    tape.node("Gather", "plm input_ids", "embedded")
    tape.node("Shape", "embedded", "shape")
    hidden = _write_experts(tape, w, experts)
    _write_head(tape, w, hidden, task, columns)

    def value(spec: Spec) -> onnx.ValueInfoProto:
        kind = TensorProto.INT64 if spec["dtype"] == "int64" else TensorProto.FLOAT
        return helper.make_tensor_value_info(spec["name"], kind, spec["axes"])

    inputs, outputs = _io(experts, task, columns)
    graph = helper.make_graph(
        tape.nodes,
        "tiny",
        [value(spec) for spec in inputs],
        [value(spec) for spec in outputs],
        [numpy_helper.from_array(np.ascontiguousarray(a), name) for name, a in tape.constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def _write_experts(tape: _Tape, w: dict[str, NDArray[np.float32]], experts: str) -> str:
    """Write CLIP and the experts, and return the name of the hidden states after them."""
    node, hidden, names = tape.node, "embedded", []
    if experts != "none":
        tape.constants["clip"] = w["clip"]
        node("Gather", "clip clip_input_ids", "clip_states")
        node("ReduceSum", "clip_states one", "text_sum", keepdims=0)
        node("ReduceL2", "text_sum", "text_length", axes=[-1], keepdims=1)
        node("Div", "text_sum text_length", "text")
    if "v" in experts:
        rows = {"bank": w["bank"], "bank_t": w["bank"].T, "k": np.array([K])}
        tape.constants |= {**rows, "adapter_v": w["adapter_v"]}
        node("MatMul", "text bank_t", "scores")
        node("TopK", "scores k", "retrieved_scores retrieved")
        node("Gather", "bank retrieved", "pictures")
        node("Unsqueeze", "retrieved_scores two", "weights")
        node("Mul", "pictures weights", "weighted")
        node("ReduceSum", "weighted one", "seen", keepdims=0)
        node("MatMul", "seen adapter_v", "read_v")
        names.append("v")
    if "t" in experts:
        tape.constants["adapter_t"] = w["adapter_t"]
        node("MatMul", "text adapter_t", "read_t")
        names.append("t")
    for name in names:
        node("Unsqueeze", f"read_{name} one", f"wide_{name}")
        node("Expand", f"wide_{name} shape", f"x_adapter.0.{name}")
        node("Add", f"{hidden} x_adapter.0.{name}", f"hidden_{name}")
        hidden = f"hidden_{name}"
    return hidden


def _write_head(
    tape: _Tape, w: dict[str, NDArray[np.float32]], hidden: str, task: str, columns: list[int] | None
) -> None:
    """Write what the task answers with."""
    node = tape.node
    if task == "fill-mask":
        tape.constants["decoder"] = w["plm"].T if columns is None else w["plm"].T[:, columns]
        node("Unsqueeze", "mask_positions two", "where")
        node("GatherND", f"{hidden} where", "at_masks", batch_dims=1)
        node("MatMul", "at_masks decoder", "logits")
    else:
        node("Cast", "attention_mask", "mask", to=TensorProto.FLOAT)
        node("Unsqueeze", "mask two", "mask3")
        node("Mul", f"{hidden} mask3", "masked")
        node("ReduceSum", "masked one", "summed", keepdims=0)
        node("ReduceSum", "mask3 one", "length", keepdims=0)
        node("Div", "summed length", "pooled")
    if task == "text-classification":
        tape.constants["head"] = w["head"]
        node("MatMul", "pooled head", "logits")
    elif task == "feature-extraction":
        node("Identity", hidden, "last_hidden_state")
        node("ReduceL2", "pooled", "pooled_length", axes=[-1], keepdims=1)
        node("Div", "pooled pooled_length", "sentence_embedding")


def _io(experts: str, task: str, columns: list[int] | None) -> tuple[list[Spec], list[Spec]]:
    def spec(name: str, dtype: str, *axes: str | int) -> Spec:
        return {"name": name, "dtype": dtype, "axes": list(axes)}

    inputs = [spec("input_ids", "int64", "batch", "seq")]
    if task != "fill-mask":
        inputs.append(spec("attention_mask", "int64", "batch", "seq"))
    if experts != "none":
        inputs.append(spec("clip_input_ids", "int64", "batch", "clip_seq"))
    if task == "fill-mask":
        inputs.append(spec("mask_positions", "int64", "batch", "masks"))
    outputs = {
        "fill-mask": [spec("logits", "float32", "batch", "masks", H if columns is None else len(columns))],
        "text-classification": [spec("logits", "float32", "batch", 2)],
        "feature-extraction": [
            spec("last_hidden_state", "float32", "batch", "seq", H),
            spec("sentence_embedding", "float32", "batch", H),
        ],
    }[task]
    if "v" in experts:
        outputs += [spec("retrieved", "int64", "batch", K), spec("retrieved_scores", "float32", "batch", K)]
    return inputs, outputs


def write_bundle(
    folder: Path,
    *,
    task: str = "fill-mask",
    sets: tuple[str, ...] = SETS,
    candidates: tuple[str, ...] | None = None,
    variants: tuple[str, ...] = ("onnx-fp32",),
) -> Path:
    """Write a whole bundle, hashes included, and return its folder.

    Each set comes in each of ``variants``; those of a precision below fp32 hold weights rounded to 8 bits.
    """
    columns = None if candidates is None else [WORDS.index(word) for word in candidates]
    arrays = _write_companions(folder, task, sets, columns)
    manifest = {
        "format_version": 1,
        "created_with": {"onnx": onnx.__version__},
        "checkpoint": {"source": "tiny", "sha256": SHA},
        "task": task,
        "labels": ["sweet", "sour"] if task == "text-classification" else None,
        "candidates": candidates and [{"word": word, "token_id": WORDS.index(word)} for word in candidates],
        "opset": 17,
        "default_expert_set": sets[-1],
        "expert_sets": {experts: _set(experts, task, columns) for experts in sets},
        **PARTS,
        "variants": [
            _write_variant(folder, experts, task, columns, name, is_default=experts == sets[-1])
            for experts in sets
            for name in variants
        ],
        "files": {},
    }
    manifest["files"] = {path: entry.model_dump() for path, entry in list_files(folder).items()}
    parsed = Manifest.from_json(json.dumps(manifest))
    if any(variant.agreement for variant in parsed.variants):
        _record_lossy(folder, parsed, arrays)
        parsed = parsed.model_copy(update={"files": list_files(folder)})
    (folder / "manifest.json").write_text(parsed.to_json(), encoding="utf-8")
    return folder


def _write_companions(folder: Path, task: str, sets: tuple[str, ...], columns: list[int] | None) -> Arrays:
    """Write tokenizers, pictures and reference, and return the arrays of the reference."""
    from xadapter_export.runtime.text import TextEncoder, TowerTokens

    (folder / "onnx").mkdir(parents=True)
    plm_tokenizer().save(str(folder / "tokenizer.json"))
    clip_tokenizer().save(str(folder / "clip_tokenizer.json"))
    lines = [json.dumps({"id": key, "caption": caption}) for key, caption, _ in PICTURES]
    (folder / "bank.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    encoder = TextEncoder(
        plm_tokenizer(),
        TowerTokens(clip_tokenizer(), TowerRules(CONTEXT, 2)),
        max_seq=MAX_SEQ,
        mask_token="[MASK]",
        pad_token_id=0,
        has_token_type_ids=False,
    )
    arrays: Arrays = {}
    for case, (texts, _) in CASES.items():
        inputs = encoder.encode(texts)
        arrays |= {f"{case}/in/{name}": value for name, value in inputs.items()}
        for experts in sets:
            for key, value in reference(inputs, experts, task, columns).items():
                arrays[f"{case}/{experts}/{key}"] = value
    np.savez(folder / "reference.npz", **arrays)  # type: ignore[arg-type]  # keywords are arrays
    return arrays


def _set(experts: str, task: str, columns: list[int] | None) -> Spec:
    """Return what the manifest says of an expert set."""
    inputs, outputs = _io(experts, task, columns)
    taps = [e for e in "vt" if e in experts]
    return {
        "inputs": inputs,
        "outputs": outputs,
        "taps": [{"name": f"x_adapter.0.{e}", "layer": 0, "expert": e} for e in taps],
        "component_parameters": {"plm": H * H, "head": 0} | {f"adapter_{e}": D * H for e in taps},
    }


def _write_variant(
    folder: Path, experts: str, task: str, columns: list[int] | None, name: str, *, is_default: bool
) -> Spec:
    """Write a variant of an expert set, and return what the manifest says of it."""
    target, precision = name.split("-")
    stem = "model" if is_default else f"model_{experts}"
    stem += "" if name == "onnx-fp32" else f"_{target}_{precision}"
    lossy = precision != "fp32"
    graph = _graph(experts, task, columns, rounded=lossy)
    file, data = _write_graph(folder, stem, graph, to_openvino=target == "openvino")
    spec = _set(experts, task, columns)
    num_arrays = len(spec["outputs"]) + (0 if target == "openvino" else len(spec["taps"]))
    return {
        "expert_set": experts,
        "precision": precision,
        "target": target,
        "file": file,
        "weight_files": [data],
        "size_bytes": sum((folder / path).stat().st_size for path in (file, data)),
        "optimizations": [STEP] if target == "cpu" else [],
        "parity": None if lossy else PROOF | {"num_cells": len(CASES) * num_arrays},
        "agreement": AGREEMENT if lossy else None,
    }


def _record_lossy(folder: Path, manifest: Manifest, arrays: Arrays) -> None:
    """Add to the reference what the lossy variants say."""
    from xadapter_export.bundle.folder import Bundle
    from xadapter_export.parity.recorded import noise, record
    from xadapter_export.sessions.open import open_variant

    said: Arrays = {}
    for variant in [variant for variant in manifest.variants if variant.agreement]:
        session = open_variant(Bundle(folder, manifest), variant)
        said |= record(session, variant, manifest.expert_sets[variant.expert_set], arrays)
    np.savez(folder / "reference.npz", **arrays | said | noise(said, arrays))  # type: ignore[arg-type]  # as above


def rewrite_manifest(folder: Path, **changes: object) -> None:
    """Replace top-level keys of a manifest without any check."""
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | changes), encoding="utf-8")


def rehash(folder: Path) -> None:
    """Record the files as they are now, so that only their content can be wrong."""
    rewrite_manifest(folder, files={path: entry.model_dump() for path, entry in list_files(folder).items()})
