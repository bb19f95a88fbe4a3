"""`latentrelay compress`: a source pipeline and a device profile in, a student folder with a Plan out.

Two ways through: a model (its units scored, the student distilled from it) and a geometry, which is a model's shapes
with random weights: sizes, structure and cost are real there, scores come from the shipped prior and nothing is
trained. What takes long (scores, encoded pictures, checkpoints) lives in a work folder beside the output and is found
again; the output itself is written beside its place and renamed into it.
"""

from __future__ import annotations

import resource
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from latentrelay.device_profiles import DeviceProfile, load_profile
from latentrelay.runtime.errors import RequestError
from latentrelay.tools.console import emit, err, extra, printable, table
from latentrelay.tools.models import REFERENCE


@dataclass(frozen=True)
class Training:
    """How the student is distilled; None is the default of the model: the released students' on the reference, the
    paper's elsewhere. `steps` 0 prunes and stops. `data` is a folder of captioned pictures; `pictures` is how many
    scenes the reference renders."""

    steps: int | None = None
    batch: int | None = None
    learning_rate: float | None = None
    mixed_precision: str = "no"
    data: Path | None = None
    pictures: int | None = None


def run(
    output: Path,
    *,
    model: str | None,
    geometry: str | None,
    device: str | None,
    recipe: str | None,
    parameters: int | None,
    allocation: str,
    loras: Sequence[str],
    light_vae: Path | None,
    training: Training,
    scores: str,
    revision: str | None,
    config: str | None,
    work: Path | None,
    profiles: Path | None,
    overwrite: bool,
    as_json: bool,
    max_step_ms: float | None = None,
) -> None:
    """Make the student and print what it is."""
    if geometry is not None and model is not None:
        raise RequestError("both a model and a geometry are given", do="Give --model or --geometry.")
    if recipe is None and device is None and parameters is None:
        raise RequestError("nothing says how small the student is to be", do="Give --device, --parameters or --recipe.")
    if allocation not in ("sensitivity", "uniform"):
        raise RequestError("unknown allocation", got=allocation, expected="sensitivity or uniform")
    if scores not in ("measured", "prior"):
        raise RequestError("unknown scores", got=scores, expected="measured or prior")
    profile = load_profile(device, profiles) if device is not None else None
    with extra("compress", "compressing a model"):
        from latentrelay.tools.compress_geometry import compress_geometry
        from latentrelay.tools.compress_model import ModelJob
        from latentrelay.tools.student_folder import check_student_output
    check_student_output(output, overwrite=overwrite)
    started = time.perf_counter()
    if geometry is not None:
        document = compress_geometry(
            geometry, output, profile=profile, recipe=recipe, parameters=parameters, allocation=allocation,
            overwrite=overwrite, max_step_ms=max_step_ms,
        )  # fmt: skip
    else:
        job = ModelJob(
            model or REFERENCE, output, work or output.with_name(output.name + ".work"), profile, recipe, parameters,
            allocation, tuple(loras), light_vae, training, scores, revision, config, overwrite,
            max_step_ms,
        )  # fmt: skip
        document = job.run()
    document["seconds"] = round(time.perf_counter() - started, 1)
    document["peak_memory_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    emit(document, as_json, lambda console: _show(console, document))


def _show(console: Any, document: Mapping[str, Any]) -> None:
    rows = [
        ["parameters", f"{document['parameters']:,}"],
        ["of the source's", f"{document['parameters'] / document['source_parameters']:.1%}"],
    ]
    for name in ("target_parameters", "with_light_decoder", "published_total"):
        if document.get(name) is not None:
            rows.append([name.replace("_", " "), f"{document[name]:,}"])
    if document.get("budget"):
        rows.append(["limited by", document["budget"]["limited_by"]])
    for name in ("held_out_before", "held_out_after"):
        if document.get(name) is not None:
            rows.append([name.replace("_", " "), f"{document[name]:.4f}"])
    rows += [["seconds", document["seconds"]], ["peak memory, MiB", document["peak_memory_mib"]]]
    console.print(table(["student", ""], rows))
    console.print(f"student: [bold]{printable(document['student'])}[/]")


def student_target(
    model: str, profile: DeviceProfile | None, parameters: int | None, max_step_ms: float | None = None
) -> dict[str, Any]:
    """The ceiling on the student's parameters and where it comes from; None where the profile's ceilings decide.

    On the reference, a hundredth of SD's size, a profile's ceilings would admit everything: there the released size of
    the profile's class is the target. A ceiling in milliseconds is weighed with the profile's.
    """
    if max_step_ms is not None:
        if profile is None or parameters is not None:
            raise RequestError(
                "milliseconds need a device's figures",
                got=[profile, parameters],
                do="Give --device and no --parameters.",
            )
        return {"limited_by": "the profile", "parameters": None, "step_ms": max_step_ms}
    if parameters is not None:
        return {"limited_by": "--parameters", "parameters": parameters}
    if model == REFERENCE and profile is not None:
        from latentrelay.reference.students import CLASS_PARAMETERS

        target = CLASS_PARAMETERS[profile.student_class]
        return {"limited_by": f"the size of the class {profile.student_class}", "parameters": target}
    return {"limited_by": "the profile", "parameters": None}


def plan_document(plan: Any) -> dict[str, Any]:
    """A StudentPlan as JSON values."""
    return {
        "blocks": asdict(plan.blocks),
        "widths": dict(plan.widths),
        "allocation": plan.allocation,
        "ceiling": plan.ceiling,
        "parameters": plan.parameters,
        "expected_loss": plan.expected_loss,
        "considered": [
            {"blocks": asdict(each.blocks), "expected_loss": each.expected_loss} for each in plan.considered
        ],
    }


def note(words: str) -> None:
    """One line for people, on standard error."""
    err.print(words)
