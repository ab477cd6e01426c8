"""A bundle as a module of sentence-transformers.

Dimensions: B batch, T PLM tokens, H hidden size.
"""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self, Unpack

import torch
from torch import Tensor

from xadapter_export.bundle.folder import MANIFEST_NAME
from xadapter_export.errors import UnsupportedError
from xadapter_export.runtime.how_to_open import SessionOptions
from xadapter_export.runtime.session import XAdapterSession
from xadapter_export.tasks import FEATURE_EXTRACTION, TASKS
from xadapter_export.torchvision_cure import cure_torchvision

cure_torchvision()

from sentence_transformers.base.modules import InputModule  # noqa: E402  # it imports torchvision


class XAdapterEncoder(InputModule):  # type: ignore[misc]  # sentence-transformers may be missing
    """Texts in, sentence embeddings of length 1 out.

    Use it as ``SentenceTransformer(modules=[XAdapterEncoder("bundle")])``.

    Saving the ``SentenceTransformer`` saves the bundle with it.

    Args:
        bundle: A bundle for feature extraction: its folder, or its name on the Hub.
        options: As ``XAdapterSession.load``.

    Raises:
        UnsupportedError: If the bundle is for another task.
        As ``XAdapterSession.load``.
    """

    save_in_root = False  # sentence-transformers writes a README.md of its own there

    def __init__(self, bundle: Path | str, **options: Unpack[SessionOptions]) -> None:
        super().__init__()
        self.session = XAdapterSession.load(bundle, **options)
        if TASKS[self.session.manifest.task].head is not None:
            raise UnsupportedError(
                "the bundle gives no embeddings",
                where=bundle,
                expected=f"task {FEATURE_EXTRACTION.name}",
                got=self.session.manifest.task,
            )
        self.tokenizer = self.session.text_encoder().tokenizer
        self.max_seq_length = self.session.manifest.plm.max_seq

    def preprocess(self, inputs: Sequence[str], prompt: str | None = None, **_: Any) -> dict[str, Tensor]:
        """Return the arrays that the graph takes, int64, after a prompt was put before each text."""
        texts = [f"{prompt or ''}{text}" for text in inputs]
        arrays = self.session.text_encoder().encode(texts)
        return {name: torch.from_numpy(array) for name, array in arrays.items()}

    def forward(self, features: dict[str, Tensor], **_: Any) -> dict[str, Tensor]:
        """Add ``sentence_embedding``, ``(B, H) float32``, and ``token_embeddings``, ``(B, T, H) float32``."""
        outputs = self.session.run({name: tensor.cpu().numpy() for name, tensor in features.items()})
        hidden, embedding = (torch.from_numpy(outputs[output.name]) for output in FEATURE_EXTRACTION.outputs)
        return features | {"token_embeddings": hidden, "sentence_embedding": embedding}

    def get_embedding_dimension(self) -> int:
        """Return H."""
        return self.session.manifest.plm.hidden_size

    def save(self, output_path: str, *_: Any, **__: Any) -> None:
        """Copy the bundle to a folder."""
        for name in (MANIFEST_NAME, *self.session.manifest.files):
            place = Path(output_path) / name
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(self.session.bundle.file(name), place)

    @classmethod
    def load(cls, model_name_or_path: str, subfolder: str = "", **options: Any) -> Self:
        """Load the bundle that ``save`` wrote, from a folder or the Hub."""
        names = ("token", "cache_folder", "revision", "local_files_only")
        given = {name: options[name] for name in names if name in options}
        return cls(Path(cls.load_dir_path(model_name_or_path, subfolder=subfolder, **given)))
