"""The table of text towers, and loading one of them.

To add a kind, write a ``TextTower`` and list it here, or name it in a package of your own as an entry point
of the group ``xadapter_export.text_towers``. Nothing else knows a kind by its name.
"""

from pathlib import Path
from typing import Final

from torch import nn

from xadapter_export.model.clip_text import OpenClipTower
from xadapter_export.model.text_tower import TextTower
from xadapter_export.registry import Registry

TEXT_TOWERS: Final[Registry[type[TextTower]]] = Registry(
    "xadapter_export.text_towers", "text tower", OpenClipTower
)


def load_clip(source: str | Path | nn.Module, kind: str = OpenClipTower.name) -> TextTower:
    """Loads the text tower of a CLIP.

    Args:
        source: What the kind of tower is known by: for open_clip's see ``OpenClipTower.load``. Another kind
            than ``kind`` is named before it, as in ``siglip=google/siglip-base-patch16-224``. A tower is
            returned as it is.
        kind: Name of the kind, where the source does not say.

    Raises:
        CheckpointError: If it is not found, or is broken.
        UnsupportedError: If the text tower is of another kind, or there is no such kind.
    """
    if isinstance(source, TextTower):
        return source
    if isinstance(source, str):
        name, named, rest = source.partition("=")
        if named and name in TEXT_TOWERS:
            kind, source = name, rest
    return TEXT_TOWERS[kind].load(source)
