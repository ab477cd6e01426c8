"""How well a model still speaks: pseudo-perplexity and top-1 of every token, masked one at a time.

Source:
    Pseudo-perplexity per token: Salazar et al. 2020 (arXiv 1910.14659), equation 3.
"""

from collections.abc import Sequence
from functools import partial
from typing import Final

import numpy as np

from xadapter_export.errors import InputTextError
from xadapter_export.evaluation.readings import SEED, OnProgress, Reading, derangement, ignore_progress
from xadapter_export.evaluation.results import Evaluation, Metric, Row, percentage

METRICS: Final = {
    "pseudo_perplexity": Metric("pseudo-perplexity", decimals=2),
    "loss": Metric("loss (nats per token)"),
    "top1": percentage("top-1"),
}


def evaluate_mlm(
    readings: Sequence[Reading],
    texts: Sequence[str],
    *,
    data_name: str = "",
    on_progress: OnProgress = ignore_progress,
) -> Evaluation:
    """Mask each token of each text in turn, and score what the model says of it.

    Args:
        readings: The rows.
        texts: n texts without masks.
        data_name: What to call them in the report.
        on_progress: Told after each batch, in masked copies.

    Raises:
        InputTextError: If a text is empty or has a mask, or no text has a token.
        UnsupportedError: If a model does not fill masks, or only with some candidates.
        ConfigError: If the memory of a single text is to be shuffled.
    """
    rows, num_tokens = [], 0
    for reading in readings:
        memory_texts = None
        if reading.is_shuffled:
            memory_texts = [texts[source] for source in derangement(len(texts), SEED)]
        scores = reading.scorer.token_scores(
            texts,
            reading.experts,
            memory_texts=memory_texts,
            on_batch=partial(on_progress, reading.name),
        )
        log_probability = np.concatenate([score.log_probability for score in scores])
        is_best = np.concatenate([score.is_best for score in scores])
        if not len(log_probability):
            raise InputTextError("no text has a token to mask", where=data_name)
        num_tokens = num_tokens or len(log_probability)
        loss = float(-log_probability.mean())
        values = {"pseudo_perplexity": float(np.exp(loss)), "loss": loss, "top1": float(is_best.mean())}
        per_text = [
            float(-score.log_probability.mean()) if len(score.log_probability) else None for score in scores
        ]
        rows.append(Row(reading.name, values, reading.experts, details={"loss_per_text": per_text}))
    return Evaluation(
        kind="mlm",
        model=readings[0].scorer.name,
        data=data_name,
        counts={"texts": len(texts), "tokens": num_tokens},
        settings={"masking": "each token in turn; CLIP reads the text without it"},
        metrics=METRICS,
        rows=tuple(rows),
    )
