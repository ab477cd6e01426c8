"""``python -m export.web``: put the page together around a bundle, and serve it on this machine."""

from pathlib import Path

import click

from export.web.build import address_of_project, bundle_bytes, install_packages, size_bytes, write_page
from export.web.server import make_server
from xadapter_export.cli.command import XadCommand


@click.command(cls=XadCommand)
@click.option(
    "--bundle",
    type=click.Path(path_type=Path),
    default="build/bundles/web",
    show_default=True,
    help="The bundle: xad-export --config export/web.toml -o build/bundles/web",
)
@click.option(
    "--pictures",
    metavar="builtin|none|DIR",
    default="none",
    show_default=True,
    help="Thumbnails: drawn for the built-in bank, or of a bank that xad-bank built with thumbnails.",
)
@click.option(
    "--project",
    metavar="ADDRESS",
    help="Address of the project, for the links in the footer. [default: the one in the installed package]",
)
@click.option("--output", type=click.Path(path_type=Path), default="build/web", show_default=True)
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="0: a free one.")
@click.option("--serve/--no-serve", default=True, help="Serve the page, until Ctrl-C.")
def main(bundle: Path, pictures: str, project: str | None, output: Path, port: int, serve: bool) -> None:
    """Write the page into a folder that any static server can serve."""
    packages = install_packages(Path("build/npm/web"))
    write_page(output, bundle, packages, pictures, project=project or address_of_project())
    pictures_mb = size_bytes([output / "pictures"]) / 1e6
    click.echo(
        f"page: {output}, {size_bytes([output]) / 1e6:.1f} MB; of the bundle a browser loads "
        f"{bundle_bytes(output) / 1e6:.1f} MB, and {pictures_mb:.1f} MB of pictures"
    )
    if serve:
        server = make_server(output, port)
        click.echo(f"http://localhost:{server.server_port}/ (Ctrl-C stops it)")
        with server:
            server.serve_forever()


if __name__ == "__main__":
    main()
