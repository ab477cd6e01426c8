"""How much of the fp32 graph's answers a lossy variant keeps, and the gates below which it is rejected.

Dimensions: n answers, C logits of a mask or a text, or numbers of an embedding, q questions, K retrieved
pictures.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import NormalDist
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from xadapter_export.bundle.manifest import (
    Agreement,
    Candidate,
    ExpertSetSpec,
    JudgedOn,
    Task,
)
from xadapter_export.errors import ConfigError, InputTextError, ParityError
from xadapter_export.evaluation.checkpoint_scorer import CheckpointScorer
from xadapter_export.evaluation.labeled import GLUE_TASKS, read_labeled
from xadapter_export.evaluation.objects import read_colors
from xadapter_export.evaluation.prompts import VALM, ask
from xadapter_export.evaluation.tables import read_lines, read_table
from xadapter_export.exporters.judge.calibration import (
    CalibrationTexts,
    calibration_feeds,
    find_text_columns,
    put_mask_token,
    read_text_table,
)
from xadapter_export.model.builtin import builtin_folder
from xadapter_export.model.checkpoint import read_record
from xadapter_export.model.x_adapter_model import XAdapterModel
from xadapter_export.runtime.candidates import find_candidates
from xadapter_export.runtime.text import TextEncoder
from xadapter_export.sessions.session import Array, OnnxSession
from xadapter_export.targets import Precision
from xadapter_export.tasks import TASKS, TaskSpec

Feed = Mapping[str, Array]
Runner = Callable[[Feed, Sequence[str]], Sequence[Array]]  # inputs, and names of outputs, to those outputs
Float32Array = NDArray[np.float32]
CHECKPOINT_QUESTIONS: Final = "the checkpoint's own questions"
_SENTENCES_KEY = "sentences"  # of a row that brings its own questions, as those of the built-in checkpoint do


@dataclass(frozen=True)
class Gate:
    """What a variant must keep.

    Attributes:
        min_same_top: Share of answers whose largest entry must be that of fp32.
        min_cosine: Mean cosine to the answers of fp32, where an answer has no largest entry: embeddings, and
            the values of a regression.
        max_points_lost: How much worse it may be at questions with a known answer, in percentage points.
    """

    min_same_top: float
    min_cosine: float
    max_points_lost: float


GATES: Final[Mapping[Precision, Gate]] = {
    "fp16": Gate(0.999, 0.9999, 0.5),
    "int8": Gate(0.99, 0.99, 1.0),
    "int4": Gate(0.97, 0.97, 2.0),
}


@dataclass(frozen=True)
class Questions:
    """Questions with a known answer.

    Attributes:
        texts: q texts or pairs of texts; those for fill-mask have exactly one mask.
        right: q places of the right answer, among ``columns``.
        columns: Columns of the logits that may be answered; None for all.
        source: Where they are from: the name of a file without its folder, or words.
    """

    texts: CalibrationTexts
    right: tuple[int, ...]
    columns: tuple[int, ...] | None
    source: str = CHECKPOINT_QUESTIONS


@dataclass(frozen=True, eq=False)
class Probe:
    """What the fp32 graph and its variants are asked; make one with ``make_probe``.

    Attributes:
        task: What the graphs answer.
        feeds: Inputs of the texts on which answers are compared.
        retrieves: Whether the graphs give retrieved rows.
        questions: Questions with a known answer, or None. Where any answer may be given, as to what a text is
            labeled, variants are compared with fp32 on these too: they are asked anyway.
        question_feeds: Inputs of their texts, in their order.
    """

    task: Task
    feeds: tuple[Feed, ...]
    retrieves: bool
    questions: Questions | None
    question_feeds: tuple[Feed, ...]

    @property
    def compares_questions(self) -> bool:
        """Whether answers to the questions are compared like those to the texts."""
        return self.questions is not None and self.questions.columns is None


@dataclass(frozen=True, eq=False)
class Answers:
    """What one graph says.

    Attributes:
        name: The variant, for messages.
        vectors: ``(n, C) float32``. Logits of each mask or text, or embeddings.
        retrieved: ``(texts, K) int64``. Rows of the bank; None where nothing is retrieved.
        said: ``(q,) int64``. Place of the largest of the logits that may be answered; None without questions.
    """

    name: str
    vectors: Float32Array
    retrieved: NDArray[np.int64] | None
    said: NDArray[np.int64] | None


def as_runner(session: OnnxSession) -> Runner:
    """Return a session, of onnxruntime or of another engine, as a runner."""
    return lambda feed, names: session.run(list(names), feed)


def read_questions(
    model: XAdapterModel, source: Path | None, task: Task, candidates: Sequence[Candidate] | None = None
) -> Questions | None:
    """Return questions with known answers: those of a file, or of the built-in checkpoint.

    Args:
        model: The checkpoint.
        source: For text-classification, labeled texts as ``read_labeled`` reads them, the columns called as
            in GLUE. For fill-mask, Memory Colors or ColorTerms, asked with VaLM's prompts, or JSON lines with
            ``color``, ``sentences`` that ask for it and perhaps a ``distribution`` over the colors that may
            be said, as ``builtin/heldout.jsonl`` has. None for the questions in that file, where the PLM is
            the built-in one; any other has none.
        task: What the graph answers.
        candidates: What the head was sliced to, or None for the whole vocabulary.

    Returns:
        The questions; None where there is no file and the model has none of its own, or its head was sliced
        to candidates that lack a color.

    Raises:
        ConfigError: If the task has no right and wrong, a column is missing, or a color is not one token of
            the PLM, or not among the candidates.
        InputTextError: If the file cannot be read, is empty, or a label is not one of the checkpoint's.
        UnsupportedError: If colors are asked for and the checkpoint does not fill masks.
    """
    spec = TASKS[task]
    if source is None:
        source = builtin_folder() / "heldout.jsonl"
        if not spec.fills_words or model.plm.source != read_record(builtin_folder()).plm.source:
            return None
        colors = {color for row in read_table(source) for color in row["distribution"]}
        if candidates is not None and not colors <= {candidate.word for candidate in candidates}:
            return None
        return _color_questions(model, source, candidates)
    if spec.fills_words:
        return replace(_color_questions(model, source, candidates), source=source.name)
    if not spec.labels_texts or len(model.config.labels) == 1:
        raise ConfigError(
            "accuracy cannot be measured for this task",
            where="a regression" if spec.labels_texts else task,
            hint="remove --evaluate: these variants are judged only by their agreement with fp32",
        )
    return replace(_label_questions(model, source), source=source.name)


def make_probe(
    encoder: TextEncoder,
    spec: ExpertSetSpec,
    task: Task,
    texts: CalibrationTexts,
    questions: Questions | None = None,
) -> Probe:
    """Return what to ask the graphs of one expert set.

    Args:
        encoder: Both tokenizers, as the bundle will have them.
        spec: Inputs and outputs of the graphs.
        task: What they answer.
        texts: Texts to compare on; texts of like length are asked together.
        questions: Questions with a known answer.

    Raises:
        InputTextError: If a text is empty, has no mask where one is needed, or has masks too far apart.
    """
    feeds = calibration_feeds(encoder, texts.by_length(), spec.inputs)
    asked = [] if questions is None else calibration_feeds(encoder, questions.texts, spec.inputs)
    retrieves = any(tensor.name == "retrieved" for tensor in spec.outputs)
    return Probe(task, tuple(feeds), retrieves, questions, tuple(asked))


def collect(runner: Runner, probe: Probe, name: str) -> Answers:
    """Ask one graph everything.

    Args:
        runner: The graph.
        probe: What to ask.
        name: The variant, for messages.

    Raises:
        ParityError: If there is nothing to ask, or an answer is not finite.
    """
    if not probe.feeds:
        raise ParityError("there are no texts to compare a variant on", where=name)
    task = TASKS[probe.task]
    output = task.compared
    names = [output, "retrieved"] if probe.retrieves else [output]
    vectors, retrieved = [], []
    for feed in probe.feeds:
        first, *rest = runner(feed, names)
        vectors.append(task.rows(np.asarray(first, np.float32), feed))
        retrieved += [np.asarray(rows, np.int64) for rows in rest]
    said = []
    for feed in probe.question_feeds:
        rows = task.rows(np.asarray(runner(feed, [output])[0], np.float32), feed)
        said.append(_say(rows, probe))
        if probe.compares_questions:
            vectors.append(rows)
    answers = Answers(
        name,
        np.concatenate(vectors),
        np.concatenate(retrieved) if retrieved else None,
        np.concatenate(said) if said else None,
    )
    if not np.isfinite(answers.vectors).all():
        raise ParityError("a variant's outputs contain NaN or infinity", where=name)
    return answers


def compare(
    reference: Answers,
    candidate: Answers,
    probe: Probe,
    precision: Precision,
    *,
    min_agreement: float | None = None,
    max_points_lost: float | None = None,
    judged_on: JudgedOn | None = None,
) -> Agreement:
    """Return how well a variant's answers agree with those of fp32, beside the gate for its precision.

    Every mask of every text is an answer. How many there were is in the result, and the interval that they
    leave for the true share: of 990 in 1,000 it is 98.2 to 99.5 %, of 297 in 300 97.1 to 99.7 %.

    An answer of one number, as a regression gives, has no largest entry and no direction. There ``same_top``
    is None, and all answers together, less their mean, are the vector whose cosine is taken: Pearson's
    correlation of the variant with fp32. How the variant correlates with the right values is not measured.

    Args:
        reference: What the fp32 graph said.
        candidate: What the variant said.
        probe: What both were asked.
        precision: That of the variant.
        min_agreement: A gate in the place of the default one for ``same_top``, or where that is None for
            ``cosine``; what applied stands in ``min_same_top``.
        max_points_lost: Likewise for the accuracy.
        judged_on: What the result says that both were asked, and where.

    Raises:
        ParityError: If the answers have another shape than those of fp32.
    """
    ours, theirs = reference.vectors, candidate.vectors
    if ours.shape != theirs.shape:
        raise ParityError(
            "a variant's outputs have the wrong shape",
            where=candidate.name,
            expected=ours.shape,
            got=theirs.shape,
        )
    default, (cosine, same_top) = GATES[precision], _closeness(ours, theirs, TASKS[probe.task])
    default_min = default.min_cosine if same_top is None else default.min_same_top
    minimum = default_min if min_agreement is None else min_agreement
    points = default.max_points_lost if max_points_lost is None else max_points_lost
    compared = (*probe.feeds, *(probe.question_feeds if probe.compares_questions else ()))
    return Agreement(
        num_texts=sum(len(feed["input_ids"]) for feed in compared),
        num_answers=len(ours),
        same_top=same_top,
        same_top_interval=None if same_top is None else wilson_interval(same_top, len(ours)),
        cosine=cosine,
        same_rows=share_of_same_rows(reference, candidate),
        num_questions=0 if probe.questions is None else len(probe.questions.right),
        accuracy_fp32=_accuracy(reference, probe),
        accuracy=_accuracy(candidate, probe),
        min_same_top=float(minimum),
        max_points_lost=float(points),
        gate_lowered=minimum < default_min or points > default.max_points_lost,
        judged_on=judged_on,
    )


def _closeness(ours: Float32Array, theirs: Float32Array, task: TaskSpec) -> tuple[float, float | None]:
    """Return the mean cosine of answers, and the share with the same largest entry, if they have one."""
    if task.has_labels and ours.shape[1] == 1:
        return float(_cosines((ours - ours.mean()).T, (theirs - theirs.mean()).T)[0]), None
    cosine = float(_cosines(ours, theirs).mean())
    return cosine, None if task.head is None else float((ours.argmax(1) == theirs.argmax(1)).mean())


def wilson_interval(share: float, count: int) -> tuple[float, float]:
    """Return Wilson's 95 % interval of a share that was measured on ``count`` answers.

    Source: E. B. Wilson, Probable inference, the law of succession, and statistical inference, J. Am. Stat.
    Assoc. 22 (1927).
    """
    z2 = NormalDist().inv_cdf(0.975) ** 2
    middle = (share + z2 / (2 * count)) / (1 + z2 / count)
    half = math.sqrt(z2 * (share * (1 - share) / count + z2 / (4 * count**2))) / (1 + z2 / count)
    return max(0.0, middle - half), min(1.0, middle + half)


def share_of_same_rows(reference: Answers, candidate: Answers) -> float | None:
    """Return the share of fp32's retrieved rows that the variant retrieves for the same text, in any order.

    The experts weigh what was retrieved without looking at its order. None where nothing is retrieved.
    """
    if reference.retrieved is None or candidate.retrieved is None:
        return None
    pairs = zip(reference.retrieved, candidate.retrieved, strict=True)
    return float(np.mean([np.isin(ours, theirs).mean() for ours, theirs in pairs]))


def points_lost(agreement: Agreement) -> float | None:
    """Return the percentage points of accuracy that a variant lost; below 0 where it gained, None unasked."""
    if agreement.accuracy is None or agreement.accuracy_fp32 is None:
        return None
    num_lost = round((agreement.accuracy_fp32 - agreement.accuracy) * agreement.num_questions)
    return 100 * num_lost / agreement.num_questions  # 3 of 300 are 1 point, not 1.0000000000000009


def passes(agreement: Agreement) -> bool:
    """Whether a variant is at or above its gates."""
    try:
        check(agreement, "")
    except ParityError:
        return False
    return True


def check(agreement: Agreement, variant_name: str) -> None:
    """Refuse a variant that is below a gate.

    Args:
        agreement: What was measured, and the gates.
        variant_name: The variant, as in ``cpu-int8``, and the expert set where there are several.

    Raises:
        ParityError: If it is; the message has the gate, what was measured, and the flags that lower it.
    """
    same, minimum = agreement.same_top, agreement.min_same_top
    lost, most = points_lost(agreement), agreement.max_points_lost
    expected, got, flags = [], [], []
    if same is not None and same < minimum:
        expected.append(f"the same top answer in at least {_percent(minimum)}")
        got.append(
            f"{_percent(same)}: {round((1 - same) * agreement.num_answers)} of {agreement.num_answers} differ"
        )
        flags.append("--min-agreement")
    elif same is None and agreement.cosine < minimum:
        expected.append(f"a mean cosine of at least {minimum:g}")
        got.append(f"{agreement.cosine:.5f} over {agreement.num_answers}")
        flags.append("--min-agreement")
    if lost is not None and lost > most:
        expected.append(f"at most {most:g} point{'' if most == 1 else 's'} of accuracy lost")
        got.append(
            f"{lost:.2f}: {_percent(agreement.accuracy_fp32 or 0)} to {_percent(agreement.accuracy or 0)} "
            f"of {agreement.num_questions} questions"
        )
        flags.append("--max-points-lost")
    if flags:
        raise ParityError(
            "a variant failed its accuracy check",
            where=variant_name,
            expected=" and ".join(expected),
            got=" and ".join(got),
            hint="choose another precision, give typical texts with --calibration, or change the limit with "
            f"{' and '.join(flags)}",
        )


def _say(rows: Float32Array, probe: Probe) -> NDArray[np.int64]:
    columns = None if probe.questions is None else probe.questions.columns
    said: NDArray[np.int64] = (rows if columns is None else rows[:, columns]).argmax(1)
    return said


def _accuracy(answers: Answers, probe: Probe) -> float | None:
    if probe.questions is None or answers.said is None:
        return None
    return float((answers.said == np.array(probe.questions.right)).mean())


def _cosines(a: Float32Array, b: Float32Array) -> NDArray[np.float64]:
    """Return the ``(n,)`` cosines of rows; two rows of zeros are equal."""
    ours, theirs = a.astype(np.float64), b.astype(np.float64)
    lengths = np.linalg.norm(ours, axis=1) * np.linalg.norm(theirs, axis=1)
    cosines = (ours * theirs).sum(1) / np.where(lengths > 0, lengths, 1)
    equal = (ours == theirs).all(1)
    return np.where(equal, 1.0, np.clip(cosines, -1, 1))


def _percent(share: float) -> str:
    return f"{100 * share:.2f} %"


def _color_questions(model: XAdapterModel, source: Path, candidates: Sequence[Candidate] | None) -> Questions:
    scorer = CheckpointScorer(model, model.plm.source)
    asked: list[tuple[str, str]] = []  # question and color
    colors: set[str] = set()
    if f'"{_SENTENCES_KEY}"' in "".join(read_lines(source)[:1]):
        for number, row in enumerate(read_table(source), 1):
            color, sentences, others = _own_questions(row, f"{source}, row {number}")
            asked += [(put_mask_token(sentence, scorer.mask_token), color) for sentence in sentences]
            colors |= {color, *others}
    else:
        things = read_colors(source)
        asked = [(ask(prompt, o, scorer).text, o.color) for prompt in VALM for o in things.objects]
        colors = set(things.colors)
    for text, _ in asked:
        if (found := text.count(scorer.mask_token)) != 1:
            raise InputTextError("a question must have exactly one mask", where=repr(text), got=found)
    words = sorted(colors)
    columns = [candidate.token_id for candidate in find_candidates(scorer.encoder.tokenizer, words)]
    if candidates is not None:
        column_of = {candidate.token_id: place for place, candidate in enumerate(candidates)}
        if absent := [color for color, i in zip(words, columns, strict=True) if i not in column_of]:
            raise ConfigError(
                "a question's answer is not among the candidates",
                where=f"{source}, {', '.join(absent)}",
                expected=", ".join(candidate.word for candidate in candidates),
                hint="add it to --candidates, or leave --evaluate out",
            )
        columns = [column_of[i] for i in columns]
    texts = CalibrationTexts(tuple(text for text, _ in asked))
    return Questions(texts, tuple(words.index(color) for _, color in asked), tuple(columns))


def _own_questions(row: Mapping[str, Any], where: str) -> tuple[str, list[str], Mapping[str, float]]:
    """Return the color, the sentences that ask for it, and the shares of all colors that may be said."""
    color, sentences, shares = row.get("color"), row.get(_SENTENCES_KEY), row.get("distribution", {})
    if not (
        isinstance(color, str)
        and isinstance(sentences, list)
        and all(isinstance(sentence, str) for sentence in sentences)
        and sentences
        and isinstance(shares, dict)
    ):
        raise InputTextError(
            "a row has no questions", where=where, expected=f"color, and a list of {_SENTENCES_KEY}", got=row
        )
    return color, sentences, shares


def _label_questions(model: XAdapterModel, source: Path) -> Questions:
    columns = list(read_text_table(source)[0])
    text, pair = find_text_columns(columns, source, with_pairs=True)
    known = {name for task in GLUE_TASKS.values() for name in task.label}
    data = read_labeled(
        source,
        text_column=text,
        pair_column=pair,
        label_column=next((name for name in columns if name in known), None),
        labels=model.config.labels,
    )
    places = tuple(int(label) for label in data.labels)
    return Questions(CalibrationTexts(data.texts, data.pairs), places, None)
