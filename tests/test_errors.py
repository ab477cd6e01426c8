import pickle
from pathlib import Path

import pytest

from xadapter_export import errors
from xadapter_export.errors import (
    MissingExtraError,
    OutputWriteError,
    ShapeError,
    XAdapterError,
    import_extra,
    import_installed,
    printable,
)

LEAVES = [
    value
    for value in vars(errors).values()
    if isinstance(value, type) and issubclass(value, XAdapterError) and value is not XAdapterError
]


def test_message_says_what_where_expected_got_and_how_to_mend_it_on_one_line() -> None:
    error = ShapeError("a bad\nshape", where="mask", expected=(2, 8), got=(2, 1), hint="pad it")
    assert str(error) == "a bad shape: mask (expected (2, 8), got (2, 1)); pad it"


def test_the_parts_of_an_error_are_attributes_and_come_again_from_a_pickle() -> None:
    error = ShapeError("a bad shape", where="mask", expected=(2, 8), got=(2, 1), hint="pad it")
    for one in (error, pickle.loads(pickle.dumps(error)), error.with_hint("or cut it")):
        assert (one.what, one.where, one.expected, one.got) == ("a bad shape", "mask", (2, 8), (2, 1))
    more = error.with_hint("or cut it")
    assert (type(more), more.hint) == (ShapeError, "pad it; or cut it")
    assert str(more) == f"{error}; or cut it"
    assert ShapeError("a bad shape").with_hint("pad it").hint == "pad it"


def test_a_zero_is_still_a_fact() -> None:
    assert str(ShapeError("empty", got=0)) == "empty (got 0)"


@pytest.mark.parametrize("leaf", LEAVES)
def test_every_leaf_specializes_a_builtin_and_keeps_its_message(leaf: type[XAdapterError]) -> None:
    builtins = [base for base in leaf.__mro__ if base.__module__ == "builtins"]
    assert builtins[0] is not Exception
    error = pickle.loads(pickle.dumps(leaf("what", where="here")))
    assert str(error) == "what: here"


def test_an_os_error_can_be_caught_as_one() -> None:
    with pytest.raises(OSError, match="no space: out"):
        raise OutputWriteError("no space", where="out")


def test_missing_extra_gives_the_exact_line_to_install_it() -> None:
    with pytest.raises(MissingExtraError, match=r'pip install "xadapter-export\[export\]"$'):
        import_extra("no_such_module_at_all", "export")
    with pytest.raises(ImportError, match=r'\[cpu\]" or pip install "xadapter-export\[gpu\]"$'):
        import_extra("no_such_module_at_all", "cpu", "gpu")


def test_the_line_names_the_package_that_brings_the_module() -> None:
    with pytest.raises(MissingExtraError, match=r'pip install "my-package\[export\]"$'):
        import_installed("no_such_module_at_all", "my-package[export]")


def test_import_extra_returns_the_module() -> None:
    assert import_extra("json", "export").loads("1") == 1


def test_an_error_of_the_system_is_told_without_its_number(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        (tmp_path / "y").read_text(encoding="utf-8")
    line = str(ShapeError("the file cannot be read", where="y", got=caught.value))
    assert line == "the file cannot be read: y (got No such file or directory)"


def test_what_a_terminal_would_obey_is_printed_as_an_escape() -> None:
    error = ShapeError("bad\x1b[2J", where="\x9b2J\udc80", got="a\u202eb", hint="bell\a")
    assert str(error) == r"bad\x1b[2J: \x9b2J\udc80 (got a\u202eb); bell\x07"
    assert error.where == "\x9b2J\udc80"  # the attributes are what was found
    assert printable("tab\tbreak\n", keep="\t") == "tab\tbreak\\n"
    assert printable("Ünïcödé 日本語 עברית 👩‍🍳") == "Ünïcödé 日本語 עברית 👩‍🍳"


def test_a_long_value_does_not_make_a_long_line() -> None:
    line = str(ShapeError("w" * 10**5, where="x" * 10**5, expected="e" * 10**5, got="g" * 10**5))
    assert len(line) < 5000
    assert "x... (100000 characters)" in line
