"""What runs things, on the command line: serve, generate, plan, verify; each imports what it needs when it runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from latentrelay.tools.cli_options import Backend, Json, Model, ProfileFolder


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
    store: Annotated[
        Path | None,
        typer.Option(help="Folder of accepted jobs and results, kept over a restart; a temporary one if not given."),
    ] = None,
    tokens: Annotated[
        Path | None, typer.Option(help="TOML file of bearer tokens with their limits, instead of --token.")
    ] = None,
    ray: Annotated[
        bool, typer.Option("--ray", help="Run replicas on a Ray Serve of its own (extra `ray`), behind one address.")
    ] = False,
    replicas: Annotated[
        str | None,
        typer.Option(metavar="MIN[:MAX]", help="With --ray: how many; between MIN and MAX by the jobs in hand. 1."),
    ] = None,
    torch_device: Annotated[str, typer.Option(help="Where the model runs: cpu, cuda or cuda:N.")] = "cpu",
    dtype: Annotated[str, typer.Option(help="Of the model: float32, bfloat16 or float16.")] = "float32",
    compiled: Annotated[
        bool, typer.Option("--compile", help="torch.compile the U-Net; the start takes longer.")
    ] = False,
    step_cache: Annotated[
        Path | None, typer.Option(help="The cloud's own schedule of computed steps, for requests that allow it.")
    ] = None,
    max_batch: Annotated[
        int | None, typer.Option(min=1, help="Requests that share a network call; 16 on the CPU, 32 on a GPU.")
    ] = None,
    memory_mib: Annotated[
        int | None, typer.Option(min=1, help="For activations; four fifths of what is free if not given.")
    ] = None,
    queue: Annotated[int | None, typer.Option(min=1, help="Jobs held at once, running ones included.")] = None,
    ttl: Annotated[float | None, typer.Option(min=1, help="Seconds that a result is kept; 600.")] = None,
    no_cache: Annotated[
        bool, typer.Option("--no-cache", help="Keep no text states and no results; equal requests share no run.")
    ] = False,
    log_format: Annotated[str, typer.Option(help="text or json.")] = "text",
    log_prompts: Annotated[bool, typer.Option("--log-prompts", help="Write prompts into the log.")] = False,
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
        store=store,
        tokens=tokens,
        ray=ray,
        replicas=replicas,
        port_file=port_file,
        as_json=as_json,
        running=serve.Running(
            device=torch_device,
            dtype=dtype,
            compiled=compiled,
            step_cache=step_cache,
            max_batch=max_batch,
            memory_mib=memory_mib,
            queue=queue,
            ttl_s=ttl,
            cache=not no_cache,
        ),
        log_format=log_format,
        log_prompts=log_prompts,
    )


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
    insecure: Annotated[
        bool, typer.Option("--insecure", help="Plain HTTP off loopback, in a network you trust.")
    ] = False,
    ca: Annotated[
        Path | None,
        typer.Option(
            "--ca", envvar="LATENTRELAY_CA", help="PEM: the cloud's certificate is checked against those in here."
        ),
    ] = None,
    wire_dtype: Annotated[str, typer.Option(help="float16 or float32.")] = "float16",
    fallback: Annotated[bool, typer.Option(help="Run all steps here if the cloud is out of reach.")] = True,
    cloud_deadline: Annotated[
        float | None,
        typer.Option(
            min=0.001,
            help="Seconds for everything asked of the cloud, 60 if not given; a slow one may hand over early.",
        ),
    ] = None,
    thermal: Annotated[
        str,
        typer.Option(
            help="How hot the device is: nominal, fair, serious or critical; from serious on more steps are predicted."
        ),
    ] = "nominal",
    free_mib: Annotated[
        float | None,
        typer.Option(min=0, help="Memory that the run may take; with too little more steps are predicted."),
    ] = None,
    previews: Annotated[Path | None, typer.Option(help="Write a small picture of every step into this folder.")] = None,
    public_key: Annotated[
        Path | None,
        typer.Option(
            envvar="LATENTRELAY_PUBLIC_KEY", help="The bundle must be signed with this PEM key's private half."
        ),
    ] = None,
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
        cloud_deadline_s=cloud_deadline,
        thermal=thermal,
        free_mib=free_mib,
        previews=previews,
        public_key=public_key,
        insecure=insecure,
        ca_file=ca,
    )


def plan(
    device: Annotated[str, typer.Option("--device", "-d", help="A device profile's name or alias.")],
    network: Annotated[
        list[str],
        typer.Option("--network", "-n", help="offline, 3g, 4g, 5g, wifi, lan or RTT_MS:MBIT; may be repeated."),
    ],
    bundle: Annotated[
        list[Path] | None, typer.Option("--bundle", "-b", help="Plan with this bundle; may be repeated.")
    ] = None,
    model: Annotated[
        str, typer.Option("--model", "-m", help="Without a bundle: the model whose students are meant.")
    ] = "reference",
    price: Annotated[
        str | None, typer.Option(help="2.5 or 2.5/hour: an hour of the cloud's machine; 0.0001/step: one step.")
    ] = None,
    max_latency: Annotated[float | None, typer.Option(min=0.001, help="Seconds a picture may take.")] = None,
    max_cost: Annotated[
        float | None, typer.Option(min=0, help="What a picture may cost, in the price's money.")
    ] = None,
    cloud: Annotated[str | None, typer.Option(help="Ask this service how fast and how busy it is.")] = None,
    token: Annotated[str | None, typer.Option(envvar="LATENTRELAY_TOKEN", help="The cloud's bearer token.")] = None,
    cloud_step_ms: Annotated[
        float | None, typer.Option(min=0.001, help="Instead: milliseconds a step takes there.")
    ] = None,
    sweep: Annotated[Path | None, typer.Option(help="What `evaluate --sweep` measured for your own model.")] = None,
    here: Annotated[bool, typer.Option("--here", help="The device is this machine: time the bundles now.")] = False,
    unmeasured: Annotated[
        bool, typer.Option("--unmeasured", help="Rows whose quality nobody measured may be chosen too.")
    ] = False,
    device_watts: Annotated[float | None, typer.Option(min=0, help="What the device draws while it computes.")] = None,
    profiles: ProfileFolder = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Plot the frontier into this picture.")] = None,
    as_json: Json = False,
) -> None:
    """Which split, precision and mask meet a latency or a cost with the least loss; exit status 3 if none does."""
    from latentrelay.tools import plan

    status = plan.run(
        device,
        network,
        bundles=bundle or (),
        model=model,
        price=price,
        max_latency_s=max_latency,
        max_cost=max_cost,
        cloud=cloud,
        token=token,
        cloud_step_ms=cloud_step_ms,
        sweep=sweep,
        here=here,
        unmeasured=unmeasured,
        device_watts=device_watts,
        profiles=profiles,
        output=output,
        as_json=as_json,
    )
    raise typer.Exit(status)


def verify(
    bundle: Path,
    selftest: Annotated[bool, typer.Option(help="Also run the bundle's sample inputs through this machine.")] = False,
    backend: Backend = None,
    key: Annotated[Path | None, typer.Option(help="A PEM public key: the bundle must be signed with it.")] = None,
    as_json: Json = False,
) -> None:
    """Check every file of a bundle against its manifest; exit status 3 if anything differs."""
    from latentrelay.tools import verify

    verify.run(bundle, selftest=selftest, as_json=as_json, backend=backend, key=key)
