"""Bundles and checkpoints on the Hub: huggingface_hub's cache, and its protocol, served on this machine."""

import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from click.testing import CliRunner
from huggingface_hub import constants

from docs.cli_reference import COMMANDS
from tests.bundle.test_signature import write_key
from tests.documents import code_blocks
from tests.hub_server import FakeHub, Repo, serving
from tests.tiny_bundle import rehash, write_bundle
from xadapter_export import XAdapterSession
from xadapter_export.bundle.folder import SIGNATURE_NAME, read_bundle
from xadapter_export.bundle.signature import sign_bundle
from xadapter_export.cli.bank import bank
from xadapter_export.cli.evaluate import evaluate
from xadapter_export.cli.inspect import inspect
from xadapter_export.cli.parity import parity
from xadapter_export.cli.push import push
from xadapter_export.cli.run import run
from xadapter_export.errors import BundleError, ConfigError, HashMismatchError, HubError, SignatureError
from xadapter_export.model.builtin import builtin_folder

if TYPE_CHECKING:
    from xadapter_export.exporters.pipeline import ExportResult
    from xadapter_export.model.x_adapter_model import XAdapterModel

pytestmark = pytest.mark.filterwarnings(
    "ignore:Use 'content=<...>' to upload raw bytes:DeprecationWarning"  # so huggingface_hub uploads
)

NAME = "fruit/colors"
TEXT = "the color of a banana is [MASK]."


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """A Hub of this test alone, with an empty cache; huggingface_hub knows no other."""
    with serving() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 8)  # what is cut is kept up to whole chunks
        monkeypatch.setattr(time, "sleep", lambda _seconds: None)  # the client waits before it tries again
        monkeypatch.delenv("HF_TOKEN", raising=False)
        yield server


@pytest.fixture
def pulled(hub: FakeHub, tiny: Path) -> Path:
    """The folder of a snapshot in the cache, with the whole tiny bundle."""
    hub.add(NAME, tiny)
    return read_bundle(NAME).folder


def go_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


def test_a_bundle_loads_by_its_name_and_answers_as_its_folder(hub: FakeHub, tiny: Path) -> None:
    hub.add(NAME, tiny)
    session = XAdapterSession.load(NAME)
    assert session.fill_mask(TEXT) == XAdapterSession.load(tiny).fill_mask(TEXT)
    assert session.bundle.file("onnx/model.onnx").is_symlink()


def test_only_what_is_needed_is_downloaded(hub: FakeHub, tiny: Path) -> None:
    hub.add(NAME, tiny)
    session = XAdapterSession.load(NAME, experts="v")
    needed = {"manifest.json", "tokenizer.json", "clip_tokenizer.json", "bank.jsonl", "reference.npz"}
    assert set(hub.downloads()) == needed | {"onnx/model_v.onnx", "onnx/model_v.onnx_data"}
    session.fill_mask(TEXT, experts="none")
    assert set(hub.downloads()[7:]) == {"onnx/model_none.onnx", "onnx/model_none.onnx_data"}


def test_inspect_without_verification_downloads_the_manifest_alone(hub: FakeHub, tiny: Path) -> None:
    hub.add(NAME, tiny)
    done = CliRunner().invoke(inspect, [NAME, "--no-verify"])
    assert done.exit_code == 0, done.output
    assert hub.downloads() == ["manifest.json"]


def test_commands_take_a_name(hub: FakeHub, tiny: Path) -> None:
    hub.add(NAME, tiny)
    assert "yellow" in CliRunner().invoke(run, [NAME, TEXT]).output
    assert "hashes verified" in CliRunner().invoke(inspect, [NAME]).output
    assert "parity: passed" in CliRunner().invoke(parity, [NAME]).output


def test_an_evaluation_takes_a_name(hub: FakeHub, tiny: Path, tmp_path: Path) -> None:
    first = hub.add(NAME, tiny)
    hub.add(NAME, write_bundle(tmp_path / "other", task="text-classification"))
    text = tmp_path / "text.txt"
    text.write_text("the banana is yellow\n", encoding="utf-8")
    there = CliRunner().invoke(evaluate, ["mlm", NAME, "--revision", first, "--data", str(text), "--json"])
    assert there.exit_code == 0, there.output
    assert json.loads(there.stdout)["model"] == NAME
    here = CliRunner().invoke(evaluate, ["mlm", str(tiny), "--data", str(text), "--json"])
    assert json.loads(there.stdout)["rows"] == json.loads(here.stdout)["rows"]
    refused = CliRunner().invoke(evaluate, ["mlm", str(tiny), "--revision", "main", "--data", str(text)])
    assert "a revision is for repositories on the Hub" in refused.output


@pytest.mark.long
def test_a_swap_and_a_search_take_names(
    hub: FakeHub, tiny_model: "XAdapterModel", tiny_export: "ExportResult", tmp_path: Path
) -> None:
    tiny_model.save_pretrained(tmp_path / "checkpoint")
    hub.add(NAME, tiny_export.folder)
    hub.add("fruit/small", tmp_path / "checkpoint")
    asked = ["swap", NAME, "fruit/small", "--assume-clip"]
    done = CliRunner().invoke(bank, [*asked, "-o", str(tmp_path / "swapped")])
    assert done.exit_code == 0, done.output
    assert read_bundle(tmp_path / "swapped").manifest.variants == read_bundle(NAME).manifest.variants
    refused = CliRunner().invoke(bank, asked)
    assert "a bundle on the Hub is not replaced: fruit/colors; write the new one with -o" in refused.output
    hub.add("fruit/checkpoint", builtin_folder())
    found, wanted = (
        CliRunner().invoke(bank, ["search", name, "a banana", "--json"])
        for name in ("fruit/checkpoint", "builtin")
    )
    assert found.exit_code == 0, found.output
    assert found.stdout == wanted.stdout


def test_later_files_belong_to_the_commit_of_the_manifest(hub: FakeHub, tiny: Path, tmp_path: Path) -> None:
    hub.add(NAME, tiny)
    session = XAdapterSession.load(NAME, experts="v")
    hub.add(NAME, write_bundle(tmp_path / "other", candidates=("yellow", "red")))
    assert session.fill_mask(TEXT, experts="t") == XAdapterSession.load(tiny, experts="t").fill_mask(TEXT)


def test_a_revision_is_a_branch_or_a_commit(hub: FakeHub, tiny: Path, tmp_path: Path) -> None:
    first = hub.add(NAME, tiny)
    hub.add(NAME, write_bundle(tmp_path / "other", task="text-classification"))
    assert XAdapterSession.load(NAME).manifest.task == "text-classification"
    assert XAdapterSession.load(NAME, revision=first).manifest.task == "fill-mask"
    assert "yellow" in CliRunner().invoke(run, [NAME, TEXT, "--revision", first]).output


def test_what_is_in_the_cache_loads_offline(
    hub: FakeHub, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add(NAME, tiny)
    online = XAdapterSession.load(NAME, experts="v").fill_mask(TEXT)
    go_offline(monkeypatch)
    asked = len(hub.requests)
    session = XAdapterSession.load(NAME, experts="v")
    assert session.fill_mask(TEXT) == online
    with pytest.raises(HubError, match=r"HF_HUB_OFFLINE is set, and the cache .*fruit/colors@[0-9a-f]{40}"):
        session.fill_mask(TEXT, experts="t")
    assert len(hub.requests) == asked


def test_the_environment_is_read(hub: FakeHub, tiny: Path, tmp_path: Path) -> None:
    """The same in processes of their own, with nothing patched."""
    hub.add(NAME, tiny)
    code = f"from xadapter_export.cli.run import run; run(['{NAME}', '{TEXT}'])"
    environment = os.environ | {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home")}
    for more in ({}, {"HF_HUB_OFFLINE": "1", "HF_ENDPOINT": "http://127.0.0.1:9"}):
        done = subprocess.run(
            [sys.executable, "-c", code],
            env=environment | more,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert "yellow" in done.stdout
    assert list((tmp_path / "home/hub/models--fruit--colors/blobs").iterdir())


def test_the_cache_is_used_where_the_hub_is_down(hub: FakeHub, tiny: Path) -> None:
    hub.add(NAME, tiny)
    XAdapterSession.load(NAME)
    hub.repos.clear()
    hub.failures.update({NAME: 99})
    assert XAdapterSession.load(NAME, revision=read_name(hub)).fill_mask(TEXT)


def read_name(hub: FakeHub) -> str:
    """Return the commit that the cache has."""
    return next(
        path.split("/")[4] for _, path, _ in hub.requests if "/resolve/" in path and "main" not in path
    )


@pytest.mark.parametrize(
    ("facts", "revision", "message"),
    [
        (None, None, "neither a folder nor a Hub repository of this name.*: fruit/colors; check the name"),
        ({}, "v9", "no such revision: fruit/colors@v9"),
        ({"gated": True}, None, "is gated: fruit/colors; ask for access on its page, then log in with"),
    ],
)
def test_what_the_hub_does_not_give_is_one_clear_line(
    hub: FakeHub, tiny: Path, facts: dict[str, bool] | None, revision: str | None, message: str
) -> None:
    if facts is not None:
        hub.add(NAME, tiny, **facts)
    with pytest.raises(HubError, match=message):
        XAdapterSession.load(NAME, revision=revision)
    options = [] if revision is None else ["--revision", revision]
    done = CliRunner().invoke(run, [NAME, TEXT, *options])
    assert done.exit_code == 1
    assert done.stderr.startswith("Error: ")
    assert done.stderr.count("\n") == 1, done.stderr


def test_a_repository_of_something_else_is_one_clear_line(hub: FakeHub, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text("{}")
    hub.add(NAME, tmp_path / "model")
    with pytest.raises(HubError, match=r"lacks a file: fruit/colors \(expected manifest\.json\)"):
        XAdapterSession.load(NAME)


def test_no_hub_at_all_is_one_clear_line(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", "http://127.0.0.1:9/{repo_id}/{filename}")
    with pytest.raises(HubError, match="the Hub cannot be reached, and the cache does not have"):
        XAdapterSession.load(NAME)


def test_a_folder_wins_over_a_name_and_has_no_revision(
    hub: FakeHub, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(tiny, tmp_path / NAME)
    monkeypatch.chdir(tmp_path)
    assert XAdapterSession.load(NAME).fill_mask(TEXT)
    with pytest.raises(ConfigError, match="revision is for repositories on the Hub: fruit/colors"):
        XAdapterSession.load(NAME, revision="main")
    with pytest.raises(BundleError, match="this is not a bundle: no/folder"):
        XAdapterSession.load(Path("no/folder"))
    assert hub.requests == []


def test_a_download_that_is_cut_short_is_resumed(hub: FakeHub, tiny: Path) -> None:
    hub.add(NAME, tiny)
    hub.cuts["onnx/model_v.onnx_data"] = 2
    XAdapterSession.load(NAME, experts="v")
    ranges = [r for m, p, r in hub.requests if p.endswith("model_v.onnx_data") and m == "GET"]
    size = (tiny / "onnx/model_v.onnx_data").stat().st_size
    assert ranges == [None, f"bytes={size // 2}-", f"bytes={size // 2 + (size - size // 2) // 2}-"]


def test_a_download_that_fails_is_one_clear_line_and_what_arrived_is_kept(hub: FakeHub, tiny: Path) -> None:
    hub.add(NAME, tiny)
    hub.cuts["onnx/model_v.onnx_data"] = 99
    with pytest.raises(HubError, match=r"the download from the Hub failed: fruit/colors.*run it again"):
        XAdapterSession.load(NAME, experts="v")
    hub.cuts.clear()
    arrived = len(hub.downloads())
    assert XAdapterSession.load(NAME, experts="v").fill_mask(TEXT)
    # The record that the graph is checked with comes after the graph.
    assert set(hub.downloads()[arrived:]) == {"onnx/model_v.onnx_data", "reference.npz"}


def test_a_busy_hub_is_asked_again(hub: FakeHub, tiny: Path) -> None:
    hub.add(NAME, tiny)
    hub.failures[f"/api/models/{NAME}/tree/{hub.repos[NAME].branches['main']}"] = 2
    assert XAdapterSession.load(NAME).fill_mask(TEXT)


def test_a_blob_that_was_damaged_is_one_clear_line(pulled: Path) -> None:
    weights = (pulled / "onnx/model.onnx_data").resolve()
    data = weights.read_bytes()
    weights.write_bytes(data[:-9])
    with pytest.raises(BundleError, match=r"wrong size: .*model\.onnx_data .*delete .*models--fruit--colors"):
        XAdapterSession.load(NAME)
    weights.write_bytes(bytes([data[0] ^ 1]) + data[1:])
    with pytest.raises(HashMismatchError, match=r"has changed: .*model\.onnx_data"):
        XAdapterSession.load(NAME)


def test_a_repository_that_lies_about_a_hash_is_refused(hub: FakeHub, broken: Path) -> None:
    (broken / "tokenizer.json").write_bytes(
        (broken / "tokenizer.json").read_bytes().replace(b"lime", b"mile")
    )
    hub.add(NAME, broken)
    with pytest.raises(HashMismatchError, match=r"has changed: .*tokenizer\.json"):
        XAdapterSession.load(NAME)


def test_the_folder_of_a_snapshot_is_a_bundle(pulled: Path, tiny: Path) -> None:
    assert (pulled / "manifest.json").is_symlink()
    assert read_bundle(pulled).manifest == read_bundle(tiny).manifest
    assert XAdapterSession.load(pulled).fill_mask(TEXT) == XAdapterSession.load(tiny).fill_mask(TEXT)
    assert "parity: passed" in CliRunner().invoke(parity, [str(pulled)]).output


@pytest.mark.parametrize(
    "target",
    [
        "../../../secret",
        "../../../models--other--repo/blobs/secret",
        "../../blobs/inner/secret",
        "../../../../outside",
        "../../blobs/away",
    ],
)
def test_a_link_that_leaves_the_cache_of_the_snapshot_is_refused(pulled: Path, target: str) -> None:
    link = pulled / "bank.jsonl"
    data = link.read_bytes()
    blobs = pulled.parent.parent / "blobs"
    (blobs / "away").symlink_to("../../../outside")
    place = pulled / target
    place = blobs.parent.parent.parent / "outside" if target.endswith("away") else place
    place = Path(os.path.normpath(place))
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_bytes(data)
    link.unlink()
    link.symlink_to(target)
    assert link.read_bytes() == data
    with pytest.raises(BundleError, match=r"outside its folder: .*bank\.jsonl"):
        read_bundle(pulled)


def test_blobs_beside_a_folder_that_is_no_snapshot_are_refused(broken: Path, tmp_path: Path) -> None:
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    folder = Path(shutil.move(broken, tmp_path / "models" / "copy"))
    shutil.move(folder / "bank.jsonl", blobs / "bank")
    (folder / "bank.jsonl").symlink_to(blobs / "bank")
    with pytest.raises(BundleError, match="outside its folder"):
        read_bundle(folder)


@pytest.fixture
def logged_in(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:  # after it
    monkeypatch.setenv("HF_TOKEN", "hf_test")


@pytest.mark.usefixtures("logged_in")
def test_a_bundle_is_pushed_and_pulled(hub: FakeHub, tiny: Path) -> None:
    done = CliRunner().invoke(push, [str(tiny), NAME, "--private", "--message", "Colors of fruit"])
    assert done.exit_code == 0, done.output
    repo = hub.repos[NAME]
    assert done.stdout == f"{hub.url}/{NAME}/commit/{repo.branches['main']}\n"
    assert (repo.private, repo.messages[-1]) == (True, "Colors of fruit")
    assert set(repo.commits[repo.branches["main"]]) == {
        ".gitattributes", "manifest.json", *read_bundle(tiny).manifest.files
    }  # fmt: skip
    assert len(hub.uploads) > 1  # some by git-lfs' protocol
    assert XAdapterSession.load(NAME).fill_mask(TEXT) == XAdapterSession.load(tiny).fill_mask(TEXT)


@pytest.mark.usefixtures("logged_in")
def test_a_signed_bundle_is_verified_from_the_hub(hub: FakeHub, broken: Path, tmp_path: Path) -> None:
    write_key(tmp_path, "mine")
    sign_bundle(broken, tmp_path / "mine.pem")
    read_bundle(broken).push_to_hub(NAME)
    session = XAdapterSession.load(NAME, verify_key=tmp_path / "mine.pub", experts="v")
    assert session.fill_mask(TEXT) == XAdapterSession.load(broken, experts="v").fill_mask(TEXT)
    assert set(read_bundle(broken).manifest.files) < set(hub.downloads())
    shown = CliRunner().invoke(inspect, [NAME, "--verify-key", str(tmp_path / "mine.pub")])
    assert "verified, with key with SHA-256" in shown.stdout
    (broken / "bank.jsonl").write_text("".join((broken / "bank.jsonl").read_text().splitlines(True)[::-1]))
    rehash(broken)
    refused = CliRunner().invoke(push, [str(broken), NAME])
    assert refused.stderr.startswith("Error: a file was changed after signing")
    (broken / SIGNATURE_NAME).unlink()
    read_bundle(broken).push_to_hub(NAME)
    with pytest.raises(SignatureError, match="the bundle is not signed"):
        XAdapterSession.load(NAME, verify_key=tmp_path / "mine.pub")


@pytest.mark.usefixtures("logged_in")
def test_a_push_replaces_what_was_there_in_one_commit(hub: FakeHub, tiny: Path, tmp_path: Path) -> None:
    read_bundle(tiny).push_to_hub(NAME)
    smaller = write_bundle(tmp_path / "smaller", sets=("v",))
    (smaller / "notes.txt").write_text("mine")  # no file of the bundle
    read_bundle(smaller).push_to_hub(NAME)
    repo = hub.repos[NAME]
    assert len(repo.messages) == 3
    assert set(repo.commits[repo.branches["main"]]) == {
        ".gitattributes", "manifest.json", *read_bundle(smaller).manifest.files
    }  # fmt: skip
    assert XAdapterSession.load(NAME).experts == "v"


@pytest.mark.usefixtures("logged_in")
def test_a_push_to_a_branch_leaves_main_alone(hub: FakeHub, tiny: Path) -> None:
    for _ in range(2):
        assert CliRunner().invoke(push, [str(tiny), NAME, "--revision", "next"]).exit_code == 0
    repo = hub.repos[NAME]
    assert set(repo.commits[repo.branches["main"]]) == {".gitattributes"}
    assert XAdapterSession.load(NAME, revision="next").fill_mask(TEXT)


def test_a_push_without_a_login_is_one_clear_line(hub: FakeHub, tiny: Path) -> None:
    done = CliRunner().invoke(push, [str(tiny), NAME])
    assert done.exit_code == 1
    assert done.stderr.startswith(f"Error: the upload to the Hub was refused: {NAME}")
    assert "hf auth login" in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.usefixtures("logged_in")
def test_a_push_that_fails_commits_nothing(hub: FakeHub, tiny: Path) -> None:
    hub.repos[NAME] = Repo()
    hub.repos[NAME].commit("main", {}, "initial commit")
    hub.failures[f"/api/models/{NAME}/commit/main"] = 9
    with pytest.raises(HubError, match=r"upload to the Hub failed: fruit/colors .*run it again"):
        read_bundle(tiny).push_to_hub(NAME)
    assert hub.repos[NAME].messages == ["initial commit"]
    hub.failures.clear()
    read_bundle(tiny).push_to_hub(NAME)
    uploads = [path for method, path, _ in hub.requests if method == "PUT"]
    assert len(uploads) == len(set(uploads)) > 1  # what had arrived was not sent again


def test_a_broken_bundle_is_not_pushed(hub: FakeHub, broken: Path) -> None:
    (broken / "tokenizer.json").write_bytes(b"{}")
    rehash(broken)
    files = json.loads((broken / "manifest.json").read_text())["files"]
    (broken / "tokenizer.json").write_bytes(b"[]")
    assert files["tokenizer.json"]["size_bytes"] == 2
    done = CliRunner().invoke(push, [str(broken), NAME])
    assert (done.exit_code, hub.requests) == (1, [])
    assert "has changed" in done.stderr


def test_a_folder_that_is_neither_is_not_pushed(hub: FakeHub, tmp_path: Path) -> None:
    done = CliRunner().invoke(push, [str(tmp_path), NAME])
    assert (done.exit_code, hub.requests) == (1, [])
    assert "xadapter.json is missing" in done.stderr


@pytest.mark.usefixtures("logged_in")
def test_the_guide_runs_as_it_is_written(
    hub: FakeHub, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(tiny, tmp_path / "bundle")
    monkeypatch.chdir(tmp_path)
    upload, download = code_blocks("hub.md", "console")
    push_it, load_it = code_blocks("hub.md", "python")

    def run_lines(block: str) -> None:
        for line in block.splitlines():
            program, *arguments = shlex.split(line)
            if program != "hf":  # the log-in: here a token in the environment
                done = CliRunner().invoke(COMMANDS[program], arguments)
                assert done.exit_code == 0, done.output

    run_lines(upload)
    assert set(hub.repos["my-name/colors"].branches) == {"main", "larger"}
    exec(push_it, {})
    run_lines(download)
    loaded: dict[str, object] = {}
    exec(load_it, loaded)
    assert isinstance(loaded["session"], XAdapterSession)
    assert type(loaded["model"]).__name__ == "XAdapterModel"


@pytest.mark.usefixtures("logged_in")
def test_a_checkpoint_is_pushed_and_pulled(hub: FakeHub, tmp_path: Path) -> None:
    from xadapter_export import XAdapterModel
    from xadapter_export.errors import CheckpointError

    model = XAdapterModel.from_pretrained("builtin")
    model.push_to_hub(NAME, self_contained=True, message="The built-in one")
    assert hub.repos[NAME].messages[-1] == "The built-in one"
    found = XAdapterModel.from_pretrained(NAME)
    for name, tensor in model.trained_state().items():
        assert tensor.equal(found.trained_state()[name]), name
    assert found.calibration == model.calibration
    model.save_pretrained(tmp_path / "checkpoint")
    assert CliRunner().invoke(push, [str(tmp_path / "checkpoint"), "fruit/other"]).exit_code == 0
    assert "xadapter.json" in hub.repos["fruit/other"].commits[hub.repos["fruit/other"].branches["main"]]
    with pytest.raises(CheckpointError, match="neither a folder nor a Hub repository of this name"):
        XAdapterModel.from_pretrained("fruit/nothing")
    with pytest.raises(HubError, match="no such revision: fruit/colors@v2"):
        XAdapterModel.from_pretrained(NAME, revision="v2")
