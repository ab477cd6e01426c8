"""A bundle as a pipeline of transformers.

Dimensions: B batch, T PLM tokens, M masks, V vocabulary.
"""

from collections.abc import Callable
from pkgutil import resolve_name
from typing import Any

import numpy as np
import torch
from torch import Tensor

from xadapter_export.errors import UnsupportedError
from xadapter_export.runtime.session import XAdapterSession
from xadapter_export.tasks import TASKS
from xadapter_export.torchvision_cure import cure_torchvision

cure_torchvision()

from transformers import (  # noqa: E402  # transformers imports torchvision
    BatchEncoding,
    Pipeline,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers import pipeline as transformers_pipeline  # noqa: E402  # as above
from transformers.pipelines import PIPELINE_REGISTRY  # noqa: E402  # as above
from transformers.utils.generic import ModelOutput  # noqa: E402  # as above


def make_pipeline(session: XAdapterSession, **options: Any) -> Pipeline:
    """Make transformers' pipeline for the task of a session, which answers with the numbers of the session.

    Args:
        session: The session; its expert set answers.
        options: As ``transformers.pipeline``: ``top_k``, ``batch_size``.

    Raises:
        UnsupportedError: If transformers has no pipeline for the task.
    """
    task = session.manifest.task
    if task not in PIPELINE_REGISTRY.get_supported_tasks():
        raise UnsupportedError("transformers has no pipeline for this task", got=task)
    base = PIPELINE_REGISTRY.check_task(task)[1]["impl"]
    if isinstance(base, str):  # "transformers.pipelines.fill_mask.FillMaskPipeline"
        base = resolve_name(base)
    make: Callable[..., Pipeline] = transformers_pipeline  # its overloads know no class but their own
    return make(
        task,
        model=SessionModel(session),
        tokenizer=SessionTokenizer(session),
        # transformers says of every model class that it does not list that it may not work.
        pipeline_class=type(f"Session{base.__name__}", (base,), {"check_model_type": lambda *_: None}),
        **{"device": "cpu"} | options,  # where the session's arrays are
    )


class SessionTokenizer(PreTrainedTokenizerFast):
    """The tokenizers of a session, behind the interface of transformers."""

    def __init__(self, session: XAdapterSession) -> None:
        plm = session.manifest.plm
        tokenizer = session.text_encoder().tokenizer
        super().__init__(  # type: ignore[no-untyped-call]  # transformers'
            tokenizer_object=tokenizer,
            mask_token=plm.mask_token,
            pad_token=tokenizer.id_to_token(plm.pad_token_id),
            model_max_length=plm.max_seq,
        )
        self._text_encoder = session.text_encoder()

    def __call__(self, text: Any, text_pair: Any = None, **options: Any) -> BatchEncoding:
        """Return what the session takes; it pads and cuts by rules of its own, whatever the options say."""
        if not options.get("add_special_tokens", True):  # a word that is looked up
            looked_up: BatchEncoding = super().__call__(text, text_pair, **options)
            return looked_up
        arrays = self._text_encoder.encode(text, text_pair)
        return BatchEncoding({name: torch.from_numpy(array) for name, array in arrays.items()})


class SessionModel(PreTrainedModel):  # type: ignore[no-untyped-call]  # transformers' __init_subclass__
    """The graphs of a session, behind the interface of transformers."""

    def __init__(self, session: XAdapterSession) -> None:
        labels = dict(enumerate(session.manifest.labels or ()))
        config = PreTrainedConfig(problem_type="regression" if len(labels) == 1 else None)
        if labels:
            config.id2label = labels
        super().__init__(config)
        self._session = session

    @property
    def device(self) -> torch.device:
        """Where the tensors are that it takes and gives."""
        return torch.device("cpu")

    @property
    def dtype(self) -> torch.dtype:
        """What it answers in."""
        return torch.float32

    def forward(self, **inputs: Tensor) -> ModelOutput:
        """Return the outputs of the task; ``logits`` of masks as ``(B, T, V)``, minus infinity elsewhere."""
        session, manifest = self._session, self._session.manifest
        task = TASKS[manifest.task]
        feed = {name: tensor.cpu().numpy() for name, tensor in inputs.items()}
        outputs = session.run(feed, outputs=[output.name for output in task.outputs])
        if task.reads_masks:
            columns = [word.token_id for word in manifest.candidates or ()] or range(manifest.plm.vocab_size)
            shape = (*feed["input_ids"].shape, manifest.plm.vocab_size)
            everywhere = np.full(shape, -np.inf, np.float32)
            found = zip(everywhere, feed["mask_positions"], outputs[task.compared], strict=True)
            for row, positions, logits in found:
                row[np.ix_(positions, columns)] = logits
            outputs = {task.compared: everywhere}
        tensors = {name: torch.from_numpy(value) for name, value in outputs.items()}
        return ModelOutput(tensors)  # type: ignore[no-untyped-call]  # transformers'
