"""Signatures of bundles, in the OpenSSF's model-signing format: who vouches for every file.

``model.sig`` lists ``manifest.json`` and every file that it lists, each with its SHA-256, and is signed with
a key or a certificate. The package ``model-signing`` signs and verifies, without a network; what a signature
says is read without it. Each file is held to the manifest when it is read, so none is hashed twice.
"""

import base64
import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from xadapter_export.bundle.folder import (
    MANIFEST_NAME,
    SIGNATURE_NAME,
    Bundle,
    inside,
    read_bundle,
    sha256_file,
    unlisted_files,
)
from xadapter_export.bundle.small_files import parse_object, read_object
from xadapter_export.bundle.staging import staged_file
from xadapter_export.errors import (
    ConfigError,
    MissingExtraError,
    OutputExistsError,
    SignatureError,
    import_extra,
)

# What git and the Hub's client keep in a folder: never read here, so neither signed nor refused.
NOT_SIGNED: Final = (".git", ".gitattributes", ".gitignore", ".github", ".cache/huggingface")
PASSWORD: Final = "XAD_KEY_PASSWORD"  # noqa: S105  # the name of the environment variable

Kind = Literal["key", "certificate", "keyless"]


@dataclass(frozen=True)
class Signature:
    """What a signature says. Whether that is true is known once it was verified.

    Attributes:
        kind: What it was made with: a key, a certificate, or Sigstore's keyless signing.
        signer: Who made it: the SHA-256 of the public key's file, or name and SHA-256 of the certificate.
        files: SHA-256 of every file that it is of, by its path.
    """

    kind: Kind
    signer: str
    files: dict[str, str]


class BundleSigner:
    """Signs bundles with a key.

    Args:
        key: PEM file with a private key for the curve P-256, P-384 or P-521, and after it, where it has one,
            its certificate and those that lead to the root. The environment variable ``XAD_KEY_PASSWORD``
            has the password of an encrypted key.

    Raises:
        MissingExtraError: If model-signing is not installed.
        ConfigError: If the key cannot be read.
    """

    def __init__(self, key: Path | str) -> None:
        config = import_extra("model_signing.signing", "sign").Config()
        password = os.environ.get(PASSWORD)
        try:
            if _has_certificate(key):
                self._config = config.use_certificate_signer(
                    private_key=key, signing_certificate=key, certificate_chain=[key]
                )
            else:
                secret = password.encode() if password else None
                self._config = config.use_elliptic_key_signer(private_key=key, password=secret)
        except Exception as error:  # of cryptography, which has many kinds
            raise ConfigError(
                "the key to sign with cannot be read",
                where=key,
                expected="a PEM file with a private key for P-256, P-384 or P-521",
                got=_said(error),
                hint=f"the password of an encrypted key is read from {PASSWORD}",
            ) from error

    def sign(self, bundle: Bundle, name: str) -> Signature:
        """Write the signature of a bundle whose files were compared with its manifest.

        Args:
            bundle: The bundle.
            name: What the signature calls it.

        Raises:
            SignatureError: If its folder holds a file that the manifest does not list.
            OutputWriteError: If the signature cannot be written.
        """
        with staged_file(bundle.folder / SIGNATURE_NAME) as path:
            _check_only_signed(bundle)
            self._config.set_hashing_config(_RecordedHashes(bundle, name)).sign(bundle.folder, path)
        signature = read_signature(bundle)
        assert signature is not None  # it was just written
        return signature


def sign_bundle(folder: Path | str, key: Path | str, *, force: bool = False) -> Signature:
    """Sign the bundle in a folder, after every file was compared with its hash.

    Args:
        folder: The bundle.
        key: See ``BundleSigner``.
        force: Whether a signature that is there may be replaced.

    Raises:
        BundleError: If the bundle is not whole.
        HashMismatchError: If a file was changed.
        OutputExistsError: If it is signed already.
        As ``BundleSigner``, and its ``sign``.
    """
    signer = BundleSigner(key)
    bundle = read_bundle(Path(folder))
    if (bundle.folder / SIGNATURE_NAME).exists() and not force:
        raise OutputExistsError(
            "the bundle is signed already",
            where=bundle.folder / SIGNATURE_NAME,
            hint="replace the signature with --force (force=True)",
        )
    return signer.sign(bundle, bundle.folder.resolve().name)


def read_signature(bundle: Bundle) -> Signature | None:
    """Return what the signature of a bundle says; None where it has none.

    A bundle on the Hub downloads it. Nothing but its form is checked.

    Raises:
        SignatureError: If it is no signature in the model-signing format.
    """
    path = bundle.folder / SIGNATURE_NAME
    if bundle.repo is not None and not path.exists():
        bundle.repo.fetch([SIGNATURE_NAME])
    if not path.exists() and not path.is_symlink():
        return None
    fields = read_object(inside(bundle.folder, SIGNATURE_NAME, "bundle"), "the signature", SignatureError)
    try:
        payload = base64.b64decode(fields["dsseEnvelope"]["payload"], validate=True).decode()
        statement = parse_object(payload, "the signed statement", path, SignatureError)
        signed = statement["predicate"]["resources"]
        files = {str(item["name"]): str(item["digest"]) for item in signed}
        return Signature(*_read_signer(fields["verificationMaterial"]), files)
    except SignatureError:
        raise
    except Exception as error:  # of cryptography, and of JSON that has another form
        raise SignatureError("this is no signature that can be read", where=path, got=_said(error)) from error


def check_signed_files(bundle: Bundle, signature: Signature) -> None:
    """Refuse a signature that is not of the files of a bundle, as its manifest records them.

    Raises:
        SignatureError: If a file was added, removed or changed since it was made.
    """
    recorded = _recorded_hashes(bundle)
    for names, what in (
        (recorded.keys() - signature.files.keys(), "the signature does not cover a file of the bundle"),
        (signature.files.keys() - recorded.keys(), "a file that was signed is not in the bundle"),
        ({n for n in recorded if recorded[n] != signature.files.get(n)}, "a file was changed after signing"),
    ):
        if names:
            hint = "get the bundle again from whoever signed it"
            raise SignatureError(what, where=bundle.folder / min(names), hint=hint)
    _check_only_signed(bundle)


def verify_signature(bundle: Bundle, key: Path | str) -> Signature:
    """Check that a bundle was signed with a key, as its manifest records its files.

    Args:
        bundle: The bundle. Whether its files are those of the manifest is for ``verify_files`` to say.
        key: PEM file with the public key; or with the certificates that are trusted, up to a root: then
            whoever has one of theirs for signing may have signed, also one that has expired since.

    Raises:
        SignatureError: If it is not signed, the signature is of other files, or it was made with another key.
        ConfigError: If the key cannot be read.
        MissingExtraError: If model-signing is not installed.
    """
    verifier = _make_verifier(key)
    signature = read_signature(bundle)
    path = bundle.folder / SIGNATURE_NAME
    if signature is None:
        raise SignatureError("the bundle is not signed", where=bundle.folder, expected=f"a {SIGNATURE_NAME}")
    wanted = "certificate" if _has_certificate(key) else "key"
    if signature.kind != wanted:
        raise SignatureError(
            "the signature was made with something else than what verifies it",
            where=path,
            expected=f"made with a {wanted}",
            got=f"{signature.kind}, {signature.signer}",
            hint="verify keyless signatures with: model_signing verify sigstore"
            if signature.kind == "keyless"
            else f"give the {signature.kind} of whoever signed it",
        )
    check_signed_files(bundle, signature)
    try:
        hashes = _RecordedHashes(bundle, bundle.folder.name)
        verifier.set_hashing_config(hashes).verify(bundle.folder, path)
    except Exception as error:  # of cryptography and pyOpenSSL, which have many kinds
        raise SignatureError(
            "the signature was not made with this key",
            where=path,
            expected=key,
            got=f"{signature.signer}: {_said(error)}",
        ) from error
    return signature


def read_signed_bundle(source: Path | str, key: Path | str, *, revision: str | None = None) -> Bundle:
    """Read a bundle of which every file is the one that somebody signed with a key.

    Raises:
        As ``read_bundle``, with every file compared, and ``verify_signature``.
    """
    bundle = read_bundle(source, revision=revision)
    verify_signature(bundle, key)
    return bundle


class _RecordedHashes:
    """What model-signing asks for the hashes of a folder: those that the manifest of a bundle records."""

    def __init__(self, bundle: Bundle, name: str) -> None:
        self._hashes, self._name = _recorded_hashes(bundle), name

    def hash(self, *_: object, **__: object) -> Any:
        """Return them as model-signing's own kind of manifest."""
        module = import_extra("model_signing.manifest", "sign")
        ignored = [SIGNATURE_NAME, *NOT_SIGNED]
        how = {"method": "files", "hash_type": "sha256", "allow_symlinks": False, "ignore_paths": ignored}
        method = module.SerializationType.from_args(how)
        items = [
            method.new_item(name, module.hashing.Digest("sha256", bytes.fromhex(sha256)))
            for name, sha256 in self._hashes.items()
        ]
        return module.Manifest(self._name, items, method)

    def add_ignored_paths(self, **_: object) -> None:
        """Ignore nothing, whatever a signature says that its maker ignored."""


def _recorded_hashes(bundle: Bundle) -> dict[str, str]:
    listed = {name: entry.sha256 for name, entry in bundle.manifest.files.items()}
    return {MANIFEST_NAME: sha256_file(bundle.folder / MANIFEST_NAME)} | listed


def _check_only_signed(bundle: Bundle) -> None:
    """Refuse a file that no signature can cover, because the manifest does not list it."""
    for name in unlisted_files(bundle):
        if not any(name == kept or name.startswith(f"{kept}/") for kept in NOT_SIGNED):
            raise SignatureError(
                "the bundle has a file that its manifest does not list, so no signature covers it",
                where=bundle.folder / name,
                hint="remove it, or copy the bundle again",
            )


def _make_verifier(key: Path | str) -> Any:
    config = import_extra("model_signing.verifying", "sign").Config()
    try:
        if _has_certificate(key):
            return config.use_certificate_verifier(certificate_chain=[key])
        return config.use_elliptic_key_verifier(public_key=key)
    except Exception as error:  # of cryptography, which has many kinds
        raise ConfigError(
            "the key to verify with cannot be read",
            where=key,
            expected="a PEM file with a public key or certificates",
            got=_said(error),
            hint="get the public key of a private one with: openssl pkey -in key.pem -pubout -out public.pem",
        ) from error


def _has_certificate(key: Path | str) -> bool:
    try:
        return b"-----BEGIN CERTIFICATE-----" in Path(key).read_bytes()
    except OSError as error:
        raise ConfigError("the key cannot be read", where=key, got=error) from error


def _read_signer(material: dict[str, Any]) -> tuple[Kind, str]:
    """Return what a signature was made with, and by whom as far as it says."""
    if "publicKey" in material:
        hint = material["publicKey"]["hint"]
        if not isinstance(hint, str) or not hint:
            raise ValueError("the key's hash is missing")
        return "key", f"key with SHA-256 {hint}"
    kind: Kind = "keyless" if "certificate" in material else "certificate"
    if kind == "keyless":
        encoded = material["certificate"]["rawBytes"]
    else:
        encoded = material["x509CertificateChain"]["certificates"][0]["rawBytes"]
    certificate = base64.b64decode(encoded, validate=True)
    return kind, f"{_name_of(certificate)}, SHA-256 {hashlib.sha256(certificate).hexdigest()}"


def _name_of(certificate: bytes) -> str:
    """Return whom a certificate in DER is for; reading that needs what comes with model-signing."""
    try:
        x509 = import_extra("cryptography.x509", "sign")
    except MissingExtraError:
        return "certificate"
    read = x509.load_der_x509_certificate(certificate)
    if name := read.subject.rfc4514_string():
        return f"certificate of {name}"
    names = read.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    return f"certificate of {', '.join(str(name.value) for name in names)}"


def _said(error: Exception) -> str:
    """Return what an error says; cryptography's for a wrong signature says nothing."""
    return str(error) or type(error).__name__
