"""``xad sign``: sign a bundle."""

from pathlib import Path

import click

from xadapter_export.cli.command import NamedPath, XadCommand, example


@click.command(
    cls=XadCommand,
    epilog=example(
        "openssl genpkey -algorithm EC -pkeyopt ec_paramgen_curve:P-256 -out key.pem",
        "openssl pkey -in key.pem -pubout -out public.pem",
        "xad-export --experts t --opset 17 -o bundle",
        "xad-sign bundle key.pem",
        "xad-inspect bundle --verify-key public.pem",
    ),
)
@click.argument("bundle", type=NamedPath(path_type=Path))
@click.argument("key", type=NamedPath(path_type=Path))
@click.option("--force", is_flag=True, help="Replace an existing signature.")
def sign(bundle: Path, key: Path, force: bool) -> None:
    """Sign a bundle, so others can verify who made it.

    KEY is a PEM file with a private key for P-256, P-384 or P-521. If certificates follow the key in the
    file, the signature carries them. The password of an encrypted key is read from XAD_KEY_PASSWORD.

    The signature is the file model.sig in the bundle's folder, in the OpenSSF model-signing format. It covers
    every other file of the bundle; the command checks them against their hashes first.
    """
    from xadapter_export.bundle.signature import sign_bundle

    signature = sign_bundle(bundle, key, force=force)
    click.echo(f"{len(signature.files)} files signed with: {signature.signer}")
