"""Device profiles on the command line: list, show, validate, check, measure."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from latentrelay.tools.cli_options import Json, NumSteps, ProfileFolder


def devices_list(profiles: ProfileFolder = None, as_json: Json = False) -> None:
    """Every profile there is."""
    from latentrelay.tools import devices_command

    devices_command.show_list(profiles, as_json)


def devices_show(name: str, profiles: ProfileFolder = None, as_json: Json = False) -> None:
    """One profile, with the sources of its numbers."""
    from latentrelay.tools import devices_command

    devices_command.show_one(name, profiles, as_json)


def devices_validate(file: Path, as_json: Json = False) -> None:
    """Check a profile file of your own; exit status 3 if it does not follow the schema."""
    from latentrelay.tools import devices_command

    devices_command.validate(file, as_json)


def devices_check(
    name: str,
    geometry: Annotated[str | None, typer.Option(help="Instead of a model: sd14, its shapes without weights.")] = None,
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="'reference', or a folder in diffusers' layout.")
    ] = None,
    student: Annotated[
        str, typer.Option(help="auto: the one that compress would choose; none: the model's own U-Net; or a folder.")
    ] = "auto",
    light_vae: Annotated[Path | None, typer.Option(help="A folder with the device's AutoencoderTiny.")] = None,
    precision: Annotated[str, typer.Option(help="fp32 is what build writes; others are estimates.")] = "fp32",
    height: Annotated[int | None, typer.Option(help="Pixels; the model's own if not given.")] = None,
    width: Annotated[int | None, typer.Option(help="Pixels; the model's own if not given.")] = None,
    num_steps: NumSteps = 25,
    max_step_ms: Annotated[float | None, typer.Option(min=0, help="Also refuse a slower guided step.")] = None,
    predict: Annotated[
        str | None,
        typer.Option(help="Count the ladders of predicted steps: whole_output, deep_feature, or auto: the widest."),
    ] = None,
    measure: Annotated[bool, typer.Option(help="Measure the blocks here where no table of them is shipped.")] = False,
    profiles: ProfileFolder = None,
    as_json: Json = False,
) -> None:
    """Whether a model's bundle fits a device, from shapes alone; exit status 3 if it does not."""
    from latentrelay.tools import devices_check

    status = devices_check.run(
        name,
        geometry=geometry,
        model=model,
        student=student,
        vae=light_vae,
        precision=precision,
        height=height,
        width=width,
        num_steps=num_steps,
        max_step_ms=max_step_ms,
        measure=measure,
        predict=predict,
        profiles=profiles,
        as_json=as_json,
    )
    raise typer.Exit(status)


def devices_measure(
    output: Annotated[
        Path, typer.Option("--output", "-o", help="The profile to write; the file's name is the profile's.")
    ] = Path("this-machine.toml"),
    bundle: Annotated[Path | None, typer.Option("--bundle", "-b", help="Also time this bundle's graphs.")] = None,
    provider: Annotated[
        list[str] | None, typer.Option(help="An execution provider of ONNX Runtime; all there are if not given.")
    ] = None,
    runs: Annotated[int, typer.Option(help="Timed runs of each part, 5 or more.")] = 7,
    overwrite: Annotated[bool, typer.Option(help="Replace a profile that is there.")] = False,
    as_json: Json = False,
) -> None:
    """Write a profile of the machine this runs on, from what is measured here. Takes about a minute."""
    from latentrelay.tools import devices_measure

    devices_measure.run(output, bundle=bundle, provider=provider, runs=runs, overwrite=overwrite, as_json=as_json)
