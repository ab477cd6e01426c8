"""Banks on disk: what is written is what is read, in every dtype, in memory that does not grow."""

import errno
import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from xadapter_export.bank import BankClip, FeatureBank
from xadapter_export.bank.compact import compact_bank
from xadapter_export.bank.convert import convert_bank, measure_recall, noisy_queries
from xadapter_export.bank.merge import merge_banks
from xadapter_export.bank.nearest import find_nearest
from xadapter_export.bank.output import staged_bank
from xadapter_export.bank.reader import BankReader
from xadapter_export.bank.record import DTYPES, BankDtype
from xadapter_export.bank.rows import Float32, to_dtype, to_float32
from xadapter_export.bank.writer import BankWriter
from xadapter_export.bundle.pictures import Picture
from xadapter_export.errors import (
    CheckpointError,
    ConfigError,
    OutputExistsError,
    OutputWriteError,
    ShapeError,
)

CLIP = BankClip(source="some/clip", sha256="a" * 64, image_sha256="b" * 64)
OTHER_CLIP = BankClip(source="other/clip", sha256="c" * 64)


def unit_rows(count: int, dim: int, seed: int = 0) -> Float32:
    rows = np.random.default_rng(seed).standard_normal((count, dim), dtype=np.float32)
    unit: Float32 = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return unit


def write(folder: Path, rows: Float32, dtype: BankDtype = "fp32", prefix: str = "p", **said: Any) -> Path:
    """Write a bank in blocks of 1000 rows."""
    with (
        staged_bank(folder, force=False) as staged,
        BankWriter(staged.path, dtype=dtype, dim=rows.shape[1]) as writer,
    ):
        for start in range(0, len(rows), 1000):
            block = rows[start : start + 1000]
            numbers = range(start, start + len(block))
            writer.append(block, [Picture(id=f"{prefix}{i}", caption=f"c {i}") for i in numbers])
        writer.finish(**{"clip": CLIP, **said})
    return folder


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [24, 7])  # 7: int8 rows of odd size must leave the scales aligned
def test_what_is_written_in_blocks_is_a_safetensors_file(tmp_path: Path, dtype: BankDtype, dim: int) -> None:
    rows = unit_rows(2501, dim)
    folder = write(tmp_path / "bank", rows, dtype, num_skipped=3)
    bank = FeatureBank.load(folder)
    tensors = load_file(folder / "bank.safetensors")
    assert tensors["features"].shape == (2501, dim)
    assert sorted(tensors) == (["features", "scales"] if dtype == "int8" else ["features"])
    tolerance = {"fp32": 0, "fp16": 3e-4, "int8": 6e-3}[dtype]
    assert np.abs(bank.rows() - rows).max() <= tolerance
    assert bank.rows().dtype == np.float32
    assert (bank.clip, bank.kind, bank.num_skipped) == (CLIP, "pictures", 3)
    assert bank.pictures[2500] == Picture(id="p2500", caption="c 2500")
    reader = BankReader(folder)
    assert reader.sha256() == bank.sha256
    assert np.concatenate([block.features for block in reader.blocks(100)]).tobytes() == bank.rows().tobytes()
    assert [p for block in reader.blocks() for p in block.pictures] == list(bank.pictures)
    assert reader.pictures_of([2000, 3]) == [bank.pictures[2000], bank.pictures[3]]


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_bank_in_memory_is_saved_and_loaded(tmp_path: Path, dtype: BankDtype) -> None:
    bank = FeatureBank.load(write(tmp_path / "bank", unit_rows(50, 8), dtype, kind="prototypes"))
    (tmp_path / "copy").mkdir()
    bank.save(tmp_path / "copy")
    copy = FeatureBank.load(tmp_path / "copy")
    assert (copy.sha256, copy.clip, copy.kind, copy.pictures) == (
        bank.sha256,
        CLIP,
        "prototypes",
        bank.pictures,
    )
    assert copy.features.dtype == bank.features.dtype


def test_int8_rows_keep_their_length_and_nearly_their_direction() -> None:
    rows = unit_rows(300, 512)
    rows[0] = 0
    rows[0, 5] = -1  # one value has everything
    raw, scales = to_dtype(rows, "int8")
    back = to_float32(raw, scales)
    assert raw.dtype == np.int8
    assert np.abs(np.linalg.norm(back, axis=1) - 1).max() < 1e-5
    assert (back * rows).sum(axis=1).min() > 0.9999
    assert np.array_equal(to_dtype(back, "int8")[0], raw)  # stored again, it stays


def test_a_bank_without_a_record_still_loads_and_has_the_same_hash(tmp_path: Path) -> None:
    folder = write(tmp_path / "bank", unit_rows(20, 8), "fp16")
    before = FeatureBank.load(folder).sha256
    (folder / "bank.json").unlink()
    bank = FeatureBank.load(folder)
    assert (bank.clip, bank.kind, bank.num_skipped, bank.sha256) == (None, "pictures", 0, before)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda record: {**record, "surprise": 1}, "surprise: Extra inputs"),
        (lambda record: {**record, "num_pictures": 21}, "num_pictures .*expected 21, got 20"),
        (lambda record: {**record, "dtype": "int8"}, "the bank's dtype differs .*expected int8, got fp16"),
        (lambda record: {**record, "format_version": 2}, "format_version"),
    ],
)
def test_a_record_that_is_wrong(
    tmp_path: Path, change: Callable[[dict[str, Any]], dict[str, Any]], message: str
) -> None:
    path = write(tmp_path / "bank", unit_rows(20, 8), "fp16") / "bank.json"
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    with pytest.raises(CheckpointError, match=message):
        FeatureBank.load(tmp_path / "bank")


def test_lines_that_do_not_match_the_rows(tmp_path: Path) -> None:
    path = write(tmp_path / "bank", unit_rows(20, 8)) / "bank.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    for kept in (lines[:19], [*lines, lines[0]]):
        path.write_text("".join(kept))
        with pytest.raises(CheckpointError, match="wrong number of images"):
            list(BankReader(tmp_path / "bank").blocks())
        with pytest.raises(CheckpointError, match="wrong number of images"):
            FeatureBank.load(tmp_path / "bank")
    path.write_text("".join([*lines[:4], "{}\n", *lines[5:]]))
    with pytest.raises(CheckpointError, match="line 5"):
        list(BankReader(tmp_path / "bank").pictures())


def test_features_that_are_no_bank(tmp_path: Path) -> None:
    folder = write(tmp_path / "bank", unit_rows(20, 8))
    rows = unit_rows(20, 8)
    rows[7] *= 2
    save_file({"features": rows}, folder / "bank.safetensors")
    with pytest.raises(ShapeError, match="bank row 7: expected a feature of length 1, got 2"):
        list(BankReader(folder).row_blocks(6))
    save_file({"features": rows.astype(np.int8)}, folder / "bank.safetensors")
    with pytest.raises(CheckpointError, match="this is not a bank"):
        BankReader(folder)
    (folder / "bank.safetensors").write_bytes(b"12345")
    with pytest.raises(CheckpointError, match="cannot be read"):
        BankReader(folder)


def test_a_feature_that_is_not_finite_is_never_written(tmp_path: Path) -> None:
    rows = unit_rows(20, 8)
    rows[3, 1] = np.nan
    with pytest.raises(ShapeError, match="bank row 3: expected a feature of length 1, got nan"):
        write(tmp_path / "bank", rows)
    assert list(tmp_path.iterdir()) == []


def test_no_space_left_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write(tmp_path / "bank", unit_rows(20, 8))

    def full(*_arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(BankWriter, "append", full)
    with pytest.raises(OutputWriteError, match="No space left on device"):
        convert_bank(source, tmp_path / "out", "fp16")
    assert [path.name for path in tmp_path.iterdir()] == ["bank"]


def test_force_replaces_a_bank_and_nothing_else(tmp_path: Path) -> None:
    source = write(tmp_path / "bank", unit_rows(20, 8))
    convert_bank(source, tmp_path / "out", "fp16")
    with pytest.raises(OutputExistsError, match="output path already exists"):
        convert_bank(source, tmp_path / "out", "int8")
    convert_bank(source, tmp_path / "out", "int8", force=True)
    assert BankReader(tmp_path / "out").dtype == "int8"
    (tmp_path / "out" / "xadapter.json").write_text("{}")
    with pytest.raises(OutputExistsError, match="the output path holds a checkpoint"):
        convert_bank(source, tmp_path / "out", "fp32", force=True)


def test_merging_keeps_every_row_in_order(tmp_path: Path) -> None:
    parts = [unit_rows(1500, 8, seed) for seed in range(3)]
    folders = [write(tmp_path / str(i), rows, "fp32", f"{i}-", num_skipped=i) for i, rows in enumerate(parts)]
    record = merge_banks(folders, tmp_path / "all")
    bank = FeatureBank.load(tmp_path / "all")
    assert bank.rows().tobytes() == np.concatenate(parts).tobytes()
    assert [picture.id for picture in bank.pictures[1499:1501]] == ["0-1499", "1-0"]
    assert (record.num_pictures, record.num_skipped, record.clip, record.dtype) == (4500, 3, CLIP, "fp32")


def test_banks_that_cannot_be_merged(tmp_path: Path) -> None:
    first = write(tmp_path / "first", unit_rows(20, 8))
    for name, rows, said, message in [
        ("wide", unit_rows(20, 9), {}, r"the banks differ in width: .* \(expected 8, as .*first, got 9\)"),
        (
            "other",
            unit_rows(20, 8),
            {"clip": OTHER_CLIP},
            r"differ in CLIP: .*expected some/clip \(aaaaaaaaaaaa\).*got other/clip \(cccccccccccc\)",
        ),
        ("unknown", unit_rows(20, 8), {"clip": None}, "differ in CLIP.*got one that nobody named"),
        ("middles", unit_rows(20, 8), {"kind": "prototypes"}, "differ in kind"),
    ]:
        second = write(tmp_path / name, rows, prefix="q", **said)  # type: ignore[arg-type]  # any field
        with pytest.raises(ConfigError, match=message):
            merge_banks([first, second], tmp_path / "out")
    with pytest.raises(ConfigError, match="at least two banks"):
        merge_banks([first], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_picture_that_is_there_twice(tmp_path: Path) -> None:
    first, second = write(tmp_path / "1", unit_rows(20, 8)), write(tmp_path / "2", unit_rows(5, 8, 1))
    with pytest.raises(ConfigError, match="5 images are in more than one bank; the first is 'p0'"):
        merge_banks([first, second], tmp_path / "out")
    assert merge_banks([first, second], tmp_path / "out", keep_duplicates=True).num_pictures == 25


def _peak_bytes(action: Callable[[], object]) -> int:
    tracemalloc.start()
    try:
        action()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_memory_does_not_grow_with_the_bank(tmp_path: Path) -> None:
    dim = 64
    peaks = []
    block = unit_rows(2000, dim)
    for count in (50_000, 200_000):
        folder = tmp_path / str(count)

        def grow(folder: Path = folder, count: int = count) -> None:
            with (
                staged_bank(folder, force=False) as staged,
                BankWriter(staged.path, dtype="fp32", dim=dim) as writer,
            ):
                for start in range(0, count, len(block)):
                    numbers = range(start, start + len(block))
                    writer.append(block, [Picture(id=str(i), caption="") for i in numbers])
                writer.finish(clip=CLIP)

        def merge(folder: Path = folder) -> None:
            merge_banks([folder, folder], folder / "merged", dtype="int8", keep_duplicates=True)

        def search(folder: Path = folder) -> None:
            find_nearest(BankReader(folder), block[:3], 5)

        peaks.append([_peak_bytes(action) for action in (grow, merge, search)])
        assert BankReader(folder / "merged").num_pictures == 2 * count
    assert max(peaks[1]) < 6_000_000, peaks
    for small, large in zip(*peaks, strict=True):
        assert large < small + 300_000, peaks


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_nearest_rows_are_those_of_a_full_search(tmp_path: Path, dtype: BankDtype) -> None:
    rows = unit_rows(5000, 16)
    rows[4000] = rows[10]  # equal ones come in the order of the bank
    reader = BankReader(write(tmp_path / "bank", rows, dtype))
    queries = np.concatenate([unit_rows(20, 16, 1), rows[10:11]])
    found = find_nearest(reader, queries, 7)
    scores = queries @ FeatureBank.load(reader.folder).rows().T
    expected = np.argsort(-scores, axis=1, kind="stable")[:, :7]
    assert np.array_equal(found.rows[:20], expected[:20])
    assert found.rows[20, :2].tolist() == [10, 4000]
    assert np.abs(found.scores - np.take_along_axis(scores, found.rows, axis=1)).max() < 1e-6
    with pytest.raises(
        ConfigError, match=r"k is larger than the number of images in the bank: .*at most 5000, got 5001"
    ):
        find_nearest(reader, queries, 5001)
    with pytest.raises(ConfigError, match="expected 16, got 15"):
        find_nearest(reader, queries[:, :15], 3)


def test_recall_of_other_dtypes(tmp_path: Path) -> None:
    source = BankReader(write(tmp_path / "bank", unit_rows(3000, 64)))
    queries = noisy_queries(source, 200)
    assert np.abs(np.linalg.norm(queries, axis=1) - 1).max() < 1e-5
    nearest = find_nearest(source, queries, 1)
    assert 0.4 < nearest.scores.mean() < 0.97  # near rows, and equal to none
    convert_bank(source.folder, tmp_path / "fp16", "fp16")
    convert_bank(source.folder, tmp_path / "int8", "int8")
    fp16 = measure_recall(source, BankReader(tmp_path / "fp16"), queries)
    int8 = measure_recall(source, BankReader(tmp_path / "int8"), queries)
    assert list(fp16) == [1, 5, 10]
    assert min(fp16.values()) > 0.995
    assert 0.95 < min(int8.values()) < 1
    other = BankReader(write(tmp_path / "other", unit_rows(3000, 64, 5)))
    assert max(measure_recall(source, other, queries).values()) < 0.05  # the measure can fail


def _clustered(path: Path) -> Path:
    """300 + 200 + 100 rows around three directions, one class after the other."""
    centers = unit_rows(3, 16, 3)
    rows = np.concatenate([np.repeat(centers[i : i + 1], n, 0) for i, n in enumerate((300, 200, 100))])
    rows = rows + 0.05 * np.random.default_rng(4).standard_normal(rows.shape, dtype=np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    names = ["cat"] * 300 + ["dog"] * 150 + ["puppy"] * 50 + ["sun"] * 100
    pictures = tuple(Picture(id=str(i), caption=name) for i, name in enumerate(names))
    path.mkdir()
    FeatureBank(rows.astype(np.float32), pictures, clip=CLIP).save(path)
    return path


def test_prototypes_are_the_middles_of_clusters(tmp_path: Path) -> None:
    source = _clustered(tmp_path / "bank")
    made = compact_bank(source, tmp_path / "prototypes", 3)
    assert [p.num_pictures for p in made.prototypes] == [300, 200, 100]
    assert [p.picture.caption for p in made.prototypes] == ["cat", "dog, puppy", "sun"]
    assert [p.picture.id for p in made.prototypes] == ["prototype-0001", "prototype-0002", "prototype-0003"]
    assert min(p.mean_cosine for p in made.prototypes) > 0.95
    bank = FeatureBank.load(tmp_path / "prototypes")
    assert (bank.kind, bank.clip) == ("prototypes", CLIP)
    assert bank.features.dtype == np.float32
    mean = FeatureBank.load(source).rows()[:300].mean(axis=0)
    assert np.dot(bank.rows()[0], mean) / np.linalg.norm(mean) > 0.9999
    again = compact_bank(source, tmp_path / "again", 3)
    assert FeatureBank.load(tmp_path / "again").sha256 == bank.sha256
    assert again.prototypes == made.prototypes


def test_more_prototypes_than_pictures(tmp_path: Path) -> None:
    source = write(tmp_path / "bank", unit_rows(20, 8))
    with pytest.raises(ConfigError, match=r"more prototypes than images: .*at most 20, got 21"):
        compact_bank(source, tmp_path / "out", 21)
    assert compact_bank(source, tmp_path / "out", 20).record.num_pictures == 20


def test_a_prototype_that_serves_nothing_is_left_out(tmp_path: Path) -> None:
    source = write(tmp_path / "bank", np.repeat(unit_rows(2, 8), 5, axis=0))
    with pytest.warns(UserWarning, match=r"of 4 prototypes had no images"):
        made = compact_bank(source, tmp_path / "out", 4)
    assert sum(prototype.num_pictures for prototype in made.prototypes) == 10
    assert len(made.prototypes) == made.record.num_pictures < 4
