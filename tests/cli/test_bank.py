"""``xad-bank``: what it prints, and one clear line for every mistake."""

import base64
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image

from tests.tiny_checkpoint import make_clip
from xadapter_export.bank import BankClip, FeatureBank
from xadapter_export.cli.bank import bank
from xadapter_export.model.builtin import builtin_folder

COLORS = {"red": (220, 30, 30), "blue": (30, 60, 220)}


def call(*arguments: object) -> Result:
    return CliRunner().invoke(bank, [str(argument) for argument in arguments])


def good(*arguments: object) -> str:
    result = call(*arguments)
    assert result.exit_code == 0, result.output
    return result.stdout


def error_of(*arguments: object) -> str:
    result = call(*arguments)
    assert (result.exit_code, result.stdout) == (1, "")
    lines = [line for line in result.stderr.splitlines() if not re.match(r" *\d+\.\d s  ", line)]
    assert len(lines) == 1
    return lines[0]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("colors") / "pictures"
    for name, color in COLORS.items():
        (folder / name).mkdir(parents=True)
        for number in range(4):
            Image.new("RGB", (40 + number, 40), color).save(folder / name / f"{number}.png")
    return folder


@pytest.fixture(scope="module")
def built(pictures: Path) -> Path:
    output = pictures.parent / "bank"
    good("build", pictures, "-o", output, "--workers", 0, "--thumbnails", 32, "--quiet")
    return output


def test_build_says_what_it_made(pictures: Path, tmp_path: Path) -> None:
    (tmp_path / "source").symlink_to(pictures)
    result = call("build", tmp_path / "source", "-o", tmp_path / "bank", "--workers", 0, "--dtype", "int8")
    assert result.exit_code == 0
    assert result.stdout.splitlines() == [
        "8 pictures, 128 wide, int8, CLIP built-in/clip (88d4087e1981)",
        f"bank: {tmp_path / 'bank'}",
    ]
    *lines, about_clip = result.stderr.splitlines()
    assert about_clip == "note: the built-in CLIP has seen emoji only; for photographs, name another: --clip"
    notes = [line.split(" s  ")[1] for line in lines]
    assert "8 images in 1 shard" in notes
    assert re.fullmatch(r"8 of 8 images(, [\d.e+]+ images/s)?", notes[-2])
    assert error_of("build", tmp_path / "source", "-o", tmp_path / "bank").startswith(
        f"Error: the output path already exists: {tmp_path / 'bank'}; "
    )


def test_build_counts_what_it_skipped(pictures: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(pictures, tmp_path / "source"))
    (source / "blue" / "zero.png").write_bytes(b"")
    stdout = good("build", source, "-o", tmp_path / "bank", "--workers", 0, "--quiet")
    assert stdout.splitlines()[1] == "1 skipped, listed in skipped.jsonl; first: blue/zero.png (empty file)"
    shown = json.loads(good("build", source, "-o", tmp_path / "bank", "--force", "--workers", 0, "--json"))
    assert (shown["num_listed"], shown["record"]["num_skipped"]) == (9, 1)
    assert error_of("build", source, "-o", tmp_path / "b", "--strict", "--workers", 0).startswith(
        "Error: 1 of 9 images cannot be decoded; the first is: blue/zero.png (empty file); "
    )


def test_build_needs_one_source(tmp_path: Path) -> None:
    for arguments in (["-o", tmp_path / "bank"], [tmp_path, "-o", tmp_path / "bank", "--dataset", "x/y"]):
        result = call("build", *arguments)
        assert result.exit_code == 2
        assert "Give either SOURCE or --dataset." in result.stderr


def test_info(built: Path) -> None:
    facts = json.loads(good("info", built, "--json"))
    assert (facts["num_pictures"], facts["dim"], facts["dtype"], facts["kind"]) == (
        8,
        128,
        "fp16",
        "pictures",
    )
    assert facts["sha256"] == FeatureBank.load(built).sha256
    assert facts["clip"]["source"] == "built-in/clip"
    assert "CLIP      built-in/clip (88d4087e1981)" in good("info", built).splitlines()
    recorded = json.loads((builtin_folder() / "xadapter.json").read_text())["bank"]
    facts = json.loads(good("info", "builtin", "--json"))
    assert {name: facts[name] for name in recorded} == recorded
    assert error_of("info", built / "nowhere").startswith(f"Error: bank: {built / 'nowhere' / 'bank.saf'}")


def test_search_finds_by_meaning(built: Path) -> None:
    hits = json.loads(good("search", "builtin", "strawberry", "-k", 5, "--json"))
    assert [hit["caption"] for hit in hits].count("strawberry") >= 2
    scores = [hit["score"] for hit in hits]
    assert scores == sorted(scores, reverse=True)
    lines = good("search", built, "blue", "-k", 3).splitlines()
    assert len(lines) == 3
    assert re.fullmatch(r" *-?\d\.\d{3}  (red|blue) +(red|blue)/\d\.png", lines[0])


@pytest.mark.filterwarnings("always:the bank does not record")  # which the command prints
def test_search_knows_whose_the_bank_is(built: Path, tmp_path: Path) -> None:
    nameless = Path(shutil.copytree(builtin_folder(), tmp_path / "nameless"))
    shutil.rmtree(nameless / "clip")
    (nameless / "xadapter.json").unlink()
    assert good("search", nameless, "banana") == good("search", "builtin", "banana")  # by the bank's hash

    unknown = Path(shutil.copytree(built, tmp_path / "unknown"))
    (unknown / "bank.json").unlink()
    assert error_of("search", unknown, "banana") == (
        f"Error: the bank does not record which CLIP made it: {unknown}; name it with --clip"
    )
    result = call("search", unknown, "blue", "--clip", "builtin", "-k", 1)
    assert result.exit_code == 0
    assert "nothing checks that it is this one" in result.stderr


def test_search_refuses_another_clip(built: Path, tmp_path: Path) -> None:
    other = make_clip(embed_dim=128)
    other.save(tmp_path / "other")
    assert re.match(
        r"Error: the bank was made with another CLIP: .*\(expected built-in/clip \(88d4087e1981\), "
        r"got .*/other \(\w{12}\)\); ",
        error_of("search", built, "banana", "--clip", tmp_path / "other"),
    )
    elsewhere = FeatureBank.load(built)
    lost = FeatureBank(
        elsewhere.features, elsewhere.pictures, clip=BankClip(source="./lost-clip", sha256="d" * 64)
    )
    (tmp_path / "lost").mkdir()
    lost.save(tmp_path / "lost")
    assert error_of("search", tmp_path / "lost", "banana").startswith(
        "Error: the CLIP that made the bank cannot be loaded: ./lost-clip (dddddddddddd)"
    )


@pytest.mark.filterwarnings("always:the bank does not record")  # which the command prints
def test_search_of_a_bank_of_another_width(built: Path, tmp_path: Path) -> None:
    make_clip().save(tmp_path / "narrow")
    unknown = Path(shutil.copytree(built, tmp_path / "unknown"))
    (unknown / "bank.json").unlink()
    result = call("search", unknown, "banana", "--clip", tmp_path / "narrow")
    assert result.exit_code == 1
    assert "the query and the bank's features have different widths" in result.stderr
    assert "(expected 128, got 24)" in result.stderr


def test_search_for_too_much_or_nothing(built: Path) -> None:
    assert error_of("search", built, "banana", "-k", 9) == (
        f"Error: k is larger than the number of images in the bank: {built} (expected at most 8, got 9)"
    )
    assert error_of("search", built, " ").startswith("Error: text 1 of 1 is empty")


def test_the_page_holds_its_pictures(built: Path, pictures: Path, tmp_path: Path) -> None:
    sheet = tmp_path / "sheet.html"
    query = '<script>alert("x")</script> & blue'
    good("search", built, query, "-k", 3, "--html", sheet)
    page = sheet.read_text()
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    assert not re.search(r"(src|href)=\"(?!data:)", page)
    embedded = re.findall(r'src="data:image/webp;base64,([^"]+)"', page)
    assert len(embedded) == 3
    assert all(base64.b64decode(data)[8:12] == b"WEBP" for data in embedded)
    assert "the output path already exists" in error_of("search", built, "blue", "--html", sheet)

    bare = Path(shutil.copytree(built, tmp_path / "bare"))
    (bare / "thumbnails.zip").unlink()
    good("search", bare, "blue", "-k", 3, "--html", sheet, "--force")
    assert sheet.read_text().count('class="picture words"') == 3
    good("search", bare, "blue", "-k", 3, "--html", sheet, "--force", "--pictures", pictures)
    assert sheet.read_text().count("data:image/webp") == 3
    rows = (bare / "bank.jsonl").read_text()
    (bare / "bank.jsonl").write_text(rows.replace('"id":"', '"id":"../pictures/'))
    good("search", bare, "blue", "-k", 3, "--html", sheet, "--force", "--pictures", pictures / "red")
    assert sheet.read_text().count('class="picture words"') == 3  # no id leads out


def test_long_work_shows_its_rows(built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("xadapter_export.cli.bank.QUICK_S", 0.0)
    for command, total in (
        (("merge", built, built, "--keep-duplicates"), 16),
        (("compact", built, "--prototypes", 2), 3 * 8),  # each row once for each epoch
        (("dtype", built, "--to", "int8"), 8),
    ):
        result = call(*command, "-o", tmp_path / str(command[0]))
        assert f"{total} of {total} rows" in result.stderr
        quiet = call(*command, "-o", tmp_path / str(command[0]), "--force", "--quiet")
        assert (quiet.exit_code, quiet.stderr) == (0, "")


def test_merge_and_compact_and_dtype(built: Path, tmp_path: Path) -> None:
    assert "8 images are in more than one bank" in error_of("merge", built, built, "-o", tmp_path / "merged")
    merged = good("merge", built, built, "--keep-duplicates", "-o", tmp_path / "merged")
    assert merged.splitlines()[0] == "16 pictures, 128 wide, fp16"
    doubled = FeatureBank.load(tmp_path / "merged").rows()
    assert np.array_equal(doubled[:8], doubled[8:])
    sheet = tmp_path / "sheet.html"
    good("search", tmp_path / "merged", "blue", "-k", 16, "--html", sheet)
    assert sheet.read_text().count("data:image/webp") == 16  # thumbnails were merged too

    made = good("compact", built, "--prototypes", 2, "-o", tmp_path / "prototypes")
    assert re.search(r"prototype-0001 .* 4 .* (red|blue)", made)
    mean = re.search(r"^8 pictures, mean cosine to their prototype (\d\.\d{3})$", made, re.MULTILINE)
    assert mean is not None
    assert 0.9 < float(mean[1]) <= 1
    assert "more prototypes than images" in error_of(
        "compact", built, "--prototypes", 9, "-o", tmp_path / "p"
    )

    shown = good("dtype", "builtin", "--to", "int8", "-o", tmp_path / "int8", "--queries", 50)
    assert re.match(
        r"recall against fp16, 50 queries: @1 [01]\.\d{4}, @5 [01]\.\d{4}, @10 [01]\.\d{4}\n", shown
    )
    assert FeatureBank.load(tmp_path / "int8").clip is not None  # the checkpoint says whose it is
    named = ("dtype", "builtin", "--to", "fp32", "-o", tmp_path / "fp32", "--clip", "builtin", "--json")
    facts = json.loads(good(*named))
    assert facts["recall"] == {"1": 1.0, "5": 1.0, "10": 1.0}  # nothing is lost
    assert not (tmp_path / "p").exists()


def test_help_is_instant_and_imports_nothing_heavy() -> None:
    code = (
        "import sys\nfrom click.testing import CliRunner\nfrom xadapter_export.cli.bank import bank\n"
        "for name in ('', 'build', 'info', 'search', 'merge', 'compact', 'dtype'):\n"
        "    assert CliRunner().invoke(bank, [*name.split(), '--help']).exit_code == 0\n"
        "print(*sorted({'torch', 'open_clip', 'sklearn', 'numpy', 'PIL'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == ""
