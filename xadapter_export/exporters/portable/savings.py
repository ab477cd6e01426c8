"""What the exact steps of the merge save: multiply-adds, counted by running the merged module on shapes.

Counted for one text of 32 tokens with one mask and 32 CLIP tokens, or of as many as PLM and CLIP can or must
read.
"""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from xadapter_export.bundle.manifest import Optimization
from xadapter_export.exporters.portable.merge import MergedModel
from xadapter_export.model.x_adapter_model import XAdapterModel

_NUM_TOKENS = 32


def count_savings(model: XAdapterModel, merged: MergedModel) -> list[Optimization]:
    """What each step of the merge saved, those that saved nothing left out.

    Args:
        model: The checkpoint.
        merged: What was made of it, whole.
    """
    with FakeTensorMode(allow_non_fake_inputs=True):  # no number is computed, no weight copied
        example = _example(model)
        after = _multiply_adds(merged, example)
        found: list[tuple[str, int, int]] = []

        if merged.last_at_positions:
            unread = merged.leaving_out(model, "last_layer_at_positions")
            before = _multiply_adds(unread, example)
            found.append(("last_layer_at_positions", before, after))
            if "mask_positions" in merged.input_names:
                everywhere = {**example, "mask_positions": torch.arange(example["input_ids"].shape[1])[None]}
                found.append(("head_at_positions", _multiply_adds(unread, everywhere), before))
        if merged.clip is not None:
            if merged.clip.exact_at_true_length:
                padded = {**example, "clip_input_ids": _clip_ids(model, merged.clip.context_length)}
                found.append(("clip_at_true_length", _multiply_adds(merged, padded), after))
            if merged.clip_at_end:
                whole = merged.leaving_out(model, "clip_last_block_at_end")
                found.append(("clip_last_block_at_end", _multiply_adds(whole, example), after))
        if merged.folds_bank:
            unfolded = merged.leaving_out(model, "folded_bank")
            found.append(("folded_bank", _multiply_adds(unfolded, example), after))
        saved = [
            Optimization(name=name, lossless=True, unit="multiply-adds", before=before, after=less)
            for name, before, less in found
            if less < before
        ]
        num_attentions, num_products = merged.projection_counts
        if num_products < 3 * num_attentions:
            counts = {"before": 3 * num_attentions, "after": num_products}
            saved.append(Optimization(name="packed_projections", lossless=True, unit="products", **counts))
        return saved


def _multiply_adds(merged: MergedModel, example: Mapping[str, Tensor]) -> int:
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        merged({name: example[name] for name in merged.input_names})
    return int(counter.get_total_flops()) // 2


def _example(model: XAdapterModel) -> dict[str, Tensor]:
    ids = torch.arange(min(_NUM_TOKENS, model.plm.max_seq))[None] % model.plm.vocab_size
    example = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "token_type_ids": torch.zeros_like(ids),
        "mask_positions": torch.tensor([[1]]),
    }
    if model.clip is not None:
        usual = _NUM_TOKENS if model.clip.exact_at_true_length else model.clip.context_length
        example["clip_input_ids"] = _clip_ids(model, min(usual, model.clip.context_length))
    return example


def _clip_ids(model: XAdapterModel, length: int) -> Tensor:
    assert model.clip is not None  # callers have looked
    ids = torch.ones(1, length, dtype=torch.int64)
    ids[:, -1] = model.clip.end_token_id
    return ids
