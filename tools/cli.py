"""The `latentrelay` command. Every subcommand imports what it needs when it runs, so `--help` is instant."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

# Every usage error descends from BadParameter's grandparent; typer brings its own copy of click, so it is asked here.
_USAGE_ERRORS = typer.BadParameter.__mro__[2]
MISUSED = 2
INTERRUPTED = 130

app = typer.Typer(
    name="latentrelay",
    help="One Stable Diffusion run, shared: the cloud starts it, the device finishes it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Exit status: 0 done, 1 failed, 2 misused, 3 refused.",
)
devices = typer.Typer(help="Device profiles: those shipped, your own, and one of this machine.", no_args_is_help=True)
app.add_typer(devices, name="devices")

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else on standard output.")]
Model = Annotated[
    str,
    typer.Option("--model", "-m", help="'reference', 'reference-few-step', a hub id, a folder or a .safetensors file."),
]
ProfileFolder = Annotated[Path | None, typer.Option("--profiles", help="A folder of your own device profiles.")]
Backend = Annotated[str | None, typer.Option(help="onnxruntime, openvino or coreml, in the place of the bundle's own.")]
NumSteps = Annotated[int, typer.Option("--num-steps", min=1, max=1000, help="N, the steps of the whole run.")]


@devices.command("list")
def devices_list(profiles: ProfileFolder = None, as_json: Json = False) -> None:
    """Every profile there is."""
    from latentrelay.tools import devices_command

    devices_command.show_list(profiles, as_json)


@devices.command("show")
def devices_show(name: str, profiles: ProfileFolder = None, as_json: Json = False) -> None:
    """One profile, with the sources of its numbers."""
    from latentrelay.tools import devices_command

    devices_command.show_one(name, profiles, as_json)


@devices.command("validate")
def devices_validate(file: Path, as_json: Json = False) -> None:
    """Check a profile file of your own; exit status 3 if it does not follow the schema."""
    from latentrelay.tools import devices_command

    devices_command.validate(file, as_json)


@devices.command("check")
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
        profiles=profiles,
        as_json=as_json,
    )
    raise typer.Exit(status)


@devices.command("measure")
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


@app.command()
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
        _refuse(unused, "--few-step")
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
    _refuse({"--prompts": prompts, "--student": student}, "compress without --few-step")
    if recipe is not None:
        _refuse({"--parameters": parameters, "--max-step-ms": max_step_ms}, "--recipe, which fixes the shape,")
    if geometry is not None:
        unused = {"--lora": bool(lora), "--data": data, "--steps": steps, "--light-vae": light_vae, "--work": work}
        _refuse(unused, "--geometry, which has no weights,")
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


@app.command()
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


@app.command()
def serve(
    model: Model = "reference",
    host: str = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8000,
    revision: Annotated[str | None, typer.Option(help="Of a hub model.")] = None,
    config: Annotated[
        str | None, typer.Option(help="For a .safetensors file: the folder or hub id that describes it.")
    ] = None,
    token: Annotated[
        str | None, typer.Option(envvar="LATENTRELAY_TOKEN", help="Ask clients for this bearer token.")
    ] = None,
    cert: Annotated[Path | None, typer.Option(help="TLS certificate, PEM.")] = None,
    key: Annotated[Path | None, typer.Option(help="TLS key, PEM.")] = None,
    insecure: Annotated[bool, typer.Option(help="Plain HTTP off loopback, where another proxy ends TLS.")] = False,
    lora: Annotated[list[str] | None, typer.Option(help="Adapters merged into the model: FILE or FILE:SCALE.")] = None,
    port_file: Annotated[Path | None, typer.Option(help="Write the port here once requests are answered.")] = None,
    as_json: Json = False,
) -> None:
    """Run the first steps for devices, over HTTP, until interrupted."""
    from latentrelay.tools import serve

    serve.run(
        model,
        host=host,
        port=port,
        revision=revision,
        config=config,
        token=token,
        cert=cert,
        key=key,
        insecure=insecure,
        loras=lora or (),
        port_file=port_file,
        as_json=as_json,
    )


@app.command()
def generate(
    prompt: Annotated[str, typer.Option("--prompt", "-p")],
    bundle: Annotated[Path, typer.Option("--bundle", "-b", help="A bundle's folder.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The PNG to write.")] = Path("out.png"),
    cloud: Annotated[str | None, typer.Option(help="Address of a `latentrelay serve`.")] = None,
    split: Annotated[
        int | None, typer.Option(min=0, help="First step on the device; half the run if a cloud is given.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    negative_prompt: str = "",
    guidance: Annotated[float | None, typer.Option(help="The bundle's default if not given.")] = None,
    token: Annotated[str | None, typer.Option(envvar="LATENTRELAY_TOKEN", help="The cloud's bearer token.")] = None,
    wire_dtype: Annotated[str, typer.Option(help="float16 or float32.")] = "float16",
    fallback: Annotated[bool, typer.Option(help="Run all steps here if the cloud is out of reach.")] = True,
    backend: Backend = None,
    no_predict: Annotated[
        bool, typer.Option("--no-predict", help="Compute every step, also where the bundle predicts some.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Make a picture with a bundle, alone or with a cloud. Needs the base install only."""
    from latentrelay.tools import generate

    generate.run(
        bundle,
        prompt,
        output,
        cloud=cloud,
        split=split,
        seed=seed,
        negative_prompt=negative_prompt,
        guidance=guidance,
        token=token,
        wire_dtype=wire_dtype,
        fallback=fallback,
        as_json=as_json,
        backend=backend,
        predict=not no_predict,
    )


@app.command()
def verify(
    bundle: Path,
    selftest: Annotated[bool, typer.Option(help="Also run the bundle's sample inputs through this machine.")] = False,
    backend: Backend = None,
    as_json: Json = False,
) -> None:
    """Check every file of a bundle against its manifest; exit status 3 if anything differs."""
    from latentrelay.tools import verify

    verify.run(bundle, selftest=selftest, as_json=as_json, backend=backend)


@app.command()
def bench(
    geometry: Annotated[
        str | None, typer.Option(help="hybrid-sd-224m (the default), sd14 or tiny, with random weights.")
    ] = None,
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="Instead: 'reference', a hub id, a folder or a file.")
    ] = None,
    student: Annotated[
        Path | None, typer.Option(help="With --model: a student's folder, in the U-Net's place.")
    ] = None,
    bundle: Annotated[
        Path | None, typer.Option("--bundle", "-b", help="Instead: a bundle's step graph in the runtime's backends.")
    ] = None,
    rows: Annotated[list[str] | None, typer.Option("--row", help="Only this row; give it several times.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Of every row; all cores if not given.")] = None,
    rounds: Annotated[int, typer.Option(help="5 or more; each runs every row once.")] = 7,
    predicted: Annotated[
        bool, typer.Option("--predicted", help="Predicted steps beside a computed one, instead; one thread.")
    ] = False,
    work: Annotated[Path | None, typer.Option(help="Keep the graphs here for another run; figures never are.")] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Also write the JSON object here.")] = None,
    as_json: Json = False,
) -> None:
    """Time one guided step here against torch, Optimum, OpenVINO and NNCF: the same network, interleaved in one run."""
    if predicted:
        from latentrelay.tools import bench_predicted

        _refuse({"--bundle": bundle, "--row": rows}, "--predicted")
        status = bench_predicted.run(
            geometry=geometry,
            model=model,
            student=student,
            threads=threads,
            rounds=rounds,
            work=work,
            output=output,
            as_json=as_json,
        )
        raise typer.Exit(status)
    from latentrelay.tools import bench

    status = bench.run(
        geometry=geometry,
        model=model,
        student=student,
        bundle=bundle,
        rows=rows or [],
        threads=threads,
        rounds=rounds,
        work=work,
        output=output,
        as_json=as_json,
    )
    raise typer.Exit(status)


@app.command()
def evaluate(
    model: Model = "reference",
    captions: Annotated[int, typer.Option(min=1, help="Held-out captions.")] = 512,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    num_steps: NumSteps = 25,
    guidance: Annotated[float | None, typer.Option(help="The reference's own if not given.")] = None,
    held_out: Annotated[
        int | None, typer.Option(min=1, help="Captions with held-out pairs; a quarter as many if not given.")
    ] = None,
    split: Annotated[
        str, typer.Option(help="Which data split the captions come from: report, or gate while tuning.")
    ] = "report",
    sheet: Annotated[Path | None, typer.Option(help="Also write a sheet of the first pictures here (PNG).")] = None,
    sweep: Annotated[bool, typer.Option("--sweep", help="Hybrid runs: every split with every student.")] = False,
    student: Annotated[
        list[str] | None, typer.Option(help="For --sweep: a released name or a folder; repeat for more; else all.")
    ] = None,
    splits: Annotated[str | None, typer.Option(help="For --sweep: first steps on the device, as in '8,25'.")] = None,
    vae: Annotated[bool, typer.Option("--vae", help="The light autoencoder beside the source's, instead.")] = False,
    few_step: Annotated[
        bool, typer.Option("--few-step", help="Hybrids of 4 and 8 consistency steps beside those of 25, instead.")
    ] = False,
    lora: Annotated[list[str] | None, typer.Option(help="Adapters merged into the model: FILE or FILE:SCALE.")] = None,
    decoder: Annotated[
        str | None, typer.Option(help="The device's decoder: for --sweep light or source, or a light VAE's folder.")
    ] = None,
    precision: Annotated[
        str | None, typer.Option(help="Precisions of the device's U-Net side by side, instead: all, or 'w8a8,w4a8'.")
    ] = None,
    accelerate: Annotated[
        str | None, typer.Option(help="Ways to run fewer steps side by side, instead: all, or families with commas.")
    ] = None,
    prediction_profile: Annotated[
        list[Path] | None,
        typer.Option(help="What can be predicted of a device's steps, instead: bundles, the float one first; repeat."),
    ] = None,
    device: Annotated[
        str | None,
        typer.Option("--device", "-d", help="For --precision, --accelerate: a profile; this machine's if not given."),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="For --sweep, --precision, --accelerate: the folder, by default in runs/."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Score a model's pictures of held-out Scenes captions with the judge; with --sweep, of its hybrid runs."""
    beside = accelerate is not None or precision is not None
    if sweep + vae + few_step + beside + bool(prediction_profile) > 1:
        raise typer.BadParameter(
            "--sweep, --vae, --few-step, --precision, --accelerate and --prediction-profile are evaluations of their "
            "own; ask for one"
        )
    if prediction_profile:
        from latentrelay.tools import prediction_profile as profiling

        unused = {
            "--lora": lora, "--decoder": decoder, "--sheet": sheet, "--held-out": held_out, "--guidance": guidance,
            "--student": student, "--device": device,
        }  # fmt: skip
        _refuse(unused, "--prediction-profile")
        profiling.run(
            prediction_profile,
            captions,
            seed,
            split=_whole(splits, "--splits", 8),
            threads=None,
            output=output or Path("runs/prediction_profile"),
            as_json=as_json,
        )
        return
    if few_step:
        from latentrelay.tools import evaluate_few_step

        _refuse({"--lora": lora, "--guidance": guidance, "--splits": splits}, "--few-step")
        if len(student or ()) > 1:
            raise typer.BadParameter("--few-step takes one --student")
        name = (student or ["phone-mid"])[0]
        evaluate_few_step.run(
            captions, seed, student=name, folder=None, adapters=None, data_split=split, as_json=as_json
        )
        return
    if accelerate is not None or precision is not None:
        asked = "--precision" if accelerate is None else "--accelerate"
        unused = {
            "--lora": lora, "--decoder": decoder, "--sheet": sheet, "--held-out": held_out, "--guidance": guidance,
        }  # fmt: skip
        _refuse(unused, asked)
        if model != "reference" or len(student or ()) > 1 or (splits or "0").count(","):
            raise typer.BadParameter(f"{asked} takes the reference, at most one --student, and one number as --splits")
    if accelerate is not None:
        from latentrelay.tools import evaluate_accelerate

        evaluate_accelerate.run(
            accelerate,
            captions,
            seed,
            device=device,
            student=student[0] if student else None,
            split=_whole(splits, "--splits", 8),
            num_steps=num_steps,
            precision=precision,
            data_split=split,
            output=output or Path("runs/accelerate"),
            as_json=as_json,
        )
        return
    if precision is not None:
        from latentrelay.tools import evaluate_precision

        evaluate_precision.run(
            precision,
            captions,
            seed,
            device=device,
            student=student[0] if student else None,
            split=_whole(splits, "--splits", 8),
            num_steps=num_steps,
            data_split=split,
            output=output or Path("runs/precision"),
            as_json=as_json,
        )
        return
    _refuse({"--device": device}, "evaluate without --precision or --accelerate")
    if sweep or vae:
        _refuse({"--lora": lora}, "--sweep and --vae")
    if sweep:
        from latentrelay.tools import sweep as sweeping

        sweeping.run(
            model,
            captions,
            seed,
            students=student or (),
            splits=splits,
            decoder=decoder,
            output=output or Path("runs/sweep"),
            num_steps=num_steps,
            guidance=guidance,
            data_split=split,
            as_json=as_json,
        )
        return
    if vae:
        from latentrelay.tools import evaluate_vae

        light = None if decoder in (None, "light") else Path(decoder)
        evaluate_vae.run(model, light, seed=seed, split=split, sheet=sheet, as_json=as_json)
        return
    from latentrelay.tools import evaluate

    evaluate.run(
        model,
        captions,
        seed,
        num_steps=num_steps,
        guidance=guidance,
        held_out=held_out,
        split=split,
        sheet=sheet,
        as_json=as_json,
        loras=lora or (),
    )


@app.command()
def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="Where the report goes.")] = Path("runs/demo"),
    captions: Annotated[int, typer.Option(min=1, max=64)] = 8,
    num_steps: NumSteps = 25,
    split: Annotated[int, typer.Option(min=0, help="Steps in the cloud in the hybrid run.")] = 10,
    device: Annotated[
        str | None, typer.Option("--device", "-d", help="A profile; this machine's kind if not given.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Build, serve, generate three ways and report: the whole chain on this machine, offline."""
    from latentrelay.tools import demo

    demo.run(output, captions=captions, num_steps=num_steps, split=split, device=device, as_json=as_json)


def _refuse(options: dict[str, Any], beside: str) -> None:
    """Options that would be ignored are misuse, not silence."""
    given = [name for name, value in options.items() if value]
    if given:
        raise typer.BadParameter(f"{', '.join(given)}: no use beside {beside}; leave out one or the other")


def _whole(words: str | None, option: str, default: int) -> int:
    """A whole number given as text."""
    if words is None:
        return default
    if not (words.strip().isascii() and words.strip().isdecimal()):
        raise typer.BadParameter(f"{option} is {words!r}, expected one whole number here")
    return int(words)


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        from importlib.metadata import version as of

        typer.echo(f"latentrelay {of('latentrelay')}")
        raise typer.Exit


def main(arguments: list[str] | None = None) -> None:
    """Run the command and exit with its status."""
    given = sys.argv[1:] if arguments is None else arguments
    with _signals_unwind():
        sys.exit(_status(given))


@contextmanager
def _signals_unwind() -> Iterator[None]:
    """SIGTERM and a closed terminal end the command as Ctrl-C does: partial folders go, the demo's server ends."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    before = {each: signal.getsignal(each) for each in numbers}
    for each, handler in before.items():
        if handler is signal.SIG_DFL:  # nohup's choice, or an embedding program's, stands
            signal.signal(each, _end)
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


def _end(number: int, frame: object) -> NoReturn:
    raise SystemExit(128 + number)


def _status(arguments: list[str]) -> int:
    as_json = "--json" in arguments
    try:
        status: Any = app(arguments, prog_name="latentrelay", standalone_mode=False)
        if status == INTERRUPTED:  # typer makes a status of Ctrl-C
            return _interrupted(INTERRUPTED, as_json)
        return status if isinstance(status, int) else 0
    except (typer.Abort, KeyboardInterrupt):
        return _interrupted(INTERRUPTED, as_json)
    except SystemExit as ended:
        return _interrupted(ended.code if isinstance(ended.code, int) else 1, as_json)
    except Exception as error:
        from latentrelay.tools.console import report_error

        if hasattr(error, "exit_status"):
            return report_error(error, as_json)
        if isinstance(error, _USAGE_ERRORS):
            if not as_json:
                error.show()  # type: ignore[attr-defined]
                return MISUSED
            return report_error(error, as_json, MISUSED)
        if isinstance(error, OSError):  # a full disk, a folder that may not be written, weights that are not there
            return report_error(error, as_json)
        if as_json:
            import traceback

            traceback.print_exc()
            return report_error(error, as_json)
        raise


def _interrupted(status: int, as_json: bool) -> int:
    if as_json:
        from latentrelay.tools.console import report_error

        return report_error(KeyboardInterrupt("interrupted"), as_json, status)
    return status


if __name__ == "__main__":
    main()
