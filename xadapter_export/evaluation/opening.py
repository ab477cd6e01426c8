"""Opens what is to be scored: a bundle with onnxruntime alone, anything else as a checkpoint."""

from collections.abc import Sequence
from pathlib import Path

from xadapter_export.bundle.folder import MANIFEST_NAME
from xadapter_export.bundle.hub import HubRepo
from xadapter_export.errors import import_extra
from xadapter_export.evaluation.bundle_scorer import BundleScorer
from xadapter_export.evaluation.scorer import Scorer
from xadapter_export.runtime.session import XAdapterSession


def is_bundle(source: str | Path, revision: str | None = None) -> bool:
    """Whether a model is a bundle: its folder, or its repository on the Hub, has a manifest.

    Raises:
        ConfigError: If there is a revision, and the model is a folder.
        HubError: If the Hub does not say.
    """
    repo = HubRepo.find(source, revision)
    return (Path(source) / MANIFEST_NAME).is_file() if repo is None else repo.has(MANIFEST_NAME)


def open_scorer(
    source: str | Path,
    *,
    revision: str | None = None,
    variant: str = "auto",
    providers: Sequence[str] | None = None,
    num_threads: int | None = None,
    batch_size: int = 32,
) -> Scorer:
    """Open a bundle or a checkpoint: its folder, or its name on the Hub; or ``builtin``.

    Args:
        source: The model.
        revision: Branch, tag or commit on the Hub; ``main`` if None.
        variant: Which graph of a bundle answers; see ``HowToOpen``.
        providers: onnxruntime execution providers of a bundle; the CPU if None.
        num_threads: Threads inside one operator of a bundle; onnxruntime's choice if None.
        batch_size: How many texts go through the model together.

    Raises:
        BundleError: If the bundle is not whole.
        ConfigError: If there is a revision, and the model is a folder.
        HubError: If it cannot be downloaded.
        CheckpointError: If it is neither a bundle nor a checkpoint, or the checkpoint is broken.
        MissingExtraError: If onnxruntime, or for a checkpoint PyTorch, is not installed.
    """
    scorer: Scorer
    if is_bundle(source, revision):
        session = XAdapterSession.load(
            source, variant=variant, providers=providers, num_threads=num_threads, revision=revision
        )
        scorer = BundleScorer(session)
    else:
        import_extra("torch", "export", "train")
        from xadapter_export.evaluation.checkpoint_scorer import CheckpointScorer
        from xadapter_export.model.x_adapter_model import XAdapterModel

        path = Path(source)
        name = path.resolve().name if path.is_dir() else str(source)
        scorer = CheckpointScorer(XAdapterModel.from_pretrained(source, revision=revision), name)
    scorer.batch_size = batch_size
    return scorer
