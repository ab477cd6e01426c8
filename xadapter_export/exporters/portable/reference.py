"""What PyTorch says: inputs of every kind, and the trained model's own outputs for them.

The reference comes from ``XAdapterModel``, not from the merged module that is traced, so an error of the
merge fails the proof like one of the trace.
"""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from xadapter_export.bundle.manifest import ExpertSet
from xadapter_export.experts import experts_of, keep_name, length_names, reads_bank
from xadapter_export.exporters.portable.merge import MergedModel
from xadapter_export.model.explanation import Reading, measure_lengths
from xadapter_export.model.export_layers import additive_mask
from xadapter_export.model.x_adapter_model import XAdapterModel, XAdapterOutput
from xadapter_export.runtime.text import TextEncoder, TruncationWarning
from xadapter_export.sessions.session import Array

_FILLER = "on a warm day the children saw one small animal near two old trees and a river"


def reference_inputs(encoder: TextEncoder, *, with_masks: bool) -> dict[str, dict[str, Array]]:
    """Makes the inputs of every case: shortest, longest and typical, single, unpadded and padded batches.

    Returns:
        Arrays by input name, by case; see docs/design.md for the cases.
    """
    mask = (encoder.mask_token if with_masks else None) or "thing"
    typical = f"The color of a banana is {mask}."
    swapped = f"The color of a {mask} is banana."  # the same tokens, so that nothing is padded
    words = _FILLER.split()
    longest = " ".join([mask, *(words * (encoder.max_seq // len(words) + 1))])
    two_masks = f"A {mask} {mask} grows in the garden in summer, and children like to eat its sweet fruit."
    cases = {
        "single_shortest": [mask],
        "single_typical": [typical],
        "single_longest": [longest],
        "batch_unpadded": [typical, swapped],
        "batch_padded": [mask, two_masks, typical],
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TruncationWarning)  # the longest text is cut on purpose
        return {case: dict(encoder.encode(texts, require_mask=with_masks)) for case, texts in cases.items()}


def leave_some_out(model: XAdapterModel, cases: Mapping[str, dict[str, Array]]) -> None:
    """Adds to every case which memory items are kept.

    A single text keeps all. In a batch each text lacks another item; the last text of a padded one lacks all.
    """
    for case, inputs in cases.items():
        batch = len(inputs["input_ids"])
        for expert in experts_of(model.config.experts):
            size = model.num_bank_items if reads_bank([expert]) else inputs["clip_input_ids"].shape[1]
            keep = np.ones((batch, size), np.int64)
            if batch > 1:
                keep[np.arange(batch), np.arange(batch) % size] = 0
            if case == "batch_padded":
                keep[-1] = 0
            inputs[keep_name(expert)] = keep


def reference_outputs(
    model: XAdapterModel,
    merged: MergedModel,
    expert_set: ExpertSet,
    candidate_ids: Sequence[int] | None,
    cases: Mapping[str, Mapping[str, Array]],
) -> dict[str, Array]:
    """Runs the trained model on every case.

    Returns:
        Arrays by their keys in ``reference.npz``, ``{case}/{set}/out/{output}`` and
        ``{case}/{set}/tap/{layer}.{expert}``.
    """
    arrays: dict[str, Array] = {}
    for case, inputs in cases.items():
        tensors = {
            name: torch.from_numpy(np.asarray(array))
            for name, array in inputs.items()
            if name in merged.input_names
        }
        keep = {expert: tensors.pop(keep_name(expert)) for expert in merged.explained}
        with torch.no_grad():
            memory = replace(model.memory(tensors.get("clip_input_ids"), expert_set), keep=keep)
            output = model(**tensors, experts=expert_set, memory=memory)
        answers = output.answers
        if merged.task.name != model.config.task:
            answers = model.answers(merged.task, output.last_hidden_state, tensors["attention_mask"])
        values: dict[str, Tensor | None] = {**answers}
        values |= _lengths(model, output, merged, tensors)
        values |= {"retrieved": output.memory.retrieved, "retrieved_scores": output.memory.retrieved_scores}
        if candidate_ids is not None:
            words = [answer.name for answer in merged.task.outputs if answer.axes[-1] == "words"]
            values |= {name: answers[name][..., list(candidate_ids)] for name in words}
        for name in merged.output_names:
            arrays[f"{case}/{expert_set}/out/{name}"] = _array(values[name])
        for layer, expert in merged.taps:
            arrays[f"{case}/{expert_set}/tap/{layer}.{expert}"] = _array(output.contributions[layer, expert])
    return arrays


@torch.no_grad()
def _lengths(
    model: XAdapterModel, output: XAdapterOutput, merged: MergedModel, tensors: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """How far items, and the rest, carry each contribution, by the names of the graph's outputs."""
    mask, positions = tensors["attention_mask"], tensors.get("mask_positions")
    if merged.task.reads == "first":
        positions = torch.zeros_like(mask[:, :1])
    reading = Reading(mask, additive_mask(mask), positions if merged.reads_positions else None)
    found: dict[str, Tensor] = {}
    for expert in merged.explained:
        items, items_mask = output.memory.of(expert)
        assert items is not None  # it is active
        measured = []
        for layer in [layer for layer, of in output.contributions if of == expert]:
            adapter, entering = model.adapter(layer, expert), output.entering[layer]
            projected = adapter.project_memory(items, items_mask)
            contribution = output.contributions[layer, expert]
            measured.append(
                measure_lengths(adapter, entering, projected, contribution, items.shape[1], reading)
            )
        stacked = (torch.stack(numbers, 2) for numbers in zip(*measured, strict=True))
        found |= dict(zip(length_names(expert), stacked, strict=True))
    return found


def _array(tensor: Tensor | None) -> Array:
    assert tensor is not None  # output_names names only what the task computes
    return tensor.numpy()
