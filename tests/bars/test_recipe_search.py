"""Bar: the best uncompensated w4a8 recipe of the reference's middle student, found and frozen; the Pareto front.

A quarter of an hour on one thread. The frozen recipe lies beside the student (recipes/); a later search must not find
its figures wrong. The front of all precisions goes to docs/measured/pareto_phone_mid.json and .png.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from latentrelay.compress.precision import PrecisionRecipe
from latentrelay.compress.precision_plot import save_pareto
from latentrelay.tools.recipe_search import RecipeSearch

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
MEASURED = ROOT / "docs" / "measured"
FROZEN = ROOT / "reference" / "weights" / "students" / "phone-mid" / "recipes" / "w4a8.onnxruntime-x64.json"
SHARES = (0.25, 0.5, 1.0)


@pytest.fixture(scope="module")
def search(tmp_path_factory: pytest.TempPathFactory) -> RecipeSearch:
    torch.set_num_threads(1)
    return RecipeSearch("phone-mid", tmp_path_factory.mktemp("search"))


def test_the_frozen_recipe_is_what_it_says(search: RecipeSearch) -> None:
    frozen = json.loads(FROZEN.read_text())
    recipe = PrecisionRecipe.from_json(frozen["recipe"])
    got, plain = search.figures(recipe), search.figures(search.plain("w4a8"))
    print(f"plain {plain}\nfrozen {got}")
    assert got.final_psnr_db == pytest.approx(frozen["figures"]["final_psnr_db"], abs=0.5)
    assert got.final_psnr_db > plain.final_psnr_db + 2.0
    assert got.bytes <= 1.10 * plain.bytes
    assert recipe.float_list.mac_share <= 0.05


def test_search_and_front(search: RecipeSearch, measured: Callable[[str, dict[str, Any]], Path]) -> None:
    families = {
        precision: [(precision, search.plain(precision))] for precision in ("fp16", "w8a16", "w8a8", "w4a16", "w4a8")
    }
    families["w4a8"] += [(f"w4a8, {share:.0%} of the budget", search.spared("w4a8", share)) for share in SHARES]
    measured_points = iter(search.points([recipe for family in families.values() for recipe in family]))
    points = {name: [next(measured_points) for _ in family] for name, family in families.items()}
    save_pareto(points, MEASURED, "pareto_phone_mid", {"metric": "final-latent PSNR, gate split, 16 captions"})
    rows = [dataclasses.asdict(point) for family in points.values() for point in family]
    worst = [dataclasses.asdict(each) for each in search.sensitivities("w4a8")[:20]]
    measured("recipe_search", {"points": rows, "worst_layers": worst})
    plain, best = points["w4a8"][0], points["w4a8"][-1]
    assert best.psnr_db > plain.psnr_db + 2.0
    assert best.bytes <= 1.10 * plain.bytes
