"""Merges the frozen PLM, the active experts, the bank and the CLIP text tower into the module that is traced.

Only what the expert set and the task need is in it, so nothing of an inactive expert can reach the graph, and
each thing is computed only where it is read. The steps that can be left out are ``request.STEPS``.

Dimensions: B batch, T PLM tokens, S CLIP tokens, P masks per text, H hidden size, V vocabulary, C candidates,
R adapter width, K retrieved pictures, N bank size, D CLIP embedding size.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Literal, NamedTuple, cast

import torch
from torch import Tensor, nn

from xadapter_export.bundle.manifest import Expert, ExpertSet, Task
from xadapter_export.experts import V, keep_name, length_names, reads_bank, reads_text
from xadapter_export.exporters.request import Retrieval, Step
from xadapter_export.model.explanation import Lengths, Reading, is_on, measure_lengths
from xadapter_export.model.export_layers import PackedLayer, additive_mask
from xadapter_export.model.pooling import take_positions, unit_length
from xadapter_export.model.tasks import States, task_head
from xadapter_export.model.text_tower import TextTower
from xadapter_export.model.x_adapter import Projected, XAdapterLayer
from xadapter_export.model.x_adapter_model import XAdapterModel
from xadapter_export.tasks import TASKS

Part = Literal["whole", "query", "answer"]


def tap_name(layer: int, expert: Expert) -> str:
    """Name, in the graph, of what an expert adds before a PLM layer."""
    return f"x_adapter.{layer}.{expert}"


class _Memory(NamedTuple):
    """What an expert attends to: items, ``(B or 1, M, C)`` or None where they are folded, and how many.

    The mask is as in ``Projected``; ``keep``, ``(B, M) int64``, is None where nothing can be left out.
    """

    items: Tensor | None
    mask: Tensor | None
    keep: Tensor | None
    num_items: int


class MergedModel(nn.Module):
    """One expert set of a checkpoint, ready to be traced.

    Args:
        model: The checkpoint; its parameters are shared, not copied.
        expert_set: Experts that are switched on.
        task: What the graph answers.
        candidate_ids: Token ids that the MLM head is sliced to, or None for the whole vocabulary.
        without: Steps to leave out.
        part: What a text asks CLIP and the bank, the answer that is given with it, or both in one graph.
        retrieval: Whether the bank is searched in the graph.
        explains: Whether it also takes which memory items to keep, and gives how far each carries the
            contributions.
    """

    def __init__(
        self,
        model: XAdapterModel,
        expert_set: ExpertSet,
        task: Task,
        candidate_ids: Sequence[int] | None = None,
        without: Collection[Step] = (),
        part: Part = "whole",
        retrieval: Retrieval = "in-graph",
        explains: bool = False,
    ) -> None:
        super().__init__()
        self._made_with, self._without = (expert_set, task, candidate_ids), frozenset(without)
        self.task = TASKS[task]
        self.part = part
        self.active = model.active_experts(expert_set)
        self.retrieves = reads_bank(self.active) and model.config.retrieval.mode == "topk"
        self.k = model.config.retrieval.k
        self.searches = self.retrieves and part != "answer" and retrieval == "in-graph"
        reads_clip = self.retrieves or reads_text(self.active)
        self.answers = part != "query"
        self.explained = self.active if explains and self.answers else ()
        self.num_bank_items = model.num_bank_items if reads_bank(self.active) else 0
        self.width_v = model.bank_features.shape[1] if reads_bank(self.active) else 0
        self.width_t = model.clip.width if model.clip is not None else 0
        if self.answers:
            self._add_answer(model, candidate_ids, without)
        clip = model.clip if reads_clip and part != "answer" else None
        packed = "packed_projections" not in without
        self.clip_layers = nn.ModuleList(
            [clip.export_layer(index, packed=packed) for index in range(len(clip.layers))] if clip else ()
        )
        self.clip = clip
        self.clip_at_end = clip is not None and clip.pools_one_token and not reads_text(self.active)
        self.clip_at_end &= "clip_last_block_at_end" not in without
        if self.searches:
            self.register_buffer(
                "bank", model.bank_features
            )  # (N, D); rows have length 1, so a product is a cosine

    def leaving_out(self, model: XAdapterModel, step: Step) -> "MergedModel":
        """Return the same part of the same checkpoint, made with one more step left out."""
        return MergedModel(model, *self._made_with, self._without | {step}, self.part).eval()

    def _add_answer(
        self, model: XAdapterModel, candidate_ids: Sequence[int] | None, without: Collection[Step]
    ) -> None:
        """Takes PLM, experts and head, and a static bank."""
        self.plm = model.plm
        packed = "packed_projections" not in without
        last = len(model.plm.layers) - 1
        self.reads_positions = self.task.reads != "all"  # but masks, or the first token
        self.last_at_positions = self.reads_positions and "last_layer_at_positions" not in without
        self.plm_layers = nn.ModuleList(
            model.plm.export_layer(i, packed=packed, at_positions=self.last_at_positions and i == last)
            for i in range(last + 1)
        )
        self.adapters = nn.ModuleDict(
            {
                layer: nn.ModuleDict({expert: cast(nn.ModuleDict, experts)[expert] for expert in self.active})
                for layer, experts in model.adapters.items()
                if self.active
            }
        )
        if reads_bank(self.active) and not self.retrieves:
            if "folded_bank" not in without:
                self._fold_bank(model.bank_features)
            else:
                self.register_buffer("bank", model.bank_features)
        self.task_head = task_head(self.task)
        self.head = model.head if self.task.name == model.config.task else None
        self.candidate_decoder = self._slice_decoder(candidate_ids) if candidate_ids is not None else None

    def _fold_bank(self, bank: Tensor) -> None:
        """Replaces a static bank by its keys and values ``(1, N, R)``: they depend on nothing else.

        With top-k retrieval the bank is searched and must stay, and projecting K rows costs less than keeping
        2 R numbers per picture and layer; so it is folded in static mode only.
        """
        for layer in self.adapters:
            keys, values = self.adapter(layer, V.name).fold(bank)
            self.register_buffer(f"bank_keys_{layer}", keys)
            self.register_buffer(f"bank_values_{layer}", values)

    def adapter(self, layer: int | str, expert: Expert) -> XAdapterLayer:
        """The layer of an expert before a PLM layer."""
        return cast(XAdapterLayer, cast(nn.ModuleDict, self.adapters[str(layer)])[expert])

    def _slice_decoder(self, candidate_ids: Sequence[int]) -> nn.Linear:
        decoder = self.plm.decoder
        sliced = nn.Linear(decoder.in_features, len(candidate_ids), bias=decoder.bias is not None)
        rows = torch.tensor(list(candidate_ids))
        with torch.no_grad():
            sliced.weight.copy_(decoder.weight[rows])
            if decoder.bias is not None:
                sliced.bias.copy_(decoder.bias[rows])
        return sliced.requires_grad_(False)

    @property
    def folds_bank(self) -> bool:
        """Whether a static bank is in the graph as keys and values."""
        return any(name.startswith("bank_keys_") for name, _ in self.named_buffers())

    @property
    def projection_counts(self) -> tuple[int, int]:
        """How many packed attentions there are, and how many products give their queries, keys and values."""
        attentions = [layer.attention for layer in self._layers if isinstance(layer, PackedLayer)]
        return len(attentions), sum(len(attention.projections) for attention in attentions)

    @property
    def text_adapters(self) -> list[XAdapterLayer]:
        """Layers of experts that read what belongs to a text, and no static bank, which the batch shares."""
        own = [tap for tap in self.taps if reads_text([tap[1]]) or self.retrieves]
        return [self.adapter(*tap) for tap in own]

    @property
    def has_other_layers(self) -> bool:
        """Whether a layer is written in a way of its own, so that nobody knows what of it can be fused."""
        packed = all(isinstance(layer, PackedLayer) for layer in self._layers)
        return not (packed and all(adapter.is_fused for adapter in self.text_adapters))

    @property
    def _layers(self) -> list[nn.Module]:
        return [*(self.plm_layers if self.answers else ()), *self.clip_layers]

    @property
    def input_names(self) -> list[str]:
        """Names of the graph inputs, in the order of ``forward``'s arguments."""
        if self.part == "query":
            return ["clip_input_ids"]
        names = ["input_ids", "attention_mask"]
        names += ["token_type_ids"] if self.plm.has_token_type_ids else []
        names += ["clip_input_ids"] if self.clip is not None else []
        names += ["mask_positions"] if self.task.reads_masks else []
        names += [] if self.part == "whole" else self._memory_names
        return [*names, *map(keep_name, self.explained)]

    @property
    def input_axes(self) -> dict[str, tuple[str | int, ...]]:
        """Axes of every input, named where they vary."""
        axes: dict[str, tuple[str | int, ...]] = {
            "clip_input_ids": ("batch", "clip_seq"),
            "mask_positions": ("batch", "masks"),
            "memory_v": ("batch", self.k, self.width_v),
            "memory_t": ("batch", "clip_seq", self.width_t),
            "memory_t_mask": ("batch", "clip_seq"),
        }
        for expert in self.explained:
            axes[keep_name(expert)] = ("batch", self.num_bank_items if reads_bank([expert]) else "clip_seq")
        return {name: axes.get(name, ("batch", "seq")) for name in self.input_names}

    @property
    def _memory_names(self) -> list[str]:
        """What the answer graph of a split set is given of pictures and text."""
        names = ["memory_v"] if self.retrieves else []
        return names + (["memory_t", "memory_t_mask"] if reads_text(self.active) else [])

    @property
    def output_names(self) -> list[str]:
        """Names of the graph outputs, without the taps."""
        found = ["retrieved", "retrieved_scores"] if self.searches else []
        if self.part == "query":
            outside = ["query"] if self.retrieves and not self.searches else []
            memory = [name for name in self._memory_names if name != "memory_v" or self.searches]
            return [*outside, *memory, *found]
        lengths = [name for expert in self.explained for name in length_names(expert)]
        return [*(output.name for output in self.task.outputs), *found, *lengths]

    @property
    def taps(self) -> list[tuple[int, Expert]]:
        """Layer and expert of every contribution, in the order in which ``forward`` returns them."""
        if not self.answers:
            return []
        return [(int(layer), expert) for layer in self.adapters for expert in self.active]

    def forward(self, inputs: dict[str, Tensor]) -> tuple[Tensor, ...]:
        """Answers, what was retrieved, and the contributions.

        Args:
            inputs: ``input_ids``, ``attention_mask``, ``token_type_ids`` ``(B, T)``, ``clip_input_ids``
                ``(B, S)``, ``mask_positions`` ``(B, P)``, all int64; of a set that is split ``memory_v``
                ``(B, K, D) float32``, ``memory_t`` ``(B, S, W) float32`` and ``memory_t_mask`` ``(B, S)
                int64``; with explanations ``keep_v`` ``(B, K or N)`` and ``keep_t`` ``(B, S)``, int64; those
                of ``input_names``.

        Returns:
            Tensors of ``output_names``, among them for each explained expert ``(B, P, layers, M) float32``
            and ``(B, P, layers, 2) float32`` as ``explanation.Lengths`` has them; then ``(B, T, H) float32``
            for each of ``taps``.
        """
        if self.part == "query":
            named = self._ask(inputs["clip_input_ids"])
            return tuple(named[name] for name in self.output_names)
        mask = additive_mask(inputs["attention_mask"])
        asked = self._ask(inputs["clip_input_ids"]) if self.clip is not None else inputs
        memory = {expert: self._memory(expert, asked, inputs) for expert in self.active}
        hidden = self.plm.embed(inputs["input_ids"], inputs.get("token_type_ids"))
        context = self.plm.prepare(hidden, inputs["attention_mask"])
        positions = inputs.get("mask_positions", torch.zeros_like(inputs["input_ids"][:, :1]))
        reading = Reading(inputs["attention_mask"], mask, positions if self.reads_positions else None)
        contributions: list[Tensor] = []
        lengths: list[Tensor] = []
        for index, layer in enumerate(self.plm_layers):
            if str(index) in self.adapters:
                made = [self._contribution(index, e, hidden, memory[e], reading) for e in self.active]
                added = [contribution for contribution, _ in made]
                lengths += [number for _, measured in made for number in measured]
                contributions += added
                hidden = sum(added, start=hidden)
            at = positions if self.last_at_positions and index == len(self.plm_layers) - 1 else None
            hidden = layer(hidden, context, at)
        hidden = self.plm.finish(hidden)
        if self.reads_positions and not self.last_at_positions:
            hidden = take_positions(hidden, positions)
        answers = self.task_head.answer(States(hidden, inputs["attention_mask"], self._mlm_logits, self.head))
        found = [asked[name] for name in ("retrieved", "retrieved_scores") if self.searches]
        each = 2 * len(self.explained)  # numbers of a layer
        stacked = [torch.stack(lengths[number::each], 2) for number in range(each)]  # (B, P, layers, ...)
        return (*answers, *found, *stacked, *contributions)

    def _memory(self, expert: Expert, asked: Mapping[str, Tensor], inputs: Mapping[str, Tensor]) -> "_Memory":
        """What an expert attends to, of what CLIP and the bank say of the text, and of what is kept of it."""
        keep = inputs[keep_name(expert)] if expert in self.explained else None
        if reads_bank([expert]):
            mask = None if keep is None else additive_mask(keep)
            if self.folds_bank:
                return _Memory(None, mask, keep, self.num_bank_items)
            bank = asked["memory_v"] if self.retrieves else cast(Tensor, self.bank)[None]
            bank = bank if keep is None else bank.expand(keep.shape[0], -1, -1)
            return _Memory(bank, mask, keep, self.num_bank_items)
        states, real = asked["memory_t"], asked["memory_t_mask"]
        mask = additive_mask(real if keep is None else real * keep)
        return _Memory(states, mask, keep, states.shape[1])

    def _ask(self, clip_input_ids: Tensor) -> dict[str, Tensor]:
        """What CLIP says of the text, and what is found in the bank, by the names of the graph's values."""
        clip = cast(TextTower, self.clip)
        asked: dict[str, Tensor] = {}
        states, context = clip.embed(clip_input_ids), clip.prepare(clip_input_ids)
        for number, layer in enumerate(self.clip_layers, 1):
            ends = self.clip_at_end and number == len(self.clip_layers)
            states = layer(states, context, clip.end_position(clip_input_ids)[:, None] if ends else None)
        states = clip.finish(states)  # (B, S or 1, W)
        if self.retrieves:
            at_end = self.clip_at_end
            feature = clip.project(states.squeeze(1)) if at_end else clip.pool(states, clip_input_ids)
            asked["query"] = unit_length(feature)  # (B, D)
        if self.searches:
            bank = cast(Tensor, self.bank)
            scores, rows = (asked["query"] @ bank.T).topk(self.k)  # (B, K)
            asked |= {"memory_v": bank[rows], "retrieved": rows, "retrieved_scores": scores}
        if reads_text(self.active):
            asked["memory_t"] = states
            mask = clip.token_mask(clip_input_ids)
            asked["memory_t_mask"] = mask if self.part == "whole" else mask.to(torch.int64)
        return asked

    def _contribution(
        self, layer: int, expert: Expert, hidden: Tensor, memory: "_Memory", reading: Reading
    ) -> tuple[Tensor, Lengths | tuple[()]]:
        """What an expert adds before a PLM layer, and how far its parts carry it, where that is asked for."""
        adapter = self.adapter(layer, expert)
        if memory.items is not None:
            projected = adapter.project_memory(memory.items, memory.mask)
        else:
            projected = Projected(*(self.get_buffer(f"bank_{part}_{layer}") for part in ("keys", "values")))
            mask, beside = memory.mask, projected.keys.shape[1] - memory.num_items
            if mask is not None and beside:  # rows beside the memory are always there
                mask = torch.cat([mask, torch.zeros_like(mask[..., :1]).expand(-1, -1, -1, beside)], -1)
            projected = projected._replace(mask=mask)
        added = adapter.attend_in_graph(hidden, projected, reading.token_mask)
        if memory.keep is None:
            return added, ()
        added = added * is_on(memory.keep)
        return added, measure_lengths(adapter, hidden, projected, added, memory.num_items, reading)

    def _mlm_logits(self, hidden: Tensor) -> Tensor:
        if self.candidate_decoder is None:
            return self.plm.mlm_logits(hidden)
        return self.candidate_decoder(self.plm.mlm_transform(hidden))  # type: ignore[no-any-return]  # nn.Module call
