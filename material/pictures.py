"""Named pictures of objects: emoji artwork whose licenses allow shipping what is made from it.

N pictures, C colors (11).

Source:
    unicode-emoji-json and emojilib (MIT); Noto Emoji and Firefox OS Emoji (Apache-2.0); Fluent Emoji (MIT),
    as packed for npm by iconify. Color distributions: CoDa (Paik et al. 2021, Apache-2.0).
"""

import csv
import io
import json
import re
import subprocess
import tarfile
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import resvg_py
from numpy.typing import NDArray
from PIL import Image

from material.stages import Stages
from xadapter_export.evaluation.objects import ELEVEN

COLORS = ELEVEN
_COLOR_WORDS = frozenset(
    (
        *COLORS,
        "gray",
        "color",
        "color",
        "colorful",
        "gold",
        "golden",
        "silver",
        "violet",
        "crimson",
        "scarlet",
        "turquoise",
    )
)
_CODA_FILE = Path(__file__).with_name("coda_colors.csv")
_CLOCK_FACE = re.compile(r"o.clock|-thirty")


@dataclass(frozen=True)
class DemoObject:
    """One kind of thing.

    Attributes:
        name: What its pictures are called, without color words.
        names: All that it is called: ``name``, CoDa's singular and plural. Captions draw from these.
        keywords: Words that people associate with it, without color words.
        group: The Unicode group, such as "Food & Drink".
        coda_name: CoDa's name of it, or None where CoDa does not know it.
        color_shares: Share of CoDa's annotators' color mass, in the order of ``COLORS``; empty without CoDa.
    """

    name: str
    names: tuple[str, ...]
    keywords: tuple[str, ...]
    group: str
    coda_name: str | None
    color_shares: tuple[float, ...]

    @property
    def color(self) -> str | None:
        """The color that most of CoDa's annotators' mass is on."""
        return COLORS[int(np.argmax(self.color_shares))] if self.color_shares else None


@dataclass(frozen=True)
class Material:
    """All objects and their pictures.

    Attributes:
        objects: Every object has at least one picture.
        images: ``(N, size, size, 3) uint8``. RGB on white.
        coverage: ``(N, size, size) uint8``. How much of each pixel the drawing covers.
        object_of: ``(N,) int64``. Row of ``objects`` that each picture shows.
        picture_ids: N names, "<icon set>/<icon>".
    """

    objects: tuple[DemoObject, ...]
    images: NDArray[np.uint8]
    coverage: NDArray[np.uint8]
    object_of: NDArray[np.int64]
    picture_ids: tuple[str, ...]


def without_color_words(text: str) -> str:
    """Drop color words, punctuation other than hyphens, and the "face" that ends "dog face"."""
    words = [
        word
        for word in re.sub(r"[^\w -]", "", text.lower()).split()
        if _COLOR_WORDS.isdisjoint(word.split("-"))
    ]
    return " ".join(words[:-1] if len(words) > 1 and words[-1] == "face" else words)


def pack_packages(packages: Sequence[str], folder: Path) -> None:
    """Fetch npm packages with the npm client and unpack each into its folder, licenses included."""
    for spec in packages:
        done = subprocess.run(
            ["npm", "pack", "--silent", "--json", spec],
            cwd=folder,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise RuntimeError(
                f"`npm pack {spec}` in {folder} failed with {done.returncode}: {done.stderr.strip()}"
            )
        archive = folder / json.loads(done.stdout)[0]["filename"].replace("@", "").replace("/", "-")
        with tarfile.open(archive) as tar:
            tar.extractall(folder / _folder_name(spec), filter="data")
        archive.unlink()


def gather_material(stages: Stages, recipe: Mapping[str, Any]) -> Material:
    """Fetch the packages and draw the pictures, unless both were kept from an earlier run.

    Args:
        stages: Where the stages ``npm`` and ``pictures`` are kept.
        recipe: Sections ``pictures`` and ``coda_names`` of this folder's ``recipe.toml``.
    """
    settings, coda_names = recipe["pictures"], recipe["coda_names"]
    packages = settings["packages"]
    npm = stages.run("npm", packages, (), lambda folder: pack_packages(packages, folder))
    folder = stages.run(
        "pictures",
        [settings, coda_names],
        ("npm",),
        lambda folder: make_pictures(packages, settings["groups"], settings["size"], coda_names, npm, folder),
    )
    return read_material(folder)


def make_pictures(
    packages: Sequence[str],
    groups: Sequence[str],
    size: int,
    coda_names: Mapping[str, str],
    npm: Path,
    folder: Path,
) -> None:
    """Write ``objects.json`` and ``pictures.npz`` into ``folder`` from the packages unpacked in ``npm``.

    Args:
        packages: The npm packages: names, keywords, then icon sets.
        groups: Unicode groups that count as objects.
        size: Width and height of a picture in pixels.
        coda_names: CoDa's name to the emoji's name where they differ.
        npm: Folder that ``pack_packages`` filled.
        folder: Where to write.
    """
    named, keyworded, *icon_sets = (npm / _folder_name(spec) / "package" for spec in packages)
    emoji: dict[str, dict[str, Any]] = json.loads((named / "data-by-emoji.json").read_text())
    keywords: dict[str, list[str]] = json.loads((keyworded / "dist" / "emoji-en-US.json").read_text())
    sets = {
        icons.parent.name.removeprefix("iconify-json-"): json.loads((icons / "icons.json").read_text())
        for icons in icon_sets
    }
    coda = _read_coda(coda_names)
    found: dict[str, dict[str, Any]] = {}
    images, coverage, object_names, ids = [], [], [], []
    for symbol, entry in emoji.items():
        name = without_color_words(entry["name"])
        if entry["group"] not in groups or _CLOCK_FACE.search(entry["name"]) or not name:
            continue
        rendered = _render_all(sets, entry["name"], size)
        if not rendered:
            continue
        words = (without_color_words(word.replace("_", " ")) for word in keywords.get(symbol, []))
        found.setdefault(name, {"group": entry["group"], "keywords": {}})["keywords"].update(
            dict.fromkeys(words)
        )
        for picture_id, rgba in rendered:
            if picture_id in ids:
                continue
            alpha = rgba[..., 3:].astype(np.float32) / 255
            images.append((rgba[..., :3] * alpha + 255 * (1 - alpha)).round().astype(np.uint8))
            coverage.append(rgba[..., 3])
            object_names.append(name)
            ids.append(picture_id)
    objects = [_name_object(name, found, coda) for name in found]
    row = {entry.name: index for index, entry in enumerate(objects)}
    (folder / "objects.json").write_text(
        json.dumps([asdict(entry) for entry in objects], indent=1, ensure_ascii=False)
    )
    np.savez_compressed(
        folder / "pictures.npz",
        images=np.stack(images),
        coverage=np.stack(coverage),
        ids=np.array(ids),
        object_of=np.array([row[name] for name in object_names], np.int64),
    )


def _render_all(
    sets: Mapping[str, dict[str, Any]], name: str, size: int
) -> list[tuple[str, NDArray[np.uint8]]]:
    """Render an emoji in each icon set that has it: its id and ``(size, size, 4) uint8``."""
    return [
        (f"{set_name}/{icon}", rgba)
        for set_name, icon_set in sets.items()
        if (icon := _find_icon(icon_set["icons"], name)) is not None
        and (rgba := _render(icon_set, icon, size)) is not None
    ]


def read_material(folder: Path) -> Material:
    """Read what ``make_pictures`` wrote."""
    entries: list[dict[str, Any]] = json.loads((folder / "objects.json").read_text(encoding="utf-8"))
    objects = tuple(DemoObject(**_with_tuples(entry)) for entry in entries)
    with np.load(folder / "pictures.npz") as arrays:
        return Material(
            objects, arrays["images"], arrays["coverage"], arrays["object_of"], tuple(arrays["ids"].tolist())
        )


def _with_tuples(entry: dict[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in entry.items()}


def _folder_name(spec: str) -> str:
    return spec.rpartition("@")[0].replace("@", "").replace("/", "-")


def _find_icon(icons: Mapping[str, Any], emoji_name: str) -> str | None:
    """The icon set's name of an emoji: words joined by hyphens, or by nothing in Firefox OS Emoji."""
    plain = unicodedata.normalize("NFKD", emoji_name.lower()).encode("ascii", "ignore").decode()
    words = re.findall(r"[a-z0-9]+", plain)
    return next((name for name in ("-".join(words), "".join(words)) if name in icons), None)


def _render(icon_set: Mapping[str, Any], icon: str, size: int) -> NDArray[np.uint8] | None:
    """``(size, size, 4) uint8``, or None for an icon without a single covered pixel."""
    entry = {**{key: icon_set.get(key) for key in ("width", "height")}, **icon_set["icons"][icon]}
    left, top = entry.get("left", 0), entry.get("top", 0)
    svg = (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="{left} {top} {entry["width"]} {entry["height"]}">{entry["body"]}</svg>'
    )
    png = resvg_py.svg_to_bytes(svg_string=svg, width=size, height=size, skip_system_fonts=True)
    rgba = np.asarray(Image.open(io.BytesIO(bytes(png))).convert("RGBA").resize((size, size)))
    return rgba if rgba[..., 3].any() else None


def _read_coda(coda_names: Mapping[str, str]) -> dict[str, list[tuple[str, str, tuple[float, ...]]]]:
    """Emoji name to CoDa's rows for it: name, plural, shares in the order of ``COLORS``."""
    rows: dict[str, list[tuple[str, str, tuple[float, ...]]]] = {}
    with _CODA_FILE.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(line for line in file if not line.startswith("#")):
            value = (row["object"], row["plural"], tuple(float(row[color]) for color in COLORS))
            for name in dict.fromkeys((coda_names.get(row["object"], row["object"]), row["plural"])):
                rows.setdefault(name, []).append(value)
    return rows


def _name_object(
    name: str,
    found: Mapping[str, Mapping[str, Any]],
    coda: Mapping[str, list[tuple[str, str, tuple[float, ...]]]],
) -> DemoObject:
    rows = sorted(coda.get(name, []), key=lambda row: row[0] != name)
    others = dict.fromkeys(part for row in rows for part in row[:2] if part and part not in found)
    words = found[name]["keywords"]
    return DemoObject(
        name=name,
        names=(name, *others),
        keywords=tuple(word for word in words if word not in ("", name, *others)),
        group=found[name]["group"],
        coda_name=rows[0][0] if rows else None,
        color_shares=rows[0][2] if rows else (),
    )
