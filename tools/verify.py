"""`latentrelay verify`: is this bundle intact, and does it compute here what it computed where it was built?"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from latentrelay.runtime import Bundle, Session
from latentrelay.runtime.errors import REFUSED, LatentRelayError
from latentrelay.tools.console import emit, table


class SelftestFailedError(LatentRelayError):
    """A graph computes something else on this machine than the bundle expects."""

    exit_status = REFUSED


def run(path: Path, *, selftest: bool, as_json: bool, backend: str | None = None, key: Path | None = None) -> None:
    """Raises BundleError or SelftestFailedError (both exit status 3). `backend` stands for the bundle's own; with
    `key`, a PEM file of a public key, the bundle must be signed with it."""
    bundle = Bundle.open(path, public_key=key)
    document: dict[str, Any] = {"ok": True, "digest": bundle.digest, "files": len(bundle.files)}
    if bundle.signed_by is not None:
        document["signed_by"] = bundle.signed_by
    rows = [[entry.path, f"{entry.bytes:,}", entry.sha256[:16]] for entry in bundle.files]
    if selftest:
        with Session(bundle, backend=backend) as session:
            report = session.selftest()
            providers = session.providers_used
            document["providers_by_component"] = {
                name: list(each) for name, each in session.providers_by_component.items()
            }
        if not report.ok:
            name, worst = report.worst
            raise SelftestFailedError(
                f"{name} differs from the bundle's own sample on this machine",
                got=f"{worst:.1f} dB",
                expected=f"at least {report.tolerance(report.worst[0]):g} dB",
                do=f"Providers used: {', '.join(providers)}. Try the CPU provider alone.",
            )
        document["selftest_db"] = {name: min(value, 300.0) for name, value in report.snr_db.items()}  # equal = 300

    def show(console: Any) -> None:
        console.print(table(["file", "bytes", "sha256"], rows))
        console.print(f"[green]intact[/]: {len(rows)} files, {bundle.digest}")
        if bundle.signed_by is not None:
            console.print(f"[green]signed[/] by key {bundle.signed_by[:16]}")
        for name, value in document.get("selftest_db", {}).items():
            ran = ", ".join(document["providers_by_component"].get(name, ()))
            console.print(f"self-test {name}: {value:.1f} dB ({ran})")

    emit(document, as_json, show)
