"""The plug-ins: V- and T-expert in one checkpoint, their controls and the language check.

B batch, T PLM tokens, K pictures, N bank size, V vocabulary, A answers that a question weighs.
"""

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from rich.console import Console
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from train.demo.pictures import COLORS, DemoObject, Material
from train.demo.plm import Corpus
from train.demo.stages import track
from train.demo.text import MASK, TRAINING_TEMPLATES, UNSEEN_TEMPLATES, fill
from xadapter_export.bundle.manifest import ExpertSet
from xadapter_export.model.x_adapter_model import Memory, XAdapterModel

EXPERT_SETS: tuple[ExpertSet, ...] = ("v", "t", "vt")
CLEAR_PEAK = 0.5
_SMALL_WORDS = frozenset(
    (
        "a",
        "an",
        "and",
        "at",
        "behind",
        "by",
        "for",
        "in",
        "no",
        "of",
        "on",
        "or",
        "over",
        "the",
        "to",
        "with",
        "without",
    )
)
_WORD = re.compile(r"\w+")

# Where the eleven names lie in sRGB: the most common answers of the xkcd color survey (CC0).
_SURVEY_COLORS = {
    "black": 0x000000, "blue": 0x0343DF, "brown": 0x653700, "green": 0x15B01A, "grey": 0x929591,
    "orange": 0xF97306, "pink": 0xFF81C0, "purple": 0x7E1E9C, "red": 0xE50000, "white": 0xFFFFFF,
    "yellow": 0xFFFF14,
}  # fmt: skip


@dataclass(frozen=True)
class PluginSettings:
    """Section ``[plugin]`` of the recipe."""

    layers: list[int]
    adapter_width: int
    num_heads: int
    k: int
    k_training: int
    steps: int
    color_batch: int
    fact_batch: int
    num_facts: int
    learning_rate: float
    weight_decay: float
    splits: int
    held_out_share: float
    always_held_out: list[str]


# ---------------------------------------------------------------------------------------------------- objects


@dataclass(frozen=True)
class Split:
    """Which objects train the plug-ins, and which they are tested on.

    Attributes:
        training: Rows of objects none of whose names has a word of ``held_out_words``.
        held_out: Rows of objects with a clear color.
        held_out_words: Every word of every name of the held-out objects, in the singular.
    """

    training: tuple[int, ...]
    held_out: tuple[int, ...]
    held_out_words: frozenset[str]

    def names_held_out(self, text: str) -> bool:
        """Whether a word of the text belongs to a held-out object."""
        return not self.held_out_words.isdisjoint(content_words(text))


def split_objects(objects: Sequence[DemoObject], share: float, always: Sequence[str], seed: int) -> Split:
    """Hold out a share of the objects of a clear color, whole head nouns at a time.

    Args:
        objects: All objects.
        share: Of the objects with a clear color.
        always: Names, as CoDa has them, that are held out in any case.
        seed: Of the order in which head nouns are drawn.
    """
    clear = [row for row, entry in enumerate(objects) if max(entry.color_shares, default=0.0) >= CLEAR_PEAK]
    heads: dict[str, list[int]] = {}
    for row in clear:
        heads.setdefault(_singular(str(objects[row].coda_name).split()[-1]), []).append(row)
    order = sorted(heads)
    random.Random(seed).shuffle(order)
    order.sort(key=lambda head: not any(objects[row].coda_name in always for row in heads[head]))
    held_out: list[int] = []
    for head in order:
        if len(held_out) < share * len(clear):
            held_out += heads[head]
    words = frozenset(word for row in held_out for name in objects[row].names for word in content_words(name))
    training = [
        row for row, entry in enumerate(objects) if words.isdisjoint(content_words(" ".join(entry.names)))
    ]
    return Split(tuple(training), tuple(sorted(held_out)), words)


def content_words(text: str) -> set[str]:
    """Words of a text in the singular, without the small ones."""
    return {_singular(word) for word in _WORD.findall(text.lower())} - _SMALL_WORDS


def _singular(word: str) -> str:
    for ending, singular in (
        ("ies", "y"),
        ("ses", "s"),
        ("ches", "ch"),
        ("oes", "o"),
        ("ss", "ss"),
        ("s", ""),
    ):
        if word.endswith(ending) and len(word) > len(ending) + 1:
            return word.removesuffix(ending) + singular
    return word


def measure_pixel_colors(material: Material) -> NDArray[np.float64]:
    """Share of the eleven colors in the drawings of each object: ``(objects, 11) float64``.

    Every covered pixel counts for the nearest survey color in CIELAB.
    """
    anchors = _to_lab(
        np.array([[code >> 16, code >> 8 & 255, code & 255] for code in _SURVEY_COLORS.values()])
    )
    shares = np.zeros((len(material.images), len(COLORS)))
    for row, (image, coverage) in enumerate(zip(material.images, material.coverage, strict=True)):
        lab = _to_lab(image[coverage > 127])
        nearest = ((lab[:, None] - anchors) ** 2).sum(-1).argmin(1)
        shares[row] = np.bincount(nearest, minlength=len(COLORS)) / max(len(lab), 1)
    sums = np.zeros((len(material.objects), len(COLORS)))
    np.add.at(sums, material.object_of, shares)
    mean: NDArray[np.float64] = sums / np.bincount(material.object_of)[:, None]
    return mean


def _to_lab(rgb: NDArray[np.generic]) -> NDArray[np.float64]:
    """``(..., 3)`` sRGB from 0 to 255 to ``(..., 3) float64`` CIELAB, white point D65."""
    value = np.asarray(rgb, np.float64) / 255
    linear = np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)
    xyz = linear @ np.array([[0.4339, 0.2126, 0.0178], [0.3762, 0.7152, 0.1095], [0.1899, 0.0722, 0.8727]])
    f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    lab: NDArray[np.float64] = np.stack(
        [116 * f[..., 1] - 16, 500 * (f[..., 0] - f[..., 1]), 200 * (f[..., 1] - f[..., 2])], -1
    )
    return lab


def color_targets(objects: Sequence[DemoObject], pixel_colors: NDArray[np.float64]) -> NDArray[np.float64]:
    """What a plug-in learns: CoDa's shares, and where CoDa has none the main color of the pictures."""
    main = np.eye(len(COLORS))[pixel_colors.argmax(1)]
    return np.stack(
        [
            np.array(entry.color_shares) / sum(entry.color_shares) if entry.color_shares else main[row]
            for row, entry in enumerate(objects)
        ]
    )


# -------------------------------------------------------------------------------------------------- questions


@dataclass(frozen=True)
class Questions:
    """Sentences with one mask each, run through everything that is frozen.

    Attributes:
        input_ids: ``(B, T) int64``.
        attention_mask: ``(B, T) int64``.
        mask_positions: ``(B, 1) int64``.
        hidden: ``(B, T, H) float32``. What enters the first layer with a plug-in.
        memory: What the experts may attend to.
        answers: ``(B, A) int64``. Tokens that are right.
        shares: ``(B, A) float32``. How right each is; rows sum to 1.
    """

    input_ids: Tensor
    attention_mask: Tensor
    mask_positions: Tensor
    hidden: Tensor
    memory: Memory
    answers: Tensor
    shares: Tensor

    @classmethod
    def ask(
        cls, model: XAdapterModel, sentences: Sequence[str], answers: Tensor, shares: Tensor, k: int
    ) -> Self:
        """Encode sentences, retrieve ``k`` pictures for each and run the frozen layers below the plug-in."""
        inputs = model.encode(sentences)
        memory = model.memory(inputs["clip_input_ids"], "vt", k=k)
        hidden = model.hidden_before(
            model.config.layers[0], inputs["input_ids"], inputs["attention_mask"], inputs["token_type_ids"]
        )
        return cls(
            inputs["input_ids"],
            inputs["attention_mask"],
            inputs["mask_positions"],
            hidden,
            memory,
            answers,
            shares,
        )

    def __len__(self) -> int:
        return len(self.input_ids)

    def take(self, rows: Tensor, pictures: Tensor | None = None) -> Self:
        """Some questions; of their pictures those at ``pictures``, ``(rows, K) int64``, or all."""
        v = _given(self.memory.v)[rows]
        if pictures is not None:
            v = v.gather(1, pictures[:, :, None].expand(-1, -1, v.shape[-1]))
        memory = Memory(v, _given(self.memory.t)[rows], _given(self.memory.t_mask)[rows])
        return replace(
            self,
            input_ids=self.input_ids[rows],
            attention_mask=self.attention_mask[rows],
            mask_positions=self.mask_positions[rows],
            hidden=self.hidden[rows],
            memory=memory,
            answers=self.answers[rows],
            shares=self.shares[rows],
        )

    def with_pictures(self, v: Tensor) -> Self:
        """The same questions with ``(B, K, D) float32`` picture features put in place of their own."""
        return replace(self, memory=replace(self.memory, v=v))


def _given(tensor: Tensor | None) -> Tensor:
    if tensor is None:
        raise TypeError("the memory was made without one of the experts")
    return tensor


def color_questions(
    model: XAdapterModel,
    objects: Sequence[DemoObject],
    targets: NDArray[np.float64],
    templates: Sequence[str],
    k: int,
    *,
    all_names: bool,
) -> Questions:
    """Ask for the color of every object in every template, by each of its names or by CoDa's alone."""
    asked = [
        (fill(template, noun, c=MASK), row)
        for row, entry in enumerate(objects)
        for noun in (entry.names if all_names else (str(entry.coda_name),))
        for template in templates
    ]
    shares = torch.from_numpy(targets).float()[[row for _, row in asked]]
    answers = torch.tensor([_token_id(model, color) for color in COLORS]).expand(len(asked), -1)
    return Questions.ask(model, [sentence for sentence, _ in asked], answers, shares, k)


def fact_questions(
    model: XAdapterModel, sentences: Sequence[str], count: int, k: int, seed: int
) -> Questions:
    """Mask one word of each of ``count`` sentences; only words that are one token are masked."""
    rng = random.Random(seed)
    asked: list[str] = []
    answers: list[int] = []
    for sentence in rng.sample(list(sentences), min(count, len(sentences))):
        words = [
            (word, token)
            for word in _WORD.finditer(sentence)
            if (token := model.plm.tokenizer.token_to_id(word.group().lower())) is not None
        ]
        word, token = rng.choice(words)
        asked.append(sentence[: word.start()] + MASK + sentence[word.end() :])
        answers.append(token)
    return Questions.ask(model, asked, torch.tensor(answers)[:, None], torch.ones(len(asked), 1), k)


def _token_id(model: XAdapterModel, word: str) -> int:
    token = model.plm.tokenizer.token_to_id(word)
    if token is None:
        raise ValueError(f"the PLM's vocabulary lacks {word!r}")
    return int(token)


# --------------------------------------------------------------------------------------------------- training


def answer_logits(model: XAdapterModel, questions: Questions, experts: ExpertSet) -> Tensor:
    """``(B, V) float32``."""
    output = model(
        questions.input_ids,
        questions.attention_mask,
        mask_positions=questions.mask_positions,
        experts=experts,
        memory=questions.memory,
        first_layer_input=questions.hidden,
    )
    logits: Tensor = output.logits[:, 0]
    return logits


def train_plugin(
    model: XAdapterModel,
    colors: Questions,
    facts: Questions,
    settings: PluginSettings,
    expert_sets: Sequence[ExpertSet],
    seed: int,
    console: Console,
    title: str,
) -> None:
    """Train the plug-in in place: colors and ordinary words in every step, the expert sets in turn."""
    torch.manual_seed(seed)
    for module in model.adapters.modules():
        if isinstance(module, torch.nn.Linear | torch.nn.LayerNorm):
            module.reset_parameters()
    for name, parameter in model.adapters.named_parameters():
        if ".out." in name:
            torch.nn.init.zeros_(parameter)
    steps = settings.steps * len(expert_sets)
    optimizer = torch.optim.AdamW(
        model.adapters.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, settings.learning_rate, steps, pct_start=0.1, cycle_momentum=False
    )
    model.train()
    for step, note in track(steps, title, console):
        losses = [
            _loss(model, _draw(questions, count, settings), expert_sets[step % len(expert_sets)])
            for questions, count in ((colors, settings.color_batch), (facts, settings.fact_batch))
        ]
        optimizer.zero_grad()
        sum(losses, start=torch.zeros(())).backward()  # type: ignore[no-untyped-call]  # torch
        torch.nn.utils.clip_grad_norm_(model.adapters.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        note(f"color loss {losses[0].item():.2f}, word loss {losses[1].item():.2f}")
    model.eval()


def _draw(questions: Questions, count: int, settings: PluginSettings) -> Questions:
    """Draw questions, and for each K of the pictures that were retrieved."""
    rows = torch.randint(len(questions), (count,))
    available = _given(questions.memory.v).shape[1]
    return questions.take(rows, torch.rand(count, available).argsort(1)[:, : settings.k])


def _loss(model: XAdapterModel, questions: Questions, experts: ExpertSet) -> Tensor:
    log_probability = F.log_softmax(answer_logits(model, questions, experts), dim=-1)
    return -(log_probability.gather(1, questions.answers) * questions.shares).sum(1).mean()


# ------------------------------------------------------------------------------------------------- measuring


@torch.no_grad()
def _all_logits(model: XAdapterModel, questions: Questions, experts: ExpertSet) -> Tensor:
    """``(B, V) float32``, with the K best pictures of each question."""
    k = model.config.retrieval.k
    parts = torch.split(torch.arange(len(questions)), 512)
    return torch.cat(
        [
            answer_logits(model, questions.take(rows, torch.arange(k).expand(len(rows), -1)), experts)
            for rows in parts
        ]
    )


def color_accuracy(model: XAdapterModel, questions: Questions, experts: ExpertSet) -> float:
    """Share of color questions whose best of the eleven colors is CoDa's."""
    logits = _all_logits(model, questions, experts).gather(1, questions.answers)  # (B, 11)
    return (logits.argmax(1) == questions.shares.argmax(1)).float().mean().item()


@dataclass(frozen=True)
class Language:
    """The language check on ordinary words: mean loss in nats, share right, share answered with a color."""

    loss: float
    top1: float
    color_rate: float


def check_language(model: XAdapterModel, questions: Questions, experts: ExpertSet) -> Language:
    """Fill masks where no color belongs."""
    logits = _all_logits(model, questions, experts)
    best = logits.argmax(1)
    colors = torch.tensor([_token_id(model, color) for color in COLORS])
    return Language(
        loss=F.cross_entropy(logits, questions.answers[:, 0]).item(),
        top1=(best == questions.answers[:, 0]).float().mean().item(),
        color_rate=torch.isin(best, colors).float().mean().item(),
    )


def pixel_accuracy(
    material: Material, pixel_colors: NDArray[np.float64], targets: NDArray[np.float64], split: Split
) -> float:
    """How often a linear probe on the pixels of an object's pictures, trained like a plug-in, is right."""
    tint = np.stack(
        [
            _tints(image[coverage > 127])
            for image, coverage in zip(material.images, material.coverage, strict=True)
        ]
    )
    sums = np.zeros((len(material.objects), tint.shape[1]))
    np.add.at(sums, material.object_of, tint)
    features = np.concatenate([pixel_colors, sums / np.bincount(material.object_of)[:, None]], 1)
    labels = targets.argmax(1)
    probe = make_pipeline(StandardScaler(), LogisticRegression(C=0.03, max_iter=2000))
    training, held_out = list(split.training), list(split.held_out)
    probe.fit(features[training], labels[training])
    return float((probe.predict(features[held_out]) == labels[held_out]).mean())


def _tints(pixels: NDArray[np.uint8]) -> NDArray[np.float64]:
    """``(pixels, 3) uint8`` to ``(64,) float64``: share of each of 4 x 4 x 4 cells of RGB."""
    cell = (pixels // 64).astype(np.int64) @ np.array([16, 4, 1])
    return np.bincount(cell, minlength=64) / max(len(cell), 1)


@dataclass(frozen=True)
class SplitResult:
    """One split: color accuracies by row of the table, and language checks by model."""

    num_held_out: int
    accuracy: dict[str, float]
    language: dict[str, Language]


class Laboratory:
    """Everything that the splits share."""

    def __init__(
        self,
        model: XAdapterModel,
        untrained: XAdapterModel,
        material: Material,
        corpus: Corpus,
        settings: PluginSettings,
        seed: int,
        console: Console,
    ) -> None:
        self.model = model
        self.untrained = untrained
        self.material = material
        self.corpus = corpus
        self.settings = settings
        self.seed = seed
        self.console = console
        self.pixel_colors = measure_pixel_colors(material)
        self.targets = color_targets(material.objects, self.pixel_colors)
        self.words = {
            name: fact_questions(plm, corpus.held_out, settings.num_facts, settings.k, seed)
            for name, plm in (("trained", model), ("untrained", untrained))
        }

    def run(self, split: Split, seed: int, title: str) -> SplitResult:
        """Train and measure one split; ``model`` holds the shippable plug-in afterwards."""
        settings, model = self.settings, self.model
        generator = torch.Generator().manual_seed(seed)
        tests = {
            name: self._questions(plm, split.held_out, UNSEEN_TEMPLATES, all_names=False)
            for name, plm in (("trained", model), ("untrained", self.untrained))
        }
        test = tests["trained"]
        accuracy = {"chance": 1 / len(COLORS), "majority": self._majority(split)}
        accuracy["frozen PLM"] = color_accuracy(model, test, "none")
        language = {
            "frozen PLM": check_language(model, self.words["trained"], "none"),
            "untrained PLM": check_language(self.untrained, self.words["untrained"], "none"),
        }

        # V is active in two of the three expert sets that train in turn, so its controls get as many steps.
        v_sets: tuple[ExpertSet, ...] = ("v", "v")
        facts = [sentence for sentence in self.corpus.training if not split.names_held_out(sentence)]
        colors, words = self._training(model, split, facts, seed)
        constant = F.normalize(torch.randn(1, 1, colors.memory.v.shape[-1], generator=generator), dim=-1)  # type: ignore[union-attr]  # V is active
        blank = [
            part.with_pictures(constant.expand(len(part), settings.k_training, -1))
            for part in (colors, words, test, self.words["trained"])
        ]
        train_plugin(model, blank[0], blank[1], settings, v_sets, seed, self.console, f"{title}, text only")
        accuracy["same adapter, text only"] = color_accuracy(model, blank[2], "v")

        colors_untrained, words_untrained = self._training(self.untrained, split, facts, seed)
        train_plugin(
            self.untrained,
            colors_untrained,
            words_untrained,
            settings,
            v_sets,
            seed,
            self.console,
            f"{title}, untrained PLM",
        )
        accuracy["untrained PLM + V"] = color_accuracy(self.untrained, tests["untrained"], "v")
        language["untrained PLM + V"] = check_language(self.untrained, self.words["untrained"], "v")

        train_plugin(model, colors, words, settings, EXPERT_SETS, seed, self.console, f"{title}, experts")
        shuffled = _given(test.memory.v)[torch.randperm(len(test), generator=generator)]
        accuracy["V-expert, shuffled pictures"] = color_accuracy(model, test.with_pictures(shuffled), "v")
        for experts, name in zip(EXPERT_SETS, ("V-expert", "T-expert", "V + T"), strict=True):
            accuracy[name] = color_accuracy(model, test, experts)
            language[name] = check_language(model, self.words["trained"], experts)
        accuracy["probe on the pictures' pixels"] = pixel_accuracy(
            self.material, self.pixel_colors, self.targets, split
        )
        return SplitResult(len(split.held_out), accuracy, language)

    def answers(self, split: Split) -> list[dict[str, str]]:
        """Every test question of a split, what is right, and what each expert set of ``model`` says."""
        test = self._questions(self.model, split.held_out, UNSEEN_TEMPLATES, all_names=False)
        said = {
            experts: _all_logits(self.model, test, experts).gather(1, test.answers).argmax(1).tolist()
            for experts in ("none", *EXPERT_SETS)
        }
        asked = [
            (self.material.objects[row], template) for row in split.held_out for template in UNSEEN_TEMPLATES
        ]
        return [
            {
                "text": fill(template, str(entry.coda_name), c=MASK),
                "color": str(entry.color),
                **{experts: COLORS[indices[number]] for experts, indices in said.items()},
            }
            for number, (entry, template) in enumerate(asked)
        ]

    def _questions(
        self, model: XAdapterModel, rows: Sequence[int], templates: Sequence[str], *, all_names: bool
    ) -> Questions:
        objects = [self.material.objects[row] for row in rows]
        return color_questions(
            model, objects, self.targets[list(rows)], templates, self.settings.k_training, all_names=all_names
        )

    def _training(
        self, model: XAdapterModel, split: Split, facts: Sequence[str], seed: int
    ) -> tuple[Questions, Questions]:
        return (
            self._questions(model, split.training, TRAINING_TEMPLATES, all_names=True),
            fact_questions(model, facts, self.settings.num_facts, self.settings.k_training, seed),
        )

    def _majority(self, split: Split) -> float:
        """Accuracy of always saying the color that most training objects of a clear color have."""
        objects = self.material.objects
        seen = [
            objects[row].color
            for row in split.training
            if max(objects[row].color_shares, default=0) >= CLEAR_PEAK
        ]
        commonest = max(sorted(COLORS), key=seen.count)
        return sum(objects[row].color == commonest for row in split.held_out) / len(split.held_out)
