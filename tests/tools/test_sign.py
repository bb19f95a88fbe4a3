"""Signed bundles: `latentrelay sign` and the runtime's verifier against OpenSSF model signing's own, both ways."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from latentrelay.runtime import Bundle
from latentrelay.runtime.digest import json_digest, sha256_file
from latentrelay.runtime.errors import (
    BundleLayoutError,
    BundleSignatureError,
    BundleTamperedError,
    ManifestError,
    RequestError,
)
from latentrelay.runtime.signature import SIGNATURE_NAME, parse_signature, verify_bundle_signature
from latentrelay.tools import sign, verify
from latentrelay.tools.sign import sign_bundle

pytestmark = pytest.mark.skipif(shutil.which("openssl") is None, reason="makes its keys with the openssl command")


def make_keys(folder: Path, curve: str = "prime256v1") -> SimpleNamespace:
    """A key pair as docs/security.md says to make it."""
    folder.mkdir(parents=True, exist_ok=True)
    private, public = folder / "private.pem", folder / "public.pem"
    for command in (
        ["openssl", "ecparam", "-name", curve, "-genkey", "-noout", "-out", private],
        ["openssl", "ec", "-in", private, "-pubout", "-out", public],
    ):
        subprocess.run(command, check=True, capture_output=True)
    return SimpleNamespace(private=private, public=public)


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    return make_keys(tmp_path_factory.mktemp("keys"))


@pytest.fixture(scope="module")
def other_keys(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    return make_keys(tmp_path_factory.mktemp("other-keys"))


@pytest.fixture(scope="module")
def _signed(keys: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> Path:
    golden = Path(__file__).parents[1] / "golden" / "bundle-1.3"
    folder = Path(shutil.copytree(golden, tmp_path_factory.mktemp("signed") / "bundle"))
    sign_bundle(folder, keys.private)
    return folder


@pytest.fixture
def signed(_signed: Path, tmp_path: Path) -> Path:
    """A signed copy of a golden bundle, to be spoilt."""
    return Path(shutil.copytree(_signed, tmp_path / "bundle"))


def reseal(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the manifest and give it the digest of what it then says."""
    document = json.loads((folder / "manifest.json").read_text())
    change(document)
    document.pop("digest")
    document["digest"] = json_digest(document)
    (folder / "manifest.json").write_text(json.dumps(document))


def list_as_it_is(folder: Path, path: str) -> Callable[[dict[str, Any]], None]:
    """The manifest's entry of a file, made to fit what the file now is."""

    def change(document: dict[str, Any]) -> None:
        (entry,) = [each for each in document["files"] if each["path"] == path]
        entry.update(bytes=(folder / path).stat().st_size, sha256=sha256_file(folder / path))

    return change


def test_a_signed_bundle_opens_with_and_without_the_key(signed: Path, keys: SimpleNamespace) -> None:
    fingerprint = hashlib.sha256(keys.public.read_bytes()).hexdigest()
    assert Bundle.open(signed).signed_by is None
    for key in (keys.public, str(keys.public), keys.public.read_bytes()):
        assert Bundle.open(signed, public_key=key, require_signature=True).signed_by == fingerprint
    listed = verify_bundle_signature(signed, keys.public)
    assert set(listed.digests) == {entry.path for entry in Bundle.open(signed).files} | {"manifest.json"}
    assert listed.digests["manifest.json"] == sha256_file(signed / "manifest.json")


@pytest.mark.parametrize("curve", ["prime256v1", "secp384r1", "secp521r1"])
def test_the_libraries_verifier_accepts_what_we_sign(signed: Path, tmp_path: Path, curve: str) -> None:
    from model_signing import verifying

    keys = make_keys(tmp_path / "keys", curve)
    sign_bundle(signed, keys.private)
    Bundle.open(signed, public_key=keys.public)
    verifier = verifying.Config().use_elliptic_key_verifier(public_key=keys.public)
    verifier.verify(signed, signed / SIGNATURE_NAME)
    (signed / "manifest.json").write_bytes((signed / "manifest.json").read_bytes() + b" ")
    with pytest.raises(ValueError, match="mismatch"):
        verifier.verify(signed, signed / SIGNATURE_NAME)


def test_the_libraries_command_verifies_and_signs(signed: Path, keys: SimpleNamespace) -> None:
    place = ["--signature", signed / SIGNATURE_NAME]
    command = [sys.executable, "-m", "model_signing"]
    verified = [*command, "verify", "key", signed, *place, "--public_key", keys.public]
    subprocess.run(verified, check=True, capture_output=True)
    (signed / SIGNATURE_NAME).unlink()
    subprocess.run(
        [*command, "sign", "key", signed, *place, "--private_key", keys.private], check=True, capture_output=True
    )
    Bundle.open(signed, public_key=keys.public)
    verify_bundle_signature(signed, keys.public)


def test_the_libraries_interface_signs_what_we_verify(signed: Path, keys: SimpleNamespace) -> None:
    from model_signing import signing

    (signed / SIGNATURE_NAME).unlink()
    signer = signing.Config().use_elliptic_key_signer(private_key=keys.private)
    signer.sign(signed, signed.parent / "outside.sig")
    verify_bundle_signature(signed, keys.public, signature=signed.parent / "outside.sig")
    with pytest.raises(BundleSignatureError, match="not signed"):
        verify_bundle_signature(signed, keys.public)


def test_an_unsigned_bundle_is_refused_where_the_policy_says_so(signed: Path, keys: SimpleNamespace) -> None:
    (signed / SIGNATURE_NAME).unlink()
    assert Bundle.open(signed).signed_by is None
    assert Bundle.open(signed, public_key=keys.public, require_signature=False).signed_by is None
    for required in (None, True):
        with pytest.raises(BundleSignatureError, match="not signed") as caught:
            Bundle.open(signed, public_key=keys.public, require_signature=required)
        assert caught.value.exit_status == 3
    with pytest.raises(RequestError, match="no key"):
        Bundle.open(signed, require_signature=True)


@pytest.mark.parametrize("required", [None, True, False])
def test_another_key_is_refused(signed: Path, other_keys: SimpleNamespace, required: bool | None) -> None:
    with pytest.raises(BundleSignatureError, match="another key"):
        Bundle.open(signed, public_key=other_keys.public, require_signature=required)
    rewrite(signed, lambda document: document["verificationMaterial"]["publicKey"].pop("hint"))
    with pytest.raises(BundleSignatureError, match="not valid for this key"):
        Bundle.open(signed, public_key=other_keys.public, require_signature=required)


def rewrite(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    document = json.loads((folder / SIGNATURE_NAME).read_text())
    change(document)
    (folder / SIGNATURE_NAME).write_text(json.dumps(document))


def test_a_resealed_manifest_with_a_changed_file_is_refused(signed: Path, keys: SimpleNamespace) -> None:
    path = "tokenizer/tokenizer.json"
    (signed / path).write_bytes((signed / path).read_bytes() + b"\n")
    with pytest.raises(BundleTamperedError):
        Bundle.open(signed, public_key=keys.public)
    reseal(signed, list_as_it_is(signed, path))
    Bundle.open(signed)  # whoever does not ask for a signature sees a bundle in order
    for opened in (Bundle.open, verify_bundle_signature):
        with pytest.raises(BundleSignatureError, match="is not what was signed"):
            opened(signed, public_key=keys.public)


def test_a_changed_manifest_alone_is_refused(signed: Path, keys: SimpleNamespace) -> None:
    (signed / "manifest.json").write_bytes((signed / "manifest.json").read_bytes() + b"\n")
    Bundle.open(signed)
    with pytest.raises(BundleSignatureError, match=r"manifest\.json is not what was signed"):
        Bundle.open(signed, public_key=keys.public)


def test_files_are_hashed_against_the_signed_manifest(signed: Path, keys: SimpleNamespace) -> None:
    text = (signed / "tokenizer/tokenizer.json").read_bytes()
    (signed / "tokenizer/tokenizer.json").write_bytes(b"X" + text[1:])
    with pytest.raises(BundleTamperedError):
        Bundle.open(signed, public_key=keys.public)
    with pytest.raises(BundleSignatureError, match="is not what was signed"):
        verify_bundle_signature(signed, keys.public)


def test_another_bundles_signature_is_refused(signed: Path, keys: SimpleNamespace, tmp_path: Path) -> None:
    other = Path(shutil.copytree(signed, tmp_path / "other"))
    reseal(other, lambda document: document.update(parity={}))
    sign_bundle(other, keys.private)
    shutil.copy(other / SIGNATURE_NAME, signed / SIGNATURE_NAME)
    with pytest.raises(BundleSignatureError, match="is not what was signed"):
        Bundle.open(signed, public_key=keys.public)


def test_extra_and_missing_files_are_refused(signed: Path, keys: SimpleNamespace) -> None:
    (signed / "unet" / "extra.bin").write_bytes(b"x")
    with pytest.raises(BundleLayoutError, match="does not list"):
        Bundle.open(signed, public_key=keys.public)
    with pytest.raises(BundleSignatureError, match="does not cover"):
        verify_bundle_signature(signed, keys.public)
    listed = {"path": "unet/extra.bin", "bytes": 1, "sha256": sha256_file(signed / "unet" / "extra.bin")}
    reseal(signed, lambda document: document["files"].append(listed))
    with pytest.raises(BundleSignatureError, match="does not cover"):
        Bundle.open(signed, public_key=keys.public)
    (signed / "unet" / "extra.bin").unlink()
    (signed / "tokenizer" / "tokenizer.json").unlink()
    with pytest.raises(BundleSignatureError, match="missing"):
        verify_bundle_signature(signed, keys.public)


def test_a_second_signature_file_is_an_extra_file(signed: Path, keys: SimpleNamespace) -> None:
    shutil.copy(signed / SIGNATURE_NAME, signed / "unet" / SIGNATURE_NAME)
    with pytest.raises(BundleLayoutError, match="does not list"):
        Bundle.open(signed, public_key=keys.public)


@pytest.mark.parametrize("path", [SIGNATURE_NAME, "tokenizer/tokenizer.json"])
def test_links_are_refused(signed: Path, keys: SimpleNamespace, path: str) -> None:
    (signed / path).rename(signed.parent / "elsewhere")
    (signed / path).symlink_to(signed.parent / "elsewhere")
    for opened in (Bundle.open, verify_bundle_signature):
        with pytest.raises(BundleLayoutError, match="is a link"):
            opened(signed, public_key=keys.public)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
@pytest.mark.parametrize("opened", [Bundle.open, verify_bundle_signature])
def test_a_pipe_in_the_signatures_place_is_not_waited_for(
    signed: Path, keys: SimpleNamespace, opened: Callable[..., Any]
) -> None:
    (signed / SIGNATURE_NAME).unlink()
    os.mkfifo(signed / SIGNATURE_NAME)
    errors: list[Exception] = []

    def ask() -> None:
        try:
            opened(signed, public_key=keys.public)
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(30)
    assert not thread.is_alive()
    assert isinstance(errors[0], BundleLayoutError)


def test_a_manifest_cannot_list_the_signature(signed: Path, keys: SimpleNamespace) -> None:
    entry = {"path": SIGNATURE_NAME, "bytes": 1, "sha256": "0" * 64}
    reseal(signed, lambda document: document["files"].append(entry))
    with pytest.raises((BundleLayoutError, ManifestError)):
        Bundle.open(signed)


def forge(document: dict[str, Any], change: Callable[[dict[str, Any]], object]) -> None:
    """Change the signed statement; the signature over it is left as it was."""
    envelope = document["dsseEnvelope"]
    statement = json.loads(base64.b64decode(envelope["payload"]))
    change(statement)
    envelope["payload"] = base64.b64encode(json.dumps(statement).encode()).decode()


FORGED: list[Callable[[dict[str, Any]], object]] = [
    lambda document: forge(document, lambda statement: statement["predicate"]["resources"].pop()),
    lambda document: document["dsseEnvelope"]["signatures"][0].update(sig=base64.b64encode(b"x" * 70).decode()),
    lambda document: document["dsseEnvelope"]["signatures"][0].update(sig=""),
    lambda document: document["dsseEnvelope"].update(signatures=[]),
    lambda document: document["dsseEnvelope"].update(payload="%%%"),
    lambda document: document["dsseEnvelope"].update(payloadType="text/plain"),
    lambda document: document.update(mediaType="x"),
    lambda document: document.update(verificationMaterial=None),
    lambda document: document.clear(),
]


@pytest.mark.parametrize("change", FORGED)
def test_forged_signatures_are_refused(
    signed: Path, keys: SimpleNamespace, change: Callable[[dict[str, Any]], object]
) -> None:
    rewrite(signed, change)
    with pytest.raises(BundleSignatureError):
        Bundle.open(signed, public_key=keys.public)


def test_damaged_signatures_never_do_worse_than_a_signature_error(signed: Path, keys: SimpleNamespace) -> None:
    text, refused = (signed / SIGNATURE_NAME).read_bytes(), 0
    good = parse_signature(text, keys.public)
    for position in range(0, len(text), max(1, len(text) // 300)):
        changed = bytearray(text)
        changed[position] ^= 0x04
        for damaged in (bytes(changed), text[:position], b"[" * position):
            try:
                assert parse_signature(damaged, keys.public) == good  # damage outside what is signed
            except BundleSignatureError:
                refused += 1
    assert refused > 800


def signed_statement(keys: SimpleNamespace, statement: dict[str, Any]) -> bytes:
    """A signature file, valid for the key, over any statement."""
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    payload = json.dumps(statement).encode()
    kind = b"application/vnd.in-toto+json"
    key = serialization.load_pem_private_key(keys.private.read_bytes(), None)
    signature = key.sign(b"DSSEv1 %d %s %d %s" % (len(kind), kind, len(payload), payload), ec.ECDSA(hashes.SHA256()))
    envelope = {
        "payload": base64.b64encode(payload).decode(),
        "payloadType": kind.decode(),
        "signatures": [{"sig": base64.b64encode(signature).decode(), "keyid": ""}],
    }
    hint = hashlib.sha256(keys.public.read_bytes()).hexdigest()
    return json.dumps(
        {
            "mediaType": "application/vnd.dev.sigstore.bundle.v0.3+json",
            "verificationMaterial": {"publicKey": {"hint": hint}},
            "dsseEnvelope": envelope,
        }
    ).encode()


def statement(**changes: Any) -> dict[str, Any]:
    resources = [{"name": name, "algorithm": "sha256", "digest": "ab" * 32} for name in ("a", "b")]
    whole = hashlib.sha256(bytes.fromhex("ab" * 64)).hexdigest()
    form = {"method": "files", "hash_type": "sha256", "allow_symlinks": False, "ignore_paths": []}
    document: dict[str, Any] = {
        "_type": "https://in-toto.io/Statement/v1",
        "subject": [{"name": "bundle", "digest": {"sha256": whole}}],
        "predicateType": "https://model_signing/signature/v1.0",
        "predicate": {"serialization": form, "resources": resources},
    }
    document["predicate"] |= {key: value for key, value in changes.items() if key in ("serialization", "resources")}
    return document | {key: value for key, value in changes.items() if key in document}


def test_what_a_statement_must_be(keys: SimpleNamespace) -> None:
    good = statement()
    assert set(parse_signature(signed_statement(keys, good), keys.public).digests) == {"a", "b"}
    resources = good["predicate"]["resources"]
    form = good["predicate"]["serialization"]
    for changes in [
        {"_type": "x"},
        {"predicateType": "https://model_signing/Digests/v0.1"},
        {"subject": []},
        {"subject": [{"name": "bundle", "digest": {"sha256": "00" * 32}}]},
        {"serialization": form | {"method": "shards"}},
        {"serialization": form | {"hash_type": "blake3"}},
        {"serialization": form | {"allow_symlinks": True}},
        {"resources": resources[:1]},
        {"resources": [resources[0], resources[0]]},
        {"resources": [resources[0], resources[1] | {"algorithm": "md5"}]},
        {"resources": [resources[0], resources[1] | {"digest": "ab"}]},
        {"resources": [resources[0], resources[1] | {"name": ["b"]}]},
        {"resources": "x"},
    ]:
        with pytest.raises(BundleSignatureError, match="is not a signature"):
            parse_signature(signed_statement(keys, statement(**changes)), keys.public)


@pytest.mark.parametrize("kind", ["private", "rsa", "text", "missing", "p224"])
def test_what_is_no_such_key_is_misuse(signed: Path, keys: SimpleNamespace, tmp_path: Path, kind: str) -> None:
    key = tmp_path / "key.pem"
    if kind == "private":
        key = keys.private
    elif kind == "text":
        key.write_text("hello")
    elif kind == "p224":
        key = make_keys(tmp_path / "p224", "secp224r1").public
    elif kind == "rsa":
        made = tmp_path / "rsa.pem"
        subprocess.run(["openssl", "genrsa", "-out", made, "2048"], check=True, capture_output=True)
        subprocess.run(["openssl", "rsa", "-in", made, "-pubout", "-out", key], check=True, capture_output=True)
    with pytest.raises(RequestError, match="public key cannot be used") as caught:
        Bundle.open(signed, public_key=key)
    assert caught.value.exit_status == 2


def test_a_damaged_bundle_is_not_signed(signed: Path, keys: SimpleNamespace) -> None:
    before = (signed / SIGNATURE_NAME).read_bytes()
    (signed / "tokenizer" / "tokenizer.json").write_bytes(b"x")
    with pytest.raises(BundleTamperedError):
        sign_bundle(signed, keys.private)
    assert (signed / SIGNATURE_NAME).read_bytes() == before


def test_signing_again_replaces_the_signature(signed: Path, other_keys: SimpleNamespace) -> None:
    sign_bundle(signed, other_keys.private)
    Bundle.open(signed, public_key=other_keys.public)
    assert [path.name for path in signed.glob("*sig*")] == [SIGNATURE_NAME]


def test_where_a_signature_goes(signed: Path, keys: SimpleNamespace, tmp_path: Path) -> None:
    sign_bundle(signed, keys.private, tmp_path / "apart.sig")
    verify_bundle_signature(signed, keys.public, signature=tmp_path / "apart.sig")
    with pytest.raises(RequestError, match="under one name"):
        sign_bundle(signed, keys.private, signed / "unet" / "other.sig")


def test_keys_that_cannot_sign_and_passwords(signed: Path, keys: SimpleNamespace, tmp_path: Path) -> None:
    locked = tmp_path / "locked.pem"
    command = ["openssl", "ec", "-in", keys.private, "-aes256", "-passout", "pass:secret words", "-out", locked]
    subprocess.run(command, check=True, capture_output=True)
    assert sign_bundle(signed, locked, password="secret words").key
    Bundle.open(signed, public_key=keys.public)
    for key, password in ((locked, None), (locked, "wrong"), (keys.public, None), (tmp_path / "none.pem", None)):
        with pytest.raises(RequestError, match="private key cannot be used") as caught:
            sign_bundle(signed, key, password=password)
        assert "secret" not in str(caught.value)


def test_a_private_key_of_another_kind_is_misuse(signed: Path, tmp_path: Path) -> None:
    made = tmp_path / "rsa.pem"
    subprocess.run(["openssl", "genrsa", "-out", made, "2048"], check=True, capture_output=True)
    with pytest.raises(RequestError, match="elliptic-curve"):
        sign_bundle(signed, made)


def test_a_verifier_without_cryptography_says_how_to_get_it(signed: Path, keys: SimpleNamespace) -> None:
    code = (
        "import sys; sys.modules['cryptography'] = None\nfrom latentrelay.runtime import Bundle\n"
        "Bundle.open(sys.argv[1])\ntry:\n    Bundle.open(sys.argv[1], public_key=sys.argv[2])\n"
        "except Exception as error:\n    print(type(error).__name__, error.exit_status, error)"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", code, signed, keys.public], capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("MissingExtraError 2 ")
    assert "latentrelay[sign]" in done.stdout


def test_what_the_commands_print(signed: Path, keys: SimpleNamespace, capsys: pytest.CaptureFixture[str]) -> None:
    fingerprint = hashlib.sha256(keys.public.read_bytes()).hexdigest()
    (signed / SIGNATURE_NAME).unlink()
    sign.run(signed, key=keys.private, output=None, as_json=True)
    printed = json.loads(capsys.readouterr().out)
    path = signed / SIGNATURE_NAME
    files = len(Bundle.open(signed).files) + 1
    expected = {"ok": True, "signature": str(path), "bytes": path.stat().st_size, "files": files, "key": fingerprint}
    assert printed == expected
    verify.run(signed, selftest=False, as_json=True, key=keys.public)
    assert json.loads(capsys.readouterr().out)["signed_by"] == fingerprint
    verify.run(signed, selftest=False, as_json=True)
    assert "signed_by" not in json.loads(capsys.readouterr().out)
    sign.run(signed, key=keys.private, output=None, as_json=False)
    verify.run(signed, selftest=False, as_json=False, key=keys.public)
    assert capsys.readouterr().out.count(fingerprint[:16]) == 2
