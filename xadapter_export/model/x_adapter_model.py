"""A frozen PLM that reads a frozen CLIP through a trained plug-in.

Dimensions: B batch, T PLM tokens, S CLIP tokens, H hidden size, V vocabulary, K retrieved pictures, N bank
size, D CLIP embedding size, W CLIP text width, P masks per text, L labels.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Self, Unpack, cast

import torch
from torch import Tensor, nn

from xadapter_export.bank import FeatureBank
from xadapter_export.bundle.hub import PushOptions
from xadapter_export.bundle.manifest import Expert, ExpertSet
from xadapter_export.errors import CheckpointError, ConfigError
from xadapter_export.experts import KINDS, NONE, Read, experts_of, reads_bank, reads_text
from xadapter_export.layers import LAYERS, TOKEN_QUERY
from xadapter_export.model.config import BankPart, FrozenPart, XAdapterConfig
from xadapter_export.model.explanation import is_on
from xadapter_export.model.export_layers import additive_mask
from xadapter_export.model.plm import load_plm
from xadapter_export.model.plm_family import PlmFamily
from xadapter_export.model.pooling import take_positions, unit_length
from xadapter_export.model.tasks import States, task_head
from xadapter_export.model.text_tower import TextTower
from xadapter_export.model.towers import load_clip
from xadapter_export.model.x_adapter import LayerShape, XAdapterLayer, make_layer
from xadapter_export.runtime.text import TextEncoder, TowerTokens
from xadapter_export.tasks import TASKS, TaskSpec

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Memory:
    """What the active experts attend to; computed by the frozen CLIP, so it can be cached.

    Attributes:
        v: ``(B, K, D) float32`` retrieved picture features, or ``(1, N, D)`` prototypes; None without V.
        t: ``(B, S, W) float32`` CLIP token states; None without T.
        t_mask: ``(B, S) bool``. True at real CLIP tokens, end-of-text included.
        retrieved: ``(B, K) int64`` bank rows, best first; None without top-k retrieval.
        retrieved_scores: ``(B, K) float32`` cosine similarities.
        keep: ``(B, K)``, ``(B, N)`` or ``(B, S)``, by expert: 0 or False at the items that are left out, as
            if they were not there. An expert all of whose items are left out adds nothing.
    """

    v: Tensor | None = None
    t: Tensor | None = None
    t_mask: Tensor | None = None
    retrieved: Tensor | None = None
    retrieved_scores: Tensor | None = None
    keep: Mapping[Expert, Tensor] = field(default_factory=dict)

    def of(self, expert: Expert) -> tuple[Tensor | None, Tensor | None]:
        """What an expert attends to, and what is added to its scores: the lowest number where masked."""
        memory, mask = (self.v, None) if KINDS[expert].reads == "bank" else (self.t, self.t_mask)
        if (keep := self.keep.get(expert)) is not None:
            mask = keep if mask is None else mask * keep
            memory = None if memory is None else memory.expand(len(keep), -1, -1)
        return memory, None if mask is None else additive_mask(mask)


@dataclass(frozen=True)
class XAdapterOutput:
    """Outputs of a forward pass.

    Attributes:
        last_hidden_state: ``(B, T, H) float32``, after the PLM's final norm where it has one.
        answers: What the task gives, float32, by the names of ``TaskSpec.outputs``.
        memory: What the experts attended to.
        contributions: ``(B, T, H) float32`` that each expert added before each layer, by (layer, expert).
        entering: ``(B, T, H) float32`` that it was added to, by layer.
    """

    last_hidden_state: Tensor
    answers: dict[str, Tensor]
    memory: Memory = field(default_factory=Memory)
    contributions: dict[tuple[int, Expert], Tensor] = field(default_factory=dict)
    entering: dict[int, Tensor] = field(default_factory=dict)

    @property
    def logits(self) -> Tensor:
        """Of masks ``(B, P, V)``, or ``(B, T, V)`` where no positions were given; of labels ``(B, L)``."""
        return self.answers["logits"]


class XAdapterModel(nn.Module):
    """Frozen PLM, frozen CLIP text tower, static bank, and the plug-in that is trained between them.

    Make one with ``create`` or ``from_pretrained``. Only the plug-in (and the classification head) has
    parameters that require a gradient. A forward pass changes no state.

    Attributes:
        calibration: Texts as it was trained on, as JSON lines, or None. They are saved with the checkpoint;
            lossy exports are made and judged with them.
    """

    bank_features: Tensor

    def __init__(
        self, config: XAdapterConfig, plm: PlmFamily, clip: TextTower | None, bank: FeatureBank | None
    ) -> None:
        super().__init__()
        self.config = config
        self.plm = plm
        self.clip = clip
        self.bank = bank
        self.calibration: str | None = None
        self._check()
        widths: dict[Read, int] = {}
        if reads_bank(config.experts) and bank is not None:
            widths["bank"] = bank.features.shape[1]
            self.register_buffer("bank_features", torch.from_numpy(bank.unit_rows()), persistent=False)
        if reads_text(config.experts) and clip is not None:
            widths["text"] = clip.width
        self.adapters = nn.ModuleDict(
            {
                str(layer): nn.ModuleDict(
                    {e: self._make_layer(e, widths[KINDS[e].reads]) for e in experts_of(config.experts)}
                )
                for layer in config.layers
            }
        )
        self.task = TASKS[config.task]
        self.head = task_head(self.task).make_head(plm.hidden_size, len(config.labels))
        self.text_encoder = self.make_text_encoder(plm.max_seq)

    def _make_layer(self, expert: Expert, memory_width: int) -> XAdapterLayer:
        config, kind = self.config, LAYERS[self.config.layer]
        reads_static = KINDS[expert].reads == "bank" and config.retrieval.mode == "static"
        shape = LayerShape(
            self.plm.hidden_size,
            memory_width,
            config.adapter_width,
            config.num_heads,
            num_rows=len(self.bank_features) if reads_static else None,
            num_null_rows=config.null_rows,
        )
        return make_layer(TOKEN_QUERY if kind.learns_rows and not reads_static else kind, shape)

    @property
    def num_bank_items(self) -> int:
        """How many pictures or prototypes a V-expert attends to."""
        retrieval = self.config.retrieval
        return retrieval.k if retrieval.mode == "topk" else len(self.bank_features)

    def make_text_encoder(self, max_seq: int) -> TextEncoder:
        """Both tokenizers with their rules, for inputs of at most ``max_seq`` PLM tokens."""
        plm, clip = self.plm, self.clip
        return TextEncoder(
            plm.tokenizer,
            TowerTokens(clip.tokenizer, clip) if clip else None,
            max_seq=max_seq,
            mask_token=plm.tokenizer.id_to_token(plm.special["mask"]) if "mask" in plm.special else None,
            pad_token_id=plm.special["pad"],
            has_token_type_ids=plm.has_token_type_ids,
        )

    def _check(self) -> None:
        config, clip, bank = self.config, self.clip, self.bank
        if config.layers[-1] >= len(self.plm.layers):
            raise ConfigError(
                f"layer {config.layers[-1]}: PLM {self.plm.source} has layers 0 to {len(self.plm.layers) - 1}"
            )
        if reads_bank(config.experts) and bank is None:
            raise ConfigError("the V-expert needs a feature bank; pass bank=")
        needs_clip = reads_text(config.experts) or config.retrieval.mode == "topk"
        if needs_clip and clip is None:
            raise ConfigError(f"experts {config.experts!r} need a CLIP text tower; pass clip=")
        if (
            reads_bank(config.experts)
            and config.retrieval.mode == "topk"
            and bank is not None
            and clip is not None
        ):
            check_bank_fits(bank, clip)
            if config.retrieval.k > len(bank.features):
                raise ConfigError(
                    f"retrieval k={config.retrieval.k}, but the bank has {len(bank.features)} pictures"
                )

    @classmethod
    def create(
        cls,
        plm: "str | Path | PreTrainedModel",
        clip: str | Path | nn.Module | None,
        config: XAdapterConfig,
        bank: str | Path | FeatureBank | None = None,
    ) -> Self:
        """Makes a model with a fresh plug-in, which leaves the PLM exactly as it was.

        Args:
            plm: Folder in ``save_pretrained`` layout, hub id, or transformers model, which stays as it is.
            clip: Folder in open_clip's hub layout, ``model:tag``, hub id, or open_clip model, likewise; a
                tower of another kind as ``load_clip`` has it; None for a static bank without T-expert.
            config: Shape and task of the plug-in.
            bank: Bank or folder of one; needed by the V-expert.

        Raises:
            CheckpointError: If a part cannot be loaded.
            UnsupportedError: If PLM or CLIP is of a kind that is not known.
            ConfigError: If the parts do not fit together.
        """
        if isinstance(bank, str | Path):
            bank = FeatureBank.load(bank)
        return cls(config, load_plm(plm, config.task), None if clip is None else load_clip(clip), bank)

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        *,
        plm: str | Path | None = None,
        clip: str | Path | None = None,
        revision: str | None = None,
    ) -> Self:
        """Reads a checkpoint: a folder or a hub id.

        Args:
            source: Checkpoint folder or hub id, ``org/name``.
            plm: Where the PLM is, if not where the checkpoint says; its weights must have the recorded hash.
            clip: Where CLIP is, likewise.
            revision: Branch, tag or commit on the Hub; ``main`` if None.

        Raises:
            CheckpointError: If anything is missing, broken or does not fit.
            HashMismatchError: If PLM, CLIP or bank is not the one the plug-in was trained with.
            HubError: If it cannot be downloaded.
            ConfigError: If there is a revision, and the checkpoint is a folder.
        """
        from xadapter_export.model.checkpoint import read_checkpoint

        return cast(Self, read_checkpoint(source, plm=plm, clip=clip, revision=revision))

    def push_to_hub(self, repo: str, *, self_contained: bool = False, **options: Unpack[PushOptions]) -> str:
        """Uploads a checkpoint to the Hugging Face Hub, as one commit that replaces what was there.

        Args:
            repo: ``org/name``; made if it is not there.
            self_contained: As ``save_pretrained``.
            options: ``private``, ``revision``, ``message``; see ``bundle.hub.PushOptions``.

        Returns:
            The address of the commit.

        Raises:
            HubError: If anything goes wrong; then nothing was committed.
        """
        from xadapter_export.model.checkpoint import push_checkpoint

        with TemporaryDirectory() as folder:
            checkpoint = Path(folder) / "checkpoint"
            self.save_pretrained(checkpoint, self_contained=self_contained)
            return push_checkpoint(checkpoint, repo, **options)

    def save_pretrained(
        self,
        folder: str | Path,
        *,
        self_contained: bool = False,
        dtype: torch.dtype = torch.float32,
        training: dict[str, str | int | float | bool | None] | None = None,
        more_files: dict[str, str] | None = None,
    ) -> None:
        """Writes a checkpoint folder; an existing checkpoint there is replaced when the new one is complete.

        Args:
            folder: Where to write.
            self_contained: Also write PLM and CLIP text tower; else they are found by their source again, but
                for one that came as a model without a source, or with another checkpoint.
            dtype: Type of the stored PLM and CLIP weights; a narrower type must lose nothing.
            training: How it was trained, free form, kept in ``xadapter.json``.
            more_files: Text files to put beside, by name.

        Raises:
            CheckpointError: If ``dtype`` would change a weight.
            OutputWriteError: If the folder cannot be written.
        """
        from xadapter_export.model.checkpoint import write_checkpoint

        write_checkpoint(
            self,
            Path(folder),
            self_contained=self_contained,
            dtype=dtype,
            training=training or {},
            more_files=more_files or {},
        )

    def train(self, mode: bool = True) -> Self:
        """Switches the plug-in; the frozen parts stay in evaluation mode."""
        return super().train(mode)

    def trained_state(self) -> dict[str, Tensor]:
        """What a checkpoint stores: the tensors of the plug-in and the classification head."""
        return {k: v for k, v in self.state_dict().items() if k.startswith(("adapters.", "head."))}

    def frozen_parts(self) -> tuple[FrozenPart, FrozenPart | None, BankPart | None]:
        """Identities of PLM, CLIP text tower and bank, with the hashes of the weights in memory."""
        plm = FrozenPart(source=self.plm.source, family=self.plm.name, sha256=self.plm.sha256)
        clip = bank = None
        if self.clip is not None:
            clip = FrozenPart(source=self.clip.source, family=self.clip.name, sha256=self.clip.sha256)
        if self.bank is not None:
            bank = BankPart(
                num_pictures=len(self.bank.features), dim=self.bank.features.shape[1], sha256=self.bank.sha256
            )
        return plm, clip, bank

    def encode(self, texts: Sequence[str], text_pairs: Sequence[str] | None = None) -> dict[str, Tensor]:
        """Tokenizes texts for ``forward``: its arguments by name, int64, padded to the longest.

        Raises:
            InputTextError: For a text that is empty or, in fill-mask, has no mask.
        """
        arrays = self.text_encoder.encode(texts, text_pairs, require_mask=self.task.reads_masks)
        return {name: torch.from_numpy(array) for name, array in arrays.items()}

    def active_experts(self, expert_set: ExpertSet | None = None) -> tuple[Expert, ...]:
        """Experts of a set, all that the plug-in holds for None.

        Raises:
            CheckpointError: If the plug-in does not hold one of them.
        """
        held = experts_of(self.config.experts)
        experts = held if expert_set is None else experts_of(expert_set)
        if missing := [expert for expert in experts if expert not in held]:
            raise CheckpointError(
                f"expert {missing[0]!r} is not in this checkpoint, which holds {self.config.experts!r}; "
                f"choose from {', '.join((NONE, *held))}"
            )
        return experts

    @torch.no_grad()
    def memory(
        self, clip_input_ids: Tensor | None, experts: ExpertSet | None = None, *, k: int | None = None
    ) -> Memory:
        """Runs the frozen CLIP: what the experts will attend to.

        Args:
            clip_input_ids: ``(B, S) int64``, padded as the tower has it; not needed in static mode.
            experts: Expert set; None for all that the plug-in holds.
            k: Pictures to retrieve, if not the configured number.
        """
        active = self.active_experts(experts)
        topk = reads_bank(active) and self.config.retrieval.mode == "topk"
        v = t = t_mask = rows = scores = None
        if reads_bank(active) and not topk:
            v = self.bank_features[None]
        if topk or reads_text(active):
            clip = cast(TextTower, self.clip)
            if clip_input_ids is None:
                raise ConfigError(f"experts {active} need CLIP; pass clip_input_ids")
            states = clip.token_states(clip_input_ids)  # (B, S, W)
            if topk:
                query = unit_length(clip.pool(states, clip_input_ids))  # (B, D)
                scores, rows = (query @ self.bank_features.T).topk(k or self.config.retrieval.k)  # (B, K)
                v = self.bank_features[rows]  # (B, K, D)
            if reads_text(active):
                t, t_mask = states, clip.token_mask(clip_input_ids)
        return Memory(v, t, t_mask, rows, scores)

    @torch.no_grad()
    def hidden_before(
        self, layer: int, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None
    ) -> Tensor:
        """Frozen part below the first adapter: the ``(B, T, H) float32`` that enters PLM layer ``layer``.

        Depends on nothing that is trained if ``layer`` is at most ``config.layers[0]``: cache it while
        training.
        """
        hidden = self.plm.embed(input_ids, token_type_ids)
        context = self.plm.prepare(hidden, attention_mask)
        for index in range(layer):
            hidden = self.plm.layer(index, hidden, context)
        return hidden

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        token_type_ids: Tensor | None = None,
        clip_input_ids: Tensor | None = None,
        mask_positions: Tensor | None = None,
        *,
        experts: ExpertSet | None = None,
        memory: Memory | None = None,
        first_layer_input: Tensor | None = None,
    ) -> XAdapterOutput:
        """Runs the PLM with the experts of a set switched on.

        Args:
            input_ids: ``(B, T) int64``.
            attention_mask: ``(B, T) int64``, 1 at real tokens.
            token_type_ids: ``(B, T) int64`` or None for zeros.
            clip_input_ids: ``(B, S) int64``; needed where an expert reads CLIP and no ``memory`` is given.
            mask_positions: ``(B, P) int64``. Tokens at which fill-mask answers; None for all.
            experts: Expert set; None for all that the plug-in holds, ``"none"`` for the plain PLM.
            memory: From ``memory``, to save running CLIP.
            first_layer_input: ``(B, T, H) float32`` from ``hidden_before(config.layers[0], ...)``, to save
                running the layers below the plug-in.

        Raises:
            CheckpointError: If the plug-in does not hold an expert of the set.
            ConfigError: If an expert needs CLIP tokens and has none.
        """
        active = self.active_experts(experts)
        if memory is None:
            memory = self.memory(clip_input_ids, experts) if active else Memory()
        mask = additive_mask(attention_mask)
        memories = {expert: memory.of(expert) for expert in active}

        start = 0 if first_layer_input is None else self.config.layers[0]
        hidden = self.plm.embed(input_ids, token_type_ids) if first_layer_input is None else first_layer_input
        context = self.plm.prepare(hidden, attention_mask)
        contributions: dict[tuple[int, Expert], Tensor] = {}
        entering: dict[int, Tensor] = {}
        for index in range(start, len(self.plm.layers)):
            if str(index) in self.adapters:
                entering[index] = hidden
                for expert in active:
                    added = self.adapter(index, expert)(hidden, *memories[expert], mask)
                    if expert in memory.keep:
                        added = added * is_on(memory.keep[expert])
                    contributions[index, expert] = added
                hidden = sum((contributions[index, expert] for expert in active), start=hidden)
            hidden = self.plm.layer(index, hidden, context)
        hidden = self.plm.finish(hidden)

        answers = self.answers(self.task, hidden, attention_mask, mask_positions)
        return XAdapterOutput(hidden, answers, memory, contributions, entering)

    def adapter(self, layer: int, expert: Expert) -> XAdapterLayer:
        """The layer of an expert before a PLM layer."""
        return cast(XAdapterLayer, cast(nn.ModuleDict, self.adapters[str(layer)])[expert])

    def answers(
        self, task: TaskSpec, hidden: Tensor, attention_mask: Tensor, mask_positions: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Answers of a task, its own or one that needs no head, by the names of ``TaskSpec.outputs``.

        Args:
            task: The task.
            hidden: ``(B, T, H) float32``. What the PLM gives: ``XAdapterOutput.last_hidden_state``.
            attention_mask: ``(B, T) int64``.
            mask_positions: ``(B, P) int64``, where the task reads masks; None for all tokens.
        """
        if task.reads_masks and mask_positions is not None:
            hidden = take_positions(hidden, mask_positions)
        values = task_head(task).answer(States(hidden, attention_mask, self.plm.mlm_logits, self.head))
        return {output.name: value for output, value in zip(task.outputs, values, strict=True)}


def check_bank_fits(bank: FeatureBank, clip: TextTower) -> None:
    """Refuses a bank that was made with another CLIP than the one that searches it.

    Raises:
        ConfigError: If widths differ, or the bank knows its CLIP and it is another.
    """
    if bank.features.shape[1] != clip.feature_dim:
        raise ConfigError(
            f"bank features have width {bank.features.shape[1]}, "
            f"CLIP {clip.source} has {clip.feature_dim}; build the bank with the same CLIP"
        )
    if bank.clip is not None and (found := clip.sha256) != bank.clip.sha256:
        raise ConfigError(
            f"the bank was made with CLIP {bank.clip}, and is searched with CLIP {clip.source} "
            f"({found[:12]}); use the same one, or build the bank with this one"
        )
