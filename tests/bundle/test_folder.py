import errno
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from tests.tiny_bundle import rehash, rewrite_manifest, write_bundle
from xadapter_export.bundle import folder as folder_module
from xadapter_export.bundle import read_bundle, staged_folder, staging
from xadapter_export.bundle.pictures import read_pictures
from xadapter_export.errors import (
    BundleError,
    ConfigError,
    HashMismatchError,
    OutputExistsError,
    OutputWriteError,
)


def write(path: Path, text: str = "new") -> None:
    with staged_folder(path, force=True) as staged:
        (staged / "manifest.json").write_text(text)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_folder_appears_whole_and_alone(tmp_path: Path) -> None:
    with staged_folder(tmp_path / "a" / "out") as staged:
        assert not (tmp_path / "a" / "out").exists()
        (staged.path / "sub").mkdir()
        (staged / "sub").joinpath("x").write_text("1")
    assert names(tmp_path / "a") == ["out"]
    assert (tmp_path / "a/out/sub/x").read_text() == "1"


@pytest.mark.parametrize("stop", [KeyboardInterrupt, RuntimeError, SystemExit])
def test_what_ends_early_leaves_nothing_behind(tmp_path: Path, stop: type[BaseException]) -> None:
    with pytest.raises(stop, match="now"), staged_folder(tmp_path / "a" / "b" / "out") as staged:
        (staged / "x").write_text("1")
        raise stop("now")
    assert names(tmp_path) == []


def test_what_ends_early_leaves_the_old_folder_alone(tmp_path: Path) -> None:
    write(tmp_path / "out", "old")
    with pytest.raises(KeyboardInterrupt, match="now"), staged_folder(tmp_path / "out", force=True):
        raise KeyboardInterrupt("now")
    assert names(tmp_path) == ["out"]
    assert (tmp_path / "out/manifest.json").read_text() == "old"


def test_a_folder_in_the_way_is_an_error_before_any_work(tmp_path: Path) -> None:
    write(tmp_path / "out", "old")
    with (
        pytest.raises(OutputExistsError, match=r"output path already exists: .*out; .*--force"),
        staged_folder(tmp_path / "out"),
    ):
        pytest.fail("the block was entered")


def test_force_replaces_a_bundle(tmp_path: Path) -> None:
    write(tmp_path / "out", "old")
    write(tmp_path / "out", "new")
    assert names(tmp_path) == ["out"]
    assert (tmp_path / "out/manifest.json").read_text() == "new"


def test_force_never_deletes_what_is_no_bundle(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("years")
    with pytest.raises(OutputExistsError, match=r"xadapter-export did not write.*manifest\.json"):
        write(tmp_path / "out")
    assert (tmp_path / "out" / "thesis.txt").read_text() == "years"


def test_force_never_deletes_a_file(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("years")
    with pytest.raises(FileExistsError, match="xadapter-export did not write"):
        write(tmp_path / "out")
    assert (tmp_path / "out").read_text() == "years"


def test_the_old_folder_comes_back_if_the_swap_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "out", "old")
    rename = Path.rename

    def fail_on_the_new_one(path: Path, target: Path) -> Path:
        if path.suffix == ".tmp":
            raise KeyboardInterrupt("in between")
        return rename(path, target)

    monkeypatch.setattr(staging, "_exchange", lambda *_: False)  # as outside of Linux
    monkeypatch.setattr(Path, "rename", fail_on_the_new_one)
    with pytest.raises(KeyboardInterrupt, match="in between"):
        write(tmp_path / "out", "new")
    assert names(tmp_path) == ["out"]
    assert (tmp_path / "out/manifest.json").read_text() == "old"

    def fail_on_the_second(path: Path, target: Path) -> Path:
        if path.suffix == ".old":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return fail_on_the_new_one(path, target)

    monkeypatch.setattr(Path, "rename", fail_on_the_second)
    with pytest.raises(
        OutputWriteError, match=r"and the old one cannot be moved back: .*; rename .*\.old to out"
    ):
        write(tmp_path / "out", "new")
    assert [(path / "manifest.json").read_text() for path in tmp_path.iterdir()] == ["old"]


KILLED = """
import sys, time
from xadapter_export.bundle import staged_folder
with staged_folder(sys.argv[1], force=True) as staged:
    (staged / "manifest.json").write_text("half")
    print("writing", flush=True)
    time.sleep(600)
"""


def start_writer(final: Path) -> "subprocess.Popen[bytes]":
    """Start a process that has begun to write a folder."""
    writer = subprocess.Popen([sys.executable, "-c", KILLED, str(final)], stdout=subprocess.PIPE)
    assert writer.stdout is not None
    assert writer.stdout.readline() == b"writing\n"
    return writer


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such locks")
def test_what_a_killed_run_left_is_removed_by_the_next_one_alone(tmp_path: Path) -> None:
    foreign = (".out.1234abcd.tmp", ".out.1234abcd.xad.tmp.bak", ".other.1234abcd.xad.tmp", ".out.x.xad.tmp")
    for name in foreign:
        (tmp_path / name).mkdir()
    (tmp_path / ".out.1234abcd.xad.tmp").symlink_to(tmp_path / foreign[0])
    write(tmp_path / "out", "old")
    dead, alive = start_writer(tmp_path / "out"), start_writer(tmp_path / "out")
    dead.kill()
    dead.communicate()
    kept = {"out", ".out.1234abcd.xad.tmp", *foreign}
    assert len(set(names(tmp_path)) - kept) == 2
    write(tmp_path / "out", "new")
    assert len(set(names(tmp_path)) - kept) == 1  # of the one that is still writing
    alive.kill()
    alive.communicate()
    write(tmp_path / "out", "newer")
    assert set(names(tmp_path)) == kept
    assert (tmp_path / "out/manifest.json").read_text() == "newer"


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such locks")
def test_an_old_folder_that_a_killed_run_had_moved_aside_comes_back(tmp_path: Path) -> None:
    write(tmp_path / "out", "old")
    (tmp_path / "out").rename(tmp_path / ".out.0123abcd.xad.old")  # killed between two renames
    with pytest.raises(OutputExistsError), staged_folder(tmp_path / "out"):
        pytest.fail("the block was entered")
    assert (tmp_path / "out/manifest.json").read_text() == "old"
    assert names(tmp_path) == ["out"]


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux exchanges two folders in one step")
def test_a_reader_finds_a_bundle_at_any_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "out", "old")
    monkeypatch.setattr(Path, "rename", lambda *_: pytest.fail("nothing is there for a moment"))
    write(tmp_path / "out", "new")
    assert names(tmp_path) == ["out"]
    assert (tmp_path / "out/manifest.json").read_text() == "new"


def test_someone_else_may_win_the_race(tmp_path: Path) -> None:
    with (
        pytest.raises(OutputExistsError, match="output path already exists"),
        staged_folder(tmp_path / "out"),
    ):
        thread = threading.Thread(target=write, args=(tmp_path / "out", "first"))
        thread.start()
        thread.join()
    assert (tmp_path / "out/manifest.json").read_text() == "first"


def test_a_rejected_folder_is_kept_aside_and_replaced_by_the_next(tmp_path: Path) -> None:
    for text in ("one", "two"):
        with (
            pytest.raises(RuntimeError, match="failed its proof"),
            staged_folder(tmp_path / "out") as staged,
        ):
            (staged / "manifest.json").write_text(text)
            assert staged.keep_as_rejected() == tmp_path.resolve() / "out.rejected"
            raise RuntimeError("failed its proof")
    assert names(tmp_path) == ["out.rejected"]
    assert (tmp_path / "out.rejected/manifest.json").read_text() == "two"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES, errno.EROFS])
def test_a_full_or_closed_disk_is_one_clear_error(tmp_path: Path, number: int) -> None:
    with (
        pytest.raises(OutputWriteError, match=rf"cannot be written: .*out .*{os.strerror(number)}.*space"),
        staged_folder(tmp_path / "out"),
    ):
        raise OSError(number, os.strerror(number))
    assert names(tmp_path) == []


def test_a_file_where_the_parent_should_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputWriteError, match=r"cannot be written.*Not a directory"):
        write(tmp_path / "file" / "out")


def test_an_unreadable_input_is_not_blamed_on_the_output(tmp_path: Path) -> None:
    with pytest.raises(PermissionError, match="elsewhere"), staged_folder(tmp_path / "out"):
        raise PermissionError(errno.EACCES, "denied", "/elsewhere/weights")


def test_an_unreadable_input_beside_the_output_is_not_blamed_on_it(tmp_path: Path) -> None:
    with pytest.raises(PermissionError, match="denied") as caught, staged_folder(tmp_path / "out"):
        raise PermissionError(errno.EACCES, "denied", str(tmp_path / "checkpoint/weights"))
    assert not isinstance(caught.value, OutputWriteError)


def test_a_missing_input_is_not_blamed_on_the_output(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no-such-input"), staged_folder(tmp_path / "out"):
        (tmp_path / "no-such-input").read_bytes()
    assert names(tmp_path) == []


def test_a_root_is_no_output() -> None:
    with (
        pytest.raises(ConfigError, match=r"the output path is a root.*: /; add the name"),
        staged_folder("/", force=True),
    ):
        pytest.fail("the block was entered")


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a place where nothing can be made")
def test_a_place_where_no_folder_can_be_made() -> None:
    with (
        pytest.raises(
            OutputWriteError, match=r"cannot be written: /proc/x/y \(got No such file.*choose a folder"
        ),
        staged_folder("/proc/x/y"),
    ):
        pytest.fail("the block was entered")


def test_an_output_that_is_no_path(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for path, message in (("a\0b", "null byte"), (str(tmp_path / "loop/out"), "loop")):
        with pytest.raises(OutputWriteError, match=rf"cannot be written: .*{message}"), staged_folder(path):
            pytest.fail("the block was entered")


@pytest.mark.parametrize("name", ["rename", "mkdir"])
@pytest.mark.parametrize("number", [errno.ENOENT, errno.EIO, errno.EINVAL, errno.ELOOP])
def test_any_error_of_making_and_moving_the_folder_is_about_the_output(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, number: int
) -> None:
    def fail(path: Path, *_arguments: object, **_settings: object) -> None:
        raise OSError(number, os.strerror(number), str(path))

    monkeypatch.setattr(Path, name, fail)
    with pytest.raises(OutputWriteError, match=rf"cannot be written: .*a/out \(got {os.strerror(number)}\)"):
        write(tmp_path / "a" / "out")
    monkeypatch.undo()
    assert names(tmp_path) == []


def test_a_sync_that_fails_is_about_the_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_descriptor: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OutputWriteError, match=rf"cannot be written: .*out \(got {os.strerror(errno.EIO)}\)"):
        write(tmp_path / "out")
    assert names(tmp_path) == []


def test_a_rejected_folder_that_cannot_be_moved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: Path, _target: Path) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))

    with (
        pytest.raises(OutputWriteError, match=r"cannot be written: .*out\.rejected "),
        staged_folder(tmp_path / "out") as staged,
    ):
        monkeypatch.setattr(Path, "rename", fail)
        staged.keep_as_rejected()


@pytest.mark.parametrize(
    "name",
    [
        "tokenizer.json",
        "clip_tokenizer.json",
        "bank.jsonl",
        "reference.npz",
        "parity.json",
        "onnx/model.onnx",
        "onnx/model_t.onnx_data",
    ],
)
@pytest.mark.parametrize("verify", [True, False])
def test_a_file_that_the_manifest_does_not_list_is_refused(broken: Path, name: str, verify: bool) -> None:
    (broken / "parity.json").touch()
    rehash(broken)
    read_bundle(broken, verify=verify)
    files = json.loads((broken / "manifest.json").read_text("utf-8"))["files"]
    del files[name]
    rewrite_manifest(broken, files=files)
    with pytest.raises(
        BundleError, match=rf"file.* lack|a file that its manifest does not list.*: .*{name}"
    ) as caught:
        read_bundle(broken, verify=verify)
    assert name in str(caught.value)


def test_a_manifest_that_lists_nothing_is_refused(broken: Path) -> None:
    rewrite_manifest(broken, files={})
    with pytest.raises(
        BundleError, match=r"the bundle has a file that its manifest does not list.*: .*bank\.jsonl; copy or"
    ):
        read_bundle(broken)


def test_what_a_bundle_may_do_without(tmp_path: Path) -> None:
    folder = write_bundle(tmp_path / "b", sets=("none", "t"))
    (folder / "reference.npz").unlink()
    (folder / "bank.jsonl").unlink()
    rehash(folder)
    assert not {"config.json", "parity.json", "reference.npz", "bank.jsonl"} & set(
        read_bundle(folder).manifest.files
    )


def test_a_whole_bundle_reads(tiny: Path) -> None:
    bundle = read_bundle(tiny)
    assert bundle.file("onnx/model.onnx") == tiny / "onnx" / "model.onnx"


def test_no_bundle(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"not a bundle: .*nothing .*no such folder.*xad-export"):
        read_bundle(tmp_path / "nothing")
    with pytest.raises(BundleError, match="got a folder without one"):
        read_bundle(tmp_path)


def test_a_missing_file_is_named(broken: Path) -> None:
    (broken / "tokenizer.json").unlink()
    with pytest.raises(BundleError, match=r"missing: .*tokenizer\.json"):
        read_bundle(broken, verify=False)


def test_a_truncated_file_is_named_even_without_hashing(broken: Path) -> None:
    path = broken / "onnx/model.onnx_data"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(BundleError, match=r"wrong size: .*model\.onnx_data"):
        read_bundle(broken, verify=False)


def test_one_changed_byte_is_found(broken: Path) -> None:
    path = broken / "onnx/model.onnx_data"
    data = bytearray(path.read_bytes())
    data[5] ^= 1
    path.write_bytes(data)
    with pytest.raises(HashMismatchError, match=r"has changed: .*model\.onnx_data .*copy or export"):
        read_bundle(broken)
    read_bundle(broken, verify=False)


def test_a_link_out_of_the_folder_is_refused(broken: Path, tmp_path: Path) -> None:
    (tmp_path / "outside").write_bytes((broken / "bank.jsonl").read_bytes())
    (broken / "bank.jsonl").unlink()
    (broken / "bank.jsonl").symlink_to(tmp_path / "outside")
    with pytest.raises(BundleError, match=r"is outside its folder: .*bank\.jsonl"):
        read_bundle(broken)


def test_a_manifest_that_is_no_text(broken: Path) -> None:
    (broken / "manifest.json").write_bytes(b"\xff\xfe")
    with pytest.raises(BundleError, match="the manifest cannot be read"):
        read_bundle(broken)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"id": "a", "caption": "x"}\n', "wrong number of images.*expected 3, got 1"),
        ('{"id": "a", "caption": "x"}\n' * 2 + '{"id": "a"}\n', "line 3 .*caption: Field required"),
    ],
)
def test_a_bank_list_that_does_not_fit(broken: Path, text: str, message: str) -> None:
    from xadapter_export.runtime.session import XAdapterSession

    (broken / "bank.jsonl").write_text(text)
    rehash(broken)
    with pytest.raises(BundleError, match=message):
        XAdapterSession.load(broken)


def test_a_bank_list_that_cannot_be_read(broken: Path) -> None:
    from xadapter_export.runtime.session import XAdapterSession

    (broken / "bank.jsonl").write_bytes(b'{"id": "a", "caption": "caf\xe9"}\n' * 3)
    rehash(broken)
    with pytest.raises(BundleError, match=r"list of images cannot be read: .*bank\.jsonl.*can't decode"):
        XAdapterSession.load(broken)
    with pytest.raises(BundleError, match=r"list of images cannot be read: .*onnx \(expected a regular file"):
        read_pictures(broken / "onnx", num_pictures=3)


def test_files_are_listed_without_the_manifest(tiny: Path) -> None:
    listed = folder_module.list_files(tiny)
    assert "manifest.json" not in listed
    assert "onnx/model.onnx" in listed
