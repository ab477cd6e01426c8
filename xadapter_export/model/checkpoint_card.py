"""The README of a checkpoint."""

from xadapter_export.bundle.card_data import with_card_data
from xadapter_export.bundle.model_card import FROM_SOURCE
from xadapter_export.experts import title_of
from xadapter_export.model.config import CheckpointRecord
from xadapter_export.tasks import TASKS


def checkpoint_card(record: CheckpointRecord, name: str) -> str:
    """Return the card of a checkpoint: what it is, how to load and export it, what the Hub reads of it.

    Args:
        record: What its ``xadapter.json`` says.
        name: Its title.
    """
    config, clip = record.config, record.clip
    reads = "" if clip is None else f" that reads a frozen CLIP ({clip.source})"
    nulls = f", with {config.null_rows} null rows alongside each memory" if config.null_rows else ""
    trained = [f"- {key}: {value}" for key, value in record.training.items() if value is not None]
    lines = [
        f"# {name}",
        "",
        f"An X-adapter for {config.task} ({TASKS[config.task].says}): a plug-in for a frozen "
        f"{record.plm.family} PLM ({record.plm.source}){reads}. Experts: {title_of(config.experts)}, before "
        f"layers {', '.join(map(str, config.layers))}, {config.adapter_width} wide{nulls}. Only the plug-in "
        "was trained; the frozen parts are checked by their hashes when it is loaded.",
        "",
        "```python",
        "from xadapter_export import XAdapterModel",
        "",
        f'model = XAdapterModel.from_pretrained("{name}")',
        "```",
        "",
        "```console",
        'pip install "xadapter-export[cpu,export]"',
        f"xad-export {name} -o bundle",
        "```",
        "",
        FROM_SOURCE,
        *(["", "## Training", "", *trained] if trained else []),
        "",
    ]
    sources = [part.source for part in (record.plm, clip) if part is not None]
    return with_card_data("\n".join(lines), name, config.task, sources)
