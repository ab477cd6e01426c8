"""Embeddings of texts, of length 1, and the last states of their tokens."""

from typing import ClassVar, Final

from xadapter_export.tasks.spec import Head, Output, Reads, TaskSpec


class FeatureExtraction(TaskSpec):
    """See the module; an answer is the embedding of a text, ``(H,) float32``."""

    name = pipeline_tag = "feature-extraction"
    says = "embeddings of texts"
    reads: ClassVar[Reads] = "all"
    head: ClassVar[Head | None] = None
    outputs = (
        Output("last_hidden_state", ("batch", "seq", "hidden")),
        Output("sentence_embedding", ("batch", "hidden")),
    )
    compared = "sentence_embedding"
    torch_half = "xadapter_export.model.tasks:FeatureExtractionHead"


FEATURE_EXTRACTION: Final = FeatureExtraction()
