"""`latentrelay generate`: one picture from a bundle, alone or with a cloud. Imports the runtime and nothing else."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

from latentrelay.runtime import Bundle, CloudClient, Session, StepEvent
from latentrelay.runtime import generate as generate_picture
from latentrelay.runtime.errors import RequestError
from latentrelay.tools.console import counting, emit, err, printable, table

WIRE_DTYPES = ("float16", "float32")


def run(
    bundle: Path,
    prompt: str,
    output: Path,
    *,
    cloud: str | None,
    split: int | None,
    seed: int,
    negative_prompt: str,
    guidance: float | None,
    token: str | None,
    wire_dtype: str,
    fallback: bool,
    as_json: bool,
    backend: str | None = None,
    predict: bool = True,
) -> None:
    """Verify the bundle, make the picture, write it, print what happened. `backend` stands for the bundle's own;
    `predict` False computes every step of a bundle that predicts some."""
    if wire_dtype not in WIRE_DTYPES:
        raise RequestError("unknown wire dtype", got=wire_dtype, expected=" or ".join(WIRE_DTYPES))
    if not output.absolute().parent.is_dir():
        raise RequestError("the picture's folder does not exist", got=str(output), do="Make it first.")
    if output.is_dir():
        raise RequestError("the picture's path is a folder", got=str(output), do="Give the name of a PNG file.")
    opened = Bundle.open(bundle)
    steps = opened.manifest.schedule.num_steps
    with (
        CloudClient(cloud, token=token) if cloud else nullcontext() as client,
        Session(opened, backend=backend) as session,
        counting("generating", steps) as advance,
    ):
        for words, text in (("prompt", prompt), ("negative prompt", negative_prompt)):
            if session.tokenizer.is_cut(text):
                limit = opened.manifest.tokenizer.max_length
                err.print(f"[yellow]the {words} is cut:[/] the model reads {limit} tokens, start and end included")

        def stepped(event: StepEvent) -> None:
            advance(f"step {event.step + 1} of {event.num_steps}", 1)

        result = generate_picture(
            session,
            prompt,
            negative_prompt=negative_prompt,
            seed=seed,
            guidance=guidance,
            split=split,
            cloud=client,
            on_step=stepped,
            fallback=fallback,
            wire_dtype=wire_dtype,
            predict=predict,
        )
        ran = {name: list(each) for name, each in session.providers_by_component.items()}
    result.save_png(output)
    document: dict[str, Any] = {
        "image": str(output),
        "path_taken": result.path_taken,
        "steps": dict(result.steps),
        "step_kinds": dict(result.kinds),
        "handoff_bytes": result.handoff_bytes,
        "ms": {name: round(value, 2) for name, value in result.ms.items()},
        "providers": list(result.providers),
        "providers_by_component": ran,
        "seed": result.seed,
        "guidance": result.guidance,
        "bundle_digest": result.digest,
        "fallback_reason": result.fallback_reason,
    }

    def show(console: Any) -> None:
        console.print(table(["stage", "ms"], [[name, f"{value:.0f}"] for name, value in result.ms.items()]))
        where = f"{result.steps['cloud']} steps in the cloud, {result.steps['device']} here"
        if result.predicted_steps:
            where += f" ({result.computed_steps} computed, {result.predicted_steps} predicted)"
        console.print(
            f"[bold]{printable(output)}[/]: {result.path_taken}, {where}, {result.handoff_bytes} bytes handed over"
        )
        if result.fallback_reason:
            console.print(f"[yellow]the cloud was out of reach:[/] {printable(result.fallback_reason)}")

    emit(document, as_json, show)
