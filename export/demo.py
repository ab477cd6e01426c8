"""``python -m export.demo``: ask the exported built-in checkpoint for the colors of objects new to it.

Exports every expert set into one bundle, asks about the held-out objects from the ONNX files alone, and
prints what each set answers beside what people say (CoDa).
"""

import json
import os
import sys
from collections import Counter
from pathlib import Path

import click
from rich.table import Table

from xadapter_export import XAdapterSession, export
from xadapter_export.bundle.manifest import ExpertSet
from xadapter_export.cli.command import make_console
from xadapter_export.evaluation.objects import ELEVEN
from xadapter_export.experts import EXPERT_SETS
from xadapter_export.model.builtin import builtin_folder

_TITLES: dict[ExpertSet, str] = {"none": "text only", "v": "V-expert", "t": "T-expert", "vt": "both"}


@click.command()
@click.option(
    "--output", type=click.Path(path_type=Path), default="bundles/demo", show_default=True, help="Bundle."
)
@click.option("--shown", default=12, show_default=True, help="Objects to show.")
@click.option("--every-answer", is_flag=True, help="Print every answer as JSON lines instead of the table.")
def main(output: Path, shown: int, every_answer: bool) -> None:
    """Export the built-in checkpoint and score it on its held-out objects."""
    console = make_console()
    result = export(
        "builtin",
        output,
        ("vt", "v", "t", "none"),
        force=True,
        on_stage=lambda stage, detail: click.echo(f"  {stage:5}  {detail}", err=True),
    )
    asked = Asked(XAdapterSession.load(result.folder))
    if every_answer:
        asked.print_answers()
        return
    console.print(asked.table(shown))
    console.print(asked.summary())
    console.print(f"parity: passed, {len(result.parity.cells)} comparisons. bundle: {result.folder}")
    program = os.path.relpath(Path(sys.executable).parent / "xad-run")
    bundle = os.path.relpath(result.folder)
    console.print(f'try: {program} {bundle} "The color of a strawberry is [MASK]." --compare')


class Asked:
    """What each expert set answers about the held-out objects.

    Args:
        session: The bundle.
    """

    def __init__(self, session: XAdapterSession) -> None:
        self.session = session
        lines = (builtin_folder() / "heldout.jsonl").read_text(encoding="utf-8").splitlines()
        self.objects = [json.loads(line) for line in lines]
        self.questions = [(entry, sentence) for entry in self.objects for sentence in entry["sentences"]]
        texts = [sentence for _, sentence in self.questions]
        self.said: dict[ExpertSet, list[str]] = {
            experts: [
                answers[0].token
                for answers in session.fill_mask(texts, top_k=1, candidates=ELEVEN, experts=experts)
            ]
            for experts in EXPERT_SETS
        }

    def print_answers(self) -> None:
        """Print a line of JSON for each question."""
        for number, (entry, sentence) in enumerate(self.questions):
            row = {
                "text": sentence,
                "color": entry["color"],
                **{str(experts): answers[number] for experts, answers in self.said.items()},
            }
            click.echo(json.dumps(row, ensure_ascii=False))

    def table(self, shown: int) -> Table:
        """Return the answers to the first question about some of the objects."""
        pictures = self.session.retrieve([entry["sentences"][0] for entry in self.objects], experts="v")
        table = Table(
            title="Colors of objects that the plug-in never trained on, from ONNX files", show_edge=False
        )
        for column in ("object", "people say", *_TITLES.values(), "pictures it looked at"):
            table.add_column(column)
        step = max(1, len(self.objects) // shown)
        for number in range(0, len(self.objects), step):
            entry = self.objects[number]
            first = next(i for i, (about, _) in enumerate(self.questions) if about is entry)
            captions = Counter(picture.caption for picture in pictures[number])
            table.add_row(
                entry["name"],
                entry["color"],
                *(self.said[experts][first] for experts in _TITLES),
                ", ".join(f"{caption} ({n})" for caption, n in captions.items()),
            )
        return table

    def summary(self) -> str:
        """Return how often each set is right."""
        truth = [entry["color"] for entry, _ in self.questions]
        shares = {
            experts: sum(a == b for a, b in zip(self.said[experts], truth, strict=True)) / len(truth)
            for experts in _TITLES
        }
        return (
            f"Right on {len(self.objects)} objects, {len(self.questions)} unseen sentences: "
            + ", ".join(f"{_TITLES[experts]} {share:.1%}" for experts, share in shares.items())
            + f" (chance {1 / len(ELEVEN):.1%}). Caveats: docs/results.md"
        )


if __name__ == "__main__":
    main()
