"""A bundle's signature: OpenSSF model signing with an elliptic-curve key, verified without the signing library.

In: a folder with `model.sig` (a Sigstore bundle: a DSSE envelope around an in-toto statement that lists every file's
sha256) and a PEM public key. Out: the signed digests, or BundleSignatureError. What is signed is every file of the
bundle as it is, manifest.json included, and nothing else; `model.sig` itself is the one file beside them. Needs the
module `cryptography` (extra `sign`), imported when a signature is verified. Signing is `latentrelay sign`.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from latentrelay.runtime.digest import sha256_file
from latentrelay.runtime.errors import BundleSignatureError, MissingExtraError, RequestError
from latentrelay.runtime.regular_files import regular_files
from latentrelay.runtime.strict_json import read_json

SIGNATURE_NAME = "model.sig"
MAX_SIGNATURE_BYTES = 16 * 2**20
_MEDIA_TYPE = "application/vnd.dev.sigstore.bundle.v0.3+json"
_PAYLOAD_TYPE = "application/vnd.in-toto+json"
_STATEMENT_TYPE = "https://in-toto.io/Statement/v1"
_PREDICATE_TYPE = "https://model_signing/signature/v1.0"
_HASHES = {"secp256r1": "SHA256", "secp384r1": "SHA384", "secp521r1": "SHA512"}
_DO = "Fetch the bundle again from whoever signed it, or give the key that signed it."

PublicKey = bytes | str | os.PathLike[str]


@dataclass(frozen=True)
class SignedFiles:
    """What a valid signature covers: `digests` maps POSIX paths to bare hex sha256; `key` is the key's fingerprint,
    the hex sha256 of its PEM form; `name` is what the signer's folder was called."""

    digests: Mapping[str, str]
    key: str
    name: str


def verify_bundle_signature(
    folder: str | os.PathLike[str], public_key: PublicKey, *, signature: str | os.PathLike[str] | None = None
) -> SignedFiles:
    """Verify every file of `folder` against its signature, and that there are no others. Each file is hashed once.

    `public_key`: PEM bytes, or the path of a PEM file. `signature`: another place than `model.sig` in the folder.
    Raises BundleSignatureError (exit status 3), BundleLayoutError for links and special files, RequestError for what is
    no such key, MissingExtraError.
    """
    root = Path(folder).resolve()
    path = Path(signature) if signature is not None else root / SIGNATURE_NAME
    found = {name for name in regular_files(root) if name != SIGNATURE_NAME}
    signed = read_signature(path, public_key)
    check_covers(signed, {name: sha256_file(root / name) for name in sorted(found & set(signed.digests))}, found)
    return signed


def read_signature(path: Path, public_key: PublicKey) -> SignedFiles:
    """The files that the signature in `path` covers, once the key fits it; no file of the bundle is looked at."""
    try:
        with path.open("rb") as file:
            text = file.read(MAX_SIGNATURE_BYTES + 1)
    except FileNotFoundError:
        raise BundleSignatureError(
            "the bundle is not signed",
            path=SIGNATURE_NAME,
            expected=f"the file {SIGNATURE_NAME} in its folder",
            do="Sign it with `latentrelay sign`, or take a bundle that is signed.",
        ) from None
    except OSError as error:
        raise BundleSignatureError(
            "the signature cannot be read", path=SIGNATURE_NAME, got=error.strerror, do=_DO
        ) from error
    return parse_signature(text, public_key)


def parse_signature(text: bytes, public_key: PublicKey) -> SignedFiles:
    """The same for the bytes of a signature."""
    key = _load_key(public_key)
    if len(text) > MAX_SIGNATURE_BYTES:
        raise _malformed(f"more than {MAX_SIGNATURE_BYTES} bytes")
    try:
        payload, signature, hint = _envelope(read_json(text))
        if hint is not None and hint != key.fingerprint:
            raise BundleSignatureError(
                "the bundle was signed with another key",
                path=SIGNATURE_NAME,
                got=f"key {str(hint)[:16]}",
                expected=f"key {key.fingerprint[:16]}",
                do=_DO,
            )
        key.verify(signature, _encoded(payload))
        name, digests = _statement(read_json(payload))
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise _malformed(str(error)) from error
    return SignedFiles(digests, key.fingerprint, name)


def check_covers(signed: SignedFiles, digests: Mapping[str, str], found: set[str]) -> None:
    """Raise BundleSignatureError unless exactly the files `found` are signed, with these digests."""
    for path in sorted(found - set(signed.digests)):
        raise BundleSignatureError("the signature does not cover this file", path=path, got=path, do=_DO)
    for path in sorted(set(signed.digests) - found):
        raise BundleSignatureError("a signed file is missing", path=path, expected=path, do=_DO)
    for path in sorted(found):
        if digests[path] != signed.digests[path]:
            raise BundleSignatureError(
                f"{path} is not what was signed", path=path, got=digests[path], expected=signed.digests[path], do=_DO
            )


class _Key:
    """A public key of one of the three curves that model signing knows."""

    def __init__(self, key: Any, pem: bytes) -> None:
        self._key = key
        self.fingerprint = hashlib.sha256(pem).hexdigest()

    def verify(self, signature: bytes, message: bytes) -> None:
        from cryptography.exceptions import InvalidSignature
        from cryptography.hazmat.primitives import hashes
        from cryptography.hazmat.primitives.asymmetric import ec

        try:
            self._key.verify(signature, message, ec.ECDSA(getattr(hashes, _HASHES[self._key.curve.name])()))
        except InvalidSignature:
            raise BundleSignatureError(
                "the bundle's signature is not valid for this key", path=SIGNATURE_NAME, do=_DO
            ) from None


def _load_key(public_key: PublicKey) -> _Key:
    try:
        from cryptography.exceptions import UnsupportedAlgorithm
        from cryptography.hazmat.primitives import serialization
    except ModuleNotFoundError as error:
        raise MissingExtraError("cryptography", "sign", purpose="verifying a signature") from error
    try:
        text = public_key if isinstance(public_key, bytes) else Path(public_key).read_bytes()
        key = serialization.load_pem_public_key(text)
        if getattr(getattr(key, "curve", None), "name", "") not in _HASHES:
            raise ValueError(f"a key of another kind ({type(key).__name__})")
    except (OSError, ValueError, UnsupportedAlgorithm) as error:
        what = error.strerror if isinstance(error, OSError) else str(error).split(".")[0]
        raise RequestError(
            "the public key cannot be used",
            got=what,
            expected="a PEM file with an ECDSA public key (P-256, P-384 or P-521)",
            do="Make it from the private key: openssl ec -in private.pem -pubout -out public.pem",
        ) from error
    form = serialization.PublicFormat.SubjectPublicKeyInfo
    return _Key(key, key.public_bytes(serialization.Encoding.PEM, form))


def _envelope(document: Any) -> tuple[bytes, bytes, Any]:
    """Payload, signature and the signing key's fingerprint of a Sigstore bundle."""
    if document["mediaType"] != _MEDIA_TYPE:
        raise ValueError(f"media type {str(document['mediaType'])[:80]}, expected {_MEDIA_TYPE}")
    envelope = document["dsseEnvelope"]
    if envelope["payloadType"] != _PAYLOAD_TYPE or len(envelope["signatures"]) != 1:
        raise ValueError("expected one signature over an in-toto statement")
    hint = document["verificationMaterial"]["publicKey"].get("hint")
    return _decoded(envelope["payload"]), _decoded(envelope["signatures"][0]["sig"]), hint


def _statement(document: Any) -> tuple[str, dict[str, str]]:
    """The folder's name and the digests of an in-toto statement of model signing."""
    if document["_type"] != _STATEMENT_TYPE or document["predicateType"] != _PREDICATE_TYPE:
        raise ValueError(f"expected a statement of {_PREDICATE_TYPE}")
    (subject,), predicate = document["subject"], document["predicate"]
    form = predicate["serialization"]
    if form["method"] != "files" or form["hash_type"] != "sha256" or form.get("allow_symlinks", False) is not False:
        raise ValueError("expected the sha256 of whole files, without links; sign with `latentrelay sign`")
    digests, whole = {}, hashlib.sha256()
    for resource in predicate["resources"]:
        name, digest = resource["name"], resource["digest"]
        if resource["algorithm"] != "sha256" or name in digests or len(bytes.fromhex(digest)) != 32:
            raise ValueError(f"a repeated file or no sha256: {str(name)[:80]}")
        digests[str(name)] = str(digest).lower()
        whole.update(bytes.fromhex(digest))
    if whole.hexdigest() != subject["digest"]["sha256"]:
        raise ValueError("the statement's own digest differs")
    return str(subject["name"]), digests


def _encoded(payload: bytes) -> bytes:
    """What is signed: DSSE's pre-authentication encoding."""
    return b"DSSEv1 %d %s %d %s" % (len(_PAYLOAD_TYPE), _PAYLOAD_TYPE.encode(), len(payload), payload)


def _decoded(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except binascii.Error as error:
        raise ValueError("not base64") from error


def _malformed(what: str) -> BundleSignatureError:
    return BundleSignatureError(
        f"{SIGNATURE_NAME} is not a signature of OpenSSF model signing", path=SIGNATURE_NAME, got=what[:160], do=_DO
    )
