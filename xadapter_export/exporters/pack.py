"""Writes what a bundle has besides its graphs: tokenizers, rows, manifest."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import onnx_ir as ir
import onnxruntime as ort

from xadapter_export.bank.graph_rows import Projections
from xadapter_export.bundle.folder import BANK_NAME, CLIP_TOKENIZER_NAME, FEATURES_NAME, TOKENIZER_NAME
from xadapter_export.bundle.manifest import (
    BankSpec,
    CheckpointIdentity,
    ClipSpec,
    Component,
    ExpertSet,
    ExpertSetSpec,
    GraphSpec,
    Manifest,
    PlmSpec,
    SplitSpec,
    TapSpec,
    TensorSpec,
    Variant,
)
from xadapter_export.experts import V
from xadapter_export.exporters.plan import Plan
from xadapter_export.exporters.portable.check import component_parameters
from xadapter_export.exporters.portable.merge import MergedModel, Part, tap_name
from xadapter_export.layers import LAYERS
from xadapter_export.model.checkpoint import write_tokenizer_config
from xadapter_export.model.identity import public_name, weights_sha256
from xadapter_export.model.x_adapter_model import XAdapterModel
from xadapter_export.registry import installed_version
from xadapter_export.tasks import TASKS


def expert_set_spec(
    graphs: Mapping[Part, ir.Model], parts: Mapping[Part, MergedModel], input_names: Sequence[str]
) -> ExpertSetSpec:
    """Describes the contract of a set from its graph, or from both where it is split.

    Args:
        graphs: The graphs.
        parts: What they were traced from.
        input_names: Inputs of the whole, in order.
    """
    of_part = {part: _graph_spec(graph) for part, graph in graphs.items()}
    inputs = {tensor.name: tensor for spec in of_part.values() for tensor in spec.inputs}
    outputs = {tensor.name: tensor for tensor in (of_part.get("whole") or of_part["answer"]).outputs}
    split = None
    if "query" in of_part:
        split = SplitSpec(query=of_part["query"], answer=of_part["answer"])
        retrieves, k = parts["answer"].retrieves, parts["answer"].k
        for name, dtype in (("retrieved", "int64"), ("retrieved_scores", "float32")) if retrieves else ():
            outputs[name] = TensorSpec.model_validate({"name": name, "dtype": dtype, "axes": ("batch", k)})
    counts: Counter[Component] = Counter()
    for part, graph in graphs.items():
        counts.update(component_parameters(graph, parts[part]))
    return ExpertSetSpec(
        inputs=tuple(inputs[name] for name in input_names),
        outputs=tuple(outputs.values()),
        taps=tuple(
            TapSpec(name=tap_name(layer, expert), layer=layer, expert=expert)
            for merged in parts.values()
            for layer, expert in merged.taps
        ),
        component_parameters=dict(counts),
        split=split,
    )


def _graph_spec(graph: ir.Model) -> GraphSpec:
    return GraphSpec(
        inputs=tuple(_tensor_spec(value) for value in graph.graph.inputs),
        outputs=tuple(_tensor_spec(value) for value in graph.graph.outputs),
    )


def _tensor_spec(value: ir.Value) -> TensorSpec:
    dtype = {ir.DataType.INT64: "int64", ir.DataType.FLOAT: "float32"}[value.dtype or ir.DataType.UNDEFINED]
    axes = tuple(dim if isinstance(dim, int) else str(dim.value) for dim in value.shape or ())
    return TensorSpec.model_validate({"name": str(value.name), "dtype": dtype, "axes": axes})


def write_projections(model: XAdapterModel, folder: Path, merged: MergedModel) -> None:
    """Writes what another static bank is folded with; nothing where its keys were learned for this one."""
    kind = LAYERS[model.config.layer]
    if merged.folds_bank and not kind.learns_rows:
        states = {layer: merged.adapter(layer, V.name).state_dict() for layer in merged.adapters}
        projections = {
            layer: {name: state[name].numpy() for name in kind.fold_reads} for layer, state in states.items()
        }
        Projections(kind, projections).save(folder)


def write_companions(model: XAdapterModel, folder: Path, *, with_clip: bool, with_rows: bool) -> None:
    """Writes what the runtime needs beside the graphs: PLM configuration, tokenizers, captions."""
    config = model.plm.model.config.to_dict()
    config.pop("_name_or_path", None)
    if labels := model.config.labels:
        config |= {
            "id2label": dict(enumerate(labels)),
            "label2id": {label: i for i, label in enumerate(labels)},
        }
    # What transformers.js needs to know to load onnx/model.onnx by the name of the bundle.
    config["transformers.js_config"] = {"dtype": "fp32", "use_external_data_format": True}
    (folder / "config.json").write_text(json.dumps(config, indent=2, default=str) + "\n", encoding="utf-8")
    model.plm.tokenizer.save(str(folder / TOKENIZER_NAME), pretty=False)
    write_tokenizer_config(model, folder)
    if with_clip and model.clip is not None:
        model.clip.tokenizer.save(str(folder / CLIP_TOKENIZER_NAME), pretty=False)
    if with_rows and model.bank is not None:
        model.bank.save_rows(folder / BANK_NAME)


def bank_spec(
    model: XAdapterModel, specs: Mapping[ExpertSet, ExpertSetSpec], clip_sha256: str | None = None
) -> BankSpec | None:
    """Describes the bank, and the CLIP that searches it; None where no set reads one."""
    bank, retrieval = model.bank, model.config.retrieval
    outside = any(spec.searches_outside for spec in specs.values())
    if bank is None or not (outside or any("bank" in spec.component_parameters for spec in specs.values())):
        return None
    num_pictures, dim = bank.features.shape
    if retrieval.mode == "static":
        clip_sha256 = None if bank.clip is None else bank.clip.sha256
    return BankSpec(
        num_pictures=num_pictures,
        dim=dim,
        sha256=bank.sha256,
        retrieval=retrieval.mode,
        k=retrieval.k if retrieval.mode == "topk" else num_pictures,
        features=FEATURES_NAME if outside else None,
        clip_sha256=clip_sha256,
    )


def make_manifest(
    model: XAdapterModel,
    source: str,
    plan: Plan,
    opset: int,
    specs: Mapping[ExpertSet, ExpertSetSpec],
    variants: tuple[Variant, ...],
) -> Manifest:
    """Describes the bundle, its files not yet listed."""
    plm, clip, _ = model.frozen_parts()
    special, tokenizer, tower = model.plm.special, model.plm.tokenizer, model.clip
    mask_id = special.get("mask")
    uses_clip = any("clip" in spec.component_parameters for spec in specs.values())
    clip_spec = None
    if uses_clip and tower is not None and clip is not None:
        clip_spec = ClipSpec(
            source=public_name(clip.source),
            sha256=clip.sha256,
            context_length=tower.context_length,
            end_token_id=tower.end_token_id,
            pad_token_id=tower.pad_token_id,
            exact_at_true_length=tower.exact_at_true_length,
            embed_dim=tower.feature_dim,
            text_width=tower.width,
        )
    packages = ("xadapter-export", "torch", "transformers", "onnx", "onnxscript", "tokenizers", "numpy")
    return Manifest(
        format_version=1,
        # onnxruntime comes as onnxruntime-gpu, -directml and others too, so it is asked itself
        created_with={package: installed_version(package) or "unknown" for package in packages}
        | {"onnxruntime": ort.__version__},
        checkpoint=CheckpointIdentity(
            source=public_name(source),
            sha256=weights_sha256(model.trained_state(), model.config.model_dump(mode="json")),
            layer=model.config.layer,
            null_rows=model.config.null_rows,
        ),
        task=plan.task,
        labels=model.config.labels if TASKS[plan.task].has_labels else None,
        candidates=plan.candidates,
        opset=opset,
        default_expert_set=variants[0].expert_set,
        expert_sets=dict(specs),
        plm=PlmSpec(
            family=plm.family,
            source=public_name(plm.source),
            sha256=plm.sha256,
            hidden_size=model.plm.hidden_size,
            vocab_size=model.plm.vocab_size,
            max_seq=plan.max_seq,
            mask_token=None if mask_id is None else tokenizer.id_to_token(mask_id),
            mask_token_id=mask_id,
            pad_token_id=special["pad"],
            has_token_type_ids=model.plm.has_token_type_ids,
        ),
        clip=clip_spec,
        bank=bank_spec(model, specs, None if clip is None else clip.sha256),
        variants=variants,
        files={},
    )
