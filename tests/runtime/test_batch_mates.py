"""An answer depends neither on the other texts of its batch nor on their order: 1,000 random batches each."""

import json
from pathlib import Path

import numpy as np
import pytest

from xadapter_export import XAdapterSession, export
from xadapter_export.bundle.manifest import ExpertSet
from xadapter_export.model.builtin import builtin_folder

pytestmark = pytest.mark.long  # every test exports or trains

NUM_BATCHES = 1000
NUM_TEXTS = 60
LARGEST_BATCH = 6
SETS: tuple[ExpertSet, ...] = ("vt", "none")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("company") / "bundle"
    variants = ("onnx-fp32", "cpu-int8", "cpu-int4")
    return export("builtin", folder, SETS, variants=variants, min_agreement=0.9).folder


def make_texts() -> list[str]:
    """Return sentences of many lengths, some of them twice as long as others."""
    lines = (builtin_folder() / "heldout.jsonl").read_text(encoding="utf-8").splitlines()
    sentences = [sentence for line in lines for sentence in json.loads(line)["sentences"]]
    chosen = sentences[:: len(sentences) // NUM_TEXTS][:NUM_TEXTS]
    return [f"{'well , ' * (number % 4)}{text}" for number, text in enumerate(chosen)]


def ask_in_company(session: XAdapterSession, num_batches: int) -> float:
    """Ask every text alone and in random batches; return how far a logit moved at most."""
    texts = make_texts()
    alone = [session.fill_mask(text, top_k=1)[0] for text in texts]
    rng = np.random.default_rng(7)
    furthest, num_answers = 0.0, 0
    for _ in range(num_batches):
        numbers = rng.permutation(len(texts))[: rng.integers(2, LARGEST_BATCH + 1)]
        answers = session.fill_mask([texts[number] for number in numbers], top_k=1)
        for number, (answer,) in zip(numbers, answers, strict=True):
            assert answer.token == alone[number].token, texts[number]
            furthest = max(furthest, abs(answer.logit - alone[number].logit))
        num_answers += len(numbers)
    assert num_answers > 2 * num_batches
    return furthest


@pytest.mark.parametrize("experts", SETS)
@pytest.mark.parametrize("variant", ["onnx-fp32", "cpu-int8", "cpu-int4"])
def test_the_first_answer_is_the_same_alone_and_in_company(
    bundle: Path, variant: str, experts: ExpertSet
) -> None:
    session = XAdapterSession.load(bundle, experts=experts, variant=variant, num_threads=1)
    assert ask_in_company(session, NUM_BATCHES) < (1e-3 if variant == "onnx-fp32" else 0.2)
