"""Run a bundle in an app: texts in, answers out.

Dimensions: B batch, T PLM tokens, S CLIP tokens, M masks, H hidden size, K retrieved pictures.
"""

import copy
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Self, Unpack, overload

import numpy as np
from numpy.typing import NDArray

from xadapter_export.bundle.folder import BANK_NAME, Bundle, companions, read_bundle
from xadapter_export.bundle.manifest import (
    Candidate,
    Expert,
    ExpertSet,
    ExpertSetSpec,
    Manifest,
    Variant,
)
from xadapter_export.bundle.pictures import Picture, read_pictures
from xadapter_export.bundle.signature import read_signed_bundle
from xadapter_export.errors import (
    BundleError,
    ConfigError,
    MissingExtraError,
    ProviderError,
    UnsupportedError,
    XAdapterError,
)
from xadapter_export.experts import V, experts_of, reads_bank
from xadapter_export.parity.recorded import Check
from xadapter_export.runtime.answers import RetrievedPicture
from xadapter_export.runtime.batches import plan_batches
from xadapter_export.runtime.candidates import columns_of, find_candidates
from xadapter_export.runtime.choose import runs_on_cpu
from xadapter_export.runtime.encoders import load_encoders
from xadapter_export.runtime.explain import Explanation, MemoryItem, check_explains, explain
from xadapter_export.runtime.feed import check_feed, check_outputs
from xadapter_export.runtime.graphs import Graphs
from xadapter_export.runtime.how_to_open import HowToOpen, SessionOptions
from xadapter_export.runtime.split import SplitPairs
from xadapter_export.runtime.text import Int64Array, TextEncoder, check_texts
from xadapter_export.sessions.session import Array
from xadapter_export.sessions.tensorrt_session import largest_batch
from xadapter_export.targets import CPU_PROVIDER, TARGETS
from xadapter_export.tasks import FEATURE_EXTRACTION, FILL_MASK, TASKS, TEXT_CLASSIFICATION, TaskSpec
from xadapter_export.tasks.fill_mask import FillMaskAnswer
from xadapter_export.tasks.spec import Asked
from xadapter_export.tasks.text_classification import LabelAnswer

Float32Array = NDArray[np.float32]
TextList = list[str] | tuple[str, ...]


class XAdapterSession:
    """A loaded bundle. One session may be used from several threads.

    Make one with ``load``. Where the bundle holds several expert sets, ``with_experts`` gives a view with
    another one switched on, which shares everything that is loaded; every method also takes ``experts=``.
    """

    def __init__(self, bundle: Bundle, how: HowToOpen) -> None:
        manifest = bundle.manifest
        self.bundle = bundle
        self.experts = how.experts or manifest.default_expert_set
        with how.verifying(bundle, companions(manifest)):  # each graph when it is opened; what is not, never
            self._encoder, self._clip_encoder = load_encoders(bundle)
            self.pictures = self._read_pictures()
        self._tokenizer = self._encoder.tokenizer
        self._batch_size = how.batch_size
        pairs = SplitPairs(bundle, how.index, how.cache_size, verify=how.verify)
        self._graphs = Graphs(bundle, self.experts, how, pairs)

    @classmethod
    def load(cls, bundle: Path | str, **options: Unpack[SessionOptions]) -> Self:
        """Load a bundle.

        Args:
            bundle: Its folder, or its name on the Hugging Face Hub, ``org/name``. From there a file is
                downloaded when it is needed, into the Hub's own cache: the graphs of another expert set when
                that is first asked.
            options: How: ``experts="v"``, ``variant="cpu-int8"``, ``num_threads=2``; ``HowToOpen`` lists
                them all, with their defaults.

        Raises:
            BundleError: If the bundle is not whole, or does not hold the expert set or the variant.
            ParityError: If the variant that was named gives wrong answers on this processor, or all that
                suit do.
            HashMismatchError: If a file was changed.
            SignatureError: If there is a ``verify_key``, and the bundle is not what was signed with it.
            HubError: If a file cannot be downloaded.
            ProviderError: If a provider is not there or does not start; of an engine, if there is no GPU, or
                no engine for it.
            MissingExtraError: If onnxruntime, or OpenVINO or TensorRT for what it runs, or model-signing for
                a ``verify_key``, is not installed.
            ConfigError: As ``HowToOpen``; if ``cache_dir`` cannot be written; the variant cannot go with the
                providers: fp16 runs on no CPU; or there is an index and nothing to use it, or it is not one
                of the bundle's bank.
        """
        how = HowToOpen(**options)
        if how.verify_key is None:
            found = read_bundle(bundle, revision=how.revision, verify=False, on_demand=True)
        else:
            found = read_signed_bundle(bundle, how.verify_key, revision=how.revision)
            how = replace(how, verify=False)  # just done, for every file
        try:
            return cls(found, how)
        except (ProviderError, MissingExtraError) as error:
            is_for_gpu = not runs_on_cpu(how.variant)
            if not how.allow_fallback or (isinstance(error, MissingExtraError) and not is_for_gpu):
                raise
            variant = "auto" if is_for_gpu else how.variant
            session = cls(found, replace(how, variant=variant, providers=[CPU_PROVIDER]))
            what = f", with {session.answered_by}" if is_for_gpu else ""
            warnings.warn(f"{error}; using the CPU instead{what}", UserWarning, stacklevel=2)
            return session

    def __repr__(self) -> str:
        folder, sets = self.bundle.folder, ", ".join(self.manifest.expert_sets)
        return f"XAdapterSession({str(folder)!r}, experts={self.experts!r} of {sets}, {self.answered_by})"

    @property
    def manifest(self) -> Manifest:
        """What the bundle says about itself."""
        return self.bundle.manifest

    @property
    def variant(self) -> Variant:
        """The variant that answers for the session's expert set, or that its engines were made from."""
        return self._graphs.choice(self.experts).variant

    @property
    def answered_by(self) -> str:
        """Name of what answers for the session's expert set: that of the variant, or of its engines."""
        return self._graphs.choice(self.experts).name

    @property
    def variant_reason(self) -> str:
        """Why it is that one, in a few words."""
        return self._graphs.choice(self.experts).reason

    @property
    def checks(self) -> tuple[Check, ...]:
        """What was found when graphs were opened, in that order; those that were refused too."""
        return self._graphs.checks

    def with_experts(self, experts: ExpertSet) -> Self:
        """Return the same session with another expert set switched on; nothing is loaded twice.

        Raises:
            BundleError: If the bundle does not hold that set, or not in a variant that suits.
        """
        self._graphs.choice(experts)
        other = copy.copy(self)  # shares the graphs and their lock
        other.experts = experts
        return other

    @overload
    def fill_mask(
        self,
        texts: str,
        *,
        top_k: int = 5,
        candidates: Sequence[str] | None = None,
        experts: ExpertSet | None = None,
    ) -> list[FillMaskAnswer]: ...

    @overload
    def fill_mask(
        self,
        texts: TextList,
        *,
        top_k: int = 5,
        candidates: Sequence[str] | None = None,
        experts: ExpertSet | None = None,
    ) -> list[list[FillMaskAnswer]]: ...

    def fill_mask(
        self,
        texts: str | TextList,
        *,
        top_k: int = 5,
        candidates: Sequence[str] | None = None,
        experts: ExpertSet | None = None,
    ) -> list[FillMaskAnswer] | list[list[FillMaskAnswer]]:
        """Say which words fill the masks.

        Args:
            texts: A text with one or more mask tokens, or a list of such texts.
            top_k: How many words for each mask.
            candidates: Answer with one of these words only.
            experts: Expert set for this call.

        Returns:
            For one text, its answers: mask by mask, the best first. For a list, a list of these.

        Raises:
            InputTextError: If a text is empty, has no mask, or has masks too far apart.
            ConfigError: If ``top_k`` is below 1, ``candidates`` is not a list of words, or one of them is not
                one token.
            UnsupportedError: If the bundle is for another task.
            BundleError: If the bundle does not hold the expert set.
        """
        self._require_task(FILL_MASK)
        answers = self.answer(texts, top_k=top_k, candidates=candidates, experts=experts)
        return answers[0] if isinstance(texts, str) else answers

    @overload
    def classify(
        self, texts: str, text_pairs: str | None = None, *, experts: ExpertSet | None = None
    ) -> list[LabelAnswer]: ...

    @overload
    def classify(
        self,
        texts: TextList,
        text_pairs: TextList | None = None,
        *,
        experts: ExpertSet | None = None,
    ) -> list[list[LabelAnswer]]: ...

    def classify(
        self,
        texts: str | TextList,
        text_pairs: str | TextList | None = None,
        *,
        experts: ExpertSet | None = None,
    ) -> list[LabelAnswer] | list[list[LabelAnswer]]:
        """Say which label a text, or a pair of texts, has.

        Args:
            texts: A text, or a list of texts.
            text_pairs: Where the task takes two texts, the second one, or as many second ones.
            experts: Expert set for this call.

        Returns:
            For one text, every label, the most probable first. For a list, a list of these.

        Raises:
            InputTextError: If a text is empty, or there is not one pair to each text.
            UnsupportedError: If the bundle is for another task.
            BundleError: If the bundle does not hold the expert set.
        """
        self._require_task(TEXT_CLASSIFICATION)
        answers = self.answer(texts, text_pairs, top_k=len(self.manifest.labels or ()), experts=experts)
        return answers[0] if isinstance(texts, str) else answers

    def embed(self, texts: str | TextList, *, experts: ExpertSet | None = None) -> Float32Array:
        """Return sentence embeddings, ``(B, H) float32``, of length 1.

        Raises:
            InputTextError: If a text is empty.
            UnsupportedError: If the bundle is for another task.
            BundleError: If the bundle does not hold the expert set.
        """
        self._require_task(FEATURE_EXTRACTION)
        rows = self.answer(texts, experts=experts)
        return np.array(rows, np.float32).reshape(-1, self.manifest.plm.hidden_size)

    def answer(
        self,
        texts: str | TextList,
        text_pairs: str | TextList | None = None,
        *,
        top_k: int = 5,
        candidates: Sequence[str] | None = None,
        experts: ExpertSet | None = None,
    ) -> list[Any]:
        """Answer texts as the bundle's task does, whichever it is.

        Args:
            texts: A text, or a list of texts.
            text_pairs: Where the task takes two texts, the second one, or as many second ones.
            top_k: How many answers for each mask or text at most.
            candidates: Where the task answers with words, answer with one of these only.
            experts: Expert set for this call.

        Returns:
            What ``TaskSpec.answers`` gives for each text, in the order of the texts.

        Raises:
            InputTextError: If a text cannot be answered, or there is not one pair to each text.
            ConfigError: If ``top_k`` is below 1, ``candidates`` is not a list of words, or one of them is not
                one token.
            UnsupportedError: If the task takes no second texts, or no candidates.
            BundleError: If the bundle does not hold the expert set.
        """
        task, columns, words = self._check_asked(text_pairs, candidates, top_k)
        firsts = check_texts(texts)
        found: list[Any] = [None] * len(firsts)
        for numbers, inputs in self._batches(firsts, text_pairs, experts, require_mask=task.reads_masks):
            values = self.run(inputs, outputs=(task.compared,), experts=experts)[task.compared]
            asked = Asked(
                [firsts[i] for i in numbers], inputs, self.manifest, top_k, words, columns, self._tokenizer
            )
            for number, answer in zip(numbers, task.answers(values, asked), strict=True):
                found[number] = answer
        return found

    def explain(
        self,
        text: str,
        text_pair: str | None = None,
        *,
        top_k: int = 5,
        candidates: Sequence[str] | None = None,
        experts: ExpertSet | None = None,
    ) -> Explanation:
        """Say why a text is answered as it is: what each picture and CLIP token did, and what without it.

        Args:
            text: The text.
            text_pair: Where the task takes two texts, the second one.
            top_k: How many answers for each mask or text at most.
            candidates: Where the task answers with words, answer with one of these only.
            experts: Expert set for this call.

        Raises:
            InputTextError: If the text cannot be answered.
            ConfigError: As ``answer``.
            UnsupportedError: As ``answer``; or if the expert set has no experts, or was exported without
                explanations.
            BundleError: If the bundle does not hold the expert set.
        """
        name = experts or self.experts
        spec = self._spec(name)
        check_explains(spec, name)
        task, columns, words = self._check_asked(text_pair, candidates, top_k)
        texts, pairs = check_texts(text), None if text_pair is None else [text_pair]
        [(_, inputs)] = self._batches(texts, pairs, name, require_mask=task.reads_masks)
        feed = check_feed(inputs, spec, self.manifest)
        asked = Asked(texts, feed, self.manifest, top_k, words, columns, self._tokenizer)
        answers = explain(
            lambda feed, outputs: self.run(feed, outputs=outputs, experts=name),
            asked,
            spec,
            experts_of(name),
            lambda expert, outputs: self._looked(expert, feed, outputs),
            self._size_of_batch(name),
        )
        return Explanation(text, name, self._graphs.choice(name).name, answers)

    def _looked(
        self, expert: Expert, feed: Mapping[str, Array], outputs: Mapping[str, Array]
    ) -> list[MemoryItem]:
        """Return what an expert attends to in a batch of one text."""
        if not reads_bank([expert]):
            return [*map(MemoryItem, self._clip_encoder.clip_tokens(feed["clip_input_ids"][0].tolist()))]
        if "retrieved" in outputs:
            rows, scores = (outputs[key][0].tolist() for key in ("retrieved", "retrieved_scores"))
        else:  # a static bank, all of which is read
            rows, scores = range(len(self.pictures)), [None] * len(self.pictures)
        pictures = [(row, self.pictures[row], score) for row, score in zip(rows, scores, strict=True)]
        return [MemoryItem(p.caption or p.id, row, p.id, score) for row, p, score in pictures]

    @overload
    def retrieve(
        self, texts: str, text_pairs: str | None = None, *, experts: ExpertSet | None = None
    ) -> list[RetrievedPicture]: ...

    @overload
    def retrieve(
        self,
        texts: TextList,
        text_pairs: TextList | None = None,
        *,
        experts: ExpertSet | None = None,
    ) -> list[list[RetrievedPicture]]: ...

    def retrieve(
        self,
        texts: str | TextList,
        text_pairs: str | TextList | None = None,
        *,
        experts: ExpertSet | None = None,
    ) -> list[RetrievedPicture] | list[list[RetrievedPicture]]:
        """Say which pictures the model looks at for a text.

        Returns:
            For one text, its pictures, the nearest first. For a list, a list of these.

        Raises:
            InputTextError: If a text is empty, or there is not one pair to each text.
            UnsupportedError: If the expert set retrieves no pictures.
            BundleError: If the bundle does not hold the expert set.
        """
        if not self.retrieves(experts):
            sets = [name for name, spec in self.manifest.expert_sets.items() if _retrieves(spec)]
            raise UnsupportedError(
                "this expert set uses no images",
                where=experts or self.experts,
                hint=f"choose {' or '.join(sets)}"
                if sets
                else "export the checkpoint with --experts v or vt",
            )
        firsts = check_texts(texts)
        answers: list[list[RetrievedPicture]] = [[] for _ in firsts]
        names = ("retrieved", "retrieved_scores")
        for numbers, inputs in self._batches(firsts, text_pairs, experts):
            outputs = self.run(inputs, outputs=names, experts=experts)
            values = (outputs[name].tolist() for name in names)
            for number, rows, scores in zip(numbers, *values, strict=True):
                pictures = [(row, self.pictures[row], score) for row, score in zip(rows, scores, strict=True)]
                answers[number] = [
                    RetrievedPicture(row, p.id, p.caption, score) for row, p, score in pictures
                ]
        return answers[0] if isinstance(texts, str) else answers

    def retrieves(self, experts: ExpertSet | None = None) -> bool:
        """Whether an expert set retrieves pictures that ``retrieve`` can name.

        Raises:
            BundleError: If the bundle does not hold the expert set.
        """
        return _retrieves(self._spec(experts))

    def text_encoder(self, experts: ExpertSet | None = None) -> TextEncoder:
        """Return the encoder that makes what ``run`` takes with an expert set, and nothing that it does not.

        Raises:
            BundleError: If the bundle does not hold the expert set.
        """
        takes_clip = any(tensor.name == "clip_input_ids" for tensor in self._spec(experts).inputs)
        return self._clip_encoder if takes_clip else self._encoder

    def run(
        self,
        inputs: Mapping[str, Array],
        *,
        outputs: Sequence[str] | None = None,
        experts: ExpertSet | None = None,
    ) -> dict[str, Array]:
        """Run the graph on arrays, as ``TextEncoder.encode`` makes them.

        Args:
            inputs: Arrays by name; what the expert set does not take is left aside.
            outputs: Names of the outputs to compute; all of them if None.
            experts: Expert set for this call.

        Raises:
            ShapeError: If an input is missing, or has another dtype or shape than the bundle's contract says.
            BundleError: If the bundle does not hold the expert set, or the engine cannot compute its graph.
        """
        spec = self._spec(experts)
        feed = check_feed(inputs, spec, self.manifest)
        names = [tensor.name for tensor in spec.outputs] if outputs is None else list(outputs)
        session = self._graphs.session(experts or self.experts)
        try:
            values = session.run(names, feed)
        except XAdapterError:  # of an index, or an engine
            raise
        except Exception as error:  # onnxruntime's own errors have no common base below Exception
            choice = self._graphs.choice(experts or self.experts)
            if choice.engine is not None:
                raise BundleError(
                    "the engine cannot run on this input", where=choice.name, got=error
                ) from error
            runtime = TARGETS[choice.variant.target].runtime
            assert runtime is not None  # it was opened
            file = self.bundle.folder / choice.variant.file
            raise BundleError(f"{runtime.name} cannot run the graph", where=file, got=error) from error
        found = dict(zip(names, values, strict=True))
        name = self._graphs.choice(experts or self.experts).name
        check_outputs(found, feed, spec, self.manifest, name)
        return found

    def _read_pictures(self) -> Sequence[Picture]:
        """Return the pictures of the bank, where a graph says which ones it looked at, or how."""
        bank = self.manifest.bank
        sets = self.manifest.expert_sets.values()
        if bank is None or not any(_retrieves(spec) or spec.explains(V.name) for spec in sets):
            return ()
        return read_pictures(self.bundle.file(BANK_NAME), num_pictures=bank.num_pictures)

    def _spec(self, experts: ExpertSet | None) -> ExpertSetSpec:
        name = experts or self.experts
        self.manifest.variants_of(name)  # says clearly that a set is not there
        return self.manifest.expert_sets[name]

    def _batches(
        self,
        texts: list[str],
        text_pairs: str | TextList | None,
        experts: ExpertSet | None,
        *,
        require_mask: bool = False,
    ) -> Iterator[tuple[list[int], dict[str, Int64Array]]]:
        """Yield batches of texts of about the same length: the texts' numbers, and their arrays."""
        encoder = self.text_encoder(experts)
        tokenized = encoder.tokenize(texts, text_pairs, require_mask=require_mask)
        size = self._size_of_batch(experts)
        for numbers in plan_batches([len(text.input_ids) for text in tokenized], size):
            yield numbers, encoder.collate([tokenized[number] for number in numbers])

    def _size_of_batch(self, experts: ExpertSet | None) -> int:
        """Return how many texts go through the graph together at most."""
        engine = self._graphs.choice(experts or self.experts).engine
        return self._batch_size if engine is None else min(self._batch_size, largest_batch(engine))

    def _require_task(self, task: TaskSpec) -> None:
        if self.manifest.task != task.name:
            raise UnsupportedError(
                "the bundle was exported for another task", expected=task.name, got=self.manifest.task
            )

    def _check_asked(
        self, text_pairs: str | TextList | None, candidates: Sequence[str] | None, top_k: int
    ) -> tuple[TaskSpec, list[int] | None, tuple[Candidate, ...] | None]:
        """Return the task, and what ``_choose`` does, if it can be asked like this; see ``answer``."""
        task = TASKS[self.manifest.task]
        for what, given, fits in (
            ("second texts", text_pairs, task.takes_pairs),
            ("candidates", candidates, task.fills_words),
        ):
            if given is not None and not fits:
                raise UnsupportedError(f"the bundle's task does not use {what}", got=task.name)
        if top_k < 1:
            raise ConfigError("top_k must be at least 1", got=top_k)
        return task, *self._choose(candidates)

    def _choose(
        self, candidates: Sequence[str] | None
    ) -> tuple[list[int] | None, tuple[Candidate, ...] | None]:
        """Return the columns of the logits to choose from, and the words they stand for; None for all."""
        sliced = self.manifest.candidates
        if candidates is None:
            return None, sliced
        chosen = find_candidates(self._tokenizer, candidates)
        return columns_of(chosen, sliced), chosen


def _retrieves(spec: ExpertSetSpec) -> bool:
    return any(tensor.name == "retrieved" for tensor in spec.outputs)
