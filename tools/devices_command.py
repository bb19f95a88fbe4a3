"""`latentrelay devices`: which profiles exist, what one says, whether a file of the user's own follows the schema."""

from __future__ import annotations

from pathlib import Path

from latentrelay.device_profiles import DeviceProfile, list_profiles, load_profile, validate_file
from latentrelay.tools.console import emit, printable, table
from rich.console import Console


def show_list(folder: Path | None, as_json: bool) -> None:
    """One line a profile."""
    profiles = list_profiles(folder)
    rows = [[*_summary(item)] for item in profiles]
    columns = ["name", "device", "precision", "memory for an app", "U-Net"]
    document = {"profiles": [item.model_dump(mode="json") for item in profiles]}
    shown = table(columns, rows)
    shown.columns[1].justify = "left"
    emit(document, as_json, lambda console: console.print(shown))


def _summary(item: DeviceProfile) -> tuple[str, str, str, str, str]:
    ceiling, size = item.memory.application_ceiling_mib, item.target_unet_parameters.parameters
    return item.name, item.title, item.target_precision, f"{ceiling} MiB", f"{size / 1e6:.0f}M"


def show_one(name: str, folder: Path | None, as_json: bool) -> None:
    """Everything one profile says."""
    profile = load_profile(name, folder)
    emit(profile.model_dump(mode="json"), as_json, lambda console: _describe(profile, console))


def validate(file: Path, as_json: bool) -> None:
    """Raises ProfileFileError (exit status 3) for a file that does not follow the schema."""
    profile = validate_file(file)
    document = {"ok": True, "name": profile.name, "path": str(file)}
    emit(
        document, as_json, lambda console: console.print(f"{printable(file)}: [green]valid[/], device {profile.name!r}")
    )


def _describe(profile: DeviceProfile, console: Console) -> None:
    memory, target, defaults = profile.memory, profile.target_unet_parameters, profile.defaults
    ceiling = f"{memory.application_ceiling_mib} of {memory.total_mib} MiB"
    npu = f"{profile.npu.count} ({profile.npu.name})" if profile.npu.name else str(profile.npu.count)
    facts = {
        "also called": ", ".join(profile.aliases) or "nothing else",
        "chipset": profile.chipset,
        "neural accelerators": npu + (f", {profile.npu.tops:g} TOPS" if profile.npu.tops else ""),
        "system": profile.os,
        "student class": profile.student_class,
        "precision": profile.target_precision,
        "memory for an app": f"{ceiling} ({memory.ceiling_label}: {memory.ceiling_derivation})",
        "largest file": f"{memory.largest_file_mib} MiB ({memory.largest_file_reason})",
        "U-Net": f"{target.parameters / 1e6:.0f}M parameters, limited by {target.limited_by}: {target.derivation}",
        "computes": _support(profile),
        "backend": f"{profile.backend.name}: " + ", ".join(each.name for each in profile.backend.execution_providers),
        "picture": f"{defaults.height}x{defaults.width}, {defaults.num_steps} steps, {defaults.split} in the cloud",
    }
    rows = list(facts.items())
    for anchor in profile.latency:
        figure = f"{anchor.ms:g} ms, {anchor.model} {anchor.precision}, {anchor.label}"
        more = f": {anchor.conditions}" if anchor.conditions else ""
        rows.append((anchor.component, f"{figure}, {anchor.device} ({anchor.source}){more}"))
    for source in profile.sources:
        rows.append((f"source {source.id}", f"{source.title} {source.url or ''}".strip()))
    console.print(f"[bold]{printable(profile.title)}[/] ({profile.name})")
    for name, value in rows:
        console.print(f"  [bold]{name}[/]: {printable(value)}")


def _support(profile: DeviceProfile) -> str:
    support = profile.support
    kinds = [name for name in ("fp16", "int8", "int4") if getattr(support, name)]
    shapes = "static shapes only" if support.static_shapes_only else "any shapes"
    denied = f", no {', '.join(support.denied_ops)}" if support.denied_ops else ""
    return f"{', '.join(['fp32', *kinds])}; {shapes}{denied}"
