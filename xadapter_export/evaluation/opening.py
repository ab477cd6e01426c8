"""Opens what is to be scored: a bundle with onnxruntime alone, anything else as a checkpoint."""

from collections.abc import Sequence
from pathlib import Path

from xadapter_export.bundle.folder import MANIFEST_NAME
from xadapter_export.errors import import_extra
from xadapter_export.evaluation.bundle_scorer import BundleScorer
from xadapter_export.evaluation.scorer import Scorer
from xadapter_export.runtime.session import XAdapterSession


def is_bundle(source: str | Path) -> bool:
    """Whether a model is a bundle's folder: one with a manifest."""
    return (Path(source) / MANIFEST_NAME).is_file()


def open_scorer(
    source: str | Path,
    *,
    variant: str = "auto",
    providers: Sequence[str] | None = None,
    num_threads: int | None = None,
    batch_size: int = 32,
) -> Scorer:
    """Open a bundle's folder, a checkpoint's folder, a hub id or ``builtin``.

    Args:
        source: The model.
        variant: Which graph of a bundle answers; see ``HowToOpen``.
        providers: onnxruntime execution providers of a bundle; the CPU if None.
        num_threads: Threads inside one operator of a bundle; onnxruntime's choice if None.
        batch_size: How many texts go through the model together.

    Raises:
        BundleError: If the bundle is not whole.
        CheckpointError: If it is neither a bundle nor a checkpoint, or the checkpoint is broken.
        MissingExtraError: If onnxruntime, or for a checkpoint PyTorch, is not installed.
    """
    scorer: Scorer
    if is_bundle(source):
        session = XAdapterSession.load(source, variant=variant, providers=providers, num_threads=num_threads)
        scorer = BundleScorer(session)
    else:
        import_extra("torch", "export", "train")
        from xadapter_export.evaluation.checkpoint_scorer import CheckpointScorer
        from xadapter_export.model.x_adapter_model import XAdapterModel

        path = Path(source)
        name = path.resolve().name if path.is_dir() else str(source)
        scorer = CheckpointScorer(XAdapterModel.from_pretrained(source), name)
    scorer.batch_size = batch_size
    return scorer
