"""Few-step hybrids on the reference: as good as the hybrid of 25 steps, and refused without the distilled teacher.

`evaluate --few-step` scores 512 held-out captions; the chain itself (a student's bundle, a served teacher) is run once.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow

STUDENT, HYBRIDS = "phone-mid", {(4, 2), (8, 4)}
ALLOWED_POINTS = 4.0


@pytest.fixture(scope="module")
def weights(reference_pipeline: Any) -> Path:
    from latentrelay.reference.pipeline import reference_path

    folder = reference_path()
    needed = [folder / "few_step" / f"{name}_lora.safetensors" for name in ("teacher", STUDENT)]
    for path in (*needed, folder / "students" / STUDENT / "unet" / "config.json"):
        if not path.is_file():
            pytest.skip(f"{path} is not in this checkout")
    return folder


def test_four_and_eight_steps_are_within_four_points_of_twenty_five(
    weights: Path, measured: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    from latentrelay.tools import evaluate_few_step

    evaluate_few_step.run(512, 0, student=STUDENT, folder=None, adapters=None, data_split="report", as_json=True)
    figures = json.loads(capsys.readouterr().out)
    command = f"latentrelay evaluate --few-step --student {STUDENT} --captions 512 --seed 0 --json"
    measured("few_step", {**figures, "command": command})
    rows = {(row["num_steps"], row["split"]): row for row in figures["rows"]}
    for key in HYBRIDS:
        assert rows[key]["behind_points"][2] <= ALLOWED_POINTS, (key, rows[key]["behind_points"])


def test_the_adapters_fit_their_share_of_the_weights(weights: Path) -> None:
    sizes = [path.stat().st_size for path in (weights / "few_step").glob("*.safetensors")]
    assert sum(sizes) <= 5 * 2**20


def test_a_students_few_step_bundle_takes_the_distilled_teachers_handoff_alone(
    weights: Path, serve_cloud: Callable[..., AbstractContextManager[str]], tmp_path: Path
) -> None:
    from latentrelay.cloud.loading import load_pipeline
    from latentrelay.runtime import Bundle, CloudClient, Session, generate
    from latentrelay.runtime.errors import CloudRefusedError
    from latentrelay.tools import build
    from latentrelay.tools.models import FEW_STEP, REFERENCE, merging, resolve

    build.run(
        FEW_STEP,
        "pixel-8",
        tmp_path / "bundle",
        revision=None,
        config=None,
        num_steps=4,
        sampler=None,
        height=None,
        width=None,
        guidance=None,
        profiles=None,
        overwrite=False,
        as_json=True,
        student=STUDENT,
    )
    with Session(Bundle.open(tmp_path / "bundle")) as session:
        few = load_pipeline(resolve(FEW_STEP), adapt=merging(FEW_STEP))
        with serve_cloud(few) as url, CloudClient(url) as cloud:
            result = generate(session, "a small red circle", seed=1, cloud=cloud, split=2, fallback=False)
            assert (result.path_taken, result.steps) == ("hybrid", {"cloud": 2, "device": 2})
        with serve_cloud(load_pipeline(resolve(REFERENCE))) as url, CloudClient(url) as cloud:
            with pytest.raises(CloudRefusedError) as refused:
                generate(session, "a small red circle", seed=1, cloud=cloud, split=2)
            assert (refused.value.status, refused.value.problem["field"]) == (409, "model_digest")
