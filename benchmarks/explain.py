"""``python -m benchmarks.explain BUNDLE``: does leaving out the image with the largest share change most?

For every question about a held-out object, one image is left out: the one with the largest share, any, or the
one with the smallest. The table says how often another color then comes first, and how far the probability
of the color that came first moves. BUNDLE is the built-in checkpoint, exported with explanations.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean

import click
from rich.console import Console
from rich.table import Table

from xadapter_export import XAdapterSession
from xadapter_export.experts import reads_bank, title_of
from xadapter_export.model.builtin import builtin_folder
from xadapter_export.runtime.explain import ExplainedAnswer, ExplainedItem

HELDOUT = builtin_folder() / "heldout.jsonl"
Pick = Callable[[Sequence[ExplainedItem]], Sequence[ExplainedItem]]
PICKS: dict[str, Pick] = {
    "largest share": lambda items: [max(items, key=lambda item: item.share)],
    "any image (mean)": lambda items: items,
    "smallest share": lambda items: [min(items, key=lambda item: item.share)],
}


def explain_questions(session: XAdapterSession, questions: Path = HELDOUT) -> list[ExplainedAnswer]:
    """Explain the answer to each question, among the colors that objects have."""
    objects = [json.loads(line) for line in questions.read_text("utf-8").splitlines()]
    colors = sorted({color for each in objects for color in each["distribution"]})
    texts = [text for each in objects for text in each["sentences"]]
    return [session.explain(text, candidates=colors).answers[0] for text in texts]


def changes(answers: Sequence[ExplainedAnswer], pick: Pick) -> tuple[float, float]:
    """Leave some of each answer's images out, one at a time.

    Returns:
        The share of these in which another answer comes first, and by how much the probability of the first
        answer moves, up or down, on average.
    """
    left_out = [
        (answer.answers[0].score, item.without)
        for answer in answers
        for expert in answer.experts
        if reads_bank([expert.expert])
        for item in pick(expert.items)
    ]
    return fmean(w.changes for _, w in left_out), fmean(abs(w.score - score) for score, w in left_out)


@click.command()
@click.argument("bundle", type=click.Path(exists=True, file_okay=False, path_type=Path))
def main(bundle: Path) -> None:
    """Print the table for every expert set of BUNDLE that reads images."""
    session = XAdapterSession.load(bundle, num_threads=1)
    table = Table(show_edge=False)
    for column in ("experts", "left out"):
        table.add_column(column)
    for column in ("another color first", "probability moves by"):
        table.add_column(column, justify="right")
    for experts in session.manifest.expert_sets:
        if not session.retrieves(experts):
            continue
        answers = explain_questions(session.with_experts(experts))
        for name, pick in PICKS.items():
            changed, moved = changes(answers, pick)
            table.add_row(title_of(experts), name, f"{changed:.1%}", f"{moved:.1%}")
        table.caption = f"{len(answers)} questions, {session.answered_by}"
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
