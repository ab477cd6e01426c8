"""``python -m docs.gallery``: write docs/gallery.md and its strips of images from the built-in checkpoint.

Needs npm, which fetches the emoji that the recipe of the built-in bank draws.
"""

import json
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

import click
from PIL import Image

from export.web.pictures import BUILTIN_CREDIT, builtin_pictures
from xadapter_export import XAdapterSession, export
from xadapter_export.model.builtin import builtin_folder

_DOCS = Path(__file__).parent
_COLORS = ["black", "blue", "brown", "green", "grey", "orange", "pink", "purple", "red", "white", "yellow"]
_NUM_ROWS = 16  # of the held-out objects, evenly spread
_SIDE = 64  # pixels of an image
_GAP = 6
_INTRO = f"""# Gallery

Each row is an object that the plug-in never trained on, and the four images that the V-expert looked at.
The rows are evenly spread over all {{total}} held-out objects; none was picked because it looks good. The
language model alone answers "white" to most questions. A bold answer is what most people say.

Written by `python -m docs.gallery`. {BUILTIN_CREDIT.split(" Their ")[0]}
[Licenses](../xadapter_export/builtin/NOTICE.md).

| question | images it looked at | people say | text only | V-expert |
|---|---|---|---|---|
"""


def strip_of(pictures: list[Image.Image]) -> Image.Image:
    """Put images of one row next to each other, on white."""
    strip = Image.new("RGB", (len(pictures) * (_SIDE + _GAP) - _GAP, _SIDE), "white")
    for number, picture in enumerate(pictures):
        strip.paste(picture.resize((_SIDE, _SIDE)), (number * (_SIDE + _GAP), 0))
    return strip


def write_gallery(session: XAdapterSession, pictures: Mapping[int, Image.Image]) -> None:
    """Ask about held-out objects; write the page and its strips.

    Args:
        session: Of the built-in checkpoint, with the expert sets ``v`` and ``none``.
        pictures: The bank's, by row.
    """
    lines = (builtin_folder() / "heldout.jsonl").read_text(encoding="utf-8").splitlines()
    objects = [json.loads(line) for line in lines]
    folder = _DOCS / "images" / "gallery"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    page = _INTRO.format(total=len(objects))
    for number in range(_NUM_ROWS):
        asked = objects[number * len(objects) // _NUM_ROWS]
        text = asked["sentences"][0]
        seen = session.retrieve(text, experts="v")
        file = f"{asked['name'].replace(' ', '-')}.webp"
        strip_of([pictures[picture.row] for picture in seen]).save(folder / file, quality=80)
        alone, looked = (
            session.fill_mask(text, top_k=1, candidates=_COLORS, experts=experts)[0].token
            for experts in ("none", "v")
        )
        looked = f"**{looked}**" if looked == asked["color"] else looked
        captions = ", ".join(picture.caption for picture in seen)
        strip = f"![{captions}](images/gallery/{file})"
        page += f"| {text} | {strip} | {asked['color']} | {alone} | {looked} |\n"
    (_DOCS / "gallery.md").write_text(page, encoding="utf-8")


@click.command()
@click.option(
    "--work", type=click.Path(path_type=Path), default=Path("build/web-pictures"), show_default=True
)
def main(work: Path) -> None:
    """Write the gallery."""
    with tempfile.TemporaryDirectory() as scratch:
        bundle = export("builtin", Path(scratch) / "bundle", ("v", "none")).folder
        session = XAdapterSession.load(bundle)
        write_gallery(session, builtin_pictures(work, session.pictures))


if __name__ == "__main__":
    main()
