"""The benchmarks run, compare what they say they compare, and print what a reader needs."""

import json
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from benchmarks import bank, field, latency, limits, masked_cpu, prepare, report, training
from benchmarks.cases import make_feed, make_model, torch_feed
from benchmarks.contestants import Place
from benchmarks.feeds import Cell, Feeding, feed_as
from benchmarks.footprint import Footprint
from benchmarks.intervals import Spread, geometric_mean, ratio, spread
from benchmarks.limits import Limits
from benchmarks.machine import Cpu, CpuTime, Pick, cpu, picks_of
from benchmarks.prepare import Cost, Preparation
from benchmarks.rounds import Rounds, Turn
from benchmarks.training import ARMS, _Arm, _Shape
from benchmarks.verdicts import Measured, Results, Row, Size, Verdict, chosen, judge, picked
from benchmarks.work import ModelShape
from benchmarks.worker import ContestantError, Worker
from material.models import minilm_folder
from tests.runtime.test_variants import make_variant
from xadapter_export.errors import ConfigError

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


# ------------------------------------------------------------------------------------------- latency


CELL = Cell("builtin", "t", 1, 12, "full")
FIRST: Turn = (0, "user")
SECOND: Turn = (1, "equal")


def _row(name: str, feeding: Feeding = "user") -> Row:
    return Row(name, feeding)


def _measured(*times_ms: float, gflop: float = 1.0, limit_ms: float = 1.0) -> Measured:
    return Measured(times_ms, gflop, limit_ms=limit_ms)


def _verdicts(results: Results, start: str) -> list[Verdict]:
    found = [verdict for verdict in judge(results) if verdict.text.startswith(start)]
    assert found, start
    return found


def test_medians_and_quartiles_are_those_of_the_times() -> None:
    assert spread([5, 1, 3, 2, 4]) == Spread(3, 2, 4, 5)
    with pytest.raises(ValueError, match="no times"):
        spread([])


def test_a_ratio_is_of_medians_and_its_interval_of_paired_rounds() -> None:
    ours = [10.0, 11.0, 30.0, 9.0, 10.5]
    exact = ratio([2 * time for time in ours], ours)
    assert (exact.value, exact.low, exact.high) == (2.0, 2.0, 2.0)  # what slows a round cancels
    found = ratio([20, 22, 18, 21, 19, 25], [10, 10, 10, 10, 10, 10])
    assert found.value == pytest.approx(2.05)
    assert 1.8 <= found.low < 2.05 < found.high <= 2.5
    assert ratio([20, 22], [10, 10]) == ratio([20, 22], [10, 10])
    with pytest.raises(ValueError, match="2 and 1 rounds"):
        ratio([1, 2], [1])
    assert geometric_mean([1, 100]) == pytest.approx(10)


def test_limits_are_the_larger_of_operations_and_bytes() -> None:
    machine = Limits(fp32_gflops=100, bf16_gflops=200, int8_gops=400, read_gb_s=10, threads=2)
    assert machine.least_ms(1.0, 0, "fp32") == pytest.approx(10)
    assert machine.least_ms(1.0, 0, "bf16") == pytest.approx(5)
    assert machine.least_ms(1.0, 0, "int8") == pytest.approx(2.5)
    assert machine.least_ms(1.0, 1e9, "int8") == pytest.approx(100)
    other = Limits(fp32_gflops=150, bf16_gflops=100, int8_gops=500, read_gb_s=5, threads=2)
    assert machine.best(other) == Limits(150, 200, 500, 10, 2)
    small = limits.measure(1, side=64, read_bytes=1 << 16, seconds=0)
    assert min(small.fp32_gflops, small.bf16_gflops, small.int8_gops, small.read_gb_s) > 0


def test_work_is_counted_by_formula() -> None:
    model = make_model("builtin")
    shape = ModelShape.of(model)
    h, layers, vocabulary = 128, 4, 4942
    assert (shape.layer, shape.decoder, shape.transform) == (12 * h * h, vocabulary * h, h * h)
    assert (shape.clip_layer, shape.clip_layers, shape.bank) == (12 * 96 * 96, 2, 2655 * 128)
    plain = shape.work("none", "full", batch=2, seq=16, clip_seq=0, positions=16, is_least=False)
    adds = layers * (12 * h * h * 16 + 2 * h * 16 * 16) + (h * h + vocabulary * h) * 16
    assert plain.gflop == pytest.approx(2 * 2 * adds / 1e9)
    assert plain.weights == layers * 12 * h * h + h * h + vocabulary * h
    least = shape.work("none", "full", batch=2, seq=16, clip_seq=0, positions=1, is_least=True)
    unread = 15 * (10 * h * h + 2 * h * 16) + 15 * (h * h + vocabulary * h)
    assert least.gflop == pytest.approx(2 * 2 * (adds - unread) / 1e9)
    few = shape.work("none", "candidates", batch=2, seq=16, clip_seq=0, positions=1, is_least=True)
    assert least.weights - few.weights == (vocabulary - 11) * h
    with_t = shape.work("t", "full", batch=2, seq=16, clip_seq=24, positions=16, is_least=False)
    one_expert = 2 * h * 64 * 16 + 2 * 96 * 64 * 24 + 2 * 64 * 16 * 24
    clip = 2 * (12 * 96 * 96 * 24 + 2 * 96 * 24 * 24)
    assert with_t.gflop == pytest.approx(2 * 2 * (adds + clip + 2 * one_expert) / 1e9)
    with_v = shape.work("vt", "full", batch=1, seq=16, clip_seq=24, positions=16, is_least=False)
    assert with_v.weight_bytes("int8") == with_v.weights + 4 * 2655 * 128


def test_texts_have_the_tokens_that_were_asked_for_and_are_fed_both_ways() -> None:
    model = make_model("builtin")
    feed = make_feed(model, 3, 16)
    assert feed["input_ids"].shape == (3, 16)
    assert feed["attention_mask"].all()
    masks = np.take_along_axis(feed["input_ids"], feed["mask_positions"], 1)
    assert (masks == model.text_encoder.mask_token_id).all()
    assert len({row.tobytes() for row in feed["input_ids"]}) == 3
    ours, users = (feed_as(feed, feeding, 24) for feeding in ("equal", "user"))
    assert ours["clip_input_ids"].shape[1] < 24 == users["clip_input_ids"].shape[1]
    assert not users["clip_input_ids"][:, ours["clip_input_ids"].shape[1] :].any()
    assert "mask_positions" not in users
    assert "mask_positions" in ours
    with torch.no_grad():
        one, other = (model(**torch_feed(fed), experts="vt").last_hidden_state for fed in (ours, users))
    assert (one - other).abs().max() < 1e-4  # CLIP is causal: padding changes nothing
    with pytest.raises(ConfigError, match="no text of this length"):
        make_feed(model, 1, 129)


def test_the_model_for_features_is_the_same_model() -> None:
    model, features = make_model("builtin"), make_model("builtin", "feature-extraction")
    feed = torch_feed(make_feed(model, 2, 12))
    with torch.no_grad():
        states = [each(**feed, experts="t").last_hidden_state for each in (model, features)]
        assert torch.equal(*states)
        assert features(**feed, experts="t").answers["sentence_embedding"].shape == (2, 128)


def test_fp32_passes_where_the_interval_reaches_and_misses_where_it_does_not() -> None:
    ours = {_row("ours-cpu-fp32", "equal"): _measured(10, 11, 10, 12, 10)}
    slower = {_row("ort"): _measured(9.9, 11.2, 10.1, 11.8, 10)}
    faster = {_row("ort"): _measured(5, 5, 5, 5, 5)}
    alone = {_row("plm-ort"): _measured(1, 1, 1, 1, 1)}  # does less: no contestant here
    for others, status in ((slower | alone, "PASS"), (faster, "MISS"), (alone, "not measured")):
        found = _verdicts(Results({CELL: ours | others}), "fp32 never slower")
        assert [verdict.status for verdict in found] == [status]


def test_targets_are_judged_where_they_are_asked_and_by_the_stricter_feeding() -> None:
    rows = {
        _row("eager", "user"): _measured(80, 80, 80),
        _row("eager", "equal"): _measured(31, 31, 31),
        _row("ort-int8", "user"): _measured(25, 25, 25),
        _row("ort-fused-int8", "equal"): _measured(19, 19, 19),
        _row("openvino-int8", "user"): _measured(18, 18, 18),
        _row("openvino-int8", "equal"): _measured(13, 13, 13),
        _row("plm-openvino"): _measured(12, 12, 12),
        _row("ours-cpu-int8", "equal"): _measured(10, 10, 10),
        _row("ours-openvino-int8", "equal"): _measured(10, 10, 10, limit_ms=4),
    }
    other = Cell("builtin", "none", 1, 12, "full")  # experts t are asked for
    results = Results({CELL: rows, other: {row: _measured(1, 1, 1) for row in rows}})
    found = {verdict.text: verdict for verdict in judge(results)}
    expected = {
        "int8 on onnxruntime, experts t, times the usual int8 at 1x12 and 1x32": (1.9, "MISS"),
        "int8 on onnxruntime, experts t, times PyTorch eager everywhere": (3.1, "PASS"),
        "int8 on onnxruntime, experts t, times the plain fp32 PLM alone": (1.2, "PASS"),
        "int8 on OpenVINO, experts t, times OpenVINO and NNCF as its user feeds it": (1.8, "PASS"),
        "int8 on OpenVINO, experts t, times OpenVINO and NNCF at our lengths": (1.3, "PASS"),
        "int8 on OpenVINO, experts t, times PyTorch eager at 1x12": (3.1, "MISS"),
        "int8 on OpenVINO, experts t, times the larger of the two limits": (2.5, "MISS"),
    }
    for text, (figure, status) in expected.items():
        assert found[text].figure == pytest.approx(figure), text
        assert found[text].status == status, text
    assert found["int8 on onnxruntime, experts t, times the usual int8 at 8x32"].status == "not measured"
    assert "ours-cpu-int8 against ort-fused-int8, equal at builtin t 1x12 full" in str(
        found["int8 on onnxruntime, experts t, times the usual int8 at 1x12 and 1x32"]
    )


def test_what_auto_takes_is_held_against_the_fastest_that_it_could_take() -> None:
    names = ("cpu-int8", "cpu-fp32", "openvino-int8")
    rows = {
        _row(f"ours-{name}", "equal"): _measured(*times)
        for name, times in zip(names, [(10, 10.4, 10), (20, 20, 20), (8, 8, 8)], strict=True)
    }
    rows[_row("openvino-int8", "equal")] = _measured(1, 1, 1)  # another exporter's graph of the same name
    picks = [Pick("without OpenVINO", "cpu-int8", names[:2]), Pick("with OpenVINO", "cpu-int8", names)]
    results = Results({CELL: rows}, picks={CELL: picks}, cpu=Cpu("Some CPU", "AVX2"))
    assert [(each.best, each.ratio.value) for each in picked(results)] == [
        ("cpu-int8", 1.0),
        ("openvino-int8", 1.25),
    ]
    (verdict,) = _verdicts(results, "auto")
    assert (verdict.figure, verdict.status) == (1.25, "MISS")
    assert "cpu-int8 for openvino-int8" in str(verdict)
    (verdict,) = _verdicts(Results({CELL: rows}, picks={CELL: picks[:1]}), "auto")
    assert verdict.status == "PASS"
    console = report.make_console()
    with console.capture() as said:
        console.print(report.auto_table(results))
    assert "what auto takes on Some CPU, AVX2" in said.get()
    assert "25.0% (25.0% to 30.0%)" in said.get()


def test_tables_are_written_as_markdown_too() -> None:
    rows = {_row("ort"): _measured(4, 4, 4), _row("ours-onnx-fp32", "equal"): _measured(2, 2, 2)}
    rows[_row("ctranslate2")] = _measured(1, 1, 1, gflop=0.5)
    results = Results({CELL: rows}, disturbed={CELL: 0.3}, cpu=Cpu("Some CPU", "AVX2"))
    text = report.as_markdown(report.latency_tables(results))
    assert text.startswith("### builtin, experts t, full, on Some CPU, AVX2: median ms")
    assert "| contestant | 1x12 * |\n| --- | ---: |\n" in text
    assert "x2.00 25% |" in text
    assert "- CTranslate2, PLM's encoder alone, as its user feeds it: 50% of our operations at 1x12" in text
    assert "- * disturbed, others took of the CPU: 1x12 30%" in text


def test_auto_picks_among_what_a_bundle_holds() -> None:
    variants = [make_variant(name) for name in ("onnx-fp32", "cpu-int8", "openvino-fp32")]
    for pick in picks_of(variants):
        assert pick.variant in pick.among
        assert set(pick.among) <= {variant.name for variant in variants}
    assert not list(picks_of([]))


def test_avx2_is_asked_for_more_at_our_lengths_where_there_is_nothing_else() -> None:
    rows = {
        _row("ort-int8", "equal"): _measured(16, 16, 16),
        _row("ort-int8", "user"): _measured(11, 11, 11),
        _row("openvino", "equal"): _measured(17, 17, 17),
        _row("openvino", "user"): _measured(11, 11, 11),
        _row("ctranslate2", "user"): _measured(1, 1, 1),  # the encoder alone: no other way to do the same
        _row("ours-cpu-int8", "equal"): _measured(10, 10, 10),
    }
    cells = {CELL: rows}
    int8, fp32 = _verdicts(Results(cells, cpu=Cpu("Some CPU", "AVX2")), "AVX2: cpu-int8")
    assert (int8.figure, int8.status) == (1.6, "PASS")
    assert (fp32.figure, fp32.status) == (1.7, "MISS")
    elsewhere = judge(Results(cells, cpu=Cpu("Some CPU", "AVX-512 VNNI")))
    assert not [verdict for verdict in elsewhere if verdict.text.startswith("AVX2")]


def _rounds(times: list[tuple[float, float]], shares: list[float]) -> Rounds:
    rounds = Rounds()
    for (one, other), share in zip(times, shares, strict=True):
        rounds.add({FIRST: one, SECOND: other}, share)
    return rounds


def test_a_cell_ends_when_ratios_are_narrow_or_its_time_is_over() -> None:
    narrow = _rounds([(1, 2), (3, 6), (2, 4)], [0, 0, 0])  # a slow round slows both
    wide = _rounds([(1, 2), (1, 3), (1, 4)], [0, 0, 0])
    assert narrow.are_done(3, is_over=False)
    assert not narrow.are_done(4, is_over=True)
    assert not wide.are_done(3, is_over=False)
    assert wide.are_done(3, is_over=True)
    assert not Rounds().are_done(1, is_over=True)


def test_disturbed_rounds_are_run_again_and_else_kept_with_a_mark() -> None:
    rounds = _rounds([(1, 2), (9, 9), (1, 2)], [0.0, 0.4, 0.01])
    assert not rounds.are_done(3, is_over=True)
    rounds.add({FIRST: 1.0, SECOND: 2.0}, 0.0)
    assert rounds.are_done(3, is_over=False)
    assert rounds.kept(3) == ({FIRST: (1, 1, 1), SECOND: (2, 2, 2)}, 0.01)
    busy = _rounds([(number, 2 * number) for number in range(1, 7)], [0.5, 0.1, 0.9, 0.0, 0.2, 0.9])
    assert busy.are_done(3, is_over=False)  # twice as many are enough, whatever they are
    assert busy.kept(3) == ({FIRST: (2, 4, 5), SECOND: (4, 8, 10)}, 0.2)


def test_the_cpu_is_named_with_its_kind() -> None:
    text = "model name\t: AMD EPYC\ncpu family\t: 25\nmodel\t\t: 17\nflags\t\t: fpu avx2 {}\n"
    assert str(cpu(text.format(""))) == "AMD EPYC (family 25, model 17), AVX2"
    assert cpu(text.format("avx512f avx512_vnni")).kind == "AVX-512 VNNI"
    assert str(Cpu("AMD EPYC", "AVX2", is_masked=True)) == "AVX2 kernels (CPUID masked) on AMD EPYC"
    assert cpu("").name == "unknown CPU"


def test_what_others_took_is_what_is_busy_beyond_our_processes() -> None:
    before = CpuTime(busy_s=100, own_s=40, all_s=1000)
    assert before.others_share(CpuTime(busy_s=118, own_s=56, all_s=1020)) == pytest.approx(0.1)
    assert before.others_share(CpuTime(busy_s=116, own_s=56, all_s=1020)) == 0
    assert before.others_share(before) == 0


def test_engines_that_cannot_be_installed_say_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(field, "PACKAGES", (f"nothing @ file://{tmp_path}/nothing-0-py3-none-any.whl",))
    with pytest.raises(field.FieldError, match=r"could not be installed.*nothing-0-py3-none-any"):
        prepare.prepare(Preparation("litert", "builtin", "t", "fill-mask"), tmp_path, {})


def test_one_variant_is_judged_in_all_cells() -> None:
    longer = Cell("builtin", "t", 32, 64, "full")
    cells = {
        CELL: {_row("ours-cpu-fp32"): _measured(4), _row("ours-openvino-fp32"): _measured(1)},
        longer: {_row("ours-cpu-fp32"): _measured(10), _row("ours-openvino-fp32"): _measured(90)},
    }
    assert chosen(Results(cells), "fp32") == "ours-cpu-fp32"
    assert chosen(Results(cells), "fp32", "openvino") == "ours-openvino-fp32"
    assert chosen(Results(cells), "int8") is None
    results = Results(cells, fp32_gflops=125.0)  # 1 GFLOP in 10 ms is 100 GFLOP/s
    assert _verdicts(results, "fp32 share")[0].figure == pytest.approx(0.8)
    assert _verdicts(results, "fp32 share")[0].status == "PASS"
    (impossible,) = _verdicts(Results(cells, fp32_gflops=50.0), "fp32 share")
    assert impossible.figure == pytest.approx(2.0)
    assert impossible.status == "MISS"
    assert "the limits were disturbed" in str(impossible)


def test_sizes_and_footprints_are_held_to_their_targets() -> None:
    def size(variant: str, size_bytes: int, case: str = "c") -> Size:
        return Size(case, "t", "full", variant, size_bytes, 1000)

    results = Results(
        sizes=[
            size("onnx-fp32", 4020),
            size("cpu-int8", 1020),
            size("cpu-int4", 700),
            size("cpu-int8", 113_000_000, case="bert-base-static"),
        ],
        footprints={"ours-cpu-int8": Footprint(0.4, 0.1, one_mib=120, two_mib=180, total_mib=200)},
        file_mib={"ours-cpu-int8": 100.0},
        costs={"ours-portable": Cost(91, peak_mib=2000, beyond_mib=1500, size_bytes=1)},
        weights_mib=700.0,
    )
    found: dict[str, object] = {v.text: (v.figure, v.status) for v in judge(results)}
    assert found["int8 beside fp32"] == (pytest.approx(1020 / 4020), "PASS")
    assert found["int8 beside one byte a parameter"] == (1.02, "PASS")
    assert found["int4 beside fp32"] == (pytest.approx(700 / 4020), "MISS")
    assert found["fp32 beside four bytes a parameter"] == (1.005, "PASS")
    assert found["static V-bundle of BERT-base in int8, MB"] == (113, "MISS")
    assert found["ours-cpu-int8: seconds to load"] == (0.4, "PASS")
    assert found["ours-cpu-int8: resident memory beside its files"] == (1.2, "PASS")
    assert found["ours-cpu-int8: two sessions beside one"] == (1.5, "MISS")
    assert found["export: seconds"] == (91, "MISS")
    assert found["export: peak memory beside the fp32 weights"] == (pytest.approx(1500 / 700), "PASS")
    assert {verdict.status for verdict in judge(Results())} == {"not measured"}


def test_a_small_file_that_is_below_its_gate_shows_nothing() -> None:
    sizes = [Size("c", "t", "full", "onnx-fp32", 4000, 1000)]
    for below, status in (("", "PASS"), ("85.3% the same, 3.1 points lost", "MISS")):
        results = Results(sizes=[*sizes, Size("c", "t", "full", "cpu-int4", 600, 1000, below)])
        (found,) = _verdicts(results, "int4 beside fp32")
        assert (found.figure, found.status) == (0.15, status)
        assert below in str(found)


def test_what_is_prepared_stands_under_its_code_versions_and_case(tmp_path: Path) -> None:
    one, other = (Preparation("plain", "builtin", experts, "fill-mask") for experts in ("t", "none"))
    assert one.folder(tmp_path).parent == other.folder(tmp_path).parent
    assert one.folder(tmp_path) != other.folder(tmp_path)
    assert prepare.key("builtin") != prepare.key("minilm")
    assert prepare.key("builtin") != prepare.key("builtin", ("benchmarks/field.py",))
    broken = Preparation("tvm", "builtin", "t", "fill-mask")
    with pytest.raises(prepare.PreparationError, match=r"tvm-builtin-t-fill-mask.*KeyError"):
        prepare.prepare(broken, tmp_path, prepare.quiet_environment(1, tmp_path))
    assert not (broken.folder(tmp_path) / prepare.DONE).exists()


@pytest.mark.parametrize(
    ("option", "problem"),
    [
        (["--experts", "q"], "'q' is none of none, v, t, vt"),
        (["--shapes", "1x2"], "'1x2' is not texts x tokens"),
        (["--contestants", "eager,tvm"], "'tvm' is none of eager"),
    ],
)
def test_wrong_options_are_one_line(option: list[str], problem: str) -> None:
    found = CliRunner().invoke(latency.main, option)
    assert found.exit_code == 2
    assert problem in found.stderr


def test_a_worker_that_cannot_load_says_why(tmp_path: Path) -> None:
    place = Place("builtin", "t", "fill-mask", tmp_path, threads=1)
    environment = prepare.quiet_environment(1, tmp_path)
    with pytest.raises(ContestantError, match=r"ort.*model\.onnx"):
        Worker("ort", place, environment)
    with Worker("eager", place, environment) as worker:
        with pytest.raises(ContestantError, match=r"eager.*No such file"):
            worker.first(tmp_path / "nothing.npz", "user", None)
        with pytest.raises(ContestantError, match="has ended in an earlier cell: eager"):
            worker.turn(1, is_warmed=False)


@pytest.mark.slow
def test_the_benchmark_measures_and_judges_the_built_in_case(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        limits, "measure_in_child", lambda *_, **__: Limits(100, 200, 400, 10, 1)
    )  # a minute less
    monkeypatch.setattr(latency, "OURS", ("ours",))  # OpenVINO's takes another half
    options = ["--case", "builtin", "--experts", "t", "--shapes", "2x12", "--heads", "full"]
    options += ["--contestants", "eager,ours", "--rounds", "3", "--seconds-per-cell", "0", "--threads", "1"]
    options += ["--output", str(tmp_path / "results"), "--cache", str(tmp_path / "cache")]
    result = CliRunner().invoke(latency.main, options, catch_exceptions=False)
    assert result.exit_code == 0
    assert "targets" in result.stdout
    assert "PyTorch eager, as its user feeds it" in result.stdout
    found = json.loads((tmp_path / "results" / "latency.json").read_text())
    assert set(found) == {
        "versions",
        "machine",
        "limits",
        "cells",
        "auto",
        "sizes",
        "footprints",
        "file_mib",
        "costs",
        "agreement_with_eager",
        "not_measured",
        "targets",
    }
    assert not found["not_measured"]
    assert f", on {cpu()}: median ms" in " ".join(result.stdout.split())
    assert {auto["variant"] for auto in found["auto"]} <= {"cpu-int8", "cpu-fp32"}
    assert found["auto"]
    (cell,) = found["cells"]
    assert (cell["experts"], cell["shape"], cell["head"]) == ("t", "2x12", "full")
    rows = {(row["contestant"], row["feeding"]): row for row in cell["rows"]}
    assert {("eager", "user"), ("eager", "equal"), ("ours-onnx-fp32", "equal")} <= set(rows)
    assert all(len(row["times_ms"]) == 3 and min(row["times_ms"]) > 0 for row in rows.values())
    assert rows["eager", "user"]["gflop"] > rows["eager", "equal"]["gflop"]
    assert rows["eager", "equal"]["gflop"] > rows["ours-onnx-fp32", "equal"]["gflop"]
    assert found["agreement_with_eager"]["builtin t full ours-onnx-fp32"] > 0.99999
    assert {size["variant"] for size in found["sizes"]} >= {"onnx-fp32"}
    loaded = found["footprints"]["ours-onnx-fp32"]
    assert 0 < loaded["one_mib"] < loaded["total_mib"]
    assert found["costs"]["ours-portable"]["size_bytes"] > 1e6
    assert {verdict["status"] for verdict in found["targets"]} <= {"PASS", "MISS", "not measured"}
    judged = {verdict["text"]: verdict for verdict in found["targets"]}
    assert judged["fp32 times PyTorch eager at 1x12"]["status"] == "not measured"  # no such shape here
    assert judged["export: seconds"]["status"] in ("PASS", "MISS")
    assert f", on {cpu()}: median ms" in (tmp_path / "results" / "latency.md").read_text()
    assert (tmp_path / "results" / "latency.png").read_bytes().startswith(b"\x89PNG")


_ASKS = """
#include <cpuid.h>
unsigned leaf7(void) { unsigned a, b, c, d; __cpuid_count(7, 0, a, b, c, d); return b; }
const unsigned char data[] = {0x0f, 0xa2, 0x0f, 0xa2};
"""
_AVX2, _AVX512 = 1 << 5, sum(1 << bit for bit in (16, 17, 21, 26, 27, 28, 30, 31))  # of EBX


@pytest.mark.skipif(
    platform.machine() != "x86_64"
    or sys.platform != "linux"
    or shutil.which("gcc") is None
    or shutil.which("objdump") is None,
    reason="needs gcc and objdump of x86-64 Linux",
)
def test_a_masked_process_sees_avx2_and_no_avx512(tmp_path: Path) -> None:
    package = tmp_path / "from" / "asks_cpu"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "asks.c").write_text(_ASKS)
    library = package / "asks.so"
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", library, package / "asks.c"], check=True)
    before = library.read_bytes()
    folder = tmp_path / "masked"
    masked_cpu.make(folder, [package])
    assert library.read_bytes() == before  # only the copy is changed
    copy = folder / "site" / "asks_cpu" / "asks.so"
    assert copy.read_bytes().count(b"\xcc\x90") == before.count(b"\xcc\x90") + 1
    assert b"\x0f\xa2\x0f\xa2" in copy.read_bytes()  # data stays
    code = (
        "import ctypes, sys; print(ctypes.CDLL(sys.argv[1]).leaf7() & 0xffffffff); "
        "print(open('/proc/cpuinfo').read().count('avx512'))"
    )
    masked = subprocess.run(
        [sys.executable, "-c", code, copy],
        env=masked_cpu.masked(folder), check=True, capture_output=True, text=True,
    )  # fmt: skip
    plain = subprocess.run([sys.executable, "-c", code, library], check=True, capture_output=True, text=True)
    features, named = map(int, masked.stdout.split())
    assert named == 0
    assert not features & _AVX512
    assert features & _AVX2 == int(plain.stdout.split()[0]) & _AVX2
    assert not features & ~int(plain.stdout.split()[0])


def test_a_contestant_that_ends_before_its_cell_leaves_no_times() -> None:
    rounds = Rounds()
    rounds.add({(0, "equal"): 1.0, (1, "equal"): 2.0, (1, "user"): 3.0}, 0.0)
    rounds.drop(1)
    rounds.add({(0, "equal"): 1.1}, 0.0)
    times, _ = rounds.kept(1)
    assert times == {(0, "equal"): (1.0, 1.1)}
    assert rounds.are_done(2, is_over=False)
