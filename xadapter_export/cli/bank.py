"""``xad bank``: build, inspect and search feature banks."""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from xadapter_export.cli.command import (
    NamedPath,
    XadCommand,
    check_new_file,
    example,
    json_option,
    make_console,
    print_json,
    quiet_option,
    revision_option,
    sign_option,
)
from xadapter_export.cli.progress import QUICK_S, show_progress
from xadapter_export.errors import import_extra
from xadapter_export.model.builtin import BUILTIN, builtin_folder

if TYPE_CHECKING:
    from xadapter_export.bank.reader import BankReader
    from xadapter_export.bank.record import BankClip, BankDtype, BankRecord
    from xadapter_export.bank_builder.build import BuildResult
    from xadapter_export.cli.progress import Count
    from xadapter_export.runtime.picture_index import IndexKind

DTYPES = ("fp32", "fp16", "int8")
INDEX_KINDS = ("flat", "ivf-pq", "lancedb")
MIB = 1024 * 1024

F = TypeVar("F", bound=Callable[..., object])


@click.group(
    epilog=example(
        'xad-bank search builtin "a ripe banana"',
        "xad-bank compact builtin --prototypes 64 -o prototypes",
    )
)
def bank() -> None:
    """Build, inspect and search feature banks.

    A bank is a folder with the CLIP features of images and a caption for each: bank.safetensors, bank.jsonl
    and bank.json. BANK is the folder of a bank or checkpoint, its name on the Hugging Face Hub (org/name) or
    `builtin`.
    """


def output_options(function: F) -> F:
    """Add ``--output`` and ``--force``."""
    function = click.option("--force", is_flag=True, help="Replace an existing bank.")(function)
    return click.option(
        "-o", "--output", type=NamedPath(path_type=Path), required=True, help="Folder for the new bank."
    )(function)


@bank.command(
    cls=XadCommand, epilog=example("xad-bank build pictures -o bank", 'xad-bank search bank "a banana"')
)
@click.argument("sources", metavar="SOURCE...", nargs=-1)
@output_options
@click.option(
    "--clip",
    metavar="CLIP",
    help="open_clip model: folder in hub layout, model:tag or hub id. [default: the built-in CLIP]",
)
@click.option("--dataset", metavar="NAME", help="Hugging Face dataset to read instead of SOURCE.")
@click.option("--split", help="Dataset split. [default: train]")
@click.option("--image-column", default="image", show_default=True, help="Dataset column with the images.")
@click.option(
    "--caption-column", default="caption", show_default=True, help="Dataset column with the captions."
)
@click.option("--device", default="auto", show_default=True, help="Device: auto, cpu, cuda, cuda:1, ...")
@click.option(
    "--workers",
    type=click.IntRange(min=0),
    help="Processes that decode images. [default: depends on the machine]",
)
@click.option(
    "--batch-size", type=click.IntRange(min=1), help="Images per batch. [default: 64, on a GPU 256]"
)
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads for PyTorch. [default: PyTorch's]")
@click.option(
    "--dtype",
    type=click.Choice(DTYPES),
    default="fp16",
    show_default=True,
    help="Dtype of the stored features.",
)
@click.option(
    "--precision",
    type=click.Choice(["fp32", "fp16", "bf16"]),
    default="fp32",
    show_default=True,
    help="Precision that the image tower computes in.",
)
@click.option("--strict", is_flag=True, help="Fail if an image cannot be decoded.")
@click.option(
    "--thumbnails",
    "thumbnail_px",
    type=click.IntRange(16, 1024),
    metavar="PIXELS",
    help="Store thumbnails of this size.",
)
@quiet_option
@json_option
def build(
    sources: tuple[str, ...],
    output: Path,
    force: bool,
    dataset: str | None,
    split: str | None,
    image_column: str,
    caption_column: str,
    quiet: bool,
    as_json: bool,
    **settings: Any,
) -> None:
    """Build a bank from your images: CLIP features and captions.

    SOURCE is a folder of images; a list of images (a text file with one path per line, or a CSV or JSONL file
    with the columns path and caption); WebDataset shards, such as "shards-{000..009}.tar"; or a folder saved
    by the datasets library.

    Images that cannot be decoded are skipped and listed in skipped.jsonl. To resume a build that was stopped,
    run the same command again.

    To use several processes: torchrun --nproc-per-node 4 -m xadapter_export.cli.bank build ..., or
    accelerate-launch --multi_gpu --num_processes 4 -m xadapter_export.cli.bank build ... Write
    accelerate-launch with the hyphen: "accelerate launch" imports torchvision, and fails if torchvision does
    not match the installed torch.
    """
    if bool(sources) == bool(dataset):
        raise click.UsageError("Give either SOURCE or --dataset.")
    from xadapter_export.bank.output import check_output

    check_output(output, force=force)  # before PyTorch is imported, which takes seconds
    start = time.monotonic()
    main_process = os.environ.get("RANK", "0") == "0"
    line = "{done} of {total} images{note}"
    with show_progress(quiet=quiet or not main_process, unit="image", line=line) as (on_note, count):
        on_note("loading PyTorch")
        module = import_extra("xadapter_export.bank_builder.build", "bank")
        try:
            result: BuildResult | None = module.build_bank(
                sources,
                output,
                module.BuildSettings(**settings),
                dataset=dataset,
                columns=module.DatasetColumns(split, image_column, caption_column),
                force=force,
                on_note=on_note,
                on_pictures=count,
            )
        except KeyboardInterrupt:
            if main_process:
                work = module.work_folder_of(output)
                click.echo(
                    f"stopped; finished work is kept in {work}; run the same command to resume", err=True
                )
            raise
    if result is not None:  # else another process speaks
        _report_build(result, time.monotonic() - start, as_json=as_json)


@contextmanager
def _rows_shown(stage: str, *, quiet: bool) -> Iterator["Count"]:
    """Show how many rows are done in the block."""
    line = "{done} of {total} rows{note}"
    with show_progress(quiet=quiet, unit="row", line=line, after_s=QUICK_S) as (say, count):
        say(stage)
        yield count


def _report_build(result: "BuildResult", elapsed_s: float, *, as_json: bool) -> None:
    """Print what was built."""
    if as_json:
        print_json(
            {
                "bank": str(result.folder),
                "num_listed": result.num_listed,
                "num_resumed_shards": result.num_resumed_shards,
                "first_skipped": result.first_skipped,
                "seconds": round(elapsed_s, 3),
                "record": result.record.model_dump(mode="json"),
            }
        )
        return
    console = make_console()
    record = result.record
    console.print(f"{record.num_pictures} pictures, {record.dim} wide, {record.dtype}, CLIP {record.clip}")
    if record.num_skipped:
        console.print(f"{record.num_skipped} skipped, listed in skipped.jsonl; first: {result.first_skipped}")
    console.print(f"bank: {result.folder}")
    _note_emoji(record.clip)


@bank.command(cls=XadCommand, epilog=example("xad-bank info builtin"))
@click.argument("folder", metavar="BANK")
@json_option
def info(folder: str, as_json: bool) -> None:
    """Show what is in a bank and check every row."""
    reader = _open(folder)
    size_bytes = sum(path.stat().st_size for path in _files(reader))
    sha256 = reader.sha256()
    created_with = reader.record.created_with if reader.record else {}
    if as_json:
        print_json(
            {
                "bank": str(reader.folder),
                "kind": reader.kind,
                "num_pictures": reader.num_pictures,
                "dim": reader.dim,
                "dtype": reader.dtype,
                "num_skipped": reader.num_skipped,
                "size_bytes": size_bytes,
                "sha256": sha256,
                "clip": None if reader.clip is None else reader.clip.model_dump(mode="json"),
                "created_with": created_with,
            }
        )
        return
    facts = {
        "kind": reader.kind,
        "rows": f"{reader.num_pictures}, {reader.dim} wide, {reader.dtype}, each of length 1",
        "skipped": str(reader.num_skipped),
        "CLIP": str(reader.clip or "not recorded"),
        "files": f"{size_bytes / MIB:.1f} MiB",
        "SHA-256": sha256,
        "made with": ", ".join(map(" ".join, created_with.items())) or "not recorded",
    }
    console = make_console()
    for name, value in facts.items():
        console.print(f"{name:<10}{value}")


@bank.command(
    cls=XadCommand,
    epilog=example(
        'xad-bank search builtin "a ripe banana"', 'xad-bank search builtin "a red car" --html sheet.html'
    ),
)
@click.argument("folder", metavar="BANK")
@click.argument("query", metavar="TEXT")
@click.option(
    "--clip", metavar="CLIP", help="CLIP to encode the text with. [default: the one that made the bank]"
)
@click.option(
    "-k", "--top-k", "k", type=click.IntRange(min=1), default=8, show_default=True, help="Number of results."
)
@click.option(
    "--html", "sheet", type=NamedPath(path_type=Path), help="Also write an HTML page that shows the images."
)
@click.option(
    "--pictures",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="Folder with the original images, for --html with a bank that has no thumbnails.",
)
@click.option("--force", is_flag=True, help="Replace an existing page.")
@revision_option
@json_option
def search(
    folder: str,
    query: str,
    clip: str | None,
    k: int,
    sheet: Path | None,
    pictures: Path | None,
    force: bool,
    revision: str | None,
    as_json: bool,
) -> None:
    """Find the images in a bank that best match a text."""
    reader = _open(folder, revision)
    check_new_file(sheet, force=force)
    from xadapter_export.bank.contact_sheet import Hit, find_thumbnails, render_sheet
    from xadapter_export.bank.nearest import check_k, find_nearest
    from xadapter_export.bundle.staging import staged_file

    check_k(reader, k)
    text_search = import_extra("xadapter_export.bank_builder.text_search", "bank", "export")
    tower = text_search.load_bank_clip(reader, clip)
    found = find_nearest(reader, text_search.encode_texts(tower, [query]), k)
    rows = found.rows[0].tolist()
    names = reader.pictures_of(rows)
    hits = [Hit(*hit) for hit in zip(rows, names, found.scores[0].tolist(), strict=True)]
    if sheet is not None:
        about = f"{reader.num_pictures} {reader.kind}, the nearest {k} by CLIP's cosine"
        ids = {hit.row: hit.picture.id for hit in hits}
        page = render_sheet(query, about, hits, find_thumbnails(reader.folder, ids, pictures))
        with staged_file(sheet) as path:
            path.write_text(page, encoding="utf-8")
    if as_json:
        print_json(
            [{"row": hit.row, **hit.picture.model_dump(), "score": round(hit.score, 6)} for hit in hits]
        )
        return
    console = make_console()
    width = max(len(hit.picture.caption) for hit in hits)
    for hit in hits:
        console.print(f"{hit.score:6.3f}  {hit.picture.caption:<{width}}  {hit.picture.id}")
    if sheet is not None:
        console.print(f"page: {sheet}")
    _note_emoji(reader.clip)


@bank.command(cls=XadCommand, epilog=example("xad-bank merge cats dogs -o pets"))
@click.argument("folders", metavar="BANK...", nargs=-1, required=True)
@output_options
@click.option(
    "--dtype",
    type=click.Choice(DTYPES),
    help="Dtype of the stored features. [default: the most exact of the inputs]",
)
@click.option("--keep-duplicates", is_flag=True, help="Keep duplicate images.")
@quiet_option
@json_option
def merge(
    folders: tuple[str, ...],
    output: Path,
    force: bool,
    dtype: "BankDtype | None",
    keep_duplicates: bool,
    quiet: bool,
    as_json: bool,
) -> None:
    """Merge banks that were made with the same CLIP."""
    from xadapter_export.bank.merge import merge_banks

    paths = [_resolve(folder) for folder in folders]
    with _rows_shown("merge", quiet=quiet) as count:
        record = merge_banks(
            paths, output, dtype=dtype, keep_duplicates=keep_duplicates, force=force, on_rows=count
        )
    _report(output, record, as_json=as_json)


@bank.command(cls=XadCommand, epilog=example("xad-bank compact builtin --prototypes 64 -o prototypes"))
@click.argument("folder", metavar="BANK")
@output_options
@click.option("--prototypes", type=click.IntRange(min=1), required=True, help="Number of prototypes.")
@click.option(
    "--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Random seed for the clustering."
)
@quiet_option
@json_option
def compact(
    folder: str, output: Path, force: bool, prototypes: int, seed: int, quiet: bool, as_json: bool
) -> None:
    """Cluster a bank into a few prototypes, for static retrieval.

    A prototype is the mean of the images in its cluster. Its caption lists their most common captions.
    """
    from xadapter_export.bank.compact import compact_bank

    with _rows_shown("cluster", quiet=quiet) as count:
        made = compact_bank(_resolve(folder), output, prototypes, seed=seed, force=force, on_rows=count)
    if as_json:
        listed = [
            {**asdict(prototype), "picture": prototype.picture.model_dump()} for prototype in made.prototypes
        ]
        record = made.record.model_dump(mode="json")
        print_json({"bank": str(output), "record": record, "prototypes": listed})
        return
    from rich.table import Table

    table = Table("prototype", "pictures", "mean cosine", "caption", show_edge=False)
    for prototype in made.prototypes:
        table.add_row(
            prototype.picture.id,
            str(prototype.num_pictures),
            f"{prototype.mean_cosine:.3f}",
            prototype.picture.caption,
        )
    make_console().print(table)
    total = sum(prototype.num_pictures for prototype in made.prototypes)
    mean = sum(prototype.num_pictures * prototype.mean_cosine for prototype in made.prototypes) / total
    click.echo(f"{total} pictures, mean cosine to their prototype {mean:.3f}")
    _report(output, made.record, as_json=False)


@bank.command(name="dtype", cls=XadCommand, epilog=example("xad-bank dtype builtin --to int8 -o small"))
@click.argument("folder", metavar="BANK")
@output_options
@click.option("--to", type=click.Choice(DTYPES), required=True, help="Dtype to store the features in.")
@click.option(
    "--queries",
    type=click.IntRange(min=1),
    default=500,
    show_default=True,
    help="Number of queries used to estimate recall.",
)
@click.option(
    "--clip", metavar="CLIP", help="Use captions encoded by this CLIP as queries, instead of noisy rows."
)
@quiet_option
@json_option
def convert(
    folder: str,
    output: Path,
    force: bool,
    to: "BankDtype",
    queries: int,
    clip: str | None,
    quiet: bool,
    as_json: bool,
) -> None:
    """Store a bank in another dtype and measure the recall it loses.

    Recall@k is the fraction of the k nearest rows that are still among the k nearest.
    """
    from xadapter_export.bank.convert import convert_bank, measure_recall, noisy_queries, sample_rows
    from xadapter_export.bank.reader import BankReader

    reader = _open(folder)
    if clip is None:
        features = noisy_queries(reader, queries)
    else:
        text_search = import_extra("xadapter_export.bank_builder.text_search", "bank", "export")
        pictures = reader.pictures_of(sample_rows(reader, queries))
        texts = [picture.caption or picture.id for picture in pictures]
        features = text_search.encode_texts(text_search.load_bank_clip(reader, clip), texts)
    with _rows_shown("convert", quiet=quiet) as count:
        record = convert_bank(reader.folder, output, to, force=force, on_rows=count)
    recalls = measure_recall(reader, BankReader(output), features)
    before, after = ((path / "bank.safetensors").stat().st_size / MIB for path in (reader.folder, output))
    if as_json:
        print_json(
            {
                "bank": str(output),
                "record": record.model_dump(mode="json"),
                "num_queries": len(features),
                "recall": {str(k): value for k, value in recalls.items()},
            }
        )
        return
    shown = ", ".join(f"@{k} {value:.4f}" for k, value in recalls.items())
    click.echo(f"recall against {reader.dtype}, {len(features)} queries: {shown}")
    click.echo(f"features: {before:.2f} MiB in {reader.dtype}, {after:.2f} MiB in {record.dtype}")
    _report(output, record, as_json=False)


@bank.command(
    cls=XadCommand,
    epilog=example(
        "xad-export --experts v --retrieval external -o bundle",
        "xad-bank index bundle --kind flat -o index",
        'xad-run bundle "The color of a banana is [MASK]." --index index',
    ),
)
@click.argument("folder", metavar="BANK")
@click.option("-o", "--output", type=NamedPath(path_type=Path), required=True, help="Folder for the index.")
@click.option("--force", is_flag=True, help="Replace an existing index.")
@click.option(
    "--kind",
    type=click.Choice(INDEX_KINDS),
    default="ivf-pq",
    show_default=True,
    help="flat: faiss, exact. ivf-pq: faiss, approximate, D / 8 bytes per row. lancedb: a LanceDB database.",
)
@click.option(
    "--lists",
    type=click.IntRange(min=1),
    help="Number of lists that rows are divided into. [default: 4 sqrt(N)]",
)
@click.option("--probes", type=click.IntRange(min=1), help="Number of lists to search. [default: 32]")
@click.option(
    "--candidates",
    type=click.IntRange(min=1),
    help="Number of rows the index proposes; the exact cosine picks the best. [default: 256]",
)
@click.option(
    "--queries",
    type=click.IntRange(min=0),
    default=200,
    show_default=True,
    help="Number of noisy queries used to estimate recall; 0 to skip the estimate.",
)
@quiet_option
@json_option
def index(
    folder: str,
    output: Path,
    force: bool,
    kind: "IndexKind",
    lists: int | None,
    probes: int | None,
    candidates: int | None,
    queries: int,
    quiet: bool,
    as_json: bool,
) -> None:
    """Index a bank for fast search, and measure the index's recall.

    The index is for bundles exported with --retrieval external. BANK may also be such a bundle. Recall@k is
    the fraction of the k nearest rows that the index finds, after the exact cosine has picked the best
    candidates.
    """
    from xadapter_export.bank.index import IndexOptions, build_index

    options = IndexOptions(lists, probes, candidates, queries)
    with show_progress(quiet=quiet) as (say, _):
        record = build_index(_resolve(folder), output, kind, options, force=force, say=say)
    if as_json:
        print_json({"index": str(output), "record": record.model_dump(mode="json")})
        return
    shape = "" if record.num_lists is None else f", {record.num_probes} of {record.num_lists} lists searched"
    click.echo(f"{kind}: {record.num_pictures} pictures, {record.dim} wide{shape}")
    click.echo(f"size: {record.size_bytes / MIB:.2f} MiB")
    if record.recall:
        shown = ", ".join(f"@{k} {value:.4f}" for k, value in record.recall.items())
        click.echo(f"recall against exact search, {queries} queries: {shown}")
    click.echo(f"index: {output}")


@bank.command(
    cls=XadCommand,
    epilog=example("xad-export --experts v -o bundle", "xad-bank swap bundle bank -o bundle-with-my-bank"),
)
@click.argument("bundle", metavar="BUNDLE", type=NamedPath())
@click.argument("folder", metavar="BANK")
@click.option(
    "-o",
    "--output",
    type=NamedPath(path_type=Path),
    help="Folder for the new bundle; needed if BUNDLE is on the Hub. [default: replace BUNDLE]",
)
@click.option("--force", is_flag=True, help="Replace an existing bundle at --output.")
@click.option(
    "--leave-out",
    metavar="NAME",
    multiple=True,
    help="Leave out a variant or deployment that cannot be swapped, such as openvino-int8 or triton; may be "
    "repeated.",
)
@click.option("--assume-clip", is_flag=True, help="Accept a bank that does not record which CLIP made it.")
@sign_option
@revision_option
@quiet_option
@json_option
def swap(
    bundle: str,
    folder: str,
    output: Path | None,
    force: bool,
    leave_out: tuple[str, ...],
    assume_clip: bool,
    sign: Path | None,
    revision: str | None,
    quiet: bool,
    as_json: bool,
) -> None:
    """Replace the bank in a bundle, without PyTorch or a new export.

    BUNDLE is a folder, or the name of a bundle on the Hugging Face Hub: org/name.

    The new bank must come from the same CLIP; it may have any number of images. The command repeats the
    parity check and compares what each graph retrieves with a direct search of the bank. If anything fails,
    the bundle stays as it is. Swapping the old bank back in restores the old bundle. The new bundle does not
    keep the signature of the old one: sign it with --sign or xad-sign.
    """
    from xadapter_export.bundle.folder import read_bundle
    from xadapter_export.swap.swap import swap_bank

    with show_progress(quiet=quiet, after_s=QUICK_S) as (say, _):
        result = swap_bank(
            read_bundle(bundle, revision=revision),
            _resolve(folder),
            output,
            leave_out=leave_out,
            assume_clip=assume_clip,
            sign=sign,
            force=force,
            say=say,
        )
    if result.lost_signature:
        click.echo("note: the old bundle was signed; the new one is not. Sign it with xad-sign.", err=True)
    held = result.manifest.bank
    assert held is not None  # it was just put there
    if as_json:
        print_json(
            {
                "bundle": str(result.folder),
                "bank": held.model_dump(mode="json"),
                "num_cells": result.num_cells,
                "num_searched": result.num_searched,
                "left_out": list(result.left_out),
            }
        )
        return
    proven = f"{result.num_cells} comparisons" if result.num_cells else "no fp32 variant to check"
    click.echo(f"{held.num_pictures} pictures, {held.retrieval} retrieval, k = {held.k}")
    click.echo(
        f"parity checked: {proven}; retrievals compared with a search of the bank: {result.num_searched}"
    )
    click.echo(f"bundle: {result.folder}")


def _resolve(folder: str, revision: str | None = None) -> Path:
    from xadapter_export.bank.record import FILE_PATTERNS
    from xadapter_export.bundle.folder import BANK_NAME
    from xadapter_export.bundle.hub import HubRepo

    repo = HubRepo.find(folder, revision)
    if repo is not None:
        return repo.at_commit(repo.fetch_first(BANK_NAME)).fetch(FILE_PATTERNS)
    return builtin_folder() if folder == BUILTIN else Path(folder)


def _open(folder: str, revision: str | None = None) -> "BankReader":
    from xadapter_export.bank.reader import BankReader

    return BankReader(_resolve(folder, revision))


def _note_emoji(clip: "BankClip | None") -> None:
    """Say what to expect of the built-in CLIP."""
    builtin = _open(BUILTIN).clip
    if clip is not None and builtin is not None and clip.sha256 == builtin.sha256:
        click.echo(
            "note: the built-in CLIP has seen emoji only; for photographs, name another: --clip", err=True
        )


def _files(reader: "BankReader") -> list[Path]:
    from xadapter_export.bank.record import FEATURES_NAME, RECORD_NAME, SKIPPED_NAME, THUMBNAILS_NAME
    from xadapter_export.bundle.folder import BANK_NAME

    names = (FEATURES_NAME, BANK_NAME, RECORD_NAME, SKIPPED_NAME, THUMBNAILS_NAME)
    return [path for name in names if (path := reader.folder / name).is_file()]


def _report(output: Path, record: "BankRecord", *, as_json: bool) -> None:
    if as_json:
        print_json({"bank": str(output), "record": record.model_dump(mode="json")})
    else:
        click.echo(f"{record.num_pictures} {record.kind}, {record.dim} wide, {record.dtype}")
        click.echo(f"bank: {output}")


if __name__ == "__main__":
    bank()
