"""Whose certificates a client takes: the operator's own file, or the file that SSL_CERT_FILE names, or httpx's default.

And which failure is a certificate's. No key and no password goes through here; checking is never switched off.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from latentrelay.runtime.errors import CloudCertificateError, RequestError

if TYPE_CHECKING:
    import ssl


def trusted(url: str, ca_file: Path | str | None) -> ssl.SSLContext | None:
    """What the certificate of an https address is checked against; None: httpx's default, or no TLS.

    `ca_file` is PEM: the service's own certificate, or those of the authorities that may have signed it, and nothing
    else is believed then. Without it SSL_CERT_FILE counts, on loopback too. Raises RequestError for a file that cannot
    be read or holds no certificate.
    """
    path = ca_file
    if path is None and url.lower().startswith("https:"):
        path = os.environ.get("SSL_CERT_FILE") or None
    if path is None:
        return None
    import ssl

    try:
        return ssl.create_default_context(cafile=path)
    except (OSError, ValueError) as error:  # an SSLError is an OSError
        raise RequestError(
            "the file of trusted certificates cannot be read",
            got=f"{path}: {getattr(error, 'strerror', None) or error}",
            expected="certificates in PEM",
            do="Give the service's certificate, or its authority's (--ca, ca_file, SSL_CERT_FILE).",
        ) from error


def certificate_error(error: BaseException, url: str) -> CloudCertificateError | None:
    """The error of a certificate that was not believed; None where that is not what went wrong."""
    import ssl

    for each in _chain(error):
        if isinstance(each, ssl.SSLCertVerificationError):
            return CloudCertificateError(
                f"the certificate of {url} is not to be trusted: {each.verify_message or each}",
                do="Give the certificate that the service's operator gave you (--ca FILE, ca_file).",
            )
    return None


def _chain(error: BaseException) -> Iterator[BaseException]:
    seen: BaseException | None = error
    while seen is not None:
        yield seen
        seen = seen.__cause__ or seen.__context__
