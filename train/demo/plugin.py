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
from torch import Tensor

from material.pictures import COLORS, DemoObject, Material
from material.splits import Split, color_targets, measure_pixel_colors, pixel_accuracy
from material.stages import track
from material.tables import Language
from material.text import MASK, TRAINING_TEMPLATES, UNSEEN_TEMPLATES, Corpus, fill
from xadapter_export.bundle.manifest import ExpertSet
from xadapter_export.model.x_adapter_model import Memory, XAdapterModel

EXPERT_SETS: tuple[ExpertSet, ...] = ("v", "t", "vt")
_WORD = re.compile(r"\w+")


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
        accuracy = {"chance": 1 / len(COLORS), "majority": split.majority(self.material.objects)}
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
