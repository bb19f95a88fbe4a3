"""Every error the runtime raises, in one tree. A message says what, what was got, what was expected and what to do.

LatentRelayError
|- BundleError            |- BundleLayoutError     a link, an absolute path, `..`, a missing or an extra file
|                         |- BundleTamperedError   a size, a sha256 or the manifest's own digest differs
|                         |- BundleSignatureError  unsigned, signed with another key, or not what was signed
|                         |- ManifestError         manifest.json does not follow the schema
|- HandoffError           |- HandoffFormatError    truncated, oversized, wrong dtype or name, not finite
|                         |- HandoffMismatchError  well formed, but made for another model, scheduler, size or prompt
|- SessionError           |- NonFiniteError        NaN or Inf came out of a stage
|                         |- BackendUnavailableError  what the bundle wants to run with does not exist on this system
|- CloudError             |- CloudUnavailableError no answer in time, 5xx or 429
|                         |- CloudRefusedError     a 4xx: the request is wrong for this cloud
|                         |- CloudCertificateError  nobody vouches for the cloud's TLS certificate
|                         |- CloudProtocolError    an answer that breaks the protocol
|- MissingExtraError      an optional dependency is not installed
|- RequestError           the caller's arguments make no sense
|- RunCancelledError      the caller's cancel function said stop
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

FAILED, MISUSED, REFUSED = 1, 2, 3


def _shown(value: object) -> str:
    text = value if isinstance(value, str) else repr(value)
    return text if len(text) <= 200 else text[:197] + "..."


class LatentRelayError(Exception):
    """Root of the tree; `exit_status` is what the command returns: 1 failed, 2 misused, 3 refused."""

    exit_status: ClassVar[int] = FAILED

    def __init__(self, what: str, *, got: object = None, expected: object = None, do: str | None = None) -> None:
        facts = [
            f"{word} {_shown(value)}" for word, value in (("got", got), ("expected", expected)) if value is not None
        ]
        message = what + (": " + ", ".join(facts) if facts else "")
        super().__init__(f"{message}. {do}" if do else message)
        self.what, self.got, self.expected, self.do = what, got, expected, do


class BundleError(LatentRelayError):
    """A bundle cannot be used."""

    exit_status = REFUSED

    def __init__(
        self, what: str, *, path: str | None = None, got: object = None, expected: object = None, do: str | None = None
    ) -> None:
        super().__init__(what, got=got, expected=expected, do=do)
        self.path = path


class BundleLayoutError(BundleError):
    """A bundle holds a link, a path that leaves it, a file its manifest does not list, or lacks one that it lists."""


class BundleTamperedError(BundleError):
    """A file's size or sha256, or the manifest's own digest, is not what the manifest says; see `.path`."""


class BundleSignatureError(BundleError):
    """A bundle is not signed, or its signature is not valid for the key, or does not cover the files as they are."""


class ManifestError(BundleError):
    """manifest.json is missing, is not JSON, or does not follow the schema."""


class HandoffError(LatentRelayError):
    """A handoff cannot be used."""

    exit_status = REFUSED


class HandoffFormatError(HandoffError):
    """A handoff blob is truncated, oversized, malformed, of a wrong dtype or shape, or holds NaN or Inf."""


class HandoffMismatchError(HandoffError):
    """A handoff is well formed but was made for something else; `.field`, `.got` and `.expected` say what differs."""

    def __init__(self, field: str, *, got: object, expected: object, do: str | None = None) -> None:
        default = "Use a cloud that serves the bundle's source model with the bundle's sampler and step count."
        super().__init__(
            f"the handoff does not fit the bundle: {field} differs", got=got, expected=expected, do=do or default
        )
        self.field = field


class SessionError(LatentRelayError):
    """The backend refused to load or to run a graph."""


class NonFiniteError(SessionError):
    """NaN or Inf came out of `.stage` (and `.step`, in the step loop; `.output` where it is not the latents)."""

    def __init__(self, stage: str, *, step: int | None = None, count: int = 0, output: str | None = None) -> None:
        where = (stage if step is None else f"{stage}, step {step}") + (f" ({output})" if output else "")
        super().__init__(
            f"{count} non-finite values came out of {where}",
            expected="finite values",
            do="Run `latentrelay verify` and the bundle's self-test; a backend in half precision is the usual cause.",
        )
        self.stage, self.step, self.output = stage, step, output


class BackendUnavailableError(SessionError):
    """The backend that was asked for cannot run on this system at all (Core ML away from macOS)."""

    exit_status = REFUSED


class CloudError(LatentRelayError):
    """The cloud did not hand over."""


class CloudUnavailableError(CloudError):
    """The cloud could not be reached, timed out, or answered 5xx or 429; the device can run all steps itself.

    `.kind` is a short code: "unreachable" (no connection), "dropped" (one that was cut), "timeout" (too late), or the
    kind of the cloud's problem document ("queue-full", "deadline-passed", ...; "busy" or "broken" without one).
    `.retry_after_s` is what the cloud asked for, None where it said nothing.
    """

    def __init__(
        self,
        what: str,
        *,
        kind: str = "unreachable",
        retry_after_s: float | None = None,
        got: object = None,
        expected: object = None,
        do: str | None = None,
    ) -> None:
        super().__init__(what, got=got, expected=expected, do=do)
        self.kind, self.retry_after_s = kind, retry_after_s


class CloudRefusedError(CloudError):
    """The cloud answered 4xx: the request, or with 401 the token, is wrong for it; `.status` and `.problem` say why."""

    exit_status = REFUSED

    def __init__(self, status: int, problem: Mapping[str, Any]) -> None:
        detail = str(problem.get("detail") or problem.get("title") or "no detail was given")
        field = problem.get("field")
        super().__init__(
            f"the cloud refused the request ({status}{f', {field}' if field else ''}): {detail.rstrip('.')}",
            got=problem.get("got"),
            expected=problem.get("expected"),
            do="Check the token (--token, LATENTRELAY_TOKEN)."
            if status == 401
            else "Change the request, or run without the cloud.",
        )
        self.status, self.problem = status, dict(problem)


class CloudCertificateError(CloudError):
    """The cloud's TLS certificate could not be verified: it is not known who answers, and nothing was sent."""

    exit_status = REFUSED


class CloudProtocolError(CloudError):
    """The cloud's answer breaks the protocol: media type, size, digest or shape of the problem document."""


class MissingExtraError(LatentRelayError):
    """An optional dependency is not installed; `.extra` names the extra that brings it."""

    exit_status = MISUSED

    def __init__(self, module: str, extra: str | None, *, purpose: str) -> None:
        target = f"latentrelay[{extra}]" if extra else "latentrelay"
        super().__init__(
            f"{purpose} needs the module {module!r}, which is not installed", do=f'Run: pip install "{target}"'
        )
        self.module, self.extra = module, extra


class RequestError(LatentRelayError):
    """The caller's arguments make no sense together or are out of range."""

    exit_status = MISUSED


class RunCancelledError(LatentRelayError):
    """The caller's `cancel` function returned True between two stages or steps."""
