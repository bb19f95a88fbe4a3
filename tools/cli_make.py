"""What makes things, on the command line: compress, build, sign. Every one imports what it needs when it runs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from latentrelay.tools.cli_options import Json, Model, NumSteps, ProfileFolder, refuse


def compress(
    output: Annotated[Path, typer.Option("--output", "-o", help="The student's folder.")],
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="'reference' (the default), a hub id, a folder or a file.")
    ] = None,
    geometry: Annotated[
        str | None, typer.Option(help="Instead of a model: sd14, its shapes with random weights.")
    ] = None,
    device: Annotated[
        str | None, typer.Option("--device", "-d", help="A device profile: its limits are the budget.")
    ] = None,
    recipe: Annotated[str | None, typer.Option(help="A published shape, such as hybrid-sd-224m.")] = None,
    parameters: Annotated[int | None, typer.Option(min=1, help="At most so many U-Net parameters.")] = None,
    max_step_ms: Annotated[
        float | None, typer.Option(min=0, help="With --device: at most so long a guided step, by estimate.")
    ] = None,
    allocation: Annotated[str, typer.Option(help="sensitivity, or uniform for comparison.")] = "sensitivity",
    scores: Annotated[str, typer.Option(help="measured on the model, or the shipped prior.")] = "measured",
    lora: Annotated[list[str] | None, typer.Option(help="Adapters merged first: FILE or FILE:SCALE.")] = None,
    light_vae: Annotated[Path | None, typer.Option(help="A folder with an AutoencoderTiny for the device.")] = None,
    data: Annotated[Path | None, typer.Option(help="Captioned pictures (metadata.jsonl) to distil on.")] = None,
    steps: Annotated[int | None, typer.Option(min=0, help="Distillation steps; 0 prunes only.")] = None,
    batch: Annotated[int | None, typer.Option(min=1)] = None,
    learning_rate: Annotated[float | None, typer.Option(min=0)] = None,
    mixed_precision: Annotated[str, typer.Option(help="no, bf16 or fp16.")] = "no",
    pictures: Annotated[int | None, typer.Option(min=4, help="Scenes to distil on, for the reference.")] = None,
    work: Annotated[Path | None, typer.Option(help="Scores, data and checkpoints; OUTPUT.work if not given.")] = None,
    few_step: Annotated[
        bool, typer.Option("--few-step", help="Distil to latent consistency instead: OUTPUT/lora.safetensors.")
    ] = False,
    prompts: Annotated[Path | None, typer.Option(help="For --few-step: a file of prompts, one a line.")] = None,
    student: Annotated[
        Path | None, typer.Option(help="For --few-step: the student to train, in place of the model.")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Of a hub model.")] = None,
    config: Annotated[
        str | None, typer.Option(help="For a .safetensors file: the folder or hub id that describes it.")
    ] = None,
    profiles: ProfileFolder = None,
    overwrite: Annotated[bool, typer.Option(help="Replace a student that is there.")] = False,
    as_json: Json = False,
) -> None:
    """Prune and distil a model's U-Net for a device; run again to go on where it was killed."""
    if few_step:
        from latentrelay.tools import few_step as consistency

        unused = {
            "--geometry": geometry, "--device": device, "--recipe": recipe, "--parameters": parameters,
            "--light-vae": light_vae, "--data": data, "--pictures": pictures, "--work": work,
            "--max-step-ms": max_step_ms,
        }  # fmt: skip
        refuse(unused, "--few-step")
        own = consistency.FewStepRecipe()
        consistency.run(
            output,
            model=model or "reference",
            student=student,
            prompts=prompts,
            guidance=None,
            recipe=replace(
                own,
                steps=steps or own.steps,
                batch=batch or own.batch,
                learning_rate=learning_rate or own.learning_rate,
            ),
            trajectories=None,
            as_json=as_json,
            loras=lora or (),
            revision=revision,
            config=config,
        )
        return
    refuse({"--prompts": prompts, "--student": student}, "compress without --few-step")
    if recipe is not None:
        refuse({"--parameters": parameters, "--max-step-ms": max_step_ms}, "--recipe, which fixes the shape,")
    if geometry is not None:
        unused = {"--lora": bool(lora), "--data": data, "--steps": steps, "--light-vae": light_vae, "--work": work}
        refuse(unused, "--geometry, which has no weights,")
    from latentrelay.tools import compress

    compress.run(
        output,
        model=model,
        geometry=geometry,
        device=device,
        recipe=recipe,
        parameters=parameters,
        allocation=allocation,
        loras=lora or (),
        light_vae=light_vae,
        training=compress.Training(steps, batch, learning_rate, mixed_precision, data, pictures),
        scores=scores,
        revision=revision,
        config=config,
        work=work,
        profiles=profiles,
        overwrite=overwrite,
        as_json=as_json,
        max_step_ms=max_step_ms,
    )


def build(
    output: Annotated[Path, typer.Option("--output", "-o", help="The bundle's folder.")],
    device: Annotated[str, typer.Option("--device", "-d", help="A device profile's name or file.")],
    model: Model = "reference",
    revision: Annotated[str | None, typer.Option(help="Of a hub model.")] = None,
    config: Annotated[
        str | None, typer.Option(help="For a .safetensors file: the folder or hub id that describes it.")
    ] = None,
    num_steps: NumSteps = 25,
    sampler: Annotated[
        str | None, typer.Option(help="dpmsolver++, ddim or lcm; the source's own if not given.")
    ] = None,
    height: Annotated[int | None, typer.Option(help="Pixels; the model's own if not given.")] = None,
    width: Annotated[int | None, typer.Option(help="Pixels; the model's own if not given.")] = None,
    guidance: Annotated[float | None, typer.Option(help="The bundle's default guidance scale.")] = None,
    student: Annotated[
        str,
        typer.Option(help="The device's U-Net: a released name, a folder, none (the model's own) or auto."),
    ] = "auto",
    light_vae: Annotated[
        str, typer.Option(help="The device's decoder: released, a folder of an AutoencoderTiny, none, or auto.")
    ] = "auto",
    data: Annotated[
        Path | None, typer.Option(help="Captioned pictures: with them, a model of yours is compressed first.")
    ] = None,
    steps: Annotated[int | None, typer.Option(min=0, help="Distillation steps of that compression.")] = None,
    lora: Annotated[list[str] | None, typer.Option(help="Adapters merged into the model: FILE or FILE:SCALE.")] = None,
    few_step: Annotated[bool, typer.Option(help="The model was distilled to latent consistency.")] = False,
    precision: Annotated[
        str, typer.Option(help="Of the device's U-Net: fp32, fp16, w8a16, w8a8, w4a16, w4a8; auto is the profile's.")
    ] = "auto",
    prompts: Annotated[
        Path | None, typer.Option(help="Prompts to calibrate on, one a line; plain ones if not given.")
    ] = None,
    coreml_encoding: Annotated[
        str | None, typer.Option(help="Core ML weights as linear8, linear4_block32, palette8, palette6, palette4, ...")
    ] = None,
    apple_layout: Annotated[
        bool, typer.Option("--apple-layout", help="Core ML prompt states as (B, D, 1, T), as Apple's own U-Nets.")
    ] = False,
    speedup: Annotated[
        float | None,
        typer.Option(
            help="Predict steps: how many times faster the device's part should be. Not given: every step is computed."
        ),
    ] = None,
    predict: Annotated[
        str, typer.Option(help="With --speedup, what is predicted: whole_output, deep_feature, or auto: the better.")
    ] = "auto",
    predict_splits: Annotated[
        str | None,
        typer.Option(help="With --speedup, the splits that predict steps, as 0,8; 0 and the profile's if not given."),
    ] = None,
    hot_speedup: Annotated[
        float | None,
        typer.Option(
            help="With --speedup: a second mask for each split, so many times faster, for a device that is hot."
        ),
    ] = None,
    recipe: Annotated[
        Path | None, typer.Option(help="A file with a rule for every layer; a released student's own if not given.")
    ] = None,
    work: Annotated[
        Path | None, typer.Option(help="Stages that the next build takes over, never pruned; OUTPUT.work if not given.")
    ] = None,
    profiles: ProfileFolder = None,
    overwrite: Annotated[bool, typer.Option(help="Replace a bundle that is there.")] = False,
    as_json: Json = False,
) -> None:
    """Turn a pipeline and a device profile into a bundle.

    On the reference, auto means the student released for the profile's class and the released light decoder; on any
    other model the model's own parts, or with --data a student compressed for the device first.
    """
    from latentrelay.tools import build

    build.run(
        model,
        device,
        output,
        revision=revision,
        config=config,
        num_steps=num_steps,
        sampler=sampler,
        height=height,
        width=width,
        guidance=guidance,
        student=student,
        light_vae=light_vae,
        data=data,
        steps=steps,
        loras=lora or (),
        few_step=few_step,
        speedup=speedup,
        predict=predict,
        predict_splits=predict_splits,
        hot_speedup=hot_speedup,
        profiles=profiles,
        overwrite=overwrite,
        as_json=as_json,
        precision=precision,
        prompts=prompts,
        work=work,
        recipe=recipe,
        coreml_encoding=coreml_encoding,
        apple_layout=apple_layout,
    )


def sign(
    bundle: Path,
    key: Annotated[Path, typer.Option(help="The private key, PEM: ECDSA P-256, P-384 or P-521.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="The signature's file; model.sig in the bundle if not given.")
    ] = None,
    password: Annotated[
        str | None, typer.Option(envvar="LATENTRELAY_KEY_PASSWORD", help="Of an encrypted private key.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Sign a bundle's files with OpenSSF model signing; needs the extra `sign`."""
    from latentrelay.tools import sign

    sign.run(bundle, key=key, output=output, password=password, as_json=as_json)
