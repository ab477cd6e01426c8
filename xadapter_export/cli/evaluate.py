"""``xad eval``: evaluate a checkpoint or bundle against its baselines."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from xadapter_export.cli.command import (
    NamedPath,
    XadCommand,
    example,
    json_option,
    make_console,
    print_evaluation,
    print_json,
    quiet_option,
    revision_option,
    session_options,
)
from xadapter_export.cli.progress import show_progress
from xadapter_export.errors import ConfigError, OutputExistsError, import_extra
from xadapter_export.experts import EXPERT_SETS, NONE
from xadapter_export.tasks import FILL_MASK, TEXT_CLASSIFICATION

if TYPE_CHECKING:
    from xadapter_export.bundle.manifest import ExpertSet, Task
    from xadapter_export.evaluation.color import ColorEvaluation
    from xadapter_export.evaluation.labeled import Labeled
    from xadapter_export.evaluation.objects import ObjectSet
    from xadapter_export.evaluation.readings import OnProgress, Reading
    from xadapter_export.evaluation.results import Evaluation
    from xadapter_export.evaluation.scorer import Scorer

_NOT_SHOWN = ("prompts", "full stop after a mask that was put last")  # results.md has them
TRAINED_CONTROL = "same text, no pictures"
_TRAIN_NAME = "train.json"

F = TypeVar("F", bound=Callable[..., object])


@dataclass(frozen=True)
class Shared:
    """What every evaluation takes."""

    model: str
    experts: "tuple[ExpertSet, ...]"
    with_controls: bool
    controls: tuple[str, ...]
    control_folder: Path | None
    batch_size: int
    variant: str
    revision: str | None
    providers: tuple[str, ...]
    threads: int | None
    output: Path | None
    force: bool
    quiet: bool
    as_json: bool


def shared_options(function: F) -> F:
    """Add the argument MODEL and the options of ``Shared``."""
    options = [
        click.argument("model"),
        click.option(
            "--experts",
            type=click.Choice(EXPERT_SETS),
            multiple=True,
            help="Expert set to evaluate; may be repeated. [default: all in the model, and none]",
        ),
        click.option(
            "--controls",
            "with_controls",
            is_flag=True,
            help="Add the baselines: the frozen PLM, and the model with another text's images. For a "
            f"checkpoint with {_TRAIN_NAME}, also train and evaluate the same plug-in without images (takes "
            "time).",
        ),
        click.option(
            "--control",
            "controls",
            multiple=True,
            metavar="NAME=MODEL",
            help="Add a row for another checkpoint or bundle; may be repeated.",
        ),
        click.option(
            "--control-folder",
            type=NamedPath(path_type=Path),
            help="Folder for the trained control; an existing one is reused. [default: MODEL-control]",
        ),
        click.option(
            "--batch-size",
            type=click.IntRange(min=1),
            default=32,
            show_default=True,
            help="Texts per batch.",
        ),
        click.option(
            "--variant",
            default="auto",
            show_default=True,
            help="Variant of a bundle to run: auto (the one expected to be fastest here), a variant or a "
            "precision.",
        ),
        revision_option,
        session_options,
        click.option(
            "-o",
            "--output",
            type=NamedPath(path_type=Path),
            help="Folder to write results.json, results.md and charts to.",
        ),
        click.option("--force", is_flag=True, help="Replace existing results."),
        quiet_option,
        json_option,
    ]
    for option in reversed(options):
        function = option(function)
    return function


def object_options(function: F) -> F:
    """Add what chooses objects, and where their pictures are."""
    options = [
        click.option(
            "--objects",
            metavar="NAMES|FILE",
            help="Evaluate only these objects: names separated by commas, a file with one name per line, or "
            "a data file.",
        ),
        click.option("--in-bank", is_flag=True, help="Evaluate only objects named in a caption of the bank."),
        click.option(
            "--not-in",
            metavar="NAMES|FILE",
            help="Leave these objects out, for example the ones used in training.",
        ),
        click.option(
            "--full-stop/--no-full-stop",
            default=True,
            show_default=True,
            help="End a prompt with a full stop after the mask, if the prompt does not place the mask "
            "itself.",
        ),
        click.option(
            "--pictures",
            type=click.Path(path_type=Path, exists=True),
            help="Folder with one file per image id, or a thumbnails.zip, for the chart of objects. "
            "[default: the model's thumbnails.zip, if it has one]",
        ),
    ]
    for option in reversed(options):
        function = option(function)
    return function


@click.group()
def evaluate() -> None:
    """Evaluate a checkpoint or bundle against its baselines.

    MODEL is the folder of a checkpoint or bundle, its name on the Hugging Face Hub (org/name) or `builtin`. A
    bundle needs no PyTorch. A checkpoint and its bundle give the same numbers, up to rounding.
    """


@evaluate.command(
    cls=XadCommand,
    epilog=example("xad-eval color builtin --data memory_colors.jsonl --controls --published -o results"),
)
@click.option(
    "--data",
    required=True,
    type=NamedPath(path_type=Path),
    help="JSON lines with item, label and optional descriptor (Memory Colors), or CSV with object and color "
    "(ColorTerms).",
)
@click.option(
    "--prompts",
    default="valm",
    show_default=True,
    metavar="valm|norlund|FILE",
    help="Prompts: VaLM's 9, Norlund's 13, or a file with one prompt per line. A prompt contains [ITEM] and "
    "may contain [DESCRIPTOR], [MASK] and [SEP].",
)
@click.option(
    "--candidates",
    default="labels",
    show_default=True,
    metavar="labels|eleven|WORDS",
    help="Colors to choose from: those in the data, the eleven basic ones, or words separated by commas.",
)
@click.option("--published", is_flag=True, help="Add the published results for this benchmark.")
@object_options
@shared_options
def color(
    data: Path,
    prompts: str,
    candidates: str,
    published: bool,
    objects: str | None,
    in_bank: bool,
    not_in: str | None,
    full_stop: bool,
    pictures: Path | None,
    **shared: Any,
) -> None:
    """Measure how often the model knows the color of an object.

    Accuracy is the mean over prompts and objects. The standard deviation is over prompts.
    """
    from xadapter_export.evaluation.objects import ELEVEN, read_colors
    from xadapter_export.evaluation.prompts import read_prompts

    options = Shared(**shared)
    things, sentences = read_colors(data), read_prompts(prompts)
    words = {"labels": None, "eleven": ELEVEN}.get(candidates, tuple(candidates.split(",")))
    chosen = _choose_names(objects, not_in)
    with _output(options, draws=True) as folder, _progress(quiet=options.quiet) as on_progress:
        readings = _open(options, FILL_MASK.name, on_progress)
        from xadapter_export.evaluation.color import evaluate_color

        found = evaluate_color(
            readings,
            _select(things, readings[0].scorer, *chosen, in_bank=in_bank),
            sentences,
            prompts_name=prompts,
            candidates=words,
            ends_with_stop=full_stop,
            published=published,
            on_progress=on_progress,
        )
        _draw(found, sentences, folder, options, pictures, full_stop=full_stop)
    _report(found.evaluation, options)


_old_color = copy(color)  # by its old name, for one version
_old_color.hidden = True
evaluate.add_command(_old_color, "colour")


@evaluate.command(
    cls=XadCommand, epilog=example("xad-eval coda builtin --data coda.csv --in-bank --controls")
)
@click.option(
    "--data",
    required=True,
    type=NamedPath(path_type=Path),
    help="CSV with object, plural, optional annotators, and one column per color with its share (CoDa).",
)
@click.option(
    "--templates",
    default="coda",
    show_default=True,
    metavar="coda|valm|norlund|FILE",
    help="Prompts: our 6 for CoDa, VaLM's 9, Norlund's 13, or a file with one prompt per line. A prompt "
    "contains [ITEM] or [PLURAL].",
)
@object_options
@shared_options
def coda(
    data: Path,
    templates: str,
    objects: str | None,
    in_bank: bool,
    not_in: str | None,
    full_stop: bool,
    pictures: Path | None,
    **shared: Any,
) -> None:
    """Compare the model's color distribution for an object with people's.

    Reports accuracy at 1, Spearman correlation, Kendall's tau and Jensen-Shannon divergence (base 2), each
    averaged over objects and prompts.
    """
    from xadapter_export.evaluation.objects import read_distributions
    from xadapter_export.evaluation.prompts import read_prompts

    options = Shared(**shared)
    things, sentences = read_distributions(data), read_prompts(templates)
    chosen = _choose_names(objects, not_in)
    with _output(options, draws=True) as folder, _progress(quiet=options.quiet) as on_progress:
        readings = _open(options, FILL_MASK.name, on_progress)
        from xadapter_export.evaluation.coda import evaluate_coda

        found = evaluate_coda(
            readings,
            _select(things, readings[0].scorer, *chosen, in_bank=in_bank),
            sentences,
            prompts_name=templates,
            ends_with_stop=full_stop,
            on_progress=on_progress,
        )
        _draw(found, sentences, folder, options, pictures, full_stop=full_stop)
    _report(found.evaluation, options)


@evaluate.command(cls=XadCommand, epilog=example("xad-eval glue my-classifier --task sst2 --data sst2"))
@click.option(
    "--task", help="GLUE task that defines columns, labels and metrics. [default: accuracy, or correlation]"
)
@click.option(
    "--data",
    type=NamedPath(path_type=Path),
    help="A data file, or a folder with one file per split. [default: GLUE from the hub]",
)
@click.option("--split", default="validation", show_default=True, help="Split to evaluate.")
@click.option("--text-column", help="Column with the text: its name, or its number from 0.")
@click.option("--pair-column", help="Column with the second text.")
@click.option("--label-column", help="Column with the label.")
@shared_options
def glue(
    task: str | None,
    data: Path | None,
    split: str,
    text_column: str | None,
    pair_column: str | None,
    label_column: str | None,
    **shared: Any,
) -> None:
    """Evaluate a classifier or regression model with GLUE's metrics."""
    from xadapter_export.evaluation.labeled import glue_task, read_labeled

    options = Shared(**shared)
    if task is not None:
        glue_task(task)
    with _output(options) as folder, _progress(quiet=options.quiet) as on_progress:
        readings = _open(options, TEXT_CLASSIFICATION.name, on_progress)
        from xadapter_export.evaluation.glue import evaluate_glue

        labels = readings[0].scorer.labels

        def read(name: str) -> "Labeled":
            return read_labeled(
                data,
                task=task,
                split=name,
                text_column=text_column,
                pair_column=pair_column,
                label_column=label_column,
                labels=labels if task is None and len(labels) > 1 else None,
                regression=len(labels) == 1,
            )

        sets = {split: read(split)}
        if task == "mnli" and split == "validation" and _has_mismatched(data):
            sets["mismatched"] = read("validation_mismatched")
        found = evaluate_glue(readings, sets, task=task, on_progress=on_progress)
        if folder is not None:
            found.write(folder)
    _report(found, options)


@evaluate.command(
    cls=XadCommand, epilog=example("xad-eval mlm builtin --data text.txt --limit 100 --controls")
)
@click.option(
    "--data",
    required=True,
    type=NamedPath(path_type=Path),
    help="UTF-8 text file with one sentence per line.",
)
@click.option(
    "--limit", type=click.IntRange(min=1), help="Number of lines to read from the start of the file."
)
@shared_options
def mlm(data: Path, limit: int | None, **shared: Any) -> None:
    """Measure how the plug-in changes ordinary masked-language modeling.

    Masks every token in turn and reports pseudo-perplexity, loss and top-1 accuracy.
    """
    from xadapter_export.evaluation.mlm import evaluate_mlm
    from xadapter_export.evaluation.tables import read_sentences

    options = Shared(**shared)
    texts = read_sentences(data)[:limit]
    with _output(options) as folder, _progress(quiet=options.quiet) as on_progress:
        readings = _open(options, FILL_MASK.name, on_progress)
        found = evaluate_mlm(readings, texts, data_name=data.name, on_progress=on_progress)
        if folder is not None:
            found.write(folder)
    _report(found, options)


def _open(options: Shared, task: "Task", on_progress: "OnProgress") -> "tuple[Reading, ...]":
    """Open the model and its controls, train the control that is missing, and return the rows."""
    from xadapter_export.evaluation.opening import is_bundle, open_scorer
    from xadapter_export.evaluation.readings import plan_readings

    def open_one(source: str | Path, revision: str | None = None) -> "Scorer":
        return open_scorer(
            source,
            revision=revision,
            variant=options.variant,
            providers=options.providers or None,
            num_threads=options.threads,
            batch_size=options.batch_size,
        )

    sources: dict[str, str | Path] = {}
    for control in options.controls:
        name, equals, source = control.partition("=")
        if not (name and equals and source):
            raise click.UsageError(f"--control {control}: expected NAME=MODEL.")
        if name in sources:
            raise click.UsageError(f"--control {name} is given twice.")
        sources[name] = source
    on_progress("loading", 0, 0)
    scorer = open_one(options.model, options.revision)
    plan = plan_readings(scorer, task, options.experts, shuffled=options.with_controls)  # fails early
    if taken := {reading.name for reading in plan} & sources.keys():
        raise click.UsageError(f"--control {min(taken)}: the table already has a row with this name.")
    if options.with_controls and TRAINED_CONTROL not in sources:
        if is_bundle(options.model, options.revision):
            _say(
                f'cannot train a control for a bundle; add one with --control "{TRAINED_CONTROL}=CHECKPOINT"'
            )
        elif trained := _trained_control(options, scorer.name, on_progress):
            sources[TRAINED_CONTROL] = trained
    controls = {name: open_one(source) for name, source in sources.items()}
    return plan_readings(scorer, task, options.experts, shuffled=options.with_controls, controls=controls)


def _trained_control(options: Shared, name: str, on_progress: "OnProgress") -> Path | None:
    """Return the control that was trained for a checkpoint, or train it; None if there is no record.

    Raises:
        CheckpointError: If what is there does not say how it was trained.
        OutputExistsError: If the control that is there was trained otherwise.
    """
    record = Path(options.model) / _TRAIN_NAME
    if not record.is_file():
        _say(
            f"{name} has no {_TRAIN_NAME}, so its control cannot be trained; add one with "
            f'--control "{TRAINED_CONTROL}=CHECKPOINT"'
        )
        return None
    output = options.control_folder or Path(f"{name}-control")
    import_extra("torch", "train")
    from xadapter_export.training.control import is_control_of, train_control

    if not output.exists():
        train_control(
            Path(options.model),
            output,
            on_stage=lambda stage, _detail: on_progress(f"{TRAINED_CONTROL}: {stage}", 0, 0),
            on_step=lambda done, total, _detail: on_progress(f"{TRAINED_CONTROL}: training", done, total),
        )
        _say(f"trained control: {output}")
    elif not is_control_of(output, record.parent):
        raise OutputExistsError(
            "the existing control belongs to another training run",
            where=output,
            hint="choose another --control-folder, or remove this one",
        )
    return output


def _choose_names(objects: str | None, not_in: str | None) -> tuple[list[tuple[str, ...]], tuple[str, ...]]:
    from xadapter_export.evaluation.objects import read_names

    return [read_names(objects)] if objects else [], read_names(not_in) if not_in else ()


def _select(
    things: "ObjectSet",
    scorer: "Scorer",
    only: list[tuple[str, ...]],
    leave_out: tuple[str, ...],
    *,
    in_bank: bool,
) -> "ObjectSet":
    from xadapter_export.evaluation.objects import select_objects

    if in_bank:
        if not scorer.pictures:
            raise ConfigError(
                "--in-bank needs a model that retrieves images",
                where=scorer.name,
                hint="remove --in-bank, or export the V-expert too",
            )
        only = [*only, tuple(picture.caption for picture in scorer.pictures)]
    return select_objects(things, only=only, leave_out=leave_out)


def _has_mismatched(data: Path | None) -> bool:
    """Whether MNLI's second validation set is there: on the hub, or as a file in the folder."""
    from xadapter_export.evaluation.labeled import SUFFIXES, glue_task

    if data is None:
        return True
    stems = (glue_task("mnli").splits or {})["validation_mismatched"]
    return any((data / f"{stem}{suffix}").is_file() for stem in stems for suffix in SUFFIXES)


def _draw(
    found: "ColorEvaluation",
    prompts: Sequence[str],
    folder: Path | None,
    options: Shared,
    pictures: Path | None,
    *,
    full_stop: bool,
) -> None:
    """Write the results and the charts of the row that matters most, beside the frozen PLM's answers."""
    if folder is None:
        return
    from xadapter_export.bank.record import THUMBNAILS_NAME
    from xadapter_export.evaluation.charts import draw_confusion, draw_objects
    from xadapter_export.evaluation.color_answers import look_up_pictures
    from xadapter_export.evaluation.readings import main_reading
    from xadapter_export.evaluation.thumbnails import load_thumbnails

    found.evaluation.write(folder)
    main = main_reading([answers.reading for answers in found.answers])
    shown = next(answers for answers in found.answers if answers.reading is main)
    frozen = [a for a in found.answers if a.reading.experts == NONE and a is not shown]
    draw_confusion([*frozen[:1], shown], folder / "confusion.png")
    if pictures is None and (Path(options.model) / THUMBNAILS_NAME).is_file():
        pictures = Path(options.model)
    seen = look_up_pictures(shown, prompts, ends_with_stop=full_stop)
    images = load_thumbnails(pictures, (picture for some in seen for picture in some))
    draw_objects(shown, seen, images, folder / "objects.png")


@contextmanager
def _output(options: Shared, *, draws: bool = False) -> Iterator[Path | None]:
    """Stage the folder of results first, so that what is wrong with it shows before the work."""
    if options.output is None:
        yield None
        return
    from xadapter_export.bundle.staging import staged_folder
    from xadapter_export.evaluation.results import RESULTS_NAME

    if draws:
        import_extra("matplotlib.figure", "report")
    with staged_folder(options.output, force=options.force, marker=RESULTS_NAME) as staged:
        yield staged.path


@contextmanager
def _progress(*, quiet: bool) -> "Iterator[OnProgress]":
    """Show the row at work on stderr: a bar on a terminal, a line for each row elsewhere."""
    with show_progress(quiet=quiet, line="{done} of {total}{note}") as (say, count):
        row = ""

        def show(name: str, done: int, total: int) -> None:
            nonlocal row
            if name != row:
                say(name)
            row = name
            count(done, total)

        yield show


def _say(line: str) -> None:
    click.echo(line, err=True)


def _report(found: "Evaluation", options: Shared) -> None:
    if options.as_json:
        print_json(found.to_json())
        return
    print_evaluation(found, hidden=_NOT_SHOWN)
    if options.output is not None:
        make_console().print(f"results: {options.output}")
