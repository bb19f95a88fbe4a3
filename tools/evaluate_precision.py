"""`latentrelay evaluate --precision all`: what each precision of a device's U-Net costs and gives, in one table.

Builds a bundle a precision over shared stages, runs them from the teacher's handoffs on held-out captions, and writes
precision.json, precision.html and its plot: bytes, ms and peak memory; final-latent PSNR to the float run of the same
seed, as shipped, without compensation and with each rival's; what the judge reads; the error by step before and after.
`w4a4` is simulated in torch, because no CPU runs it, and says so.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from latentrelay.device_profiles import DeviceProfile, load_profile
from latentrelay.runtime import Bundle, Session
from latentrelay.runtime.errors import RequestError
from latentrelay.tools.console import counting, emit, extra, printable, table
from latentrelay.tools.models import REFERENCE, resolve

if TYPE_CHECKING:
    from latentrelay.export import ExportResult
    from latentrelay.export.prediction_pass import PredictionAsk
    from latentrelay.tools.picture_scores import Scored
    from latentrelay.tools.precision_runs import Experiment, Variant
    from latentrelay.tools.sweep_device import Captions, Scorer

FLOAT = "fp32"
DEPLOYABLE = (FLOAT, "fp16", "w8a16", "w8a8", "w4a16", "w4a8")
SIMULATED = "w4a4"
DATA_SPLITS = ("report", "gate")
RIVALS = {"psnr_db_uncompensated": "none", "psnr_db_ptqd": "ptqd", "psnr_db_gain_only": "gain"}
_LEAST_CAPTIONS = 2
_CURVE_CAPTIONS = 32  # of which the error by step is measured


def run(
    precisions: str,
    captions: int,
    seed: int,
    *,
    device: str | None,
    student: str | None,
    split: int,
    num_steps: int,
    data_split: str,
    output: Path,
    as_json: bool,
) -> None:
    """Build, run, score, write and print. `precisions`: "all" or names with commas; fp32 is always among them.

    `student`: a released name, else the one of the profile's class. Raises RequestError, ExportError and its kin.
    """
    wanted = parse_precisions(precisions)
    if not 0 <= split < num_steps:
        raise RequestError("split is out of range", got=split, expected=f"0 .. {num_steps - 1}")
    if captions < _LEAST_CAPTIONS:
        raise RequestError("too few captions for a Frechet distance", got=captions, expected="2 or more")
    if data_split not in DATA_SPLITS:
        raise RequestError("unknown data split", got=data_split, expected=" or ".join(DATA_SPLITS))
    with extra("compress", "evaluating precisions"):
        from latentrelay.reference import captions as grammar
        from latentrelay.tools import precision_report
        from latentrelay.tools.sweep_device import Captions
    pairs = grammar.sample_captions(data_split, captions, seed)  # type: ignore[arg-type]
    asked = Captions(tuple(pairs), tuple(seed * 1_000_003 + i for i in range(captions)))
    document = {
        "captions": captions,
        "seed": seed,
        "data_split": data_split,
        **evaluate(wanted, asked, device, student, split, num_steps, output),
    }
    precision_report.write(document, output)

    def show(console: Any) -> None:
        console.print(table(list(precision_report.SHORT), [precision_report.short(row) for row in document["rows"]]))
        console.print(f"written: [bold]{printable(output)}[/]: {', '.join(precision_report.FILES)}")

    emit(document, as_json, show)


def parse_precisions(words: str) -> list[str]:
    """The precisions asked for, fp32 first. Raises RequestError."""
    known = [*DEPLOYABLE, SIMULATED]
    if words == "all":
        return known
    asked = [word.strip() for word in words.split(",")]
    for word in asked:
        if word not in known:
            raise RequestError("unknown precision", got=word, expected=f"all, or some of {', '.join(known)}")
    return [name for name in known if name in {FLOAT, *asked}]


def evaluate(
    wanted: Sequence[str],
    asked: Captions,
    device: str | None,
    student: str | None,
    split: int,
    num_steps: int,
    output: Path,
) -> dict[str, Any]:
    """The document: `rows`, a row a precision, and how they were made."""
    from latentrelay.cloud.engine import Engine
    from latentrelay.reference import pipeline as reference
    from latentrelay.tools.array_cache import ArrayCache
    from latentrelay.tools.demo import machine_profile
    from latentrelay.tools.precision_clock import peak_memory_mib, step_times
    from latentrelay.tools.precision_runs import Experiment
    from latentrelay.tools.sweep import cores
    from latentrelay.tools.sweep_device import Scorer
    from latentrelay.tools.teacher_runs import BATCH, Teacher

    profile = load_profile(device or machine_profile())
    if profile.backend.name == "coreml":
        raise RequestError(
            "the tables of a Core ML profile belong to its packages, which do not run here",
            got=profile.name,
            expected="a profile whose backend is onnxruntime or openvino",
        )
    started = time.perf_counter()
    pipeline = reference.load(Path(resolve(REFERENCE)))
    engine = Engine(pipeline, name=REFERENCE)
    teacher = Teacher(pipeline, engine.digest, num_steps, reference.GUIDANCE, ArrayCache(output / "cache"))
    shelf = Shelf(pipeline, profile, student, num_steps, output)
    made = {name: shelf.build(name) for name in wanted if name != SIMULATED}
    bundles = {name: Bundle.open(each.bundle) for name, each in made.items()}
    with Session(bundles[FLOAT], threads=cores()) as states:
        experiment = Experiment(teacher, split, states, cores())
        judged = Judged(experiment, tuple(asked.batches(BATCH)), Scorer(), bundles[FLOAT])
        rows = [judged.row(name, bundle, made[name]) for name, bundle in bundles.items()]
        curves = {name: judged.curve(bundle, made[name]) for name, bundle in bundles.items() if name != FLOAT}
        if SIMULATED in wanted:
            rows.append(judged.simulated_row(shelf))
    times = step_times(bundles, cores())
    for row in rows:
        name = row["precision"]
        row |= times.get(name, {"median_ms": None, "spread_ms": None, "cpu_share": None})
        row["peak_memory_mib"] = peak_memory_mib(bundles[name].path, cores()) if name in bundles else None
    return {
        "rows": rows,
        "curves": curves,
        "model": REFERENCE,
        "model_digest": engine.digest,
        "device": shelf.profile.name,
        "student": shelf.student_name,
        "kernels": shelf.profile.backend.kernels,
        "split": split,
        "num_steps": num_steps,
        "sampler": teacher.sampler,
        "guidance": teacher.guidance,
        "threads": cores(),
        "seconds": round(time.perf_counter() - started, 1),
    }


class Shelf:
    """The bundles of one student in every precision, built over one work folder below `output`."""

    def __init__(
        self, pipeline: Any, profile: DeviceProfile, student: str | None, num_steps: int, output: Path
    ) -> None:
        from latentrelay.reference.students import RELEASED_FOR

        self.pipeline, self.profile, self.num_steps, self.output = pipeline, profile, num_steps, output
        self.student_name = student or RELEASED_FOR[profile.student_class]

    @cached_property
    def student(self) -> Path:
        """Its folder."""
        from latentrelay.tools.students import find

        ((_, folder),) = find([self.student_name], Path(resolve(REFERENCE))).items()
        return folder.parent if folder.name == "unet" else folder

    def build(
        self, precision: str, *, prediction: PredictionAsk | None = None, name: str | None = None
    ) -> ExportResult:
        """One bundle, called by its precision unless it has another `name`; what did not change since the last run is
        not made again."""
        from latentrelay.export import export, load_source
        from latentrelay.tools.build import calibration
        from latentrelay.tools.models import default_guidance
        from latentrelay.tools.recipes import shipped_recipe

        called = name or precision
        with counting(f"building {called}", None) as advance:
            return export(
                load_source(self.pipeline, name=REFERENCE),
                self.profile,
                self.output / "bundles" / called,
                num_steps=self.num_steps,
                guidance=default_guidance(REFERENCE),
                overwrite=True,
                progress=lambda words: advance(f"{called}: {words}", 1),
                student=self.student,
                light_vae=Path(resolve(REFERENCE)) / "light_vae",
                precision=precision,
                calibration=calibration(REFERENCE, None),
                work=self.output / "work",
                recipe=shipped_recipe(self.student, precision, self.profile.backend.kernels),
                prediction=prediction,
            )


@dataclass(frozen=True)
class Judged:
    """The captions in batches, the judge, and the float bundle that everything is compared with."""

    experiment: Experiment
    parts: tuple[Captions, ...]
    scorer: Scorer
    plain: Bundle

    @cached_property
    def float_variant(self) -> Variant:
        """The float student."""
        from latentrelay.tools.precision_runs import deployed

        return deployed(self.plain, self.experiment.threads)

    @cached_property
    def float_latents(self) -> list[Any]:
        """(B, C, h, w) a part."""
        return [self.experiment.latents({FLOAT: self.float_variant}, part)[FLOAT] for part in self.parts]

    @cached_property
    def float_scored(self) -> Scored:
        """The float bundle's pictures, compared with themselves."""
        return self._scored(self.plain)

    @cached_property
    def float_pictures(self) -> list[Any]:
        """(B, H, W, 3) uint8 a part."""
        return [self.experiment.pictures(self.plain, part) for part in self.parts]

    def row(self, name: str, bundle: Bundle, made: ExportResult) -> dict[str, Any]:
        """One deployed precision."""
        variants = self.variants(bundle, made)
        decibels = self._psnr(f"{name}: {self._count} captions", variants)
        compensation = made.quality.get("compensation", {})
        step = bundle.path / "unet"
        return {
            "precision": name,
            "simulated": False,
            "bytes": sum((step / file).stat().st_size for file in ("step_full.onnx", "model.onnx_data")),
            "bundle_bytes": sum(entry.bytes for entry in bundle.files),
            "psnr_db": decibels["shipped"],
            **{column: decibels.get(candidate) for column, candidate in RIVALS.items()},
            "psnr_gain_db_95": self._gain(variants),
            **self._picture_figures(self._scored(bundle)),
            "verdict": compensation.get("verdict", "not needed: float" if name == FLOAT else "not fitted"),
            "compensation": compensation.get("kept"),
            "parity_db": dict(made.parity_db),
            "kernels": dict(made.quality.get("kernels", {})),
        }

    def simulated_row(self, shelf: Shelf) -> dict[str, Any]:
        """`w4a4` in torch: latents by the simulated U-Net, pictures of them by the float bundle's decoder."""
        from latentrelay.tools.precision_simulated import simulated

        variant, size = simulated(shelf.student, self.float_variant.table)
        decibels, found = [], []
        with counting("w4a4 (simulated)", self._count) as advance:
            for part, reference, pictures in zip(self.parts, self.float_latents, self.float_pictures, strict=True):
                latents = self.experiment.latents({SIMULATED: variant}, part)[SIMULATED]
                decibels.append(_psnr(reference, latents))
                found.append(self.scorer(self.experiment.decoded(latents), pictures, part))
                advance("w4a4 (simulated)", len(part.seeds))
        return {
            "precision": SIMULATED,
            "simulated": True,
            "bytes": size,
            "bundle_bytes": None,
            "psnr_db": float(np.concatenate(decibels).mean()),
            **dict.fromkeys(RIVALS),
            "psnr_gain_db_95": None,
            **self._picture_figures(type(found[0]).joined(found)),
            "verdict": "simulated: no CPU runs it",
            "compensation": None,
        }

    def variants(self, bundle: Bundle, made: ExportResult) -> dict[str, Variant]:
        """The bundle as it ships, and its U-Net with every candidate's tables."""
        from dataclasses import replace

        from latentrelay.compress.plan import Plan
        from latentrelay.export.compensation_file import load_outcome
        from latentrelay.tools.precision_runs import deployed

        network = deployed(bundle, self.experiment.threads)
        shipped = {k: v for k, v in Plan.load(bundle.path).tables.arrays().items() if k.startswith("compensation_")}
        found = {"shipped": replace(network, tables=shipped), "none": network}
        if "compensation" in made.stages:
            fitted = load_outcome(made.stages["compensation"])
            found |= {name: replace(network, tables=each) for name, each in fitted.candidates.items()}
        wanted = {"shipped", *RIVALS.values()}
        return {name: variant for name, variant in found.items() if name in wanted}

    def curve(self, bundle: Bundle, made: ExportResult) -> dict[str, Any]:
        """The guided prediction's error over its power by step, along the float run: without and with the tables."""
        from latentrelay.tools.precision_curves import error_by_step
        from latentrelay.tools.sweep_device import Captions
        from latentrelay.tools.teacher_runs import BATCH

        variants, chosen = self.variants(bundle, made), self.parts[: max(1, _CURVE_CAPTIONS // BATCH)]
        part = Captions(
            tuple(pair for part in chosen for pair in part.pairs), tuple(seed for part in chosen for seed in part.seeds)
        )
        return error_by_step(self.experiment, self.float_variant, variants["none"], variants["shipped"].tables, part)

    @property
    def _count(self) -> int:
        return sum(len(part.seeds) for part in self.parts)

    def _psnr(self, words: str, variants: Mapping[str, Variant]) -> dict[str, float]:
        decibels: dict[str, list[Any]] = {name: [] for name in variants}
        with counting(words, self._count) as advance:
            for part, reference in zip(self.parts, self.float_latents, strict=True):
                for name, latents in self.experiment.latents(variants, part).items():
                    decibels[name].append(_psnr(reference, latents))
                advance(words, len(part.seeds))
        return {name: float(np.concatenate(each).mean()) for name, each in decibels.items()}

    def _gain(self, variants: Mapping[str, Variant]) -> list[float] | None:
        """Bootstrap 95 % interval of the shipped tables' gain in dB over none, paired by caption."""
        from latentrelay.tools.evaluate import bootstrap_interval

        if not variants["shipped"].tables:
            return None
        gains = []
        for part, reference in zip(self.parts, self.float_latents, strict=True):
            found = self.experiment.latents(variants, part)
            gains.append(_psnr(reference, found["shipped"]) - _psnr(reference, found["none"]))
        return list(bootstrap_interval(np.concatenate(gains).tolist()))

    def _scored(self, bundle: Bundle) -> Scored:
        from latentrelay.tools.picture_scores import Scored

        found = [
            self.scorer(self.experiment.pictures(bundle, part), pictures, part)
            for part, pictures in zip(self.parts, self.float_pictures, strict=True)
        ]
        return Scored.joined(found)

    def _picture_figures(self, scored: Scored) -> dict[str, Any]:
        from latentrelay.reference import judge as judging
        from latentrelay.reference.pipeline import reference_path
        from latentrelay.tools.picture_scores import summary

        renderings = judging.load_statistics(reference_path())
        figures = summary(scored, self.float_scored, renderings)
        return {("picture_psnr_db" if name == "psnr_db" else name): value for name, value in figures.items()}


def _psnr(reference: Any, latents: Any) -> Any:
    from latentrelay.tools.precision_runs import latent_psnr_db

    return latent_psnr_db(reference, latents)
