"""Charts hold what they should: colors where answers are, pictures where objects are."""

import io
import zipfile
from pathlib import Path

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from PIL import Image

from xadapter_export.errors import CheckpointError, ConfigError
from xadapter_export.evaluation.charts import PAINTS, draw_confusion, draw_objects, paint
from xadapter_export.evaluation.color_answers import ColorAnswers
from xadapter_export.evaluation.objects import ELEVEN, ColoredObject
from xadapter_export.evaluation.opening import open_scorer
from xadapter_export.evaluation.readings import Reading
from xadapter_export.evaluation.thumbnails import load_thumbnails
from xadapter_export.runtime.answers import RetrievedPicture

MAGENTA = (255, 0, 255)


def picture(row: int, name: str = "a/b") -> RetrievedPicture:
    return RetrievedPicture(row, name, f"caption {row}", 0.5)


def make_answers(tiny: Path, said: list[list[str]], truth: list[str]) -> ColorAnswers:
    """P lists of n answers."""
    objects = tuple(
        ColoredObject(f"thing {i}", "a", f"things {i}", color, {color: 1.0}) for i, color in enumerate(truth)
    )
    index = [[ELEVEN.index(color) for color in colors] for colors in said]
    logits = np.eye(len(ELEVEN), dtype=np.float32)[index]
    return ColorAnswers(Reading("V-expert", open_scorer(tiny), "v"), objects, ELEVEN, logits)


def share_of(path: Path, color: str | tuple[int, ...]) -> float:
    """How much of a chart is painted in a color."""
    with Image.open(path) as image:
        pixels = np.asarray(image.convert("RGB")).astype(int)
    wanted = np.array(color if isinstance(color, tuple) else [round(255 * c) for c in to_rgb(paint(color))])
    return float((np.abs(pixels - wanted).max(-1) <= 2).mean())


def test_every_color_has_its_paint() -> None:
    assert len({PAINTS[color] for color in ELEVEN}) == 11
    assert paint("GREY") == paint("gray") == PAINTS["grey"]
    assert paint("mauve") not in PAINTS.values()


def test_confusion_shows_each_answer_in_its_color(tiny: Path, tmp_path: Path) -> None:
    answers = make_answers(tiny, [["red", "green"], ["red", "blue"]], ["red", "green"])
    draw_confusion([answers], tmp_path / "one.png")
    # Area is the share of the questions about that color: all, half and half.
    red, green, blue = (share_of(tmp_path / "one.png", color) for color in ("red", "green", "blue"))
    assert red == pytest.approx(2 * green, rel=0.2)
    assert green == pytest.approx(blue, rel=0.2)
    assert blue > 0.0005
    assert share_of(tmp_path / "one.png", "orange") == 0
    draw_confusion([answers, answers], tmp_path / "two.png")
    with Image.open(tmp_path / "one.png") as one, Image.open(tmp_path / "two.png") as two:
        assert two.width > 1.8 * one.width


@pytest.mark.parametrize("count", [2, 7, 11])
@pytest.mark.parametrize("panels", [1, 2])
def test_no_label_is_cut(tiny: Path, tmp_path: Path, count: int, panels: int) -> None:
    objects = make_answers(tiny, [["red"]], ["red"]).objects
    logits = np.ones((1, 1, count), np.float32)
    reading = Reading("V-expert, shuffled memory", open_scorer(tiny), "v")
    one = ColorAnswers(reading, objects, ("red", *(c for c in ELEVEN if c != "red"))[:count], logits)
    draw_confusion([one] * panels, tmp_path / "confusion.png")
    with Image.open(tmp_path / "confusion.png") as image:
        pixels = np.asarray(image.convert("RGB")).astype(int)
    paper = pixels[-1, -1]
    edges = (pixels[:2], pixels[-2:], pixels[:, :2], pixels[:, -2:])
    assert max(np.abs(edge - paper).max() for edge in edges) == 0


def test_objects_show_what_was_right_and_what_was_said_instead(tiny: Path, tmp_path: Path) -> None:
    answers = make_answers(tiny, [["red", "blue"], ["red", "blue"]], ["red", "green"])
    draw_objects(answers, ((), ()), {}, tmp_path / "objects.png")
    red, green, blue = (share_of(tmp_path / "objects.png", color) for color in ("red", "green", "blue"))
    assert red > 2 * blue > 8 * green > 0  # a bar, a thin bar, and only the mark of the true color


def test_objects_show_pictures_or_else_captions(tiny: Path, tmp_path: Path) -> None:
    answers = make_answers(tiny, [["red", "blue"]], ["red", "green"])
    seen = ((picture(0), picture(1)), (picture(1), picture(2)))
    image = np.full((64, 48, 4), (*MAGENTA, 255), np.uint8)
    draw_objects(answers, seen, {0: image, 1: image}, tmp_path / "some.png")
    draw_objects(answers, seen, {0: image, 1: image, 2: image}, tmp_path / "all.png")
    draw_objects(answers, seen, {}, tmp_path / "none.png")
    with Image.open(tmp_path / "all.png") as drawn:
        columns = (np.abs(np.asarray(drawn.convert("RGB")).astype(int) - MAGENTA).max(-1) <= 2).any(0)
    assert columns.argmax() < 0.75 * len(columns)  # next to the bars, with no wide gap
    some, every, none = (share_of(tmp_path / f"{name}.png", MAGENTA) for name in ("some", "all", "none"))
    assert every == pytest.approx(2 * some, rel=0.1)  # an object with a picture that is missing has captions
    assert some > none == 0


def test_very_many_objects_are_thinned_out(tiny: Path, tmp_path: Path) -> None:
    answers = make_answers(tiny, [["red"] * 400], ["red"] * 400)
    draw_objects(answers, ((),) * 400, {}, tmp_path / "objects.png")
    with Image.open(tmp_path / "objects.png") as image:
        assert image.width < 4000
        assert image.height < 2000


def save(path: Path, color: tuple[int, ...], size: tuple[int, int] = (200, 100)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).save(path, format="PNG")


def test_pictures_are_found_by_id(tmp_path: Path) -> None:
    save(tmp_path / "pictures" / "a" / "b.png", MAGENTA)
    save(tmp_path / "pictures" / "plain", (0, 0, 255))
    save(tmp_path / "secret.png", (1, 2, 3))
    (tmp_path / "pictures" / "broken.jpg").write_bytes(b"no picture")
    names = ["a/b", "plain", "../secret", "broken", "missing"]
    wanted = [picture(row, name) for row, name in enumerate(names)]
    found = load_thumbnails(tmp_path / "pictures", wanted, side=50)
    assert sorted(found) == [0, 1]  # an id that leads out of the folder is not followed
    assert found[0].shape == (25, 50, 4)
    assert found[0][0, 0].tolist() == [*MAGENTA, 255]
    assert load_thumbnails(None, wanted) == {}


def test_pictures_are_found_in_a_bank(tmp_path: Path) -> None:
    stream = io.BytesIO()
    Image.new("RGB", (8, 8), MAGENTA).save(stream, format="WEBP", lossless=True)
    with zipfile.ZipFile(tmp_path / "thumbnails.zip", "w") as archive:
        archive.writestr("7.webp", stream.getvalue())
        archive.writestr("8.webp", stream.getvalue())
    for source in (tmp_path, tmp_path / "thumbnails.zip"):
        found = load_thumbnails(source, [picture(7), picture(9)])
        assert list(found) == [7]
        assert found[7][0, 0].tolist() == [*MAGENTA, 255]


def test_pictures_that_cannot_be_had(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no images found"):
        load_thumbnails(tmp_path / "nowhere", [picture(0)])
    (tmp_path / "thumbnails.zip").write_bytes(b"no zip")
    with pytest.raises(CheckpointError, match="the thumbnails cannot be read"):
        load_thumbnails(tmp_path, [picture(0)])
