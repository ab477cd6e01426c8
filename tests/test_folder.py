import errno
import os
import threading
from pathlib import Path

import pytest

from tests.tiny_bundle import rehash
from xadapter_export.bundle import folder as folder_module
from xadapter_export.bundle import read_bundle, staged_folder
from xadapter_export.errors import BundleError, HashMismatchError, OutputExistsError, OutputWriteError


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
        pytest.raises(OutputExistsError, match=r"already at the output path: .*out; .*--force"),
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
    with pytest.raises(OutputExistsError, match=r"not ours to replace.*manifest\.json"):
        write(tmp_path / "out")
    assert (tmp_path / "out" / "thesis.txt").read_text() == "years"


def test_force_never_deletes_a_file(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("years")
    with pytest.raises(FileExistsError, match="not ours to replace"):
        write(tmp_path / "out")
    assert (tmp_path / "out").read_text() == "years"


def test_the_old_folder_comes_back_if_the_swap_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "out", "old")
    rename = Path.rename

    def fail_on_the_new_one(path: Path, target: Path) -> Path:
        if path.suffix == ".tmp":
            raise KeyboardInterrupt("in between")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", fail_on_the_new_one)
    with pytest.raises(KeyboardInterrupt, match="in between"):
        write(tmp_path / "out", "new")
    assert names(tmp_path) == ["out"]
    assert (tmp_path / "out/manifest.json").read_text() == "old"


def test_someone_else_may_win_the_race(tmp_path: Path) -> None:
    with (
        pytest.raises(OutputExistsError, match="already at the output path"),
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
    with pytest.raises(HashMismatchError, match=r"was changed: .*model\.onnx_data .*copy or export"):
        read_bundle(broken)
    read_bundle(broken, verify=False)


def test_a_link_out_of_the_folder_is_refused(broken: Path, tmp_path: Path) -> None:
    (tmp_path / "outside").write_bytes((broken / "bank.jsonl").read_bytes())
    (broken / "bank.jsonl").unlink()
    (broken / "bank.jsonl").symlink_to(tmp_path / "outside")
    with pytest.raises(BundleError, match=r"lies outside its folder: .*bank\.jsonl"):
        read_bundle(broken)


def test_a_manifest_that_is_no_text(broken: Path) -> None:
    (broken / "manifest.json").write_bytes(b"\xff\xfe")
    with pytest.raises(BundleError, match="the manifest cannot be read"):
        read_bundle(broken)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"id": "a", "caption": "x"}\n', "wrong number of pictures.*expected 3, got 1"),
        ('{"id": "a", "caption": "x"}\n' * 2 + '{"id": "a"}\n', "line 3 .*caption: Field required"),
    ],
)
def test_a_bank_list_that_does_not_fit(broken: Path, text: str, message: str) -> None:
    from xadapter_export.runtime.session import XAdapterSession

    (broken / "bank.jsonl").write_text(text)
    rehash(broken)
    with pytest.raises(BundleError, match=message):
        XAdapterSession.load(broken)


def test_files_are_listed_without_the_manifest(tiny: Path) -> None:
    listed = folder_module.list_files(tiny)
    assert "manifest.json" not in listed
    assert "onnx/model.onnx" in listed
