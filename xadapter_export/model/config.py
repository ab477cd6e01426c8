"""What a checkpoint says about itself: the plug-in's configuration and the identity of its frozen parts.

Nothing here imports torch, so a checkpoint can be described without loading it.
"""

from collections.abc import Sequence
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from xadapter_export.bundle.manifest import Sha256, SomeExperts, Task
from xadapter_export.experts import EXPERT_SETS
from xadapter_export.layers import LAYERS, NULL_ROWS, TOKEN_QUERY, LayerName
from xadapter_export.tasks import FILL_MASK, TASKS


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class RetrievalConfig(_Strict):
    """Where the V-expert's memory comes from; fixed at training.

    ``topk``: the ``k`` bank rows nearest (cosine) to CLIP's text embedding of the sentence.
    ``static``: every row of a small bank of prototypes, with no CLIP tower at all; ``k`` is not used.
    """

    mode: Literal["topk", "static"] = "topk"
    k: Annotated[int, Field(ge=1)] = 4


def check_shape(
    layer: str, null_rows: int, retrieval: str, layers: Sequence[int], adapter_width: int, num_heads: int
) -> None:
    """Refuse settings of a plug-in that do not go together; for what each is see ``XAdapterConfig``.

    Raises:
        ValueError: If some do not; pydantic makes one line of it.
    """
    if LAYERS[layer].learns_rows and retrieval != "static":
        raise ValueError(f"layer {layer} needs static retrieval")
    if null_rows and not LAYERS[layer].null_rows:
        raise ValueError(f"layer {layer} has no null_rows; choose one that has, such as {NULL_ROWS.name}")
    if LAYERS[layer].null_rows and not null_rows:
        raise ValueError(f"layer {layer} needs null_rows of at least 1")
    if list(layers) != sorted(set(layers)):
        raise ValueError(f"layers must be in ascending order, without repeats: {list(layers)}")
    if adapter_width % num_heads:
        raise ValueError(f"adapter_width {adapter_width} must be a multiple of num_heads {num_heads}")


class XAdapterConfig(_Strict):
    """Shape and task of a plug-in.

    Attributes:
        experts: The experts that the plug-in holds: a set that is not empty.
        layers: PLM layers before which the experts are added, counted from 0, ascending.
        adapter_width: R, width of the attention inside the plug-in; a multiple of ``num_heads``.
        num_heads: Attention heads of each expert.
        layer: The kind of layer; see ``layers``.
        null_rows: How many null rows each layer has beside its memory, where its kind has them; else 0, which
            a record leaves out.
        retrieval: The V-expert's retrieval mode.
        task: What the model is for; decides head and outputs.
        labels: Class names of ``text-classification``, in the order of the logits; exactly one, the name of
            the value, for a regression; else empty.
    """

    experts: SomeExperts = EXPERT_SETS[-1]
    layers: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1)]
    adapter_width: Annotated[int, Field(ge=1)] = 64
    num_heads: Annotated[int, Field(ge=1)] = 4
    layer: LayerName = TOKEN_QUERY.name
    null_rows: Annotated[int, Field(ge=0, exclude_if=lambda number: number == 0)] = 0
    retrieval: RetrievalConfig = RetrievalConfig()
    task: Task = FILL_MASK.name
    labels: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        check_shape(
            self.layer,
            self.null_rows,
            self.retrieval.mode,
            self.layers,
            self.adapter_width,
            self.num_heads,
        )
        if TASKS[self.task].has_labels != bool(self.labels):
            verb = "has no" if self.labels else "needs"
            raise ValueError(f"labels: {self.task} {verb} labels")
        return self


class FrozenPart(_Strict):
    """Identity of a frozen base model.

    Attributes:
        source: Hub id, open_clip ``model:tag`` or path it was loaded from.
        family: PLM family, or kind of text tower.
        sha256: Hash of the weights that are used, as float32 (see ``weights_sha256``).
    """

    source: str
    family: str
    sha256: Sha256


class BankPart(_Strict):
    """Identity of a feature bank: ``num_pictures`` rows of width ``dim``; hash of the rows as float32."""

    num_pictures: int
    dim: int
    sha256: Sha256


class CheckpointRecord(_Strict):
    """The contents of ``xadapter.json``.

    Attributes:
        plugin_sha256: Hash of what was trained, with the settings that are not the default.
        calibration_sha256: Hash of ``calibration.jsonl``; None where there is none.
    """

    format_version: Literal[1] = 1
    config: XAdapterConfig
    plm: FrozenPart
    clip: FrozenPart | None
    bank: BankPart | None
    plugin_sha256: Sha256
    calibration_sha256: Sha256 | None = None
    training: dict[str, str | int | float | bool | None] = {}
