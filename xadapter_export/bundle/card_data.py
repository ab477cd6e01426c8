"""What the Hub reads of a model card: the YAML before its text."""

import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from xadapter_export.bundle.manifest import Manifest, Task
from xadapter_export.tasks import TASKS

if TYPE_CHECKING:
    from huggingface_hub import EvalResult

_LIBRARY = "xadapter-export"
BUILTIN = "builtin"  # whose license is known: that of this package


def with_card_data(
    text: str,
    name: str,
    task: Task,
    sources: Iterable[str],
    *,
    license_name: str | None = None,
    tags: Sequence[str] = (),
    results: Sequence["EvalResult"] = (),
) -> str:
    """Return a card with what the Hub reads of it.

    Args:
        text: The card's text.
        name: The model's name.
        task: What it answers.
        sources: What its frozen parts were loaded from; those that are hub ids are its base models.
        license_name: Its license, as the Hub calls it; None where nobody said.
        tags: More tags.
        results: What was measured.
    """
    from huggingface_hub import ModelCard, ModelCardData

    data = ModelCardData(
        library_name=_LIBRARY,
        pipeline_tag=TASKS[task].pipeline_tag,
        base_model=[source for source in sources if is_hub_id(source)] or None,
        license=license_name,
        tags=["x-adapter", *tags],
        model_name=name if results else None,
        eval_results=list(results) or None,
    )
    content: str = ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}").content
    return content


def bundle_card_data(text: str, name: str, manifest: Manifest) -> str:
    """Return the card of a bundle with what the Hub reads of it; see ``with_card_data``."""
    parts = [part.source for part in (manifest.plm, manifest.clip) if part is not None]
    return with_card_data(
        text,
        name,
        manifest.task,
        parts,
        license_name="apache-2.0" if manifest.checkpoint.source == BUILTIN else None,
        tags=sorted({"onnx" if variant.is_onnx else variant.target for variant in manifest.variants}),
        results=_results_of(manifest),
    )


def _results_of(manifest: Manifest) -> list["EvalResult"]:
    """Return what lossy variants were measured to say: how often the same as fp32, and how often right."""
    from huggingface_hub import EvalResult

    tag = TASKS[manifest.task].pipeline_tag
    found: list[EvalResult] = []
    for variant in manifest.variants:
        agreement = variant.agreement
        judged = None if agreement is None else agreement.judged_on
        if tag is None or agreement is None or judged is None:
            continue
        same = agreement.same_top if agreement.same_top is not None else agreement.cosine
        kind = "same top answer as fp32" if agreement.same_top is not None else "cosine to fp32"
        measured = [(kind, "agreement", judged.texts, same)]
        if agreement.accuracy is not None and judged.questions is not None:
            measured.append(("accuracy", "accuracy", judged.questions, agreement.accuracy))
        found += [
            EvalResult(
                task_type=tag,
                dataset_type=re.sub("[^a-z0-9]+", "-", asked.lower()).strip("-"),  # data sets differ by it
                dataset_name=asked,
                metric_type=metric,
                metric_name=f"{title}: experts {variant.expert_set}, {variant.name}",
                metric_value=round(value, 4),
            )
            for title, metric, asked, value in measured
        ]
    return found


def is_hub_id(source: str) -> bool:
    """Whether a source is the name of a repository on the Hub."""
    return source.count("/") == 1 and ":" not in source and not source.startswith("built-in/")
