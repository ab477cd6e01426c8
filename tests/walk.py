"""``python -m tests.walk xad-run BUNDLE TEXT``: print the files of the library as a command enters them.

A file counts where one of its functions is first called; what runs while a module is imported does not.
"""

import sys
from importlib.metadata import entry_points
from pathlib import Path
from types import FrameType

import xadapter_export

PACKAGE = str(Path(xadapter_export.__file__).parent) + "/"


def walk(program: str, arguments: list[str]) -> list[str]:
    """Run a command of ours and return the files that it enters."""
    (point,) = entry_points(group="console_scripts", name=program)
    command = point.load()
    entered: dict[str, None] = {}

    def see(frame: FrameType, event: str, _: object) -> None:
        file = frame.f_code.co_filename
        if event == "call" and file.startswith(PACKAGE) and file not in entered and not _is_import(frame):
            entered[file] = None

    sys.setprofile(see)
    try:
        command.main(arguments, standalone_mode=False)
    finally:
        sys.setprofile(None)
    return [file.removeprefix(PACKAGE) for file in entered]


def _is_import(frame: FrameType | None) -> bool:
    """Whether a module of the library is being imported."""
    while frame is not None:
        if frame.f_code.co_name == "<module>" and frame.f_code.co_filename.startswith(PACKAGE):
            return True
        frame = frame.f_back
    return False


if __name__ == "__main__":
    found = walk(sys.argv[1], sys.argv[2:])
    print(*found, sep="\n", file=sys.stderr)  # noqa: T201
