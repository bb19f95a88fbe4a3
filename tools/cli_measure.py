"""What measures and shows, on the command line: bench, evaluate, demo. Every one imports what it needs when it runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from latentrelay.tools.cli_options import Json, Model, NumSteps, refuse, whole


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
    service: Annotated[
        bool, typer.Option("--service", help="The cloud service beside a server of one run after another, instead.")
    ] = False,
    clients: Annotated[int | None, typer.Option(min=1, help="With --service: clients at once; 8.")] = None,
    seconds: Annotated[
        float | None, typer.Option(min=1, help="With --service: shared by both servers' rounds; 60.")
    ] = None,
    work: Annotated[Path | None, typer.Option(help="Keep the graphs here for another run; figures never are.")] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Also write the JSON object here.")] = None,
    as_json: Json = False,
) -> None:
    """Time one guided step here against torch, Optimum, OpenVINO and NNCF: the same network, interleaved in one run."""
    if service:
        from latentrelay.tools import bench_service

        refuse(
            {"--geometry": geometry, "--student": student, "--bundle": bundle, "--row": rows, "--predicted": predicted}
            | {"--work": work},
            "--service",
        )
        status = bench_service.run(
            clients=clients or 8,
            seconds=seconds or 60.0,
            model=model or "reference",
            threads=threads,
            rounds=rounds,
            output=output,
            as_json=as_json,
        )
        raise typer.Exit(status)
    if clients is not None or seconds is not None:
        raise typer.BadParameter("--clients and --seconds: of use beside --service only")
    if predicted:
        from latentrelay.tools import bench_predicted

        refuse({"--bundle": bundle, "--row": rows}, "--predicted")
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
        refuse(unused, "--prediction-profile")
        profiling.run(
            prediction_profile,
            captions,
            seed,
            split=whole(splits, "--splits", 8),
            threads=None,
            output=output or Path("runs/prediction_profile"),
            as_json=as_json,
        )
        return
    if few_step:
        from latentrelay.tools import evaluate_few_step

        refuse({"--lora": lora, "--guidance": guidance, "--splits": splits}, "--few-step")
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
        refuse(unused, asked)
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
            split=whole(splits, "--splits", 8),
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
            split=whole(splits, "--splits", 8),
            num_steps=num_steps,
            data_split=split,
            output=output or Path("runs/precision"),
            as_json=as_json,
        )
        return
    refuse({"--device": device}, "evaluate without --precision or --accelerate")
    if sweep or vae:
        refuse({"--lora": lora}, "--sweep and --vae")
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
