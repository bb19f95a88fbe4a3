"""`latentrelay evaluate --accelerate all`: our predicted steps and every rival on the same graphs, captions and seeds.

Builds a student's bundle, records calibration runs, fits ours on them, runs every method from the teacher's handoffs on
held-out captions and writes accelerate.json, accelerate.html and its plot: device time of the edge segment (what each
kind of network call costs, timed in turns in one process, added up over the steps that were run) against PSNR and SSIM
to the uncached run, attribute accuracy and Frechet distance; what the planner ships within each device time; the
ablation, paired by caption.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from latentrelay.device_profiles import load_profile
from latentrelay.runtime import Bundle, Session
from latentrelay.runtime.digest import sha256_file
from latentrelay.runtime.errors import RequestError
from latentrelay.tools.console import counting, emit, extra, printable, table
from latentrelay.tools.models import FEW_STEP_STUDENT, REFERENCE, few_step_adapters, resolve

if TYPE_CHECKING:
    from latentrelay.compress.trajectory import Trajectories
    from latentrelay.tools.accelerate_methods import Lab, Method
    from latentrelay.tools.accelerate_rows import Bench
    from latentrelay.tools.accelerate_runs import Result, Runner
    from latentrelay.tools.evaluate_precision import Shelf
    from latentrelay.tools.sweep_device import Captions
    from latentrelay.tools.teacher_runs import Teacher

FAMILIES = (
    "ours", "fewer-steps", "deepcache", "fora", "taylorseer", "teacache", "first-block", "output-cache", "random",
    "guidance-interval", "few-step",
)  # fmt: skip
_FLOAT = "fp32"
_LEAST_CAPTIONS = 2
_JUDGED = (
    "attribute_accuracy", "attribute_accuracy_difference", "attribute_accuracy_difference_95",
    "frechet_distance", "frechet_ratio", "frechet_ratio_95", "ssim",
)  # fmt: skip
_FEW_STEP_RUNS = ((4, 2), (8, 4))  # (num_steps, split) of the consistency student


def run(
    methods: str,
    captions: int,
    seed: int,
    *,
    device: str | None,
    student: str | None,
    split: int,
    num_steps: int,
    precision: str | None,
    data_split: str,
    output: Path,
    as_json: bool,
) -> None:
    """Build, fit, run, score, write and print. `methods`: "all" or families with commas. `precision`: of the bundle,
    the profile's own if not given. Raises RequestError, ExportError and its kin."""
    from latentrelay.tools.evaluate_precision import DATA_SPLITS, DEPLOYABLE

    wanted = parse_methods(methods)
    if not 0 < split < num_steps - 1:
        raise RequestError("split is out of range", got=split, expected=f"1 .. {num_steps - 2}")
    if captions < _LEAST_CAPTIONS:
        raise RequestError("too few captions for an interval", got=captions, expected="2 or more")
    if data_split not in DATA_SPLITS:
        raise RequestError("unknown data split", got=data_split, expected=" or ".join(DATA_SPLITS))
    if precision is not None and precision not in DEPLOYABLE:
        raise RequestError("unknown precision", got=precision, expected=" | ".join(DEPLOYABLE))
    with extra("compress", "evaluating accelerated runs"):
        from latentrelay.reference import captions as grammar
        from latentrelay.tools import accelerate_report
        from latentrelay.tools.sweep_device import Captions
    pairs = grammar.sample_captions(data_split, captions, seed)  # type: ignore[arg-type]
    asked = Captions(tuple(pairs), tuple(seed * 1_000_003 + i for i in range(captions)))
    document = {
        "captions": captions,
        "seed": seed,
        "data_split": data_split,
        **evaluate(wanted, asked, device, student, split, num_steps, precision, output),
    }
    accelerate_report.write(document, output)

    def show(console: Any) -> None:
        console.print(table(list(accelerate_report.SHORT), [accelerate_report.short(row) for row in document["rows"]]))
        console.print("* ours")
        for entry in document["frontier"]:
            console.print(accelerate_report.sentence(entry))
        console.print(f"written: [bold]{printable(output)}[/]: {', '.join(accelerate_report.FILES)}")

    emit(document, as_json, show)


def parse_methods(words: str) -> list[str]:
    """The families asked for. Raises RequestError."""
    if words == "all":
        return list(FAMILIES)
    asked = [word.strip() for word in words.split(",")]
    for word in asked:
        if word not in FAMILIES:
            raise RequestError("unknown method", got=word, expected=f"all, or some of {', '.join(FAMILIES)}")
    return [name for name in FAMILIES if name in asked]


def evaluate(
    wanted: Sequence[str],
    asked: Captions,
    device: str | None,
    student: str | None,
    split: int,
    num_steps: int,
    precision: str | None,
    output: Path,
) -> dict[str, Any]:
    """The document: `rows`, `chosen`, `ablation`, `frontier`, and how they were made."""
    from latentrelay.cloud.engine import Engine
    from latentrelay.reference import judge as judging
    from latentrelay.reference import pipeline as reference
    from latentrelay.tools import accelerate_verdicts as verdicts
    from latentrelay.tools.accelerate_methods import plain
    from latentrelay.tools.accelerate_ours import Workshop
    from latentrelay.tools.accelerate_rows import SHARES, Bench
    from latentrelay.tools.accelerate_runs import Runner
    from latentrelay.tools.accelerate_shipped import laboratory
    from latentrelay.tools.array_cache import ArrayCache
    from latentrelay.tools.demo import machine_profile
    from latentrelay.tools.evaluate_precision import Shelf
    from latentrelay.tools.precision_runs import Experiment
    from latentrelay.tools.sweep import cores
    from latentrelay.tools.sweep_device import Scorer
    from latentrelay.tools.teacher_runs import BATCH, Teacher

    profile = load_profile(device or machine_profile())
    if profile.backend.name == "coreml":
        raise RequestError(
            "a Core ML profile's packages do not run here",
            got=profile.name,
            expected="a profile whose backend is onnxruntime or openvino",
        )
    started = time.perf_counter()
    pipeline = reference.load(Path(resolve(REFERENCE)))
    engine = Engine(pipeline, name=REFERENCE)
    teacher = Teacher(pipeline, engine.digest, num_steps, reference.GUIDANCE, ArrayCache(output / "cache"))
    shelf = Shelf(pipeline, profile, student, num_steps, output)
    name = precision or profile.target_precision
    bundles = {each: Bundle.open(shelf.build(each).bundle) for each in dict.fromkeys((_FLOAT, name))}
    labs = {
        each: laboratory(bundle, output / "cut" / each, split, teacher.guidance, cores())
        for each, bundle in bundles.items()
    }
    lab = labs[name]
    costs = timed(lab, bundles[name])
    record = partial(recorded, shelf, bundles[_FLOAT], labs[_FLOAT], teacher, output)
    workshop = Workshop(lab, record, teacher.scheduler(), teacher.cache)
    bench = Bench(workshop, {kind: each["median_ms"] for kind, each in costs.items()})
    with Session(bundles[_FLOAT], threads=cores()) as states:
        experiment = Experiment(teacher, split, states, cores())
        exact = None if name == _FLOAT else plain(labs[_FLOAT])
        parts = tuple(asked.batches(BATCH))
        runner = Runner(experiment, parts, Scorer(), plain(lab), exact)
        results, ablation = everything(wanted, bench, runner, shelf)
        chosen: list[dict[str, Any]] = []
        if "ours" in wanted:
            more, chosen = planned(bench, runner, shelf, name, bundles[name].path)
            results += more
    renderings = judging.load_statistics(reference.reference_path())
    whole = results[0]
    rows = [verdicts.row(each, whole, bench.costs, renderings) for each in results]
    for entry in chosen:
        entry |= {name: row[name] for row in rows if row["label"] == entry["label"] for name in _JUDGED}
    return {
        "rows": rows,
        "chosen": chosen,
        "frontier": verdicts.frontier(results[1:], whole, bench.costs, SHARES),
        "frontier_to_float": verdicts.frontier(results[1:], whole, bench.costs, SHARES, "float") if exact else None,
        "ablation": ablation,
        "costs": {kind: {key: round(value, 4) for key, value in each.items()} for kind, each in costs.items()},
        "model": REFERENCE,
        "model_digest": engine.digest,
        "device": profile.name,
        "student": shelf.student_name,
        "precision": name,
        "kernels": profile.backend.kernels,
        "split": split,
        "num_steps": num_steps,
        "sampler": teacher.sampler,
        "guidance": teacher.guidance,
        "threads": cores(),
        "fitted_on": len(workshop.runs) if "runs" in vars(workshop) else 0,
        "seconds": round(time.perf_counter() - started, 1),
    }


def recorded(shelf: Shelf, bundle: Bundle, lab: Lab, teacher: Teacher, output: Path) -> Trajectories:
    """Float runs of calibration captions, half from the first step and half from the split; kept, and resumed."""
    from latentrelay.compress.trajectory import Identity, record
    from latentrelay.export.deployed import PipelineCloud
    from latentrelay.tools.build import calibration

    recipe, latent, captions = lab.networks.plan.recipe, bundle.manifest.latent, calibration(REFERENCE, None)
    network = str(recipe.compression.get("student_digest", teacher.digest))
    identity = Identity(
        teacher.digest, network, teacher.sampler, recipe.scheduler_digest, teacher.num_steps, teacher.guidance
    )
    words = "recording calibration runs"
    size = (latent.channels, latent.height, latent.width)
    with counting(words, len(captions.prompts)) as advance:
        return record(
            output / "runs" / f"split-{lab.split}-{identity.network[-12:]}",
            captions.prompts,
            captions.seeds(False),
            (0, lab.split),
            PipelineCloud(shelf.pipeline, lab.table, teacher.guidance, size),
            lab.on(lab.table),
            lab.table,
            identity,
            lambda done, asked: advance(words, 1),
        )


def timed(lab: Lab, bundle: Bundle) -> Mapping[str, Mapping[str, float]]:
    """What every kind of call costs."""
    tokens, width = bundle.manifest.components["text_encoder"].outputs[0].shape[1:]
    return lab.networks.costs(lab.networks.kinds, (int(tokens), int(width)))


def everything(
    wanted: Sequence[str], bench: Bench, runner: Runner, shelf: Shelf
) -> tuple[list[Result], list[dict[str, Any]]]:
    """Results, the uncached run first, and the ablation."""
    from latentrelay.tools.accelerate_verdicts import paired

    results: dict[str, Result] = {}

    def result(method: Method) -> Result:
        found = runner.result(method)
        return results.setdefault(found.label, found)

    result(runner.reference)
    for family in wanted:
        if family == "few-step":
            results |= {found.label: found for found in few_step(bench, runner, shelf)}
            continue
        for method in bench.methods(family):
            result(method)
    ablation: list[dict[str, Any]] = []
    for pair in bench.pairs() if "ours" in wanted else []:
        with_it, without_it = result(pair.with_it), result(pair.without_it)
        told = {"part": pair.part, "share": pair.share, "with": with_it.label, "without": without_it.label}
        ablation.append({**told, **paired(with_it, without_it)})
    return list(results.values()), ablation


def planned(
    bench: Bench, runner: Runner, shelf: Shelf, precision: str, plain: Path
) -> tuple[list[Result], list[dict[str, Any]]]:
    """What a build ships within each share of the time: its results, and an entry each with the planner's reason and
    the segment's time through the runtime's sessions."""
    from latentrelay.tools.accelerate_rows import SHARES
    from latentrelay.tools.accelerate_shipped import end_to_end, shipped
    from latentrelay.tools.sweep import cores

    lab = bench.workshop.lab
    made = list(shipped(shelf, lab, precision, SHARES))
    start = runner.starts(runner.parts[0])[0]
    bundles = {"plain": plain, **{str(each.share): each.bundle for each in made}}
    clock = end_to_end(bundles, start, lab.guidance, cores())
    results, entries = [], []
    for each in made:
        found = None if each.method is None else runner.result(each.method)
        results += [] if found is None else [found]
        own = clock[str(each.share)]
        entries.append(
            {
                "share": each.share,
                "settings": each.report.get("chosen"),
                "why": each.report.get("why", "nothing was let through"),
                "label": None if found is None else found.label,
                "computed_steps": None if found is None else found.computed,
                "device_ms": None if found is None else round(found.device_ms(bench.costs), 3),
                "psnr_db": None if found is None else float(found.psnr_db.mean()),
                "end_to_end_ms": own,
                "end_to_end_speedup": own["speedup"],
                "report": dict(each.report),
            }
        )
    return results, entries


def few_step(bench: Bench, runner: Runner, shelf: Shelf) -> list[Result]:
    """The consistency student, four and eight steps, half of them on the device: another run from the first step on, so
    that its PSNR to the uncached one says little. Its network is the student's own at batch 1, in float; beside a
    quantised bundle it is left out."""
    from latentrelay.tools.accelerate_networks import BRANCH
    from latentrelay.tools.evaluate_few_step import few_step_networks, hybrid_latents

    if shelf.student_name != FEW_STEP_STUDENT or runner.exact is not None or BRANCH not in bench.costs:
        return []
    networks = few_step_networks(FEW_STEP_STUDENT)
    adapters = [sha256_file(few_step_adapters(student)) for student in (None, FEW_STEP_STUDENT)]
    found = []
    for num_steps, split in _FEW_STEP_RUNS:
        key = {"name": "few-step student", "num_steps": num_steps, "split": split, "adapters": adapters}

        def make(part: Captions, num_steps: int = num_steps, split: int = split) -> tuple[Any, Any]:
            made_from = {**runner.experiment.made_from(part), "few_step": [num_steps, split], "adapters": adapters}

            def run() -> dict[str, Any]:
                runs = zip(part.prompts, part.seeds, strict=True)
                rows = [hybrid_latents(networks, [text], [seed], num_steps, split).numpy() for text, seed in runs]
                return {"latents": np.concatenate(rows)}

            latents = runner.experiment.cache.get("few-step", made_from, run)["latents"]
            return latents, tuple((BRANCH,) * (num_steps - split) for _ in part.seeds)

        settings = {"num_steps": num_steps, "split": split}
        found.append(runner.scored("few-step student", settings, False, make, key))
    return found
