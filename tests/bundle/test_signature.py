"""Signed bundles: who signed, and every way in which a signature must not hold."""

import base64
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from tests.tiny_bundle import rehash
from xadapter_export import XAdapterSession
from xadapter_export.bundle.folder import SIGNATURE_NAME, read_bundle, sha256_file
from xadapter_export.bundle.signature import (
    PASSWORD,
    read_signature,
    read_signed_bundle,
    sign_bundle,
    verify_signature,
)
from xadapter_export.cli.main import xad
from xadapter_export.errors import (
    BundleError,
    ConfigError,
    HashMismatchError,
    MissingExtraError,
    OutputExistsError,
    SignatureError,
    XAdapterError,
)

TEXT = "the color of a banana is [MASK]."
PEM = serialization.Encoding.PEM
Private = ec.EllipticCurvePrivateKey


def call(*arguments: object) -> Result:
    return CliRunner().invoke(xad, [str(argument) for argument in arguments])


def write_key(folder: Path, name: str, password: bytes | None = None) -> Private:
    """Write ``NAME.pem`` and ``NAME.pub``."""
    key = ec.generate_private_key(ec.SECP256R1())
    hidden = serialization.BestAvailableEncryption(password) if password else serialization.NoEncryption()
    (folder / f"{name}.pem").write_bytes(key.private_bytes(PEM, serialization.PrivateFormat.PKCS8, hidden))
    public = key.public_key().public_bytes(PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    (folder / f"{name}.pub").write_bytes(public)
    return key


def certify(name: str, key: Private, issuer: str, issuer_key: Private, *, is_root: bool) -> bytes:
    """Return a certificate for a key, as PEM."""
    usage = dict.fromkeys(
        ("content_commitment", "key_encipherment", "data_encipherment", "key_agreement", "encipher_only"),
        False,
    )
    builder = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]))
        .issuer_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, issuer)]))
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(datetime(2026, 1, 1))
        .not_valid_after(datetime(2036, 1, 1))
        .add_extension(x509.BasicConstraints(is_root, None), critical=True)
        .add_extension(
            x509.KeyUsage(
                digital_signature=not is_root,
                key_cert_sign=is_root,
                crl_sign=is_root,
                decipher_only=False,
                **usage,
            ),
            critical=True,
        )
    )
    return builder.sign(issuer_key, hashes.SHA256()).public_bytes(PEM)


def write_certified_key(folder: Path, name: str = "team") -> None:
    """Write ``NAME.pem``, a key with its certificate and root, and ``NAME-root.pem``."""
    key, root = write_key(folder, name), write_key(folder, "root")
    of_root = certify("Root", root, "Root", root, is_root=True)
    with (folder / f"{name}.pem").open("ab") as stream:
        stream.write(certify("Release team", key, "Root", root, is_root=False) + of_root)
    (folder / f"{name}-root.pem").write_bytes(of_root)


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two keys, and a key with a certificate."""
    folder = tmp_path_factory.mktemp("keys")
    write_key(folder, "mine")
    write_key(folder, "other")
    write_certified_key(folder)
    return folder


@pytest.fixture(scope="module")
def signed_once(tiny: Path, keys: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    bundle = Path(shutil.copytree(tiny, tmp_path_factory.mktemp("signed") / "bundle"))
    sign_bundle(bundle, keys / "mine.pem")
    return bundle


@pytest.fixture
def signed(signed_once: Path, tmp_path: Path) -> Path:
    """A signed bundle that a test may break."""
    return Path(shutil.copytree(signed_once, tmp_path / "bundle"))


def test_a_signed_bundle_loads_with_the_key_and_answers_as_before(
    signed_once: Path, tiny: Path, keys: Path
) -> None:
    session = XAdapterSession.load(signed_once, verify_key=keys / "mine.pub")
    assert session.fill_mask(TEXT) == XAdapterSession.load(tiny).fill_mask(TEXT)
    assert XAdapterSession.load(signed_once).fill_mask(TEXT) == session.fill_mask(TEXT)


def test_the_signature_covers_every_other_file(signed_once: Path, keys: Path) -> None:
    files = {p.relative_to(signed_once).as_posix() for p in signed_once.rglob("*") if p.is_file()}
    signature = verify_signature(read_bundle(signed_once), keys / "mine.pub")
    assert signature.files == {name: sha256_file(signed_once / name) for name in files - {SIGNATURE_NAME}}
    assert signature.signer == f"key with SHA-256 {sha256_file(keys / 'mine.pub')}"


def test_one_changed_byte_of_any_file_is_one_line(signed: Path, keys: Path) -> None:
    changed = 0
    for path in sorted(path for path in signed.rglob("*") if path.is_file()):
        whole = path.read_bytes()
        middle = len(whole) // 2
        path.write_bytes(whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :])
        with pytest.raises(XAdapterError) as caught:
            XAdapterSession.load(signed, verify_key=keys / "mine.pub")
        assert "\n" not in str(caught.value)
        path.write_bytes(whole)
        changed += 1
    assert changed == len(read_bundle(signed).manifest.files) + 2


def test_a_changed_file_whose_hash_was_made_right_is_one_line(signed: Path, keys: Path) -> None:
    (signed / "bank.jsonl").write_text((signed / "bank.jsonl").read_text().replace("lime", "lame"))
    rehash(signed)
    read_bundle(signed)  # as far as the manifest can tell
    with pytest.raises(SignatureError, match=r"a file was changed after signing: .*bank\.jsonl"):
        XAdapterSession.load(signed, verify_key=keys / "mine.pub")
    assert "changed after signing" in call("inspect", signed).stderr


@pytest.mark.parametrize("name", ["extra.txt", "onnx/.hidden", ".git-not", "model.sig.old"])
@pytest.mark.parametrize("lists", [False, True])
def test_an_added_file_is_one_line(signed: Path, keys: Path, name: str, lists: bool) -> None:
    (signed / name).write_text("new")
    if lists:
        rehash(signed)
    with pytest.raises(SignatureError, match=rf"no signature covers it|does not cover a file.*{name}"):
        XAdapterSession.load(signed, verify_key=keys / "mine.pub")


def test_a_link_to_a_folder_is_an_added_file(signed: Path, keys: Path) -> None:
    (signed / "more").symlink_to(keys, target_is_directory=True)
    with pytest.raises(SignatureError, match="no signature covers it"):
        read_signed_bundle(signed, keys / "mine.pub")


def test_what_git_and_the_hub_keep_in_a_folder_is_left_aside(signed: Path, keys: Path) -> None:
    for name in (".git/config", ".gitattributes", ".cache/huggingface/x"):
        (signed / name).parent.mkdir(parents=True, exist_ok=True)
        (signed / name).write_text("")
    read_signed_bundle(signed, keys / "mine.pub")


def test_a_removed_file_is_one_line(signed: Path, keys: Path) -> None:
    (signed / "bank.jsonl").unlink()
    with pytest.raises(BundleError, match=r"a file of the bundle is missing: .*bank\.jsonl"):
        XAdapterSession.load(signed, verify_key=keys / "mine.pub")
    rehash(signed)
    with pytest.raises(BundleError, match="does not list"):
        (signed / "bank.jsonl").write_text("")
        XAdapterSession.load(signed, verify_key=keys / "mine.pub")


def test_a_signed_file_that_the_manifest_no_longer_lists_is_one_line(signed: Path, keys: Path) -> None:
    from xadapter_export.bundle.signature import check_signed_files

    bundle = read_bundle(signed)
    signature = read_signature(bundle)
    assert signature is not None
    signature.files["was-there"] = "0" * 64
    with pytest.raises(SignatureError, match=r"a file that was signed is not in the bundle: .*was-there"):
        check_signed_files(bundle, signature)


def test_another_key_is_one_line(signed: Path, keys: Path) -> None:
    with pytest.raises(SignatureError, match=r"was not made with this key.*Key mismatch") as caught:
        XAdapterSession.load(signed, verify_key=keys / "other.pub")
    assert "\n" not in str(caught.value)


def test_a_signature_that_claims_the_key_is_not_believed(signed: Path, keys: Path) -> None:
    sign_bundle(signed, keys / "other.pem", force=True)
    file = signed / SIGNATURE_NAME
    fields = json.loads(file.read_text())
    fields["verificationMaterial"]["publicKey"]["hint"] = sha256_file(keys / "mine.pub")
    file.write_text(json.dumps(fields))
    with pytest.raises(SignatureError, match=r"was not made with this key.*InvalidSignature"):
        read_signed_bundle(signed, keys / "mine.pub")


def test_a_bundle_that_is_not_signed_is_one_line(tiny: Path, keys: Path) -> None:
    with pytest.raises(SignatureError, match="the bundle is not signed"):
        XAdapterSession.load(tiny, verify_key=keys / "mine.pub")


@pytest.mark.parametrize(
    "change",
    [
        lambda fields: fields.pop("dsseEnvelope"),
        lambda fields: fields.pop("verificationMaterial"),
        lambda fields: fields["verificationMaterial"].pop("publicKey"),
        lambda fields: fields["verificationMaterial"]["publicKey"].update(hint=None),
        lambda fields: fields["dsseEnvelope"].update(payload="%"),
        lambda fields: fields["dsseEnvelope"].update(payload=base64.b64encode(b"[" * 100_000).decode()),
        lambda fields: fields["dsseEnvelope"].update(payload=base64.b64encode(b'{"predicate": 1}').decode()),
        lambda fields: fields["dsseEnvelope"].update(signatures=[]),
        lambda fields: fields.update(mediaType="text/plain"),
        lambda fields: fields.update(verificationMaterial={"certificate": {"rawBytes": "AAAA"}}),
    ],
)
def test_a_broken_signature_is_one_line(
    signed: Path, keys: Path, change: Callable[[dict[str, object]], object]
) -> None:
    file = signed / SIGNATURE_NAME
    fields = json.loads(file.read_text())
    change(fields)
    file.write_text(json.dumps(fields))
    with pytest.raises(SignatureError) as caught:
        read_signed_bundle(signed, keys / "mine.pub")
    assert "\n" not in str(caught.value)


def test_a_certificate_is_verified_up_to_its_root(signed: Path, keys: Path) -> None:
    signature = sign_bundle(signed, keys / "team.pem", force=True)
    assert signature.signer.startswith("certificate of CN=Release team, SHA-256 ")
    assert read_signed_bundle(signed, keys / "team-root.pem").folder == signed
    stranger = keys.parent / "strangers"
    stranger.mkdir()
    write_certified_key(stranger)
    with pytest.raises(SignatureError, match="was not made with this key"):
        read_signed_bundle(signed, stranger / "team-root.pem")
    with pytest.raises(SignatureError, match=r"with something else.*expected made with a key.*Release team"):
        read_signed_bundle(signed, keys / "mine.pub")


def test_a_key_with_a_password(signed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_key(tmp_path, "secret", b"open sesame")
    with pytest.raises(ConfigError, match=f"Password was not given.*{PASSWORD}"):
        sign_bundle(signed, tmp_path / "secret.pem", force=True)
    monkeypatch.setenv(PASSWORD, "open sesame")
    sign_bundle(signed, tmp_path / "secret.pem", force=True)
    read_signed_bundle(signed, tmp_path / "secret.pub")


@pytest.mark.parametrize("name", ["mine.pub", "missing.pem", "team-root.pem"])
def test_a_key_that_cannot_sign_is_one_line(signed: Path, keys: Path, name: str) -> None:
    before = (signed / SIGNATURE_NAME).read_bytes()
    with pytest.raises(ConfigError, match=r"key.*cannot be read"):
        sign_bundle(signed, keys / name, force=True)
    assert (signed / SIGNATURE_NAME).read_bytes() == before


def test_a_private_key_does_not_verify(signed: Path, keys: Path) -> None:
    with pytest.raises(ConfigError, match=r"key to verify with cannot be read.*openssl pkey"):
        read_signed_bundle(signed, keys / "mine.pem")


def test_what_is_not_whole_is_not_signed(broken: Path, keys: Path) -> None:
    (broken / "notes.txt").write_text("mine")
    with pytest.raises(SignatureError, match=r"no signature covers it: .*notes\.txt"):
        sign_bundle(broken, keys / "mine.pem")
    (broken / "notes.txt").unlink()
    (broken / "bank.jsonl").write_text("x" * (broken / "bank.jsonl").stat().st_size)
    with pytest.raises(HashMismatchError):
        sign_bundle(broken, keys / "mine.pem")
    assert not (broken / SIGNATURE_NAME).exists()


def test_a_signature_is_replaced_only_with_force(signed: Path, keys: Path) -> None:
    (signed / f".{SIGNATURE_NAME}.tmp").write_text("of a run that was killed")
    with pytest.raises(OutputExistsError, match="signed already"):
        sign_bundle(signed, keys / "other.pem")
    sign_bundle(signed, keys / "other.pem", force=True)
    read_signed_bundle(signed, keys / "other.pub")


def test_without_the_extra_its_name_is_given(
    signed: Path, keys: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] in ("model_signing", "cryptography")]:
        monkeypatch.setitem(sys.modules, name, None)
    for name in ("model_signing.signing", "model_signing.verifying"):
        monkeypatch.setitem(sys.modules, name, None)
    for arguments in (
        ("sign", signed, keys / "mine.pem"),
        ("inspect", signed, "--verify-key", keys / "mine.pub"),
    ):
        result = call(*arguments)
        assert result.exit_code == 1
        assert 'pip install "xadapter-export[sign]"' in result.stderr
        assert result.stderr.count("\n") == 1
    with pytest.raises(MissingExtraError):
        XAdapterSession.load(signed, verify_key=keys / "mine.pub")
    assert XAdapterSession.load(signed).fill_mask(TEXT)
    assert "not verified" in call("inspect", signed).stdout


def test_the_commands_sign_and_say_who_signed(broken: Path, keys: Path) -> None:
    assert re_signed(call("inspect", broken).stdout) == "no"
    result = call("sign", broken, keys / "mine.pem")
    assert result.exit_code == 0
    assert sha256_file(keys / "mine.pub") in result.stdout
    assert re_signed(call("inspect", broken).stdout).startswith("not verified (use --verify-key), with key")
    shown = call("inspect", broken, "--verify-key", keys / "mine.pub").stdout
    assert re_signed(shown).startswith("verified, with key with SHA-256")
    assert call("inspect", broken, "--verify-key", keys / "other.pub").exit_code == 1
    assert json.loads(call("inspect", broken, "--json").stdout)["signature"].startswith("not verified")
    assert re_signed(call("inspect", broken, "--no-verify").stdout) == "not read"
    assert call("run", broken, TEXT, "--verify-key", keys / "mine.pub").exit_code == 0
    assert call("run", broken, TEXT, "--verify-key", keys / "other.pub").exit_code == 1


def re_signed(text: str) -> str:
    return next(
        line.removeprefix("signed").strip() for line in text.splitlines() if line.startswith("signed")
    )


@pytest.mark.long
def test_an_export_is_signed_and_a_swap_loses_the_signature(keys: Path, tmp_path: Path) -> None:
    from tests.tiny_checkpoint import make_model  # PyTorch, which the other tests do without
    from tests.trust.kill import write_bank
    from xadapter_export import export

    output, key = tmp_path / "out", keys / "mine.pem"
    export(make_model(tmp_path / "parts"), output, ("v",), sign=key)
    write_bank(tmp_path / "bank", 7, 50)
    read_signed_bundle(output, keys / "mine.pub")
    statement = json.loads((output / SIGNATURE_NAME).read_text())["dsseEnvelope"]["payload"]
    assert json.loads(base64.b64decode(statement))["subject"][0]["name"] == "out"
    line = ("bank", "swap", output, tmp_path / "bank", "--assume-clip")
    done = call(*line, "-o", tmp_path / "again", "--sign", key)
    assert done.exit_code == 0, done.output
    read_signed_bundle(tmp_path / "again", keys / "mine.pub")
    assert "signed" not in done.stderr
    done = call(*line)
    assert done.exit_code == 0, done.output
    assert "the old bundle was signed; the new one is not" in done.stderr
    assert read_signature(read_bundle(output)) is None


def test_a_key_that_cannot_sign_costs_no_export(keys: Path, tmp_path: Path) -> None:
    done = call(
        "export", tmp_path / "nowhere", "-o", tmp_path / "out", "--sign", keys / "mine.pub", "--quiet"
    )
    assert "the key to sign with cannot be read" in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_the_librarys_own_command_verifies_and_signs(signed: Path, keys: Path) -> None:
    def own(*arguments: object) -> None:
        line = [sys.executable, "-m", "model_signing", *map(str, arguments)]
        subprocess.run(line, check=True, capture_output=True)

    file = signed / SIGNATURE_NAME
    own("verify", "key", signed, "--signature", file, "--public_key", keys / "mine.pub")
    own("sign", "key", signed, "--signature", file, "--private_key", keys / "other.pem")
    read_signed_bundle(signed, keys / "other.pub")
