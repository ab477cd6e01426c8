"""``xad push``: upload a bundle or a checkpoint to the Hugging Face Hub."""

from pathlib import Path
from typing import TYPE_CHECKING, Unpack

import click

from xadapter_export.cli.command import XadCommand, example
from xadapter_export.errors import import_extra

if TYPE_CHECKING:
    from xadapter_export.bundle.hub import PushOptions


@click.command(
    cls=XadCommand,
    epilog=example("xad-export --experts t --opset 17 -o bundle", "xad-push bundle my-name/my-bundle"),
)
@click.argument("folder", type=click.Path(path_type=Path))
@click.argument("repo", metavar="ORG/NAME")
@click.option(
    "--private/--public",
    default=None,
    help="Who can see the repository, if it is new. [default: your account's default]",
)
@click.option("--revision", metavar="BRANCH", help="Branch to upload to, created if missing. [default: main]")
@click.option("--message", metavar="TEXT", help="Commit message.")
def push(folder: Path, repo: str, **options: "Unpack[PushOptions]") -> None:
    """Upload a bundle or a checkpoint to the Hugging Face Hub.

    Log in once with: hf auth login. The files are checked first and uploaded as one commit, which removes
    whatever else the repository had. Prints the address of the commit.
    """
    from xadapter_export.bundle.folder import MANIFEST_NAME, read_bundle
    from xadapter_export.bundle.signature import check_signed_files, read_signature

    if (folder / MANIFEST_NAME).is_file():
        bundle = read_bundle(folder)
        if (signature := read_signature(bundle)) is not None:
            check_signed_files(bundle, signature)
        url = bundle.push_to_hub(repo, **options)
    else:
        checkpoint = import_extra("xadapter_export.model.checkpoint", "export", "train")
        url = checkpoint.push_checkpoint(folder, repo, **options)
    click.echo(url)
