"""Bar: what compensation takes back of a student's quantisation error on held-out captions, and why no more.

Builds the phone-mid student at w8a8 and w4a8 (calibrate captions to fit on, gate captions held out, half of the runs
from the first step and half from the profile's split), reads off what every candidate scored, decomposes each step's
error by what a static correction can know of it, and predicts the final error from the steps'. Figures go to
docs/measured/compensation.json, the plot to docs/images/error_propagation.png. Some twenty minutes on a core.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from latentrelay.compress.compensate import measure
from latentrelay.compress.error_decomposition import removed_shares
from latentrelay.compress.error_propagation import fit_jacobian, predict, rank_steps
from latentrelay.compress.error_propagation_plot import plot_predictions
from latentrelay.compress.plan import Plan
from latentrelay.compress.student_unet import StudentUNet2DConditionModel
from latentrelay.compress.trajectory import IDENTITY_JSON, Identity, Trajectories
from latentrelay.export import export, load_source
from latentrelay.export.calibration import Calibration
from latentrelay.export.deployed import OnnxDenoiser, TorchDenoiser
from latentrelay.export.stages import read_json
from latentrelay.runtime import Bundle

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
