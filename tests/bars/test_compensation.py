"""Bar: what compensation takes back of a student's quantisation error on held-out captions, and why no more.

Builds the phone-mid student at w8a8 and w4a8 by its measured recipes, which were frozen before: calibrate captions to
fit on, gate captions held out, half of the runs from the first step and half from the profile's split. Reads off what
every candidate scored, decomposes each step's error by what a static correction can know of it, and predicts the final
error from the steps'. Figures go to docs/measured/compensation.json, the plot to docs/images/error_propagation.png.
Some twenty minutes on a core. What the tables cost is timed at SD 1.4's latents: docs/measured/compensation_cost.json.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from latentrelay.compress.compensate import measure
from latentrelay.compress.error_decomposition import removed_shares
from latentrelay.compress.error_propagation import fit_jacobian, predict, rank_steps
from latentrelay.compress.error_propagation_plot import plot_predictions
from latentrelay.compress.plan import Plan, PlanSource, Tables, full_plan
from latentrelay.compress.solver_tables import SolverRow, SolverTable
from latentrelay.compress.student_unet import StudentUNet2DConditionModel
from latentrelay.compress.trajectory import IDENTITY_JSON, Identity, Trajectories
from latentrelay.export import export, load_source
from latentrelay.export.calibration import Calibration
from latentrelay.export.deployed import OnnxDenoiser, TorchDenoiser
from latentrelay.export.onnx_graphs import export_onnx
from latentrelay.export.stages import read_json
from latentrelay.export.step_graph import StepTail
from latentrelay.runtime import Bundle
from latentrelay.tools.recipes import shipped_recipe

pytestmark = pytest.mark.slow

STUDENT, PROFILE = "phone-mid", "x86-laptop-vnni"
FITTED, HELD_OUT, PREDICTED = 32, 32, 12
IMAGES = Path(__file__).resolve().parents[2] / "docs" / "images"


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("compensation")


def captions() -> Calibration:
    from latentrelay.reference.captions import sample_captions

    fitted, held_out = (
        tuple(caption.text for _, caption in sample_captions(split, count, 5))  # type: ignore[arg-type]
        for split, count in (("calibrate", FITTED), ("gate", HELD_OUT))
    )
    return Calibration(
        tuple(dict.fromkeys(fitted)), tuple(text for text in dict.fromkeys(held_out) if text not in fitted)
    )


def recorded(work: Path, bundle: Bundle, prompts: tuple[str, ...]) -> Trajectories:
    """The runs of one set of prompts, as the build left them."""
    folder = next(work.glob("runs-*"))
    document = read_json(folder, IDENTITY_JSON)
    document.pop("schema_version")
    every = Trajectories.open(folder, Identity(**document))
    files = {run.prompt: name for name, run in zip(every.files, every, strict=True)}
    return Trajectories(folder, every.identity, tuple(files[prompt] for prompt in prompts))


def test_compensation_pays(
    reference_pipeline: Any, work: Path, measured: Callable[[str, dict[str, Any]], Path]
) -> None:
    from latentrelay.reference.pipeline import GUIDANCE, NAME, reference_path

    unet = reference_path() / "students" / STUDENT / "unet"
    chosen, rows, predictions = captions(), {}, {}
    for precision in ("w8a8", "w4a8"):
        done = export(
            load_source(reference_pipeline, name=NAME),
            PROFILE,
            work / f"bundle-{precision}",
            guidance=GUIDANCE,
            student=unet.parent,
            precision=precision,
            recipe=shipped_recipe(unet.parent, precision, "onnxruntime-x64"),
            calibration=chosen,
            work=work / "stages",
        )
        bundle = Bundle.open(done.bundle)
        plan, latent = Plan.load(done.bundle), bundle.manifest.latent
        table = plan.recipe.solver_table
        tokens, width = bundle.manifest.components["text_encoder"].outputs[0].shape[1:]
        shape = (latent.channels, latent.height, latent.width)
        deployed = OnnxDenoiser(
            bundle.file("unet/model.onnx"), table, bundle.manifest.backend, shape, (int(tokens), int(width))
        )
        fitted, held = (recorded(work / "stages", bundle, part) for part in (chosen.prompts, chosen.held_out))
        shares = removed_shares(
            measure(fitted.take(PREDICTED), deployed, table),
            measure(held.take(PREDICTED), deployed, table),
            GUIDANCE,
            table.needs_x0_prev,
        )
        network = TorchDenoiser(StudentUNet2DConditionModel.from_pretrained(unet).float(), table)
        jacobian = fit_jacobian(held.take(6), network, deployed, table)
        found = predictions[precision] = predict(held.take(PREDICTED), deployed, table, jacobian)
        rows[precision] = {
            "compensation": dict(done.quality["compensation"]),
            "share_of_step_error_removed": {
                form: [round(float(v), 4) for v in values] for form, values in shares.items()
            },
            "step_share_of_final_error": [round(float(value), 4) for value in found.step_shares],
            "steps_by_share": list(rank_steps(found))[:5],
            "prediction_minus_measured_db": round(found.bias_db, 2),
            "prediction_correlation": round(
                float(np.corrcoef(np.log(found.predicted), np.log(found.measured))[0, 1]), 3
            ),
        }
    plot_predictions(predictions, IMAGES / "error_propagation.png")
    measured("compensation", {"student": STUDENT, "fitted": FITTED, "held_out": HELD_OUT, "rows": rows})
    for precision, row in rows.items():
        report = row["compensation"]
        scores = report["psnr_db"]
        assert scores[report["kept"]] >= max(scores["ptqd"], scores["gain"], scores["none"]), precision
        assert report["gain_db_95"][0] > 0.0, precision
    assert rows["w4a8"]["compensation"]["gain_db"] >= 1.2


def tail_session(folder: Path, tables: Tables) -> Any:
    """A step's tail at SD 1.4's latents, one thread."""
    steps = len(tables.guidance_multiplier)
    rows = tuple(SolverRow(0.9, -0.3, 0.1 * (0 < i < steps - 1), 0.0, 1.0, -0.5, 1.0) for i in range(steps))
    table = SolverTable(rows, tuple(range(steps, 0, -1)), 1.0)
    plain = full_plan(PlanSource("m", "sha256:0", "sd1"), {}, "dpmsolver++", "Class", "sha256:1", table)
    latents = torch.zeros(1, 4, 64, 64)
    examples = [torch.zeros(2, 4, 64, 64), latents, torch.tensor(3), torch.tensor(4.0), latents.clone()]
    names = ["noise_pred", "latents", "step", "guidance", "x0_prev"]
    path = folder / f"{len(list(folder.iterdir()))}.onnx"
    tail = StepTail(Plan(plain.recipe, tables))
    export_onnx(tail, examples, path, inputs=names, outputs=["next_latents", "next_x0_prev"], opset=20)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    feeds = {name: example.numpy() for name, example in zip(names, examples, strict=True)}
    return lambda: session.run(None, feeds)


def test_tables_cost_next_to_nothing(tmp_path: Path, measured: Callable[[str, dict[str, Any]], Path]) -> None:
    """Half a percent of a step of one second is 5 ms; a w8a8 step of the 224M geometry takes longer here."""
    rng, steps = np.random.default_rng(0), 25
    rows, mixing = rng.standard_normal((2, steps, 2, 4)), rng.standard_normal((steps, 2, 3, 4))
    mixing[0, :, 2] = 0.0
    ones = np.ones(steps)
    tails = {"none": Tables(ones), "gain and offset": Tables(ones, *rows), "with mixing": Tables(ones, *rows, mixing)}
    runs = {name: tail_session(tmp_path, tables) for name, tables in tails.items()}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(300):
        for name, run in runs.items():
            started = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - started)
    median_ms = {name: round(1e3 * float(np.median(values)), 4) for name, values in seconds.items()}
    measured("compensation_cost", {"latents": [4, 64, 64], "threads": 1, "tail_median_ms": median_ms})
    assert median_ms["with mixing"] - median_ms["none"] < 5.0
