"""The page in a real Chromium and the Node example, beside Python."""

import colorsys
import hashlib
import io
import json
import random
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from PIL import Image
from tokenizers import Tokenizer

from export.web.build import bundle_bytes, install_packages, write_page
from export.web.pictures import bank_pictures, write_sheets
from export.web.server import make_server
from tests import ROOT
from tests.tiny_bundle import rewrite_manifest
from xadapter_export import XAdapterSession, export
from xadapter_export.bank.thumbnails import write_thumbnails
from xadapter_export.bundle.manifest import ExpertSet
from xadapter_export.errors import (
    CheckpointError,
    ConfigError,
    MissingExtraError,
    OutputExistsError,
    UnsupportedError,
)
from xadapter_export.model.builtin import builtin_folder

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

    from xadapter_export.exporters.pipeline import ExportResult

SETS: tuple[ExpertSet, ...] = ("vt", "v", "t", "none")
WINDOW = "A frog sits here. " * 30
# Written to be hard: accents, quotes, several masks, more tokens than either model reads.
HARD = [
    "The color of a banana is [MASK] and that of a frog is [MASK].",
    "“Naïve” cafés serve ﬁne [MASK] soup 🍌👩‍🚀.",
    "ΌΔΟΣ İstanbul 日本語 𠀀 [MASK]",
    f"{WINDOW}It is [MASK].",
    f"The [MASK] is green. {WINDOW}",
    f"{WINDOW}A strawberry is [MASK]. {WINDOW}",
]


def sentences() -> list[str]:
    """50 sentences: questions about objects that the plug-in never saw, and hard ones."""
    lines = (builtin_folder() / "heldout.jsonl").read_text(encoding="utf-8").splitlines()
    asked = [sentence for line in lines for sentence in json.loads(line)["sentences"]]
    return [*asked[:: len(asked) // 43][:44], *HARD]


def unicode_strings(count: int) -> list[str]:
    """Strings of many scripts, symbols, controls and special tokens; from a fixed seed."""
    rng = random.Random(11)
    blocks = [
        *[(0x20, 0x7E)] * 6,
        *[(0x0, 0x1F), (0x7F, 0x9F), (0xA0, 0x17F), (0x300, 0x34F), (0x370, 0x3FF), (0x400, 0x4FF)],
        *[(0x5D0, 0x5EA), (0x620, 0x669), (0x905, 0x939), (0xE01, 0xE3A), (0x1E00, 0x1EFF), (0x2000, 0x206F)],
        *[(0x2070, 0x209C), (0x20A0, 0x20BA), (0x2100, 0x214F), (0x2190, 0x21FF), (0x2600, 0x27BF)],
        *[(0x3000, 0x30FF), (0x4E00, 0x9FFF), (0xAC00, 0xD7A3), (0xF900, 0xFAD9), (0xFB00, 0xFB06)],
        *[(0xFF00, 0xFFEF), (0xFFF9, 0xFFFD), (0x1D400, 0x1D7FF), (0x1F300, 0x1F6FF), (0x20000, 0x2A6D6)],
    ]
    pieces = [
        *(
            "The color of a banana is [MASK].",
            "It's",
            "don't",
            "we'LL",
            "ﬁne",
            "ﬄ",
            "“quoted”",
            "‘x’",
            "naïve",
        ),
        *("e\u0301", "İstanbul", "ẞ", "ǅ", "[SEP]", "<end_of_text>", "<start_of_text>", "[UNK]", " [MASK] "),
        *(
            "##s",
            "ΑΣ",
            "ΌΔΟΣ ",
            "ΣΑΣ.",
            "한국",
            "日本語",
            "\u200d",
            "\ufe0f",
            "👩‍🚀",
            "½",
            "Ⅷ",
            "٣",
            "\x85",
            "\u2028",
        ),
    ]
    texts: list[str] = []
    while len(texts) < count:
        text = ""
        for _ in range(rng.randint(1, 12)):
            if rng.random() < 0.4:
                text += rng.choice(pieces)
            else:
                low, high = rng.choice(blocks)
                text += "".join(chr(rng.randint(low, high)) for _ in range(rng.randint(1, 8)))
            text += " " * (rng.random() < 0.4)
        texts.append(text)
    return texts


def color_of(row: int) -> tuple[int, int, int]:
    """A color that tells a bank row from its neighbors."""
    red, green, blue = colorsys.hsv_to_rgb(row * 0.381966 % 1, 0.9, 0.9)
    return round(255 * red), round(255 * green), round(255 * blue)


@pytest.fixture(scope="module")
def bundle(builtin_export: "ExportResult") -> Path:
    return builtin_export.folder


@pytest.fixture(scope="module")
def python(bundle: Path) -> XAdapterSession:
    return XAdapterSession.load(bundle, variant="onnx-fp32")


def packages_of(name: str, lock_from: Path) -> Path:
    try:
        return install_packages(ROOT / "build" / "npm" / name, lock_from=lock_from)
    except MissingExtraError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def site(bundle: Path, python: XAdapterSession, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page around the built-in bundle, with a plain color as the picture of each bank row."""
    folder = tmp_path_factory.mktemp("page")
    with write_thumbnails(folder) as thumbnails:
        for row in range(len(python.pictures)):
            stream = io.BytesIO()
            Image.new("RGB", (16, 16), color_of(row)).save(stream, "WEBP")
            thumbnails.add(row, stream.getvalue())
    for name in ("bank.safetensors", "bank.jsonl"):  # the bank that the thumbnails are of
        shutil.copyfile(builtin_folder() / name, folder / name)
    packages = packages_of("web", ROOT / "export" / "web")
    write_page(folder / "site", bundle, packages, str(folder))
    return folder / "site"


@pytest.fixture(scope="module")
def browser() -> "Iterator[Browser]":
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if program is None:
        pytest.skip("no Chromium on this machine")
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def address(site: Path) -> Iterator[str]:
    with make_server(site) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://localhost:{server.server_port}/"
        server.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def page(browser: "Browser", address: str) -> "Iterator[Page]":
    """The page, loaded once, with no error in its console and no request to anyone else."""
    context = browser.new_context(viewport={"width": 1200, "height": 900})
    page = context.new_page()
    problems: list[str] = []
    page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on(
        "request", lambda request: None if request.url.startswith(address) else problems.append(request.url)
    )
    page.goto(address)
    page.wait_for_selector("#best-none:not(:empty)")
    yield page
    assert problems == []
    context.close()


def ask(page: "Page", text: str, experts: ExpertSet, words: str = "") -> None:
    page.fill("#words", words)
    page.check(f"input[value={experts}]")
    page.fill("#text", text)
    page.wait_for_function("text => document.getElementById('experts').dataset.text === text", arg=text)


def shown(page: "Page") -> list[list[tuple[str, float]]]:
    """Words and probabilities on the page, mask by mask."""
    lists = page.evaluate(
        """() => [...document.querySelectorAll("#answers ol")].map((list) => [...list.children].map(
            (item) => [item.querySelector(".word").textContent, Number(item.querySelector("data").value)]))"""
    )
    return [[(word, score) for word, score in items] for items in lists]


def expected(session: XAdapterSession, text: str, experts: ExpertSet) -> list[list[tuple[str, float]]]:
    answers = session.fill_mask(text, experts=experts)
    masks = range(answers[-1].mask + 1)
    return [[(a.token, a.score) for a in answers if a.mask == mask] for mask in masks]


@pytest.mark.filterwarnings("ignore::xadapter_export.runtime.text.TruncationWarning")
def test_page_answers_50_sentences_as_python(page: "Page", python: XAdapterSession) -> None:
    texts = sentences()
    assert len(set(texts)) == 50
    took = []
    for number, text in enumerate(texts):
        experts = SETS[number % 4]
        ask(page, text, experts)
        took.append(float(page.get_attribute("#facts", "data-milliseconds") or "nan"))
        got, wanted = shown(page), expected(python, text, experts)
        assert len(got) == len(wanted)
        for ours, theirs in zip(got, wanted, strict=True):
            assert ours[0][0] == theirs[0][0]
            assert [score for _, score in ours] == pytest.approx([score for _, score in theirs], abs=1e-3)
        for other in SETS:  # each switch shows the answer of its set
            tops = ", ".join(items[0][0] for items in expected(python, text, other))
            assert page.text_content(f"#best-{other}") == tops, (text, other)
        captions = (
            [picture.caption for picture in python.retrieve(text, experts=experts)] if "v" in experts else []
        )
        assert page.locator("#pictures .caption").all_text_contents() == captions
    sys.stderr.write(f"\nanswers in {sorted(took)[25]:.1f} ms (median), {max(took):.1f} ms at most\n")


def test_both_tokenizers_are_those_of_python(page: "Page", bundle: Path) -> None:
    texts = unicode_strings(1000)
    for name in ("tokenizer.json", "clip_tokenizer.json"):
        tokenizer = Tokenizer.from_file(str(bundle / name))
        got = page.evaluate(
            """async ([name, texts]) => {
                const { exactTokenizer } = await import("./xadapter.js");
                const json = await (await fetch(`bundle/${name}`)).json();
                const tokenizer = exactTokenizer(await import("./vendor/tokenizers.min.mjs"), json);
                return texts.map((text) => tokenizer.encode(text).ids);
            }""",
            [name, texts],
        )
        wanted = [encoding.ids for encoding in tokenizer.encode_batch(texts)]
        wrong = [text for text, ours, theirs in zip(texts, got, wanted, strict=True) if ours != theirs]
        assert wrong == []
        assert len({tuple(ids) for ids in wanted}) > 800


def test_answer_among_words_and_what_cannot_be_answered(page: "Page", python: XAdapterSession) -> None:
    text = "The color of a strawberry is [MASK]."
    ask(page, text, "v", "red, green, blue")
    wanted = python.fill_mask(text, experts="v", candidates=["red", "green", "blue"])
    assert [word for word, _ in shown(page)[0]] == [answer.token for answer in wanted]
    page.fill("#words", "red, qqqq")
    page.wait_for_selector("#hint:has-text('not one word of the language model: \"qqqq\"')")
    assert page.get_attribute("#words", "aria-invalid") == "true"
    assert page.get_attribute("#text", "aria-invalid") == "false"
    assert shown(page) == []
    page.fill("#words", "")
    page.fill("#text", "no blank")
    page.wait_for_selector("#hint:has-text('[MASK]')")
    assert page.get_attribute("#text", "aria-invalid") == "true"
    assert shown(page) == []
    assert page.locator("#pictures li").count() == 0
    assert page.locator(".experts output").all_text_contents() == [""] * 4
    page.click("#insert")
    page.wait_for_selector("#text[aria-invalid=false]")
    assert page.input_value("#text").count("[MASK]") == 1


def test_thumbnails_are_those_of_the_rows(page: "Page", python: XAdapterSession) -> None:
    text = "A pencil is [MASK]."
    ask(page, text, "v")
    rows = [picture.row for picture in python.retrieve(text, experts="v")]
    tiles = page.locator(".tile")
    assert tiles.count() == len(rows)
    page.wait_for_load_state("networkidle")
    for tile, row in zip(tiles.all(), rows, strict=True):
        image = Image.open(io.BytesIO(tile.screenshot())).convert("RGB")
        middle = image.getpixel((image.width // 2, image.height // 2))
        assert isinstance(middle, tuple)
        assert max(abs(a - b) for a, b in zip(middle, color_of(row), strict=True)) < 40


def test_keyboard_and_screen_reader(page: "Page") -> None:
    page.get_by_role("textbox", name="Sentence, with [MASK]").focus()
    page.keyboard.press("ControlOrMeta+a")
    page.keyboard.type("A frog is [MASK].")
    for _ in range(20):  # from field to field, to the switches
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.name") == "experts":
            break
    assert page.evaluate("document.activeElement.name") == "experts"
    before = page.evaluate("document.activeElement.value")
    page.keyboard.press("ArrowLeft")
    assert page.evaluate("document.activeElement.value") != before
    page.get_by_role("radio", name="Pictures").check()
    page.wait_for_selector("#spoken:has-text('Pictures: ')")  # a status, so it is read out
    assert page.get_by_role("status").filter(has_text="percent").count() == 1
    assert page.get_by_role("group", name="What the language model may use").count() == 1
    assert page.get_by_role("region", name="Pictures it looked at").get_by_role("listitem").count() == 4
    assert page.locator("button:visible, input:visible, textarea:visible, select:visible").evaluate_all(
        "all => all.every((one) => one.textContent || one.labels.length)"
    )


def test_phone_reads_well_and_lives_without_storage_or_network(browser: "Browser", address: str) -> None:
    context = browser.new_context(viewport={"width": 360, "height": 740}, is_mobile=True, has_touch=True)
    page = context.new_page()
    problems: list[str] = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.add_init_script("Cache.prototype.addAll = async () => { throw new Error('no room') }")
    page.route("**/model_none.onnx?*", lambda route: route.abort())
    page.goto(address)
    page.wait_for_selector("#hint:has-text('cannot be loaded: is there a network?')")
    page.wait_for_selector("#offline:has-text('Not available offline: no room')")
    page.unroute_all()
    page.fill("#text", "A frog is [MASK].")
    page.wait_for_selector("#best-none:not(:empty)")  # the next question tried again
    assert page.text_content("#hint") == ""
    assert page.locator("#problem").is_hidden()
    assert problems == []
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    assert page.evaluate("parseFloat(getComputedStyle(document.getElementById('text')).fontSize)") >= 16
    sizes = page.locator("button, .experts label").evaluate_all("all => all.map((one) => one.offsetHeight)")
    assert min(sizes) >= 44  # CSS pixels: what a thumb hits
    context.close()


def test_works_offline_after_load(browser: "Browser", site: Path, python: XAdapterSession) -> None:
    context = browser.new_context()
    page = context.new_page()
    with make_server(site, isolated=False) as server:  # a plain static server: one thread
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        page.goto(f"http://localhost:{server.server_port}/")
        page.wait_for_selector("#offline:not(:empty)")
        assert page.evaluate("crossOriginIsolated") is False
        server.shutdown()
        thread.join()
    context.set_offline(True)
    page.reload()
    page.wait_for_selector("#best-none:not(:empty)")
    text = "The color of a flamingo is [MASK]."
    ask(page, text, "v")
    assert shown(page)[0][0][0] == python.fill_mask(text, experts="v")[0].token
    assert page.locator(".tile").count() == 4
    context.close()


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("delete globalThis.WebAssembly", "does not support WebAssembly"),
        ("WebAssembly.validate = () => false", "too old for this page"),
    ],
)
def test_browser_that_cannot_is_told_so(browser: "Browser", address: str, script: str, message: str) -> None:
    context = browser.new_context()
    page = context.new_page()
    page.add_init_script(script)
    page.goto(address)
    assert message in (page.get_by_role("alert").filter(has_text="This browser").text_content() or "")
    context.close()


def test_changed_weights_are_refused(browser: "Browser", address: str, site: Path) -> None:
    weights = bytearray((site / "bundle/onnx/model.onnx_data").read_bytes())
    weights[1000] ^= 1
    context = browser.new_context(service_workers="block")
    page = context.new_page()
    page.route("**/model.onnx_data*", lambda route: route.fulfill(body=bytes(weights)))
    page.goto(address)
    page.wait_for_selector("#problem:has-text('is not the file that the bundle was made with')")
    context.close()


def test_caption_is_text_and_never_markup(browser: "Browser", address: str, site: Path) -> None:
    hostile = '<img src=x onerror="document.title=1">'
    manifest = json.loads((site / "bundle/manifest.json").read_text())
    rows = (site / "bundle/bank.jsonl").read_text().splitlines()
    bank = "\n".join(json.dumps({"id": "x", "caption": hostile}) for _ in rows).encode()
    manifest["files"]["bank.jsonl"] = {"size_bytes": len(bank), "sha256": hashlib.sha256(bank).hexdigest()}
    context = browser.new_context(service_workers="block")
    page = context.new_page()
    page.route("**/manifest.json", lambda route: route.fulfill(json=manifest))
    page.route("**/bank.jsonl*", lambda route: route.fulfill(body=bank))
    page.goto(address)
    page.wait_for_selector("#best-none:not(:empty)")
    assert page.locator("#pictures .caption").first.text_content() == hostile
    assert page.locator("#pictures img").count() == 0
    context.close()


def footer(page: Path) -> str:
    return (page / "index.html").read_text(encoding="utf-8").partition("Made with ")[2]


def test_page_is_small_and_replaces_only_pages(site: Path, tiny: Path, tmp_path: Path) -> None:
    assert bundle_bytes(site) < 12e6
    mine, packages = tmp_path / "mine", packages_of("web", ROOT / "export" / "web")
    mine.mkdir()
    (mine / "app.js").write_text("mine as well")
    with pytest.raises(OutputExistsError, match=r"xadapter-export did not write.*xadapter-page\.txt"):
        write_page(mine, tiny, packages)
    assert [path.name for path in mine.iterdir()] == ["app.js"]
    write_page(tmp_path / "page", tiny, packages)
    with pytest.raises(MissingExtraError, match="npm packages is missing"):
        write_page(tmp_path / "page", tiny, tmp_path / "none")
    assert (tmp_path / "page/vendor/tokenizers.min.mjs").is_file()
    assert "href" not in footer(tmp_path / "page").partition("arxiv.org")[0].removesuffix('<a href="https://')
    write_page(tmp_path / "page", tiny, packages, project="https://host/me/it/")
    assert 'href="https://host/me/it"' in footer(tmp_path / "page")
    assert 'href="https://host/me/it/tree/main/docs"' in footer(tmp_path / "page")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "page"]


def test_page_shows_no_pictures_of_another_bank(tiny: Path, tmp_path: Path, python: XAdapterSession) -> None:
    for bank, error, message in (
        (builtin_folder(), ConfigError, "not the bank of the bundle"),
        (tmp_path / "mistyped", CheckpointError, "mistyped/bank.safetensors is missing"),
    ):
        with pytest.raises(error, match=message):
            write_page(tmp_path / "page", tiny, tmp_path, str(bank))
    assert list(tmp_path.iterdir()) == []
    assert python.manifest.bank
    with pytest.raises(CheckpointError, match=r"has no thumbnails\.zip"):
        bank_pictures(builtin_folder(), python.manifest.bank.sha256)


def test_busy_port_is_one_line(tmp_path: Path) -> None:
    with (
        make_server(tmp_path) as server,
        pytest.raises(ConfigError, match=f"cannot be served on this port: {server.server_port}"),
    ):
        make_server(tmp_path, server.server_port)


def test_sheets_of_a_bank_with_gaps(tmp_path: Path) -> None:
    write_sheets(tmp_path, {300: Image.new("RGB", (8, 4), "red")}, 301)
    index = json.loads((tmp_path / "pictures.json").read_text())
    assert len(index["sheets"]) == 2
    assert index["missing"] == list(range(300))
    with Image.open(tmp_path / "sheet-1.webp") as sheet:
        assert sheet.size == (128, 128)
    write_sheets(tmp_path / "none", {}, 2)
    assert json.loads((tmp_path / "none/pictures.json").read_text())["sheets"] == []


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Node example as a user has it, with its packages."""
    if shutil.which("node") is None:
        pytest.skip("Node.js is not installed")
    packages = packages_of("node", ROOT / "examples" / "node")
    root = tmp_path_factory.mktemp("node")
    for name in ("examples/node/fill_mask.mjs", "export/web/xadapter.js"):
        (root / name).parent.mkdir(parents=True)
        shutil.copyfile(ROOT / name, root / name)
    (root / "export/web/package.json").write_text('{"type": "module"}')
    (root / "examples/node/node_modules").symlink_to(packages)
    return root / "examples/node/fill_mask.mjs"


def run_node(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["node", *arguments], capture_output=True, text=True, check=False)


@pytest.mark.filterwarnings("ignore::xadapter_export.runtime.text.TruncationWarning")
@pytest.mark.parametrize("experts", SETS)
def test_node_answers_as_python(
    node: Path, bundle: Path, python: XAdapterSession, experts: ExpertSet
) -> None:
    texts = sentences()
    done = run_node(node, bundle, *texts, "--experts", experts, "--json")
    assert done.returncode == 0, done.stderr
    lines: list[dict[str, Any]] = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line["text"] for line in lines] == texts
    for line in lines:
        for ours, theirs in zip(line["answers"], expected(python, line["text"], experts), strict=True):
            assert ours[0]["word"] == theirs[0][0]
            assert [a["score"] for a in ours] == pytest.approx([score for _, score in theirs], abs=1e-3)
        if "v" in experts:
            rows = [picture.row for picture in python.retrieve(line["text"], experts=experts)]
            assert [picture["row"] for picture in line["pictures"]] == rows


def test_node_answers_in_int8_as_python(node: Path, tmp_path: Path) -> None:
    folder = export("builtin", tmp_path / "bundle", "t", precisions=("int8",), targets=("cpu",)).folder
    texts = sentences()[:44]
    done = run_node(node, folder, *texts, "--json")
    assert done.returncode == 0, done.stderr
    lines: list[dict[str, Any]] = [json.loads(line) for line in done.stdout.splitlines()]
    session = XAdapterSession.load(folder, variant="cpu-int8")
    for text, line in zip(texts, lines, strict=True):
        ours, theirs = line["answers"][0][0], session.fill_mask(text)[0]
        assert ours["word"] == theirs.token
        assert ours["score"] == pytest.approx(theirs.score, abs=0.02)


@pytest.mark.parametrize("path", ["../model.onnx", "/model.onnx", "a\\..\\model.onnx", "C:/model.onnx"])
def test_node_refuses_a_path_that_leaves_the_bundle(
    node: Path, tiny: Path, tmp_path: Path, path: str
) -> None:
    folder = Path(shutil.copytree(tiny, tmp_path / "bundle"))
    manifest = json.loads((folder / "manifest.json").read_text())
    for variant in manifest["variants"]:
        variant["file"] = path
    manifest["files"][path] = {"size_bytes": 1, "sha256": "0" * 64}
    rewrite_manifest(folder, variants=manifest["variants"], files=manifest["files"])
    done = run_node(node, folder, "the color of a banana is [MASK].")
    assert done.returncode == 1
    assert done.stderr.startswith(f"Error: a path leaves the bundle: {path}"), done.stderr


def test_node_says_clearly_what_is_wrong(node: Path, bundle: Path, broken: Path) -> None:
    assert "has no expert set x" in run_node(node, bundle, "A [MASK].", "--experts", "x").stderr
    assert "write [MASK] where the word should go" in run_node(node, bundle, "nothing").stderr
    tokenizer = broken / "tokenizer.json"
    tokenizer.write_bytes(tokenizer.read_bytes().replace(b"banana", b"bananb"))
    assert "tokenizer.json is not the file" in run_node(node, broken, "A [MASK].").stderr
    unknown = run_node(node, bundle, "A [MASK].", "--expert", "v")
    assert (unknown.returncode, unknown.stderr.count("\n")) == (2, 1), unknown.stderr
    assert "'--expert'" in unknown.stderr
    assert run_node(node, node, "A [MASK].").stderr.startswith("Error: cannot read ")
    (broken / "manifest.json").write_text("{}")
    assert "format version undefined" in run_node(node, broken, "A [MASK].").stderr


def test_split_bundle_is_refused(node: Path, broken: Path, tmp_path: Path) -> None:
    manifest = json.loads((broken / "manifest.json").read_text())
    graph: dict[str, list[str]] = {"inputs": [], "outputs": []}
    manifest["expert_sets"]["vt"]["split"] = {"query": graph, "answer": graph}
    for variant in manifest["variants"]:
        if variant["expert_set"] == "vt":
            variant["query_file"] = variant["file"]
    rewrite_manifest(broken, **manifest)
    with pytest.raises(UnsupportedError, match=r"split into two.*got vt.*without --split"):
        write_page(tmp_path / "page", broken, tmp_path)
    done = run_node(node, broken, "a banana is [MASK].")
    assert (done.returncode, done.stderr.count("\n")) == (1, 1), done.stderr
    assert "expert set vt is split into two graphs" in done.stderr


def test_weights_are_read_again_after_a_failure_and_then_let_go(node: Path, tiny: Path) -> None:
    """Four sets on one file of weights: read twice, as the first time fails, and held until all are open."""
    module = node.parents[2] / "export/web/xadapter.js"
    program = """
        const [module, bundle] = process.argv.slice(1);
        const { XAdapterSession } = await import(module);
        const { readFile } = await import("node:fs/promises");
        const shared = "onnx/model.onnx_data";
        let reads = 0, weights;
        const read = async (path) => {
            let bytes = new Uint8Array(await readFile(`${bundle}/${path}`));
            if (path === "manifest.json") {
                const manifest = JSON.parse(new TextDecoder().decode(bytes));
                for (const variant of manifest.variants) variant.weight_files = [shared];
                return new TextEncoder().encode(JSON.stringify(manifest));
            }
            if (path === shared && ++reads === 1) throw new Error("offline");
            if (path === shared) weights = new WeakRef(bytes);
            return bytes;
        };
        const ort = { InferenceSession: { create: async () => ({}) } };
        const session = await XAdapterSession.load({ ort, tokenizers: { Tokenizer: class {} }, read });
        const held = async () => {
            await new Promise((resolve) => setTimeout(resolve));
            gc();
            return weights?.deref() !== undefined;
        };
        const said = [await session.open("vt").catch((error) => error.message)];
        for (const experts of ["vt", "v", "t"]) await session.open(experts);
        said.push(await held());
        await session.open("none");
        said.push(await held(), reads);
        console.log(JSON.stringify(said));
    """
    done = run_node("--expose-gc", "--input-type=module", "-e", program, module, tiny)
    assert done.stdout == '["offline",true,false,2]\n', done.stderr


@pytest.mark.skipif(shutil.which("node") is None, reason="Node.js is not installed")
def test_service_worker_keeps_what_changed_and_never_holds_up_the_page() -> None:
    """A file with and without headers, and a browser that has no room: what is kept after each answer."""
    program = """
        const { readFileSync } = require("node:fs");
        let handle, fresh, room = true, kept = null;
        globalThis.location = { origin: "http://x" };
        const addEventListener = (name, listener) => { if (name === "fetch") handle = listener; };
        globalThis.self = { addEventListener };
        const full = () => { throw Object.assign(new Error(), { name: "QuotaExceededError" }); };
        const cache = {
            match: async () => kept?.clone(),
            delete: async () => { kept = null; },
            put: async (request, response) => { if (room) kept = response; else full(); },
        };
        let storage = async () => cache;
        globalThis.caches = { open: () => storage() };
        globalThis.fetch = async () => fresh;
        (0, eval)(readFileSync(process.argv[1], "utf-8"));
        async function ask(body, headers) {
            fresh = new Response(body, { headers });
            let answer;
            const after = [];
            const request = { method: "GET", url: "http://x/app.js" };
            const respondWith = (got) => { answer = got; };
            handle({ request, respondWith, waitUntil: (work) => after.push(work) });
            const text = await (await answer).text();
            await Promise.all(after);
            return [text, kept && await kept.clone().text()];
        }
        (async () => {
            const said = [await ask("1", {}), await ask("2", {}), await ask("3", { etag: "a" })];
            said.push(await ask("4", { etag: "a" }), await ask("5", { etag: "b" }));
            room = false;
            said.push(await ask("6", { etag: "c" }));
            storage = full;
            said.push(await ask("7", {}));
            console.log(JSON.stringify(said));
        })();
    """
    done = run_node("-e", program, ROOT / "export/web/offline.js")
    assert done.stderr == ""
    texts = [["1", "1"], ["2", "2"], ["3", "3"], ["4", "3"], ["5", "5"], ["6", None], ["7", None]]
    assert json.loads(done.stdout) == texts
