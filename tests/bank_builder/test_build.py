"""Building a bank: every kind of source and picture, and stops of every kind, on the built-in CLIP."""

import errno
import io
import json
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import save_file as save_numpy_file
from safetensors.torch import load_file, save_file

from tests.tiny_checkpoint import make_clip, make_model
from xadapter_export.bank import FeatureBank
from xadapter_export.bank.reader import BankReader
from xadapter_export.bank_builder import build, work_folder
from xadapter_export.bank_builder.build import BuildSettings, build_bank, work_folder_of
from xadapter_export.bank_builder.decode import UndecodableError, decode_picture
from xadapter_export.bank_builder.image_tower import ImageTower, choose_device, load_image_tower
from xadapter_export.bank_builder.sources import DatasetColumns, open_source
from xadapter_export.bundle.folder import sha256_file
from xadapter_export.errors import (
    CheckpointError,
    ConfigError,
    OutputExistsError,
    OutputWriteError,
)
from xadapter_export.model.builtin import builtin_folder
from xadapter_export.model.config import XAdapterConfig
from xadapter_export.model.x_adapter_model import XAdapterModel

FAST: dict[str, Any] = {"workers": 0, "device": "cpu", "dtype": "fp32"}


def picture(seed: int = 0, size: tuple[int, int] = (70, 90)) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 255, (*size, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((size[1] * 2, size[0] * 2))


def encoded(image: Image.Image, kind: str = "png", **settings: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **settings)
    return stream.getvalue()


def fill(folder: Path, count: int, start: int = 0) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(start, start + count):
        picture(i, (20, 24)).save(folder / f"thing_{i:03}.png")
    return folder


def make(source: Path | Sequence[str], output: Path, **settings: Any) -> FeatureBank:
    force, columns = settings.pop("force", False), settings.pop("columns", None)
    sources = [str(source)] if isinstance(source, Path) else source
    result = build_bank(sources, output, BuildSettings(**{**FAST, **settings}), force=force, columns=columns)
    assert result is not None
    assert not work_folder_of(output).exists()
    return FeatureBank.load(output)


@pytest.fixture(scope="module")
def tower() -> ImageTower:
    return load_image_tower(None, device=choose_device("cpu"), precision="fp32")


@pytest.fixture(scope="module")
def reference(tower: ImageTower) -> Callable[[Image.Image], np.ndarray]:
    """What open_clip itself makes of a picture."""
    del tower
    import open_clip  # after load_image_tower has cured torchvision

    clip = builtin_folder() / "clip"
    model, preprocess = open_clip.create_model_from_pretrained(f"local-dir:{clip}")

    def encode(image: Image.Image) -> np.ndarray:
        with torch.inference_mode():
            return model.eval().encode_image(preprocess(image)[None], normalize=True)[0].numpy()  # type: ignore[no-any-return]  # open_clip

    return encode


def test_a_folder_gives_the_features_of_open_clip(tmp_path: Path, reference: Any) -> None:
    source = fill(tmp_path / "pictures" / "b", 3)
    fill(tmp_path / "pictures" / "a", 2)
    picture(9).save(tmp_path / "pictures" / "b" / "0042.jpg")
    (tmp_path / "pictures" / ".hidden.png").write_bytes(b"not taken")
    bank = make(tmp_path / "pictures", tmp_path / "bank")
    assert [(p.id, p.caption) for p in bank.pictures] == [
        ("a/thing_000.png", "thing 000"),
        ("a/thing_001.png", "thing 001"),
        ("b/0042.jpg", "b"),  # digits say nothing, the folder does
        ("b/thing_000.png", "thing 000"),
        ("b/thing_001.png", "thing 001"),
        ("b/thing_002.png", "thing 002"),
    ]
    for row, name in [(2, "0042.jpg"), (5, "thing_002.png")]:
        assert np.abs(bank.rows()[row] - reference(Image.open(source / name))).max() < 2e-6
    assert not (tmp_path / "bank" / "skipped.jsonl").exists()


def test_the_clip_is_recorded_by_name_and_hash(tmp_path: Path, tower: ImageTower) -> None:
    source = fill(tmp_path / "pictures", 2)
    own = Path(shutil.copytree(builtin_folder() / "clip", tmp_path / "secret" / "my-clip"))
    (own / "unused.bin").write_bytes(b"a pickle that nobody reads")
    bank = make(source, tmp_path / "bank", clip=str(own))
    recorded = json.loads((builtin_folder() / "xadapter.json").read_text())["clip"]["sha256"]
    assert bank.clip is not None
    assert (bank.clip.source, bank.clip.sha256) == ("my-clip", recorded)
    assert tower.clip.source == "built-in/clip"
    assert (tower.clip.sha256, tower.clip.image_sha256) == (recorded, bank.clip.image_sha256)
    assert "secret" not in "".join(path.read_text("latin-1") for path in (tmp_path / "bank").iterdir())

    config = json.loads((own / "open_clip_config.json").read_text())
    (own / "open_clip_config.json").write_text(json.dumps(config["model_cfg"]))  # open_clip's own layout
    again = load_image_tower(str(own), device=choose_device("cpu"), precision="fp32")
    assert (again.clip.sha256, again.clip.image_sha256) == (bank.clip.sha256, bank.clip.image_sha256)

    config["preprocess_cfg"]["mean"] = [0.5, 0.5, 0.5]
    (own / "open_clip_config.json").write_text(json.dumps(config))
    other = load_image_tower(str(own), device=choose_device("cpu"), precision="fp32")
    assert other.clip.sha256 == bank.clip.sha256
    assert other.clip.image_sha256 != bank.clip.image_sha256


def test_clips_that_cannot_encode_pictures(tmp_path: Path) -> None:
    source = fill(tmp_path / "pictures", 1)
    make_clip().save(tmp_path / "text-only")
    damaged = Path(shutil.copytree(builtin_folder() / "clip", tmp_path / "damaged"))
    (damaged / "open_clip_config.json").write_text('{"model_cfg": {"embed_dim": 8}}')
    poisoned = Path(shutil.copytree(builtin_folder() / "clip", tmp_path / "poisoned"))
    weights = load_file(poisoned / "open_clip_model.safetensors")
    weights["visual.proj"][:] = float("nan")
    save_file(weights, poisoned / "open_clip_model.safetensors")
    for clip, message in [
        ("text-only", "has only its text tower"),
        ("damaged", "open_clip_config.json cannot be read"),
        ("nowhere", "neither a folder nor a reachable hub id"),
        ("poisoned", "no usable feature for an image: thing_000.png .*got nan"),
    ]:
        with pytest.raises(CheckpointError, match=message):
            make(source, tmp_path / "bank", clip=str(tmp_path / clip))
    assert not (tmp_path / "bank").exists()
    for settings, message in [
        ({"device": "cuda:9"}, "no such device: cuda:9"),
        ({"device": "abacus"}, "no such device: abacus"),
        ({"precision": "fp16"}, "fp16 is slow and inexact on a CPU"),
    ]:
        with pytest.raises(ConfigError, match=message):
            make(source, tmp_path / "bank", **settings)


def test_no_link_is_made_which_windows_allows_to_few(
    monkeypatch: pytest.MonkeyPatch, tower: ImageTower
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError("a required privilege is not held by the client")

    monkeypatch.setattr("os.symlink", refuse)
    again = load_image_tower(None, device=choose_device("cpu"), precision="fp32")
    assert again.clip == tower.clip
    pixels = torch.rand(2, 3, 64, 64)
    assert torch.equal(again.encode(pixels), tower.encode(pixels))


def test_half_precision_is_near(tmp_path: Path) -> None:
    source = fill(tmp_path / "pictures", 4)
    exact, half = make(source, tmp_path / "exact"), make(source, tmp_path / "half", precision="bf16")
    cosines = (exact.rows() * half.rows()).sum(axis=1)
    assert cosines.min() > 0.999
    assert cosines.max() < 1 - 1e-7  # it did compute in another precision


def _upright_and_turned() -> tuple[Image.Image, bytes]:
    upright = picture(1)
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees to see it upright
    return upright, encoded(upright.transpose(Image.Transpose.ROTATE_90), exif=exif)


def test_pictures_of_every_kind_become_upright_rgb() -> None:
    plain = picture(1)
    gray = plain.convert("L")
    deep = Image.fromarray(np.asarray(gray).astype(np.uint16) * 257)
    whole = Image.fromarray(np.asarray(gray).astype(np.int32) * 257)
    real = Image.fromarray(np.asarray(gray).astype(np.float32) / 255)
    clear = plain.copy()
    clear.putalpha(0)
    upright, turned = _upright_and_turned()
    palette = plain.quantize(16)
    cases: list[tuple[bytes, Image.Image, int]] = [
        (encoded(plain), plain, 0),
        (encoded(gray), gray, 0),
        (encoded(deep), gray, 1),
        (encoded(whole, "tiff"), gray, 1),
        (encoded(real, "tiff"), gray, 1),
        (encoded(palette), palette, 0),
        (encoded(clear), Image.new("RGB", plain.size, "white"), 0),
        (encoded(plain.convert("1")), plain.convert("1"), 0),
        (encoded(plain.convert("CMYK"), "jpeg", quality=100, subsampling=0), plain, 24),
        (encoded(plain, "gif", save_all=True, append_images=[Image.new("RGB", plain.size)]), plain, 80),
        (encoded(Image.new("RGB", (1, 1), "red")), Image.new("RGB", (1, 1), "red"), 0),
        (turned, upright, 0),
    ]
    for data, expected, tolerance in cases:
        decoded = decode_picture(data, 64)
        assert (decoded.mode, decoded.size) == ("RGB", expected.size)
        difference = np.asarray(decoded).astype(int) - np.asarray(expected.convert("RGB")).astype(int)
        assert np.abs(difference).max() <= tolerance, (data[:8], np.abs(difference).max())
    with_hole = plain.quantize(16)
    data = encoded(with_hole, transparency=with_hole.getpixel((0, 0)))
    assert decode_picture(data, 64).getpixel((0, 0)) == (255, 255, 255)


def test_what_is_no_picture_is_skipped_with_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = encoded(picture(1), "jpeg")
    strip = encoded(Image.new("RGB", (60_000, 1)))
    cases = [
        (b"", "empty file"),
        (b"hello", "not an image that Pillow can read"),
        (whole[: len(whole) // 2], "damaged: .*truncated"),
        (encoded(picture(1))[:300], "damaged: "),
        (strip, "too long for its width: 60000 x 1 pixels"),
    ]
    for data, reason in cases:
        with pytest.raises(UndecodableError, match=reason):
            decode_picture(data, 64)
    for pixels in (20_000, 5_000):  # Pillow warns of the one and refuses the other
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", pixels)
        with pytest.raises(UndecodableError, match=r"too large: Image size .25200 pixels. exceeds limit"):
            decode_picture(whole, 16)


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """Five pictures among four that are none."""
    folder = fill(tmp_path / "mixed", 2)
    whole = encoded(picture(1), "jpeg")
    (folder / "a-truncated.jpg").write_bytes(whole[: len(whole) // 2])
    (folder / "b-zero.png").write_bytes(b"")
    (folder / "notes.txt").write_text("not a picture")
    (folder / "missing.png").symlink_to(tmp_path / "nowhere.png")
    picture(3).convert("CMYK").save(folder / "cmyk.jpg")
    Image.new("RGB", (1, 1)).save(folder / "one-pixel.png")
    picture(4).save(folder / "moving.gif", save_all=True, append_images=[picture(5)])
    return folder


def test_undecodable_pictures_are_skipped_listed_and_counted(mixed: Path, tmp_path: Path) -> None:
    bank = make(mixed, tmp_path / "bank", batch_size=2)
    assert [p.id for p in bank.pictures] == [
        *("cmyk.jpg", "moving.gif", "one-pixel.png", "thing_000.png", "thing_001.png")
    ]
    assert bank.num_skipped == 4
    skipped = [json.loads(line) for line in (tmp_path / "bank" / "skipped.jsonl").read_text().splitlines()]
    assert [line["id"] for line in skipped] == ["a-truncated.jpg", "b-zero.png", "missing.png", "notes.txt"]
    assert [line["reason"].split(":")[0] for line in skipped] == [
        *("damaged", "empty file", "no such file", "not an image that Pillow can read")
    ]
    assert str(tmp_path) not in json.dumps(skipped)


def test_strict_refuses_and_keeps_what_was_done(mixed: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"4 of 9 images cannot be decoded; the first is: a-truncated.jpg \(damaged: "
    ):
        make(mixed, tmp_path / "bank", strict=True)
    assert not (tmp_path / "bank").exists()
    result = build_bank([str(mixed)], tmp_path / "bank", BuildSettings(**FAST))
    assert result is not None
    assert (result.num_resumed_shards, result.record.num_skipped) == (1, 4)


def test_sources_without_a_picture(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="the source has no images"):
        make(tmp_path / "empty", tmp_path / "bank")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "x.png").write_bytes(b"no")
    with pytest.raises(ConfigError, match=r"1 of 1 images cannot be decoded; the first is: x.png"):
        make(tmp_path / "bad", tmp_path / "bank")
    with pytest.raises(ConfigError, match="no such source"):
        make(tmp_path / "nothing", tmp_path / "bank")
    shutil.rmtree(work_folder_of(tmp_path / "bank"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad", "empty"]


def test_a_build_inside_its_own_source_lists_only_pictures(tmp_path: Path) -> None:
    fill(tmp_path, 3)
    assert len(make(tmp_path, tmp_path / "bank").pictures) == 3
    assert len(make(tmp_path, tmp_path / "bank", force=True).pictures) == 3


def _ids(source: Any) -> list[tuple[str, str]]:
    return [(row.id, row.caption) for row in source.rows()]


def test_lists_of_pictures(tmp_path: Path) -> None:
    fill(tmp_path / "lists" / "in", 1)
    fill(tmp_path / "out", 1)
    outside = tmp_path / "out" / "thing_000.png"
    names = ["in/thing_000.png", "../out/thing_000.png", str(outside)]
    lists = tmp_path / "lists"
    (lists / "list.txt").write_text("\n".join([names[0], "", *names[1:]]), encoding="utf-8-sig")
    (lists / "list.csv").write_text(
        'caption,path\n"a, b",' + names[0] + f"\nc,{names[1]}\n\u00e9,{names[2]}\n"
    )
    (lists / "list.jsonl").write_text(
        "".join(
            json.dumps({"path": n, "caption": c, "more": 1}) + "\n" for n, c in zip(names, "xyz", strict=True)
        )
    )
    captions = {"list.txt": ["thing 000"] * 3, "list.csv": ["a, b", "c", "\u00e9"], "list.jsonl": [*"xyz"]}
    for name, expected in captions.items():
        source = open_source([str(lists / name)], dataset=None, columns=DatasetColumns())
        rows = list(source.rows())
        assert [row.caption for row in rows] == expected
        assert [row.id for row in rows[:2]] == ["in/thing_000.png", "../out/thing_000.png"]
        assert rows[2].id.startswith("elsewhere/")
        assert str(tmp_path) not in rows[2].id
        assert [source.read(row) for row in rows] == [outside.read_bytes()] * 3
    assert len(make(lists / "list.csv", tmp_path / "bank").pictures) == 3


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.csv", "path,title\nx.png,t\n", "column 'caption' is missing: .*a.csv, line 1 .*got path, title"),
        (
            "a.jsonl",
            '{"path": "x", "caption": "c"}\n{"caption": "c"}\n',
            "column 'path' is missing: .*line 2",
        ),
        ("b.jsonl", '{"path": \n', "not JSON: .*line 1"),
        ("c.jsonl", '{"path": "x", "caption": 3}\n', "path and caption must be strings: .*line 1"),
        ("d.csv", "path,caption\nx.png\n", "path and caption must be strings: .*line 2"),
        ("e.bin", "\0\0\0", "the list of images is not a text file"),
        ("f.tar", "this is not a tar" * 100, "the shard cannot be read: .*f.tar"),
        ("g.tar.gz", "", "compressed shards are not supported"),
    ],
)
def test_lists_that_are_wrong(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match=message):
        make(tmp_path / name, tmp_path / "bank")
    assert not (tmp_path / "bank").exists()


def write_tar(path: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


def test_webdataset_shards(tmp_path: Path, reference: Any) -> None:
    for shard in range(3):
        write_tar(
            tmp_path / f"shard-{shard:03}.tar",
            {
                "000.jpg": encoded(picture(shard), "jpeg"),
                "000.txt": b" a first picture\n",
                "sub/001.json": b'{"caption": "a second picture"}',
                "sub/001.png": encoded(picture(shard + 10)),
                "red_rose.webp": encoded(picture(shard + 20), "webp"),
                "nothing.cls": b"3",
            },
        )
    expected = [
        ("000.jpg", "a first picture"),
        ("sub/001.png", "a second picture"),
        ("red_rose.webp", "red rose"),
    ]
    for patterns in (
        [str(tmp_path / "shard-{000..002}.tar")],
        [str(tmp_path / "shard-*.tar")],
        [str(tmp_path / f"shard-{shard:03}.tar") for shard in range(3)],
    ):
        source = open_source(patterns, dataset=None, columns=DatasetColumns())
        assert _ids(source) == [(f"shard-{s:03}/{name}", text) for s in range(3) for name, text in expected]
    bank = make([str(tmp_path / "shard-{001..002}.tar")], tmp_path / "bank", workers=1)
    assert len(bank.pictures) == 6
    assert np.abs(bank.rows()[1] - reference(picture(11))).max() < 2e-6
    with pytest.raises(ConfigError, match=r"no such source: .*shard-003.tar"):
        make([str(tmp_path / "shard-{002..003}.tar")], tmp_path / "other")
    cut = tmp_path / "cut.tar"
    cut.write_bytes((tmp_path / "shard-000.tar").read_bytes()[:3000])
    with pytest.raises(ConfigError, match=r"the shard cannot be read: .*cut.tar"):
        make(cut, tmp_path / "other")
    with pytest.raises(ConfigError, match=r"several sources must all be .tar shards"):
        make([str(cut), str(tmp_path)], tmp_path / "other")


def test_a_saved_dataset(tmp_path: Path, reference: Any) -> None:
    import datasets

    files = fill(tmp_path / "pictures", 4)
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "caption": datasets.Value("string"),
            "label": datasets.ClassLabel(names=["a_b", "c"]),
        }
    )
    data = datasets.Dataset.from_dict(
        {
            "image": [str(path) for path in sorted(files.iterdir())],
            "caption": list("wxyz"),
            "label": [0, 1, 0, 1],
        },
        features=features,
    )
    data.save_to_disk(str(tmp_path / "saved"))
    datasets.DatasetDict({"train": data, "test": data}).save_to_disk(str(tmp_path / "splits"))
    bank = make(tmp_path / "saved", tmp_path / "bank", workers=1)
    assert [(p.id, p.caption) for p in bank.pictures][1:3] == [("row/00000001", "x"), ("row/00000002", "y")]
    assert np.abs(bank.rows()[3] - reference(picture(3, (20, 24)))).max() < 2e-6
    labeled = DatasetColumns("test", caption="label")
    source = open_source([str(tmp_path / "splits")], dataset=None, columns=labeled)
    assert _ids(source)[0] == ("test/00000000", "a b")
    for columns, message in [
        (DatasetColumns(), r"the dataset has several splits: .* \(expected train, test, got none\)"),
        (DatasetColumns("train", caption="text"), "column 'text' is missing: .*got image, caption, label"),
        (DatasetColumns("train", image="label"), "column 'label' holds no images"),
    ]:
        with pytest.raises(ConfigError, match=message):
            make(tmp_path / "splits", tmp_path / "other", columns=columns)


def test_thumbnails_are_numbered_as_rows(mixed: Path, tmp_path: Path) -> None:
    bank = make(mixed, tmp_path / "bank", thumbnail_px=32, shard_rows=4, batch_size=3)
    with zipfile.ZipFile(tmp_path / "bank" / "thumbnails.zip") as archive:
        assert archive.namelist() == [f"{row}.webp" for row in range(len(bank.pictures))]
        shown = Image.open(io.BytesIO(archive.read("3.webp")))
    assert max(shown.size) == 32
    expected = np.asarray(picture(0, (20, 24)).resize(shown.size)).mean(axis=(0, 1))
    assert np.abs(np.asarray(shown.convert("RGB")).mean(axis=(0, 1)) - expected).max() < 12


def test_no_space_left_keeps_the_shards_so_far(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = fill(tmp_path / "pictures", 12)
    calls: list[object] = []

    def fills_up(*arguments: Any) -> None:
        calls.append(arguments)
        if len(calls) > 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        save_numpy_file(*arguments)

    monkeypatch.setattr(work_folder, "save_file", fills_up)
    with pytest.raises(OutputWriteError, match="finished shards are kept") as caught:
        make(source, tmp_path / "bank", shard_rows=4)
    assert "No space left on device" in str(caught.value)
    assert "\n" not in str(caught.value)
    monkeypatch.undo()
    result = build_bank([str(source)], tmp_path / "bank", BuildSettings(**FAST, shard_rows=4))
    assert result is not None
    assert (result.num_resumed_shards, result.record.num_pictures) == (2, 12)


def test_a_stopped_build_goes_on_only_with_the_same_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, output = fill(tmp_path / "pictures", 9), tmp_path / "bank"

    def stop(done: int, _total: int) -> None:
        if done > 4:
            raise KeyboardInterrupt

    settings = BuildSettings(**FAST, shard_rows=4)
    with pytest.raises(KeyboardInterrupt):
        build_bank([str(source)], output, settings, on_pictures=stop)
    assert not output.exists()
    with pytest.raises(ConfigError, match=r"an unfinished build with other settings: .*different batch size"):
        make(source, output, shard_rows=4, batch_size=3)
    fill(source, 1, start=9)
    with pytest.raises(
        ConfigError, match=r"got different listing\); finish that build, remove .*bank.build, or start"
    ):
        make(source, output, shard_rows=4)
    (source / "thing_009.png").unlink()
    before = {path: path.stat().st_mtime_ns for path in work_folder_of(output).rglob("shards/*")}
    notes: list[str] = []
    encoded_batches: list[int] = []
    result = build_bank(
        [str(source)],
        output,
        BuildSettings(**{**FAST, "dtype": "int8"}, shard_rows=4),  # what is stored may still be chosen
        on_note=notes.append,
        on_pictures=lambda done, _total: encoded_batches.append(done),
    )
    assert result is not None
    assert before
    assert result.num_resumed_shards == len(before)
    assert any(f"resuming: {len(before)} shard" in note for note in notes)
    assert min(encoded_batches) > 4 * len(before)
    assert [p.id for p in FeatureBank.load(output).pictures] == [f"thing_{i:03}.png" for i in range(9)]


def test_force_starts_again(tmp_path: Path) -> None:
    source, output = fill(tmp_path / "pictures", 5), tmp_path / "bank"
    with pytest.raises(ConfigError, match="cannot be decoded"):
        (source / "bad.png").write_bytes(b"x")
        make(source, output, strict=True)
    (source / "bad.png").unlink()
    with pytest.raises(ConfigError, match="different listing"):
        make(source, output)
    assert len(make(source, output, force=True).pictures) == 5
    with pytest.raises(OutputExistsError, match="the output path already exists"):
        make(source, output)


def test_what_is_not_ours_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = fill(tmp_path / "pictures", 1)
    monkeypatch.setattr(build, "load_image_tower", lambda *_a, **_k: pytest.fail("it should not get so far"))
    (tmp_path / "bank").mkdir()
    (tmp_path / "bank" / "thesis.txt").write_text("years of work")
    for force, message in [(False, "already exists"), (True, "xadapter-export did not write")]:
        with pytest.raises(OutputExistsError, match=message):
            make(source, tmp_path / "bank", force=force)
    monkeypatch.undo()
    (tmp_path / "other.build").mkdir()
    (tmp_path / "other.build" / "thesis.txt").write_text("years of work")
    with pytest.raises(OutputExistsError, match="holds something else"):
        make(source, tmp_path / "other", force=True)
    assert (tmp_path / "bank" / "thesis.txt").is_file()
    assert (tmp_path / "other.build" / "thesis.txt").is_file()


def test_shards_and_workers_change_no_bit(tmp_path: Path) -> None:
    source = fill(tmp_path / "pictures", 23)
    (source / "thing_005.png").write_bytes(b"damaged")
    banks = [
        make(source, tmp_path / f"{workers}", workers=workers, shard_rows=8, batch_size=3)
        for workers in (0, 2)
    ]
    assert len(banks[0].pictures) == 22
    for name in ("bank.safetensors", "bank.jsonl", "skipped.jsonl"):
        assert sha256_file(tmp_path / "0" / name) == sha256_file(tmp_path / "2" / name)


_SLOW_BUILD = """
import sys, time
from pathlib import Path
from xadapter_export.bank_builder.build import BuildSettings, build_bank
settings = BuildSettings(workers=int(sys.argv[3]), device="cpu", threads=1, shard_rows=5, batch_size=5)
build_bank([sys.argv[1]], Path(sys.argv[2]), settings, on_pictures=lambda *_: time.sleep(0.3))
"""


def test_a_killed_build_loses_and_doubles_no_picture(tmp_path: Path) -> None:
    source, output = fill(tmp_path / "pictures", 40), tmp_path / "bank"
    (source / "thing_007.png").write_bytes(b"damaged")
    line = [sys.executable, "-c", _SLOW_BUILD, str(source), str(output), "1"]
    shards = work_folder_of(output) / "shards"
    process = subprocess.Popen(line, stderr=subprocess.PIPE)
    try:
        deadline = time.monotonic() + 60
        while not (shards / "000002").is_dir():
            assert process.poll() is None, process.stderr and process.stderr.read().decode()
            assert time.monotonic() < deadline
            time.sleep(0.02)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
        if process.stderr:
            process.stderr.close()
    assert not output.exists()
    torch.set_num_threads(1)
    settings = BuildSettings(workers=0, device="cpu", threads=1, shard_rows=5, batch_size=5)
    result = build_bank([str(source)], output, settings)
    assert result is not None
    assert 3 <= result.num_resumed_shards < 8
    names = [p.id for p in FeatureBank.load(output).pictures]
    assert names == [f"thing_{i:03}.png" for i in range(40) if i != 7]
    build_bank([str(source)], tmp_path / "at-once", settings)
    assert sha256_file(output / "bank.safetensors") == sha256_file(tmp_path / "at-once" / "bank.safetensors")


def test_two_processes_make_the_same_bank_as_one(tmp_path: Path) -> None:
    files = sorted(fill(tmp_path / "pictures", 20).iterdir())
    (tmp_path / "list.txt").write_text(
        "".join(f"{files[i * 7 % 20]}\n" for i in range(2200)) + "missing.png\n"
    )
    build_line = ["xadapter_export.cli.bank", "build", str(tmp_path / "list.txt"), "--device", "cpu"]
    build_line += ["--workers", "0", "--threads", "1", "--dtype", "fp32", "--json"]
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    for name, launcher in (("one", []), ("two", launch)):
        line = [sys.executable, *launcher, "-m", *build_line, "-o", str(tmp_path / name)]
        result = subprocess.run(line, capture_output=True, text=True, check=False, timeout=100)
        assert result.returncode == 0, result.stderr
        assert json.loads(result.stdout)["record"]["num_pictures"] == 2200
    for name in ("bank.safetensors", "bank.jsonl", "skipped.jsonl"):
        assert sha256_file(tmp_path / "one" / name) == sha256_file(tmp_path / "two" / name)
    assert BankReader(tmp_path / "two").num_skipped == 1


def test_the_launcher_of_accelerate_starts_a_build(tmp_path: Path) -> None:
    fill(tmp_path / "pictures", 3)
    line = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    line += ["-m", "xadapter_export.cli.bank", "build", str(tmp_path / "pictures"), "--device", "cpu"]
    line += ["--workers", "0", "--threads", "1", "--json", "-o", str(tmp_path / "bank")]
    result = subprocess.run(line, capture_output=True, text=True, check=False, timeout=100)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["record"]["num_pictures"] == 3  # one process speaks
    assert BankReader(tmp_path / "bank").num_pictures == 3


@pytest.mark.parametrize("dtype", ["fp32", "int8"])
def test_a_model_takes_a_bank_of_its_own_clip_only(tmp_path: Path, dtype: str) -> None:
    bank = make(fill(tmp_path / "pictures", 6), tmp_path / "bank", dtype=dtype)
    plm = make_model(tmp_path / "plm").plm.model
    config = XAdapterConfig(experts="v", layers=(1,), adapter_width=16, num_heads=2)
    model = XAdapterModel.create(plm, builtin_folder() / "clip", config, bank)
    assert torch.allclose(model.bank_features, torch.from_numpy(bank.rows()), atol=1e-6)
    model.save_pretrained(tmp_path / "checkpoint", self_contained=True)
    again = XAdapterModel.from_pretrained(tmp_path / "checkpoint")
    assert again.bank is not None
    assert (again.bank.clip, again.bank.sha256) == (bank.clip, bank.sha256)
    wide = make_clip(embed_dim=128)
    wide.source = "another-clip"
    with pytest.raises(
        match=r"made with CLIP built-in/clip \(88d4087e1981\), and is searched with CLIP another-clip",
    ):
        XAdapterModel(config, model.plm, wide, bank)
