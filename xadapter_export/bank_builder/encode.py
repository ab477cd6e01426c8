"""Pictures to features: workers decode batches ahead while the tower is at work.

Dimensions: B pictures of a batch that could be decoded, D CLIP embedding size.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from xadapter_export.bank.rows import Float32
from xadapter_export.bank_builder.decode import UndecodableError, decode_picture, make_thumbnail
from xadapter_export.bank_builder.image_tower import ImageTower
from xadapter_export.bank_builder.sources import Source, SourceRow
from xadapter_export.bank_builder.work_folder import WorkFolder
from xadapter_export.errors import CheckpointError, ConfigError


@dataclass(frozen=True)
class Skipped:
    """A picture that could not be decoded."""

    row: SourceRow
    reason: str


@dataclass(frozen=True)
class DecodedBatch:
    """Pictures of one shard, decoded.

    Attributes:
        shard: Number of the shard.
        is_last: Whether the shard ends with it.
        pixels: ``(B, 3, size, size) float32``; None if no picture could be decoded.
        rows: B rows.
        thumbnails: B WebP files, or none where none are wanted.
        skipped: The others.
    """

    shard: int
    is_last: bool
    pixels: Tensor | None
    rows: list[SourceRow]
    thumbnails: list[bytes]
    skipped: list[Skipped]

    def pin_memory(self) -> "DecodedBatch":
        """Put the pixels where an accelerator can fetch them while it computes; called by ``DataLoader``."""
        return replace(self, pixels=None if self.pixels is None else self.pixels.pin_memory())


class ShardBatches(Dataset[DecodedBatch]):
    """Batches of the given shards. A batch depends on its shard alone, never on who makes it."""

    def __init__(
        self,
        work: WorkFolder,
        shards: list[int],
        source: Source,
        preprocess: Callable[[Any], Tensor],
        *,
        side: int,
        batch_size: int,
        thumbnail_px: int | None,
    ) -> None:
        self._work, self._source, self._preprocess = work, source, preprocess
        self._side, self._batch_size, self._thumbnail_px = side, batch_size, thumbnail_px
        self._batches = [
            (shard, start)
            for shard in shards
            for start in range(0, work.num_rows_of(shard), batch_size)
        ]  # fmt: skip
        self._listed: tuple[int, list[SourceRow]] = (-1, [])  # the shard that was read last

    def __len__(self) -> int:
        return len(self._batches)

    def __getitem__(self, index: int) -> DecodedBatch:
        shard, start = self._batches[index]
        if self._listed[0] != shard:
            self._listed = shard, self._work.read_rows(shard)
        listed = self._listed[1]
        pixels: list[Tensor] = []
        rows: list[SourceRow] = []
        thumbnails: list[bytes] = []
        skipped: list[Skipped] = []
        for row in listed[start : start + self._batch_size]:
            try:
                image = self._decode(row)
            except UndecodableError as error:
                skipped.append(Skipped(row, str(error)))
                continue
            pixels.append(self._preprocess(image))
            rows.append(row)
            if self._thumbnail_px is not None:
                thumbnails.append(make_thumbnail(image, self._thumbnail_px))
        return DecodedBatch(
            shard,
            start + self._batch_size >= len(listed),
            default_collate(pixels) if pixels else None,  # in a worker straight into shared memory
            rows,
            thumbnails,
            skipped,
        )

    def _decode(self, row: SourceRow) -> Image.Image:
        try:
            data = self._source.read(row)
        except FileNotFoundError as error:
            raise UndecodableError("no such file") from error
        except OSError as error:
            raise UndecodableError(f"cannot be read: {error.strerror or type(error).__name__}") from error
        return decode_picture(data, self._side)


def encode_batches(
    tower: ImageTower, batches: ShardBatches, *, workers: int
) -> Iterator[tuple[DecodedBatch, Float32 | None]]:
    """Give every batch with its ``(B, D) float32`` features of length 1, in order.

    One batch is on its way while the one before is fetched, so that an accelerator does not wait.

    Raises:
        CheckpointError: If the tower gives a feature that is not finite.
        ConfigError: If a worker died.
    """
    loader: DataLoader[DecodedBatch] = DataLoader(
        batches,
        batch_size=None,
        num_workers=workers,
        pin_memory=tower.device.type == "cuda",
        prefetch_factor=2 if workers else None,
    )
    waiting: tuple[DecodedBatch, Tensor | None] | None = None
    try:
        for batch in loader:
            launched = batch, None if batch.pixels is None else tower.encode(batch.pixels)
            if waiting is not None:
                yield _fetch(*waiting)
            waiting = launched
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise ConfigError(
            "a process that decodes images died", got=str(error).split("\n", 1)[0],
            hint="memory may be short: use fewer --workers or a smaller --batch-size",
        ) from error  # fmt: skip
    if waiting is not None:
        yield _fetch(*waiting)


def _fetch(batch: DecodedBatch, encoded: Tensor | None) -> tuple[DecodedBatch, Float32 | None]:
    if encoded is None:
        return batch, None
    encoded = encoded.cpu()
    good = ((encoded.norm(dim=-1) - 1).abs() < 1e-3).tolist()  # of NaN and of zero as well
    if not all(good):
        raise CheckpointError(
            "the image tower computes no usable feature for an image",
            where=batch.rows[good.index(False)].id,
            expected="length 1",
            got=f"{encoded[good.index(False)].norm().item():.4g}",
            hint="check its weights, or use --precision fp32",
        )
    features: Float32 = encoded.numpy()
    return batch, features
