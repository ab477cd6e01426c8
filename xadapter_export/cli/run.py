"""``xad run``: run a bundle on texts."""

import sys
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Unpack

import click

from xadapter_export.cli.command import (
    NamedPath,
    XadCommand,
    check_new_file,
    example,
    json_option,
    make_console,
    print_json,
    revision_option,
    session_options,
    verify_key_option,
)
from xadapter_export.cli.explanation import show_explanations, write_page
from xadapter_export.errors import InputTextError
from xadapter_export.experts import EXPERT_SETS

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from xadapter_export.runtime.answers import RetrievedPicture
    from xadapter_export.runtime.how_to_open import SessionOptions
    from xadapter_export.runtime.session import XAdapterSession
    from xadapter_export.tasks.spec import Scored

BAR_COLUMNS = 24


@click.command(
    cls=XadCommand,
    epilog=example(
        "xad-export --experts v --opset 17 --with-explanations -o bundle",
        'xad-run bundle "The color of a banana is [MASK]." --explain',
    ),
)
@click.argument("bundle", type=NamedPath())
@click.argument("texts", metavar="TEXT...", nargs=-1, required=True)
@click.option(
    "--experts", type=click.Choice(EXPERT_SETS), help="Expert set to use. [default: the bundle's first]"
)
@click.option("--compare", is_flag=True, help="Compare all expert sets of the bundle side by side.")
@click.option(
    "--top-k",
    type=click.IntRange(min=1),
    default=5,
    show_default=True,
    help="Number of predictions per mask.",
)
@click.option("--candidates", metavar="WORDS", help="Choose only among these words, separated by commas.")
@click.option(
    "--explain",
    "explains",
    is_flag=True,
    help="Also show how much each image and CLIP token contributed, and the answer without it. The bundle "
    "must be exported with --with-explanations.",
)
@click.option(
    "--explain-html",
    "page",
    type=NamedPath(path_type=Path),
    help="Write the explanations as an HTML page that shows the images.",
)
@click.option(
    "--pictures",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="Folder of the bank with its thumbnails.zip, or with the original images, for --explain-html.",
)
@click.option("--force", is_flag=True, help="Replace an existing page.")
@click.option("--pair", metavar="TEXT", help="Second text to pair with every TEXT (text-classification).")
@click.option(
    "--variant",
    default="auto",
    show_default=True,
    metavar="NAME",
    help="Variant to run: auto (expected to be fastest on this kind of CPU), fastest (timed at load, and "
    "remembered in --cache-dir), a precision (int8), a variant (cpu-int8) or an engine (tensorrt-rtx-fp16).",
)
@click.option(
    "--index",
    type=NamedPath(path_type=Path),
    help="Index made by xad-bank index, for a bundle exported with --retrieval external. [default: exact "
    "search]",
)
@click.option(
    "--cache-dir",
    type=NamedPath(path_type=Path),
    help="Directory for OpenVINO's compiled-model cache and the timings of --variant fastest (faster "
    "startup).",
)
@click.option(
    "--check",
    type=click.Choice(("always", "once", "never")),
    default="once",
    show_default=True,
    help="When to test each graph on one example from the bundle before use. A variant that computes wrong "
    "numbers on this processor is not used.",
)
@click.option(
    "--allow-fallback",
    is_flag=True,
    help="Fall back to the CPU, with a warning, if --provider does not start or an engine cannot run.",
)
@verify_key_option
@revision_option
@session_options
@json_option
def run(
    bundle: str,
    texts: tuple[str, ...],
    compare: bool,
    top_k: int,
    candidates: str | None,
    explains: bool,
    page: Path | None,
    pictures: Path | None,
    force: bool,
    pair: str | None,
    threads: int | None,
    as_json: bool,
    **opening: "Unpack[SessionOptions]",
) -> None:
    """Run a bundle on your text.

    BUNDLE is a folder, or the name of a bundle on the Hugging Face Hub: org/name. Use - as TEXT to read one
    text per line from stdin. Prints the answers with scores, and the images they were based on.
    """
    if compare and opening["experts"]:
        raise click.UsageError("--compare shows all expert sets; remove --experts.")
    explains = explains or page is not None
    if compare and explains:
        raise click.UsageError("one expert set is explained at a time; remove --compare.")
    check_new_file(page, force=force)
    rows = [line for text in texts for line in (_read_stdin() if text == "-" else [text])]

    from xadapter_export.bundle.machine import read_machine
    from xadapter_export.runtime.session import XAdapterSession

    opening["num_threads"] = threads
    session = XAdapterSession.load(bundle, **opening)
    words = None if candidates is None else candidates.split(",")
    sets = tuple(session.manifest.expert_sets) if compare else (session.experts,)
    replies = [reply for name in sets for reply in _ask(session.with_experts(name), rows, pair, top_k, words)]
    reasons = [session.explain(row, pair, top_k=top_k, candidates=words) for row in rows if explains]
    if page is not None:
        write_page(page, reasons, pictures)
    if as_json:
        print_json(
            {
                "task": session.manifest.task,
                "processor": str(read_machine()),
                "variant_reason": session.variant_reason,
                "checks": [asdict(found) for found in session.checks],
                "replies": [asdict(reply) for reply in replies],
                **({"explanations": [asdict(reason) for reason in reasons]} if explains else {}),
            }
        )
        return
    for number in range(len(rows)):
        _show_all(replies[number :: len(rows)], replies[0], compare=compare)
        if explains:
            show_explanations(reasons[number : number + 1])
    if page is not None:
        click.echo(f"page: {page}")


@dataclass(frozen=True)
class Reply:
    """What one expert set said about one text, and which of its variants that was."""

    text: str
    experts: str
    variant: str
    answers: "list[Scored]" = field(default_factory=list)
    pictures: "list[RetrievedPicture]" = field(default_factory=list)
    embedding: list[float] = field(default_factory=list)


def _read_stdin() -> list[str]:
    """Return the lines of stdin that are not blank, with a warning about the others; UTF-8 in every locale.

    Raises:
        InputTextError: If they are not UTF-8.
    """
    try:
        text = sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputTextError(
            "the texts on stdin are not UTF-8",
            got=error,
            hint="convert them to UTF-8, for example with iconv -t UTF-8",
        ) from error
    lines = text.splitlines()
    kept = [line for line in lines if line.strip()]
    if len(kept) < len(lines):
        click.echo(f"Warning: blank lines of stdin have no answer: {len(lines) - len(kept)}", err=True)
    return kept


def _ask(
    session: "XAdapterSession", texts: list[str], pair: str | None, top_k: int, candidates: list[str] | None
) -> list[Reply]:
    pairs = None if pair is None else [pair] * len(texts)
    replies = [Reply(text, session.experts, session.answered_by) for text in texts]
    found = session.answer(texts, pairs, top_k=top_k, candidates=candidates)
    for number, answer in enumerate(found):
        told = {"answers": answer} if isinstance(answer, list) else {"embedding": answer.tolist()}
        replies[number] = replace(replies[number], **told)
    if session.retrieves():
        seen = session.retrieve(texts, pairs)
        replies = [replace(r, pictures=pictures) for r, pictures in zip(replies, seen, strict=True)]
    return replies


def _show_all(replies: list[Reply], first: Reply, *, compare: bool) -> None:
    """Print a text and what each expert set says of it."""
    console = make_console()
    console.print(replies[0].text, style="bold")
    if compare and not replies[0].embedding:
        console.print(_side_by_side(replies))
    else:
        for reply in replies:
            _show(console, reply, first, label=reply.experts if compare else None)


def _show(console: "Console", reply: Reply, first: Reply, *, label: str | None) -> None:
    """Print the answers as bars and the pictures as captions; an embedding as its cosine with the first."""
    from rich.table import Table

    table = Table.grid(padding=(0, 2, 0, 2))
    block = "\u2588" if console.encoding.startswith("utf") else "#"
    masks = {getattr(answer, "mask", 0) for answer in reply.answers}
    for answer in reply.answers:
        bar = block * round(answer.score * BAR_COLUMNS)
        number = [f"mask {getattr(answer, 'mask', 0) + 1}"] if len(masks) > 1 else []
        table.add_row(*number, answer.word, f"{answer.score:6.1%}", bar)
    if reply.embedding:
        start = ", ".join(f"{value:.3f}" for value in reply.embedding[:4])
        shown = f"{label}: " if label else ""
        shown += f"{len(reply.embedding)} numbers [{start}, ...]"
        if reply is not first:
            cosine = sum(a * b for a, b in zip(reply.embedding, first.embedding, strict=True))
            shown += f", cosine with the first {cosine:.4f}"
        table.add_row(shown)
    console.print(table)
    if reply.pictures:
        console.print(f"  looked at: {_captions(reply.pictures)}")


def _side_by_side(replies: list[Reply]) -> "Table":
    """Return a table of one text: a column for each expert set, the best answers first."""
    from rich.table import Table

    table = Table(show_edge=False)
    for reply in replies:
        table.add_column(reply.experts)
    cells = [[f"{answer.word} {answer.score:.1%}" for answer in reply.answers] for reply in replies]
    for row in zip(*cells, strict=True):
        table.add_row(*row)
    if any(reply.pictures for reply in replies):
        table.add_section()
        table.add_row(*(_captions(reply.pictures) for reply in replies))
    return table


def _captions(pictures: "list[RetrievedPicture]") -> str:
    return ", ".join(f"{picture.caption} {picture.score:.2f}" for picture in pictures)
