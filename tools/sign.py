"""`latentrelay sign`: put a signature of OpenSSF model signing beside a bundle's files.

The bundle is verified first, so nothing damaged is signed; the signature is verified afterwards as a device does it.
Keys are elliptic-curve keys in PEM files (P-256 by default, P-384 and P-521 too), made with openssl.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from latentrelay.runtime import Bundle
from latentrelay.runtime.errors import RequestError
from latentrelay.runtime.signature import SIGNATURE_NAME, SignedFiles, verify_bundle_signature
from latentrelay.tools.console import emit, extra

_MAKE_A_KEY = "Make one: openssl ecparam -name prime256v1 -genkey -noout -out private.pem"


def run(bundle: Path, *, key: Path, output: Path | None, password: str | None = None, as_json: bool) -> None:
    """Raises BundleError (exit status 3) for a damaged bundle, RequestError (2) for a key that cannot sign."""
    signed = sign_bundle(bundle, key, output, password=password)
    path = output or bundle / SIGNATURE_NAME
    document: dict[str, Any] = {
        "ok": True,
        "signature": str(path),
        "bytes": path.stat().st_size,
        "files": len(signed.digests),
        "key": signed.key,
    }

    def show(console: Any) -> None:
        console.print(f"[green]signed[/]: {document['files']} files, key {signed.key[:16]}, in {path}")

    emit(document, as_json, show)


def sign_bundle(bundle: Path, key: Path, output: Path | None = None, *, password: str | None = None) -> SignedFiles:
    """Sign every file of `bundle`; the signature goes to `output`, by default `model.sig` in the bundle, whole or not
    at all, in place of an older one. `password` is the private key's, where it is encrypted."""
    Bundle.open(bundle)
    public = _public_half(key, password)
    with extra("sign", "signing a bundle"):
        from model_signing import hashing, signing
    place = _place(bundle, output)
    hashed = hashing.Config().set_ignored_paths(paths=[SIGNATURE_NAME], ignore_git_paths=False)
    signer = signing.Config().set_hashing_config(hashed)
    signer.use_elliptic_key_signer(private_key=key, password=password.encode() if password else None)
    with tempfile.TemporaryDirectory() as work:
        fresh = Path(work) / SIGNATURE_NAME
        signer.sign(bundle, fresh)
        signed = verify_bundle_signature(bundle, public, signature=fresh)
        text = fresh.read_bytes()
    partial = place.with_name(f".{place.name}.partial")
    partial.write_bytes(text)
    partial.replace(place)
    return signed


def _place(bundle: Path, output: Path | None) -> Path:
    inside = bundle / SIGNATURE_NAME
    place = inside if output is None else output
    if place.resolve() != inside.resolve() and place.resolve().is_relative_to(bundle.resolve()):
        raise RequestError(
            "a bundle holds its signature under one name",
            got=str(place),
            expected=f"{inside}, or a place outside the bundle",
            do="Leave --output out.",
        )
    return place


def _public_half(key: Path, password: str | None) -> bytes:
    """The public key of a private one, PEM."""
    with extra("sign", "signing a bundle"):
        from cryptography.exceptions import UnsupportedAlgorithm
        from cryptography.hazmat.primitives import serialization
        from cryptography.hazmat.primitives.asymmetric import ec
    form = serialization.PublicFormat.SubjectPublicKeyInfo
    try:
        private = serialization.load_pem_private_key(key.read_bytes(), password.encode() if password else None)
        if not isinstance(private, ec.EllipticCurvePrivateKey):
            raise ValueError(f"a key of another kind ({type(private).__name__.lstrip('_')})")
        return private.public_key().public_bytes(serialization.Encoding.PEM, form)
    except (OSError, ValueError, TypeError, UnsupportedAlgorithm) as error:
        what = error.strerror if isinstance(error, OSError) else str(error).split(".")[0]
        raise RequestError(
            "the private key cannot be used",
            got=what,
            expected="a PEM file with an elliptic-curve private key, and its password if it has one",
            do=_MAKE_A_KEY,
        ) from error
