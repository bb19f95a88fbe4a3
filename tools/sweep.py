"""`latentrelay evaluate --sweep`: cloud-k-then-device for many k and every student, scored and counted, in one table.

The teacher runs once a caption (torch, several captions at a time); the device's part runs the deployed graphs, one
picture at a time, from the float16 handoff that would cross the wire. Rows of one student and the all-cloud row share
captions and seeds, so differences are paired. What is done is kept under DIR/cache: a killed sweep goes on, and another
with more splits, students or captions reuses it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from latentrelay.runtime import Bundle, Session
from latentrelay.runtime.errors import RequestError
from latentrelay.tools.console import counting, emit, extra, printable, table
from latentrelay.tools.models import FEW_STEP, resolve

if TYPE_CHECKING:
    from latentrelay.tools.students import Student
    from latentrelay.tools.sweep_device import Captions
    from latentrelay.tools.teacher_runs import Teacher

SPLITS = (0, 2, 5, 8, 10, 15, 20, 25)
DATA_SPLITS = ("report", "gate")
_LEAST_CAPTIONS = 2


def run(
    model: str,
    captions: int,
    seed: int,
    *,
    students: Sequence[str],
    splits: str | None,
    decoder: str | None,
    output: Path,
    num_steps: int,
    guidance: float | None,
    data_split: str,
    as_json: bool,
) -> None:
    """Run what is missing, score, write DIR/sweep.json, sweep.md and sweep.png, and print.

    `students`: released names or folders, all released ones if empty. `decoder` is the device's: "light", "source", the
    folder of a light VAE, or None for the light one where the model's folder has `light_vae`. Raises RequestError,
    ExportError and its kin, TeacherDiffersError.
    """
    wanted = parse_splits(splits, num_steps)
    if data_split not in DATA_SPLITS:
        raise RequestError("unknown data split", got=data_split, expected=" or ".join(DATA_SPLITS))
    if model == FEW_STEP:
        raise RequestError("a sweep runs the full-length sampler", got=model, expected="'reference' or a folder")
    if captions < _LEAST_CAPTIONS:
        raise RequestError("too few captions for a Frechet distance", got=captions, expected="2 or more")
    with extra("export", "a sweep"):
        from latentrelay.reference import captions as grammar
        from latentrelay.tools import sweep_report
        from latentrelay.tools.sweep_device import Captions
    pairs = grammar.sample_captions(data_split, captions, seed)  # type: ignore[arg-type]
    asked = Captions(tuple(pairs), tuple(seed * 1_000_003 + i for i in range(captions)))
    document = {
        "captions": captions,
        "seed": seed,
        "data_split": data_split,
        **sweep(model, asked, students, wanted, decoder, output, num_steps, guidance),
    }
    sweep_report.write(document, output)

    def show(console: Any) -> None:
        console.print(table(list(sweep_report.SHORT), [sweep_report.short_cells(row) for row in document["rows"]]))
        console.print("\n".join(sweep_report.notes(document)))
        console.print(f"written: [bold]{printable(output)}[/]: {', '.join(sweep_report.FILES)}")

    emit(document, as_json, show)


def parse_splits(words: str | None, num_steps: int) -> list[int]:
    """The splits asked for ("8,25"), or those of SPLITS that fit, and always N, the all-cloud run. RequestError."""
    if words is None:
        return sorted({split for split in SPLITS if split < num_steps} | {num_steps})
    found = {num_steps}
    for word in words.split(","):
        if not (word.strip().isascii() and word.strip().isdecimal() and int(word) <= num_steps):
            expected = f"whole numbers in 0 .. {num_steps}, commas between them"
            raise RequestError("--splits holds something else", got=word.strip(), expected=expected)
        found.add(int(word))
    return sorted(found)


def light_vae_of(weights: Path, decoder: str | None) -> Path | None:
    """The folder of the light VAE that the device decodes with; None for the source's decoder. Raises RequestError."""
    own = weights / "light_vae"
    if decoder in (None, "source") and not (decoder is None and (own / "config.json").is_file()):
        return None
    folder = own if decoder in (None, "light") else Path(decoder).expanduser()
    if not (folder / "config.json").is_file():
        expected = "light, source, or the folder of a light VAE with its config.json"
        raise RequestError("there is no such decoder", got=str(folder), expected=expected)
    return folder


def sweep(
    model: str,
    asked: Captions,
    students: Sequence[str],
    splits: Sequence[int],
    decoder: str | None,
    output: Path,
    num_steps: int,
    guidance: float | None,
) -> dict[str, Any]:
    """The document: `rows`, a row a student and split, and how they were made. `splits` must hold N."""
    from latentrelay.cloud.engine import Engine
    from latentrelay.reference import judge as judging
    from latentrelay.reference import pipeline as reference
    from latentrelay.tools import students as shelf
    from latentrelay.tools import sweep_clock, sweep_rows
    from latentrelay.tools.array_cache import ArrayCache
    from latentrelay.tools.picture_scores import Scored
    from latentrelay.tools.sweep_device import Scorer, device_scores
    from latentrelay.tools.teacher_runs import BATCH, Teacher

    started = time.perf_counter()
    weights = Path(resolve(model))
    folders, light = shelf.find(students, weights), light_vae_of(weights, decoder)
    pipeline = reference.load(weights)
    _check_size(pipeline)
    loaded = [shelf.load(name, folder, pipeline) for name, folder in folders.items()]
    scale = reference.GUIDANCE if guidance is None else guidance
    engine = Engine(pipeline, name=model)
    teacher = Teacher(pipeline, engine.digest, num_steps, scale, ArrayCache(output / "cache"))
    bundles = _bundles(Path(model).name, loaded, teacher, output / "cache" / "bundles", light)
    parts, scorer = list(asked.batches(BATCH)), Scorer()
    pictures = _teacher_pictures(teacher, parts)
    baseline = Scored.joined([scorer(found, found, part) for found, part in zip(pictures, parts, strict=True)])
    scored: dict[str, dict[int, Scored]] = {}
    with ExitStack() as stack:
        sessions = {name: stack.enter_context(Session(bundle, threads=cores())) for name, bundle in bundles.items()}
        for name, session in sessions.items():
            mine = splits if not scored else splits[:-1]  # the cloud's latents decoded here: once, not once a student
            scored[name] = device_scores(name, session, teacher, parts, mine, scorer)
        clock = sweep_clock.measure(teacher, engine, sessions, parts[0], splits)
    flops = {student.name: sweep_rows.count(teacher, student, light) for student in loaded}
    renderings = judging.load_statistics(reference.reference_path())
    device_decoder = "source" if light is None else "light"
    figures = sweep_rows.Figures(scored, baseline, renderings, flops, clock, device_decoder)
    return {
        "rows": [figures.row(student.name, split) for student in loaded for split in splits],
        "cloud_latents_decoded_on_device": figures.decoded_on_device(loaded[0].name),
        "all_cloud": _evaluation(pictures, asked),
        "students": {
            student.name: {
                "parameters": student.parameters,
                "parameters_ratio": student.parameters / shelf.parameters(pipeline.unet),
                "digest": student.digest,
                "bundle_digest": bundles[student.name].digest,
                "bundle_bytes": sum(entry.bytes for entry in bundles[student.name].files),
                "flops": sweep_rows.parts(flops[student.name]),
            }
            for student in loaded
        },
        "model": model,
        "model_digest": engine.digest,
        "model_parameters": shelf.parameters(pipeline.unet),
        "num_steps": num_steps,
        "sampler": teacher.sampler,
        "guidance": scale,
        "device_decoder": device_decoder,
        "wire_dtype": "float16",
        "timed_pictures": clock.pictures,
        "threads": cores(),
        "engine_agreement_db": round(clock.agreement_db, 1),
        "seconds": round(time.perf_counter() - started, 1),
    }


def cores() -> int:
    """Processor cores that this process may use; the device's graphs run on as many threads."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _check_size(pipeline: Any) -> None:
    from latentrelay.reference.judge import SIZE

    side = pipeline.unet.config.sample_size * 2 ** (len(pipeline.vae.config.block_out_channels) - 1)
    if side != SIZE:
        raise RequestError("the judge reads Scenes pictures only", got=f"{side} pixels", expected=f"{SIZE} pixels")


def _bundles(
    model: str, loaded: Sequence[Student], teacher: Teacher, folder: Path, light: Path | None
) -> dict[str, Bundle]:
    from latentrelay.tools.students import bundle_of

    with counting("building the students' bundles", None) as advance:
        return {
            student.name: bundle_of(
                student,
                teacher.pipeline,
                folder,
                name=model,
                light_vae=light,
                num_steps=teacher.num_steps,
                guidance=teacher.guidance,
                progress=lambda words: advance(words, 1),
            )
            for student in loaded
        }


def _teacher_pictures(teacher: Teacher, parts: Sequence[Captions]) -> list[Any]:
    """Every caption's all-cloud picture, (B, H, W, 3) uint8 a part; their runs are in the cache afterwards."""
    total = sum(len(part.pairs) for part in parts)
    found = []
    with counting(f"teacher: {total} runs", total) as advance:
        for part in parts:
            found.append(teacher.batch(part.prompts, part.seeds).pictures)
            advance(f"teacher: {total} runs", len(part.pairs))
    return found


def _evaluation(pictures: Sequence[Any], asked: Captions) -> dict[str, Any]:
    """What `latentrelay evaluate` prints of the all-cloud run: with chance, and with true renderings."""
    import numpy as np
    import torch
    from latentrelay.tools.evaluate import evaluate_pictures

    whole = torch.from_numpy(np.concatenate(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1
    return evaluate_pictures(whole, asked.pairs).document()
