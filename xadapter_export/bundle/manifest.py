"""What a bundle says about itself: the strict, frozen form of ``manifest.json``.

An unknown key, a missing key or a reference to something that is not there is an error that names the key,
so a manifest that was read can be relied on without further checks.
"""

import unicodedata
from collections.abc import Iterable
from typing import Annotated, Literal, Protocol, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from xadapter_export.bundle.small_files import describe, parse_object
from xadapter_export.errors import BundleError
from xadapter_export.experts import (
    KINDS,
    keep_name,
    known_expert,
    known_experts,
    known_set,
    length_names,
    reads_bank,
)
from xadapter_export.layers import TOKEN_QUERY
from xadapter_export.targets import PORTABLE, TARGETS, Precision
from xadapter_export.tasks import TASKS

FORMAT_VERSION = 1


_DEVICES = {"con", "prn", "aux", "nul", "conin$", "conout$"}
_DEVICES |= {f"{name}{number}" for name in ("com", "lpt") for number in "0123456789\xb9\xb2\xb3"}


def _inside(path: str) -> str:
    """Refuse a path that is not relative, that leaves the folder, or that some system takes for another."""
    for part in path.split("/"):
        is_odd = (
            part.endswith((".", " ")) or not part.isprintable() or any(char in part for char in '\\:*?"<>|')
        )
        if is_odd or not 0 < len(part.encode()) <= 255 or part.split(".")[0].rstrip(" ").lower() in _DEVICES:
            raise ValueError(
                "must be a relative path with forward slashes that stays inside the bundle, with names that "
                "every system takes"
            )
    return path


def _known_task(name: str) -> str:
    """Refuse a task that is in no table; pydantic makes one line of the error."""
    return TASKS[name].name


ExpertSet = Annotated[str, AfterValidator(known_set)]
SomeExperts = Annotated[str, AfterValidator(known_experts)]
Expert = Annotated[str, AfterValidator(known_expert)]
Component = Annotated[str, Field(pattern=f"^(plm|head|clip|bank|adapter_[{''.join(KINDS)}])$")]
InnerPath = Annotated[str, AfterValidator(_inside)]
Task = Annotated[str, AfterValidator(_known_task)]
TargetName = Annotated[str, Field(pattern=r"^[a-z0-9]+(-[a-z0-9]+)*$")]  # known here, or somewhere else
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Count = Annotated[int, Field(ge=0)]
Size = Annotated[int, Field(ge=1)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class TensorSpec(_Strict):
    """One input or output of a graph; an axis is a name where it varies and a number where it is fixed."""

    name: str
    dtype: Literal["int64", "float32"]
    axes: tuple[str | Size, ...]


class TapSpec(_Strict):
    """A named value in the graph: what ``expert`` adds to the hidden states before PLM layer ``layer``."""

    name: str
    layer: Count
    expert: Expert


class GraphSpec(_Strict):
    """Inputs and outputs of one of the two graphs of a set that is split."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


class SplitSpec(_Strict):
    """The two graphs of a set that is split at what a text asks CLIP and the bank.

    The query graph reads ``clip_input_ids`` alone. Its outputs are inputs of the answer graph, but ``query``:
    with it the app searches the bank and gives the answer graph the rows it found as ``memory_v``.
    """

    query: GraphSpec
    answer: GraphSpec


class ExpertSetSpec(_Strict):
    """The IO contract of one expert set, and how many parameters each component of its graph has.

    ``inputs`` and ``outputs`` are those of the whole, also where ``split`` says that it is two graphs.
    """

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    taps: tuple[TapSpec, ...]
    component_parameters: dict[Component, Count]
    split: SplitSpec | None = None

    @property
    def searches_outside(self) -> bool:
        """Whether the app searches the bank, and not a graph."""
        return self.split is not None and any(t.name == "query" for t in self.split.query.outputs)

    def explains(self, expert: Expert) -> bool:
        """Whether the graph says how far the items of an expert's memory carry its contributions."""
        named = {tensor.name for tensor in (*self.inputs, *self.outputs)}
        return named.issuperset((keep_name(expert), *length_names(expert)))


class Candidate(_Strict):
    """A word that the sliced head can answer, and its id in the PLM's vocabulary."""

    word: str
    token_id: Count


class CheckpointIdentity(_Strict):
    """Which checkpoint the bundle was made from.

    Attributes:
        source: A name or hub id, never a local path.
        sha256: Hash of what was trained, with its settings.
        layer: The kind of its X-adapter layers.
        null_rows: Null rows beside each memory; left out where there are none.
    """

    source: str
    sha256: Sha256
    layer: str = TOKEN_QUERY.name
    null_rows: Annotated[Count, Field(exclude_if=lambda number: number == 0)] = 0


class PlmSpec(_Strict):
    """The language model, as far as feeding it is concerned; ``max_seq`` counts special tokens."""

    family: str
    source: str
    sha256: Sha256
    hidden_size: Size
    vocab_size: Size
    max_seq: Size
    mask_token: str | None
    mask_token_id: Count | None
    pad_token_id: Count
    has_token_type_ids: bool


class TowerFacts(Protocol):
    """What is to be known of a text tower to feed it; a tower, and a manifest, say it."""

    @property
    def context_length(self) -> int:
        """Longest input in tokens, special tokens included."""

    @property
    def end_token_id(self) -> int:
        """The last token of a text, which truncation keeps."""

    @property
    def pad_token_id(self) -> int:
        """What comes after it."""

    @property
    def exact_at_true_length(self) -> bool:
        """Whether padding changes nothing; otherwise every text is padded to the context length."""


class ClipSpec(_Strict):
    """CLIP's text tower, as far as feeding it is concerned.

    Attributes:
        context_length: Longest input in tokens, special tokens included.
        end_token_id: The last token of a text, which truncation keeps.
        pad_token_id: What comes after it.
        exact_at_true_length: Whether texts are padded to the longest of their batch; else to
            ``context_length``.
    """

    source: str
    sha256: Sha256
    context_length: Size
    end_token_id: Count
    pad_token_id: Count
    exact_at_true_length: bool
    embed_dim: Size
    text_width: Size


class ProvenBank(_Strict):
    """The bank that a bundle was exported and proven with, where it now has another."""

    num_pictures: Size
    sha256: Sha256


class BankSpec(_Strict):
    """The feature bank; in ``static`` retrieval ``k`` is the number of prototypes.

    Attributes:
        features: The file that holds its rows where they are in no graph and the bundle has them.
        clip_sha256: The CLIP of its features, of which another bank must be too; None where nobody said.
        swapped_from: The bank that the bundle was proven with; None where it is this one. What was proven,
            measured or counted of sets with the V-expert was so with that bank.
    """

    num_pictures: Size
    dim: Size
    sha256: Sha256
    retrieval: Literal["topk", "static"]
    k: Size
    features: InnerPath | None = None
    clip_sha256: Sha256 | None = None
    swapped_from: ProvenBank | None = None


class VariantParity(_Strict):
    """The proof of one variant, in short; ``parity.json`` has every cell."""

    passed: bool
    max_abs: Annotated[float, Field(ge=0)]
    atol: Annotated[float, Field(ge=0)]
    rtol: Annotated[float, Field(ge=0)]
    num_cells: Size


class JudgedOn(_Strict):
    """What a lossy variant was judged on.

    Attributes:
        texts: Where the texts are from: a file's name, the checkpoint, or the exporter's own sentences.
        questions: The same of the questions with a known answer; None where there were none.
        processor: Architecture and int8 features of the CPU whose kernels answered, as ``x86-64 avx2``.
            Another may give other answers.
    """

    texts: str
    questions: str | None
    processor: str


class Agreement(_Strict):
    """What a lossy variant was measured to say, beside the fp32 graph that it was derived from.

    Attributes:
        num_texts: How many texts both were asked.
        num_answers: How many answers were compared: masks, texts or embeddings.
        same_top: Share of answers whose largest entry is the same; None where there is no such entry.
        same_top_interval: Where that share lies with 95 % confidence, were each answer drawn by itself
            (Wilson's interval); None where ``same_top`` is.
        cosine: Mean cosine between the two answers, each a vector; of a regression, the correlation of its
            values with those of fp32.
        same_rows: Share of the bank rows that fp32 retrieves and it retrieves too; None where none are
            retrieved.
        num_questions: How many questions with a known answer were asked; 0 where there were none.
        accuracy_fp32: Share of them that fp32 answers right; None where there were none.
        accuracy: The same of this variant.
        min_same_top: The gate for ``same_top``, or for ``cosine`` where that is None.
        max_points_lost: The gate for the accuracy, in percentage points.
        gate_lowered: Whether the user asked for a gate below the default.
        judged_on: The texts and the processor; None in bundles that do not say.
    """

    num_texts: Size
    num_answers: Size
    same_top: Annotated[float, Field(ge=0, le=1)] | None
    same_top_interval: tuple[float, float] | None = None
    cosine: float
    same_rows: Annotated[float, Field(ge=0, le=1)] | None = None
    num_questions: Count
    accuracy_fp32: Annotated[float, Field(ge=0, le=1)] | None
    accuracy: Annotated[float, Field(ge=0, le=1)] | None
    min_same_top: Annotated[float, Field(ge=0, le=1)]
    max_points_lost: Annotated[float, Field(ge=0)]
    gate_lowered: bool
    judged_on: JudgedOn | None = None


class Optimization(_Strict):
    """One step that made the graph smaller or faster, and what it saved.

    Attributes:
        name: Name of the step, as in ``docs/design.md``.
        lossless: Whether the result changes by no more than rounding.
        unit: What was counted: ``nodes`` of the graph, ``bytes`` of its weights, ``products`` with a matrix,
            or ``multiply-adds`` for one text of 32 tokens with one mask and at most 32 CLIP tokens.
        before: Count before the step.
        after: Count after it.
    """

    name: str
    lossless: bool
    unit: Literal["nodes", "bytes", "products", "multiply-adds"]
    before: Count
    after: Count


class Variant(_Strict):
    """One graph file, or two where the set is split.

    Attributes:
        target: Who runs it; see ``targets``.
        file: The graph; of a set that is split, the answer graph.
        query_file: The query graph of a set that is split.
        weight_files: Files with the weights that the graph refers to; shared between variants.
        size_bytes: Size of the graph files plus the bytes of the weights that they refer to.
        optimizations: What was done to it, in order.
        parity: The proof of an fp32 variant; None of a lossy one, and while the bundle is being made.
        agreement: What a lossy variant was measured to say; None of an fp32 one.
    """

    expert_set: ExpertSet
    precision: Precision
    target: TargetName
    file: InnerPath
    query_file: InnerPath | None = None
    weight_files: tuple[InnerPath, ...]
    size_bytes: Size
    optimizations: tuple[Optimization, ...] = ()
    parity: VariantParity | None
    agreement: Agreement | None = None

    @property
    def name(self) -> str:
        """Name to choose it by: ``onnx-fp32``, ``cpu-int8``, ``openvino-int8``."""
        return f"{self.target}-{self.precision}"

    @property
    def is_for_gpu(self) -> bool:
        """Whether no CPU runs it as fast as fp32."""
        is_known = self.target in TARGETS
        return TARGETS[self.target].is_for_gpu(self.precision) if is_known else self.precision == "fp16"

    @property
    def is_onnx(self) -> bool:
        """Whether its files are ONNX."""
        return self.file.endswith(".onnx")

    @property
    def graph_files(self) -> tuple[str, ...]:
        """Its graph, or both in the order in which they run."""
        return (self.file,) if self.query_file is None else (self.query_file, self.file)

    @property
    def all_files(self) -> tuple[str, ...]:
        """Its graph or graphs, and their weights."""
        return (*self.graph_files, *self.weight_files)


class Deployment(_Strict):
    """Files for another runtime, made from a graph of the bundle; ``XAdapterSession`` drives engines alone.

    Attributes:
        target: The runtime.
        source: Name of the variant that it was made from, as ``onnx-fp32``.
        files: What was written for it.
        size_bytes: Bytes of these files.
        seconds: How long that took, where it was made.
        facts: What else is to be known of it, such as the ranges of its axes, by name.
        refused: What was asked for and cannot be had, a line each with the reason.
        prove_with: The command that proves it on a machine that has the runtime; None where it was proven.
    """

    target: TargetName
    expert_set: ExpertSet
    precision: Precision
    source: str
    files: tuple[InnerPath, ...]
    size_bytes: Count
    seconds: Annotated[float, Field(ge=0)]
    facts: dict[str, str]
    refused: tuple[str, ...] = ()
    prove_with: str | None

    @property
    def engines(self) -> dict[str, str]:
        """The file of each engine by the GPUs that it is for, as ``sm86+sm89``; empty of another runtime."""
        start = "engine "
        return {key.removeprefix(start): file for key, file in self.facts.items() if key.startswith(start)}

    @property
    def name(self) -> str:
        """Name that it is asked for by: ``tensorrt-rtx-fp16``, ``mobile-int8``."""
        return f"{self.target}-{self.precision}"


class FileEntry(_Strict):
    """Size and hash of one file of the bundle."""

    size_bytes: Count
    sha256: Sha256


class Manifest(_Strict):
    """The contents of ``manifest.json``.

    Attributes:
        files: Every file but the manifest itself; empty only while the bundle is being made.
    """

    format_version: Literal[1]
    created_with: dict[str, str]
    checkpoint: CheckpointIdentity
    task: Task
    labels: tuple[str, ...] | None
    candidates: tuple[Candidate, ...] | None
    opset: Size
    default_expert_set: ExpertSet
    expert_sets: dict[ExpertSet, ExpertSetSpec]
    plm: PlmSpec
    clip: ClipSpec | None
    bank: BankSpec | None
    variants: tuple[Variant, ...]
    deployments: tuple[Deployment, ...] = ()
    files: dict[InnerPath, FileEntry]

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        problems = [text for text, wrong in self._checks() if wrong]
        if problems:
            raise ValueError("; ".join(problems))
        return self

    def _checks(self) -> Iterable[tuple[str, bool]]:
        """Yield what each cross reference says when it is broken, and whether it is."""
        sets = self.expert_sets
        yield "default_expert_set is not among expert_sets", self.default_expert_set not in sets
        covered = {variant.expert_set for variant in self.variants}
        yield "variants and expert_sets do not name the same sets", covered != set(sets)
        named = {path for variant in self.variants for path in variant.all_files}
        if self.bank is not None and self.bank.features is not None:
            named.add(self.bank.features)
        named |= {path for deployment in self.deployments for path in deployment.files}
        spelled: dict[str, set[str]] = {}
        for path in {*self.files, *named}:
            spelled.setdefault(unicodedata.normalize("NFC", path).casefold(), set()).add(path)
        same = sorted(path for paths in spelled.values() if len(paths) > 1 for path in paths)
        yield f"some systems take these files for one: {', '.join(same)}", bool(same)
        unlisted = sorted(named - set(self.files)) if self.files else []
        yield f"variants or deployments name a file that files lacks: {', '.join(unlisted)}", bool(unlisted)
        inputs = {spec.name for item in sets.values() for spec in item.inputs}
        outputs = {spec.name for item in sets.values() for spec in item.outputs}
        yield "clip is null but a set takes clip_input_ids", self.clip is None and "clip_input_ids" in inputs
        yield "bank is null but a set gives retrieved", self.bank is None and "retrieved" in outputs
        too_many = self.bank is not None and self.bank.k > self.bank.num_pictures
        yield "bank.k is larger than bank.num_pictures", too_many
        split = [
            (v.query_file is not None) != (sets[v.expert_set].split is not None)
            for v in self.variants
            if v.expert_set in sets
        ]
        yield "a variant has a query graph and its set no split, or the other way round", any(split)
        task = TASKS[self.task]
        has_mask = self.plm.mask_token is not None and self.plm.mask_token_id is not None
        yield f"{task.name} needs plm.mask_token and its id", task.reads_masks and not has_mask
        verb = "needs" if task.has_labels else "has no"
        yield f"{task.name} {verb} labels", task.has_labels != bool(self.labels)
        yield f"{task.name} has no candidates", self.candidates is not None and not task.fills_words
        too_big = [c.word for c in self.candidates or () if c.token_id >= self.plm.vocab_size]
        yield f"candidates outside the vocabulary: {too_big}", bool(too_big)
        for key in ("pad_token_id", "mask_token_id"):
            token_id, size = getattr(self.plm, key), self.plm.vocab_size
            wrong = token_id is not None and token_id >= size
            yield f"plm.{key} is outside the vocabulary: {token_id} of {size}", wrong
        words = self.plm.vocab_size if self.candidates is None else len(self.candidates)
        widths = {"words": words, "labels": len(self.labels or ()), "hidden": self.plm.hidden_size}
        for name, spec in sets.items():
            for output in task.outputs:
                got = [tensor.axes[-1:] for tensor in spec.outputs if tensor.name == output.name]
                wanted = widths[output.axes[-1]]
                found = ", ".join(map(str, got[0])) if got else "none"
                text = f"set {name}: {output.name} should be {wanted} wide, got {found}"
                yield text, got != [(wanted,)]
            for tensor, axes in self._explaining_axes(spec):
                text = f"set {name}: {tensor.name} should have the axes {axes}, got {tensor.axes}"
                yield text, tensor.axes != axes

    def _explaining_axes(self, spec: ExpertSetSpec) -> Iterable[tuple[TensorSpec, tuple[str | int, ...]]]:
        """Yield what a set with explanations takes and gives, and the axes that it must have."""
        places = "masks" if TASKS[self.task].reads_masks else 1
        for expert in filter(spec.explains, KINDS):
            items = "clip_seq" if self.bank is None or not reads_bank([expert]) else self.bank.k
            layers = sum(tap.expert == expert for tap in spec.taps)
            lengths, rest = length_names(expert)
            wanted: dict[str, tuple[str | int, ...]] = {
                keep_name(expert): ("batch", items),
                lengths: ("batch", places, layers, items),
                rest: ("batch", places, layers, 2),
            }
            if reads_bank([expert]):
                wanted["retrieved"] = ("batch", items)
            for tensor in (*spec.inputs, *spec.outputs):
                if tensor.name in wanted:
                    yield tensor, wanted[tensor.name]

    def variants_of(self, expert_set: ExpertSet) -> tuple[Variant, ...]:
        """Return the variants of an expert set, the portable one first.

        Raises:
            BundleError: If the bundle does not hold that set.
        """
        if found := tuple(variant for variant in self.variants if variant.expert_set == expert_set):
            return found
        raise BundleError(
            "the bundle does not have this expert set",
            where=expert_set,
            expected=f"one of {', '.join(self.expert_sets)}",
            hint="choose one of those, or export the checkpoint again with this set",
        )

    def variant(self, expert_set: ExpertSet, name: str = PORTABLE) -> Variant:
        """Return one variant of an expert set, by its name; the portable one by default.

        Raises:
            BundleError: If the bundle does not hold that set, or not in that variant.
        """
        variants = self.variants_of(expert_set)
        for variant in variants:
            if variant.name == name:
                return variant
        raise BundleError(
            "the bundle does not have this variant",
            where=f"{name}, experts {expert_set}",
            expected=f"one of {', '.join(variant.name for variant in variants)}",
            hint="choose one of those, or export with its --precision and --target",
        )

    @property
    def longest(self) -> dict[str, int]:
        """The most tokens of ``seq``, and of ``clip_seq`` where a set reads CLIP, by axis."""
        of_clip = {} if self.clip is None else {"clip_seq": self.clip.context_length}
        return {"seq": self.plm.max_seq, **of_clip}

    @property
    def example(self) -> str:
        """A text to try the bundle with."""
        return TASKS[self.task].example.format(mask=self.plm.mask_token)

    @property
    def is_for_gpu(self) -> bool:
        """Whether every graph is for a GPU."""
        return all(variant.is_for_gpu for variant in self.variants)

    def to_json(self) -> str:
        """Return the text of ``manifest.json``, keys in the order of the contract."""
        return self.model_dump_json(indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str, *, where: str = "manifest.json") -> Self:
        """Parse ``manifest.json``.

        Raises:
            BundleError: If it is not JSON, is of another format version, or has a wrong key or value.
        """
        version = parse_object(text, "the manifest", where).get("format_version", FORMAT_VERSION)
        if version != FORMAT_VERSION:
            raise BundleError(
                "the manifest has another format version",
                where=where,
                expected=FORMAT_VERSION,
                got=version,
                hint="export the bundle again, or install the version of xadapter-export that made it",
            )
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            raise BundleError("the manifest is not valid", where=where, got=describe(error)) from error
