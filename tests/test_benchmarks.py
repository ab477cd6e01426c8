"""The benchmarks run, compare what they say they compare, and print what a reader needs."""

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from benchmarks import bank, training
from benchmarks.training import ARMS, _Arm, _Shape
from train.minilm import minilm_folder

from transformers import AutoModel  # isort: skip  # cured by model.plm

SHAPE = _Shape("minilm", batch_size=2, seq=16)
H, R = 384, 64  # MiniLM's hidden size, width of an adapter


@pytest.fixture(scope="module")
def arms(tmp_path_factory: pytest.TempPathFactory) -> dict[str, _Arm]:
    cache = tmp_path_factory.mktemp("cache")
    return {name: _Arm(name, SHAPE, cache) for name in ARMS}


def test_both_arms_see_the_same_texts_in_the_same_order(arms: dict[str, _Arm]) -> None:
    plugin, whole = (arms[name]._batches for name in ARMS)
    for _ in range(3):
        one, other = next(plugin), next(whole)
        assert one["input_ids"].shape == (2, 16)
        assert set(one) - set(other) == {"hidden", "retrieved", "t", "t_mask"}
        for name in other:
            assert torch.equal(one[name], other[name]), name


def test_the_cached_states_are_those_that_the_layers_below_give(arms: dict[str, _Arm]) -> None:
    plain = AutoModel.from_pretrained(minilm_folder(), attn_implementation="sdpa").eval()
    batch = next(arms["plug-in"]._batches)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "token_type_ids")}
    with torch.no_grad():
        states = plain(**inputs, output_hidden_states=True).hidden_states
    assert (batch["hidden"] - states[4]).abs().max() < 1e-5  # what enters the fifth layer of six


def test_each_arm_trains_what_it_should(arms: dict[str, _Arm]) -> None:
    plain = AutoModel.from_pretrained(minilm_folder(), add_pooling_layer=False)
    head = H * H + H + 2 * H + 2
    assert arms["fine-tuning"].num_trained == plain.num_parameters() + head
    of_memory = 2 * 2 * 512  # a norm of each expert's memory
    assert arms["plug-in"].num_trained > head + 4 * 2 * H * R + of_memory
    for name in ARMS:
        before = [p.detach().clone() for p in arms[name]._model.parameters()]
        losses = [arms[name].step() for _ in range(2)]
        assert all(0 < loss < 2 for loss in losses)
        moved = sum(
            p.numel()
            for old, p in zip(before, arms[name]._model.parameters(), strict=True)
            if not torch.equal(old, p)
        )
        assert 0 < moved <= arms[name].num_trained
        assert moved > 0.9 * arms[name].num_trained


def test_training_prints_a_table_and_its_command() -> None:
    result = CliRunner().invoke(training.main, ["--quick", "--json"], catch_exceptions=False)
    assert result.exit_code == 0
    found = json.loads(result.stdout)
    assert (found["plm"], found["batch_size"], found["seq"]) == ("minilm", 4, 16)
    assert set(found["samples/s"]) == set(ARMS)
    assert found["ratio, lowest"] <= found["ratio"] <= found["ratio, highest"]
    trained = found["trained parameters"]["fine-tuning"]
    memory = found["beyond the weights (MiB)"]
    assert memory["fine-tuning"] > 3 * 4 * trained / 2**20 * 0.9  # gradients and two moments, at least
    assert 0 < memory["plug-in"] < memory["fine-tuning"] / 2
    assert found["memory, share"] == pytest.approx(memory["plug-in"] / memory["fine-tuning"])


def test_the_build_of_a_bank_gives_the_features_of_the_bare_tower() -> None:
    found = CliRunner().invoke(bank.main, ["--quick", "--json"], catch_exceptions=False)
    assert found.exit_code == 0
    result = json.loads(found.stdout)
    assert result["pictures"] == 48
    assert result["largest difference of a feature"] < 1e-5
    ratio = result["ratio"]
    assert 0 < ratio["lowest"] <= ratio["median"] <= ratio["highest"]
    assert result["build"]["pictures/s"] > 0


def test_bank_prints_both_ratios() -> None:
    result = CliRunner().invoke(bank.main, ["--quick", "--workers", "0"], catch_exceptions=False)
    assert "ratio, build to bare tower: " in result.stdout
    assert "ratio of CPU time, build to bare tower: " in result.stdout
    assert "python -m benchmarks.bank" in result.stdout


def test_pictures_are_alike_from_run_to_run(tmp_path: Path) -> None:
    for name in ("one", "two"):
        bank._write_pictures(tmp_path / name, 2)
    one, two = (sorted((tmp_path / name).iterdir()) for name in ("one", "two"))
    assert [path.read_bytes() for path in one] == [path.read_bytes() for path in two]
    assert one[0].read_bytes() != one[1].read_bytes()
