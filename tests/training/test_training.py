"""Training on tiny parts: nothing frozen moves, a resumed run is the same run, processes add up."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from tests.tiny_checkpoint import write_parts
from xadapter_export import FeatureBank, XAdapterModel, XAdapterSession, export
from xadapter_export.bank.record import BankClip
from xadapter_export.errors import (
    CheckpointError,
    ConfigError,
    HashMismatchError,
    InputTextError,
    OutputExistsError,
    OutputWriteError,
)
from xadapter_export.model.identity import weights_sha256
from xadapter_export.training import TrainingStopped, TrainResult, read_config, train, train_control
from xadapter_export.training.control import is_control_of
from xadapter_export.training.examples import read_texts
from xadapter_export.training.trainer import WEIGHTS_NAME, DivergedError, load_state

TEXTS = [
    "the color of a banana is green.",
    "a fruit is very very green.",
    "the banana is a fruit.",
    "green fruit is green.",
]


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("parts")
    write_parts(folder)
    (folder / "text.txt").write_text("\n".join(TEXTS) + "\n", encoding="utf-8")
    rows = "".join(f"{text}\t{number % 2}\n" for number, text in enumerate(TEXTS * 3))
    (folder / "train.tsv").write_text(rows, encoding="utf-8")
    return folder


def settings(parts: Path, output: Path, **more: Any) -> dict[str, Any]:
    return {
        "output": str(output),
        **{name: str(parts / name) for name in ("plm", "clip", "bank")},
        "train_files": [str(parts / "text.txt")],
        "experts": "vt",
        "layers": [1, 2],
        "adapter_width": 16,
        "num_heads": 2,
        "k": 3,
        "max_steps": 2,
        "batch_size": 4,
        "learning_rate": 1e-2,
        "log_every": 1,
        **more,
    }


def run(parts: Path, output: Path, **more: Any) -> TrainResult:
    return train(read_config(None, settings(parts, output, **more)))


def change_weights(plm: Path) -> None:
    weights = load_file(plm / "model.safetensors")
    save_file(
        {name: tensor + 0.01 for name, tensor in weights.items()}, plm / "model.safetensors", {"format": "pt"}
    )


def losses(result: TrainResult) -> list[float]:
    return [entry["loss"] for entry in result.curve if "loss" in entry]


def test_nothing_frozen_moves_and_only_the_plugin_is_kept(parts: Path, tmp_path: Path) -> None:
    result = run(parts, tmp_path / "ck")
    record = json.loads((tmp_path / "ck" / "train.json").read_text(encoding="utf-8"))
    assert record["frozen_sha256_before"] == record["frozen_sha256_after"]
    assert set(record["frozen_sha256_before"]) == {"plm", "clip", "bank"}
    before = load_file(parts / "plm" / "model.safetensors")
    after = {name: tensor for name, tensor in result.model.plm.model.state_dict().items() if name in before}
    assert weights_sha256(before) == weights_sha256(after)
    kept = load_file(tmp_path / "ck" / "xadapter.safetensors")
    assert kept
    assert all(name.startswith("adapters.") for name in kept)
    assert any(tensor.abs().max() > 0 for name, tensor in kept.items() if name.endswith("out.weight"))
    assert result.steps == 6  # two for each of v, t and vt
    assert sum(tensor.numel() for tensor in kept.values()) == record["trained_parameters"]
    again = XAdapterModel.from_pretrained(tmp_path / "ck")
    assert all(torch.equal(tensor, kept[name]) for name, tensor in again.trained_state().items())
    assert not list((tmp_path / "ck.run").glob("state-*"))


def test_a_weight_that_should_be_frozen_and_moves_is_found_out(
    parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = read_config(None, settings(parts, tmp_path / "ck"))

    def meddle(step: int, _steps: int, _note: str) -> None:
        if step == 1:
            with torch.no_grad():
                plm.layers[0].attention.self.query.weight[0, 0] += 1e-3  # type: ignore[union-attr,operator,index]  # a BERT layer

    from xadapter_export.model.plm import load_plm

    plm = load_plm(str(parts / "plm"), "fill-mask")
    with pytest.raises(CheckpointError, match="the frozen PLM changed in training"):
        train(config, plm=plm, on_step=meddle)
    assert not (tmp_path / "ck").exists()


def test_a_resumed_run_is_the_run_that_was_not_stopped(parts: Path, tmp_path: Path) -> None:
    whole = run(parts, tmp_path / "whole", max_steps=4)

    def stop(step: int, _steps: int, _note: str) -> None:
        if step == 5:
            os.kill(os.getpid(), signal.SIGINT)

    config = read_config(None, settings(parts, tmp_path / "part", max_steps=4))
    with pytest.raises(
        TrainingStopped, match=r"stopped after step \d+ of 12.*run the same command again to resume"
    ):
        train(config, on_step=stop)
    assert not (tmp_path / "part").exists()
    steps: list[int] = []
    resumed = train(config, on_step=lambda step, *_: steps.append(step))
    assert 1 < steps[0] <= 7  # it did not begin again
    assert losses(resumed) == losses(whole)
    for name, tensor in whole.model.trained_state().items():
        assert torch.equal(tensor, resumed.model.trained_state()[name]), name


@pytest.mark.parametrize("state", [b"", b"\xff" * 64, None])
def test_a_damaged_state_is_one_line(tmp_path: Path, state: bytes | None) -> None:
    plugin = torch.nn.Linear(2, 2)
    if state is None:
        save_file({"weight": torch.zeros(5)}, tmp_path / WEIGHTS_NAME)
    else:
        (tmp_path / WEIGHTS_NAME).write_bytes(state)
    with pytest.raises(CheckpointError, match=r"a state of the training is damaged: .*remove .* and resume"):
        load_state(plugin, tmp_path)


def test_other_settings_do_not_go_on_with_an_unfinished_run(parts: Path, tmp_path: Path) -> None:
    def stop(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(TrainingStopped):
        train(read_config(None, settings(parts, tmp_path / "ck")), on_step=stop)
    with pytest.raises(ConfigError, match="unfinished run with other settings"):
        run(parts, tmp_path / "ck", learning_rate=1e-3)


def test_two_processes_give_the_gradients_of_one_with_the_doubled_batch(parts: Path, tmp_path: Path) -> None:
    script = Path(__file__).with_name("save_gradients.py")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(script.parents[1])}

    def gradients(name: str, batch: int, launcher: list[str]) -> dict[str, np.ndarray[Any, Any]]:
        config = tmp_path / f"{name}.json"
        config.write_text(json.dumps(settings(parts, tmp_path / name, batch_size=batch)))
        done = subprocess.run(
            [*launcher, str(script), str(config), str(tmp_path / f"{name}.npz")],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        with np.load(tmp_path / f"{name}.npz") as arrays:
            return dict(arrays)

    two = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    one_process = gradients("one", 4, [sys.executable])
    two_processes = gradients("two", 2, two)
    assert one_process.keys() == two_processes.keys()
    assert len({name.partition(".")[0] for name in one_process}) == 6  # every step
    assert sum(gradient.any() for gradient in one_process.values()) > 100
    for name, gradient in one_process.items():
        distance = np.linalg.norm(two_processes[name] - gradient)
        assert distance <= 1e-3 * np.linalg.norm(gradient) + 1e-6, name
    first, second = (load_file(tmp_path / name / "xadapter.safetensors") for name in ("one", "two"))
    for name, tensor in first.items():
        torch.testing.assert_close(second[name], tensor, atol=1e-3, rtol=1e-2)


def test_cached_features_change_nothing(parts: Path, tmp_path: Path) -> None:
    cached = run(parts, tmp_path / "cached", cache=str(tmp_path / "cache"))
    kept = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "cache").iterdir()}
    assert {name.split("-")[0] for name in kept} == {"hidden", "retrieved", "token_states"}
    plain = run(parts, tmp_path / "plain", cache=str(tmp_path / "cache"), cache_hidden=False)
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "cache").iterdir()} == kept
    np.testing.assert_allclose(losses(plain), losses(cached), rtol=1e-5)
    run(parts, tmp_path / "k", cache=str(tmp_path / "cache"), k=2)  # only retrieval depends on k
    new = {path.name for path in (tmp_path / "cache").iterdir()} - set(kept)
    assert [name.split("-")[0] for name in new] == ["retrieved"]


def test_one_expert_after_the_other(parts: Path, tmp_path: Path) -> None:
    first: dict[str, torch.Tensor] = {}
    finished = tmp_path / "ck.run" / "state-1" / WEIGHTS_NAME

    def keep_first_phase(*_: object) -> None:
        if finished.is_file():  # gone when the run ends
            first.update(load_file(finished))

    config = read_config(None, settings(parts, tmp_path / "ck", order="sequential"))
    result = train(config, on_step=keep_first_phase)
    assert {entry["phase"] for entry in result.curve} == {1, 2}
    assert result.steps == 4
    for name, tensor in result.model.trained_state().items():
        assert torch.equal(tensor, first[name]) == (".v." in name), name  # T alone moved in the second
    assert any(first[name].any() for name in first if name.endswith("v.out.weight"))  # where it starts at 0
    joint = run(parts, tmp_path / "joint", order="joint")
    assert joint.steps == 2


def test_a_static_memory_learns_to_look_where_clip_would_search(parts: Path, tmp_path: Path) -> None:
    more = {"experts": "v", "retrieval": "static", "max_steps": 40, "learning_rate": 2e-2}
    taught = run(parts, tmp_path / "taught", distill_weight=1.0, **more)
    assert losses(taught)[-1] < losses(taught)[0]
    assert taught.model.clip is None
    again = XAdapterModel.from_pretrained(tmp_path / "taught")  # no CLIP is needed to run it
    result = export(again, tmp_path / "bundle", "v")
    assert result.parity.passed
    assert "clip_input_ids" not in [tensor.name for tensor in result.manifest.expert_sets["v"].inputs]


def task(parts: Path, output: Path, **more: Any) -> dict[str, Any]:
    changed = {
        "task": "text-classification",
        "train_files": [str(parts / "train.tsv")],
        "labels": ["no", "yes"],
    }
    return settings(parts, output, **{**changed, **more})


def test_a_classifier_from_table_to_bundle(parts: Path, tmp_path: Path) -> None:
    more = {"eval_file": str(parts / "train.tsv"), "patience": 2, "max_steps": 6, "tensorboard": True}
    result = train(read_config(None, task(parts, tmp_path / "ck", **more)))
    assert any("eval_metric" in entry for entry in result.curve)
    assert list((tmp_path / "ck.run" / "tensorboard").glob("events*"))
    kept = load_file(tmp_path / "ck" / "xadapter.safetensors")
    assert {name.split(".")[0] for name in kept} == {"adapters", "head"}
    bundle = export(tmp_path / "ck", tmp_path / "bundle", "vt").folder
    session = XAdapterSession.load(bundle)
    with torch.inference_mode():
        inputs = result.model.encode(TEXTS)
        inputs.pop("mask_positions")
        logits = result.model(**inputs).logits
    said = session.classify(TEXTS)
    for row, answers in zip(logits.tolist(), said, strict=True):
        assert {answer.label for answer in answers} == {"no", "yes"}
        assert {a.label: a.logit for a in answers} == pytest.approx(
            dict(zip(("no", "yes"), row, strict=True)), abs=1e-4
        )


def test_the_head_alone_is_the_baseline(parts: Path, tmp_path: Path) -> None:
    result = train(read_config(None, task(parts, tmp_path / "ck", head_only=True)))
    state = result.model.trained_state()
    assert all(not tensor.any() for name, tensor in state.items() if ".out." in name)
    assert state["head.out_proj.weight"].std() > 0


def test_a_regression(parts: Path, tmp_path: Path) -> None:
    rows = "".join(f"{text}\t{0.5 * number}\n" for number, text in enumerate(TEXTS * 2))
    (tmp_path / "values.tsv").write_text(rows, encoding="utf-8")
    more = {"train_files": [str(tmp_path / "values.tsv")], "labels": None, "regression": True, "max_steps": 3}
    result = train(read_config(None, task(parts, tmp_path / "ck", **more)))
    assert len(result.model.config.labels) == 1
    session = XAdapterSession.load(export(tmp_path / "ck", tmp_path / "bundle", "vt").folder)
    answer = session.classify(TEXTS[0])[0]
    assert answer.score == answer.logit  # a value, not a probability


@pytest.mark.parametrize("layer", [{}, {"layer": "null-rows"}, {"layer": "null-rows", "null_rows": 5}])
def test_the_control_has_the_same_size_and_nothing_of_clip(
    layer: dict[str, Any], parts: Path, tmp_path: Path
) -> None:
    run(parts, tmp_path / "ck", experts="v", **layer)
    control = train_control(tmp_path / "ck", tmp_path / "control")
    original = XAdapterModel.from_pretrained(tmp_path / "ck")
    again = XAdapterModel.from_pretrained(tmp_path / "control")
    assert again.clip is None
    assert again.bank is not None
    assert len(again.bank.features) == 16
    sizes = [sum(t.numel() for t in model.trained_state().values()) for model in (original, again)]
    assert sizes[0] == sizes[1]
    assert control.record["config"]["control"]
    num_null_rows = layer.get("null_rows", 16) if layer else 0
    assert original.config.null_rows == again.config.null_rows == num_null_rows


def test_the_control_of_both_experts_is_one_of_twice_the_width(parts: Path, tmp_path: Path) -> None:
    run(parts, tmp_path / "both")
    wide = train_control(tmp_path / "both", tmp_path / "wide")
    assert wide.steps == 6  # as many as v, t and vt took together
    assert wide.model.config.adapter_width == 32
    with pytest.raises(CheckpointError, match="has no record of its training"):
        train_control(parts, tmp_path / "other")


def test_the_control_takes_the_parts_that_the_checkpoint_brings(
    parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A self-contained record names its parts, and what has the same name here may be something else."""
    run(parts, tmp_path / "ck", self_contained=True)
    for name in ("plm", "clip", "text.txt"):
        assert (tmp_path / "ck" / name).exists() == (name != "text.txt")
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(parts, elsewhere)
    change_weights(elsewhere / "plm")
    shutil.rmtree(elsewhere / "clip")
    shutil.rmtree(elsewhere / "bank")
    monkeypatch.chdir(elsewhere)
    control = train_control(tmp_path / "ck", tmp_path / "control")
    before, after = (json.loads((tmp_path / name / "train.json").read_text()) for name in ("ck", "control"))
    assert after["frozen_sha256_before"]["plm"] == before["frozen_sha256_before"]["plm"]
    assert is_control_of(control.folder, tmp_path / "ck")
    (elsewhere / "text.txt").write_text("green fruit is very green.\n" * 4)
    with pytest.raises(ConfigError) as caught:
        train_control(tmp_path / "ck", tmp_path / "again")
    assert (caught.value.where, caught.value.got != "none") == ("text.txt", True)
    (elsewhere / "text.txt").unlink()
    with pytest.raises(ConfigError) as caught:
        train_control(tmp_path / "ck", tmp_path / "again")
    assert caught.value.got == "none"


def test_the_control_of_another_plm_is_refused(parts: Path, tmp_path: Path) -> None:
    here = Path(shutil.copytree(parts, tmp_path / "parts"))
    run(here, tmp_path / "ck")
    change_weights(here / "plm")
    with pytest.raises(HashMismatchError) as caught:
        train_control(tmp_path / "ck", tmp_path / "control")
    assert caught.value.where == str(here / "plm")
    assert not (tmp_path / "control").exists()


def test_masks_and_answers_of_a_file(parts: Path, tmp_path: Path) -> None:
    rows = [
        {"text": "the color of a banana is [MASK].", "answers": {"green": 3, "fruit": 1}},
        {"text": "[MASK] and [MASK] fruit.", "answers": ["green", {"very": 1.0}]},
        {"text": "a banana is [MASK].", "answers": None},
    ]
    path = tmp_path / "answers.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    result = run(parts, tmp_path / "ck", train_files=[str(path)], experts="v", max_steps=30)
    assert losses(result)[-1] < losses(result)[0]
    for broken, message in (
        ({"text": "a banana.", "answers": "green"}, "a text has no mask"),
        ({"text": "[MASK] [MASK]", "answers": "green"}, "the numbers of masks and answers differ"),
        ({"text": "[MASK].", "answers": {"green": 0}}, "must add up to more than 0"),
        ({"text": "[MASK].", "answers": 5}, "neither a word nor a map"),
        ({"text": "[MASK].", "answers": {"green": "x"}}, "neither a word nor a map"),
        ({"text": 5}, "a text is empty or not a string"),
        ([1, 2], "a line is not a JSON object"),
    ):
        path.write_text(json.dumps(broken), encoding="utf-8")
        with pytest.raises(InputTextError, match=message):
            run(parts, tmp_path / "bad", train_files=[str(path)])


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"learning_rte": 1.0}, "unknown setting.*did you mean learning_rate"),
        ({"train_files": []}, "give training data"),
        ({"clip": None}, "clip: needed by"),
        ({"adapter_width": 15}, "multiple of num_heads"),
        ({"batch_size": 0}, "batch_size"),
        ({"precision": "fp16"}, "fp16 training needs a GPU"),
        ({"train_files": ["nowhere.txt"]}, "no such file"),
        ({"layers": [7]}, "layer 7.*has layers 0 to 2"),
        ({"layers": [2, 1]}, "layers must be in ascending order"),
        ({"seed": -1}, "seed"),
        ({"epochs": float("inf"), "max_steps": None}, "epochs"),
        ({"output": "."}, "give a folder, not a root"),
        ({"max_seq": 4000}, "max_seq is longer than the PLM's longest input"),
    ],
)
def test_settings_that_make_no_sense(parts: Path, tmp_path: Path, more: dict[str, Any], message: str) -> None:
    if torch.cuda.is_available() and "precision" in more:
        pytest.skip("this machine has a GPU")
    with pytest.raises(ConfigError, match=message):
        train(read_config(None, {**settings(parts, tmp_path / "ck"), **more}))
    assert not (tmp_path / "ck").exists()


def test_texts_that_cannot_be_learned_from(parts: Path, tmp_path: Path) -> None:
    for name, content, message in (
        ("empty.txt", "\n \n", "the file has no text"),
        ("empty.jsonl", '{"text": ""}', "a text is empty or not a string"),
        ("marks.txt", "... !!!\n", "no text has a word"),
        ("bytes.txt", b"\xff\xfe\x00", "cannot be read"),
    ):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        with pytest.raises(InputTextError, match=message):
            run(parts, tmp_path / "ck", train_files=[str(path)])
    (tmp_path / "labels.tsv").write_text("a fruit\t0\na banana\t7\n", encoding="utf-8")
    with pytest.raises(
        InputTextError, match=r"a label is out of range.*row 2.*expected one of no, yes.*got 7"
    ):
        train(read_config(None, task(parts, tmp_path / "ck", train_files=[str(tmp_path / "labels.tsv")])))


def test_long_and_odd_lines_are_read(parts: Path, tmp_path: Path) -> None:
    path = tmp_path / "odd.txt"
    path.write_text(
        "\ufeff" + "a fruit is green. " * 50 + "\r\nthe banana\u2028is green.\n", encoding="utf-8"
    )
    result = run(parts, tmp_path / "ck", train_files=[str(path)], mask_share=0.5, max_seq=12)
    assert result.steps == 6
    (tmp_path / "quoted.tsv").write_text('text\tid\n"a fruit\t1\nbanana is green\t2\n', encoding="utf-8")
    assert read_texts(str(tmp_path / "quoted.tsv")) == ['"a fruit', "banana is green"]


def test_a_run_that_diverges_says_so_and_writes_nothing(parts: Path, tmp_path: Path) -> None:
    with pytest.raises(DivergedError, match=r"the training diverged.*lower learning_rate"):
        run(parts, tmp_path / "ck", learning_rate=1e30, warmup_share=0.0, max_steps=6)
    assert not (tmp_path / "ck").exists()


def test_a_bank_of_another_clip_is_refused(parts: Path, tmp_path: Path) -> None:
    bank = FeatureBank.load(parts / "bank")
    clip = BankClip(source="another-clip", sha256="0" * 64)
    (tmp_path / "bank").mkdir()
    FeatureBank(bank.features, bank.pictures, clip=clip).save(tmp_path / "bank")
    for more in ({}, {"retrieval": "static", "distill_weight": 1.0}):
        with pytest.raises(ConfigError, match=r"made with CLIP another-clip.*searched with CLIP"):
            run(parts, tmp_path / "ck", experts="v", bank=str(tmp_path / "bank"), **more)


def test_what_is_in_the_way_stays(parts: Path, tmp_path: Path) -> None:
    (tmp_path / "ck").mkdir()
    (tmp_path / "ck" / "thesis.txt").write_text("years", encoding="utf-8")
    with pytest.raises(OutputExistsError, match="output path already exists"):
        run(parts, tmp_path / "ck")
    with pytest.raises(OutputExistsError, match="xadapter-export did not write"):
        run(parts, tmp_path / "ck", force=True)
    assert not (tmp_path / "ck.run").exists()  # before any work
    assert (tmp_path / "ck" / "thesis.txt").read_text(encoding="utf-8") == "years"


def test_no_space_left(parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from xadapter_export.training import trainer

    def full(*_: object, **__: object) -> None:
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "save_file", full)
        with pytest.raises(
            OutputWriteError, match=r"No space left on device.*run the same command again to resume"
        ):
            run(parts, tmp_path / "ck")
    assert run(parts, tmp_path / "ck").steps == 6
