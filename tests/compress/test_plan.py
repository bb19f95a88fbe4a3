"""The Plan on disk: bit for bit, canonical, strict."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from latentrelay.compress.errors import PlanError
from latentrelay.compress.plan import Evidence, Plan, PlanSource, SplitMask, Tables, full_plan
from latentrelay.compress.solver_tables import SolverRow, SolverTable


def some_plan() -> Plan:
    generator = np.random.default_rng(0)
    rows = tuple(SolverRow(*map(float, generator.standard_normal(7) / 3)) for _ in range(3))
    table = SolverTable(rows, (999, 500.25, 1), 14.6146)
    source = PlanSource("somewhere", "sha256:" + "0" * 64, "sd1")
    plan = full_plan(source, {"name": "x", "nested": {"a": [1, 2.5]}}, "dpmsolver++", "Class", "sha256:1", table)
    recipe = dataclasses.replace(plan.recipe, corrections=(Evidence("bias", 0.1 + 0.2, 1 / 3, "kept", "nmse"),))
    return Plan(recipe, Tables(generator.standard_normal(3)))


def test_a_plan_round_trips_bit_for_bit(tmp_path: Path) -> None:
    plan = some_plan()
    plan.save(tmp_path)
    again = Plan.load(tmp_path)
    assert again == plan
    assert again.recipe.solver_table.rows == plan.recipe.solver
    before = [(tmp_path / name).read_bytes() for name in ("plan.json", "plan.safetensors")]
    again.save(tmp_path)
    assert [(tmp_path / name).read_bytes() for name in ("plan.json", "plan.safetensors")] == before


def test_every_split_of_a_full_plan_computes_every_step() -> None:
    assert some_plan().recipe.splits == tuple(SplitMask(k, ("full",) * (3 - k)) for k in range(4))


def test_one_bit_in_a_table_is_another_plan() -> None:
    plan = some_plan()
    other = plan.tables.guidance_multiplier.copy()
    other[1] = np.nextafter(other[1], 9.0)
    assert Plan(plan.recipe, Tables(other)) != plan


def edit(folder: Path, change: Any) -> None:
    document = json.loads((folder / "plan.json").read_text())
    change(document)
    (folder / "plan.json").write_text(json.dumps(document))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda d: d["recipe"].update(surprise=1), "recipe.surprise is unknown"),
        (lambda d: d["recipe"].pop("sampler"), "recipe.sampler is missing"),
        (lambda d: d.update(schema_version="2.0"), "schema_version"),
        (lambda d: d.update(more=1), "schema_version and recipe"),
        (lambda d: d["recipe"].update(num_steps="3"), "recipe.num_steps"),
        (lambda d: d["recipe"]["timesteps"].pop(), "recipe.timesteps: got 2"),
        (lambda d: d["recipe"]["splits"][0]["mask"].pop(), "split 0"),
        (lambda d: d["recipe"]["splits"][0]["mask"].__setitem__(0, "guess"), "mask[0]"),
        (lambda d: d["recipe"]["solver"][1].update(a=float("nan")), "NaN"),
    ],
)
def test_what_breaks_the_schema_is_named(tmp_path: Path, change: Any, named: str) -> None:
    some_plan().save(tmp_path)
    edit(tmp_path, change)
    with pytest.raises(PlanError) as caught:
        Plan.load(tmp_path)
    assert named in str(caught.value)


def test_missing_and_truncated_files_are_plan_errors(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="cannot be read"):
        Plan.load(tmp_path)
    some_plan().save(tmp_path)
    (tmp_path / "plan.safetensors").write_bytes(b"\x00" * 5)
    with pytest.raises(PlanError):
        Plan.load(tmp_path)


def test_compensation_tables_round_trip_and_an_older_plan_has_none(tmp_path: Path) -> None:
    plan, generator = some_plan(), np.random.default_rng(1)
    gain, offset = generator.standard_normal((2, 3, 2, 4))
    tables = Tables(plan.tables.guidance_multiplier, gain, offset)
    corrected = Plan(plan.recipe, tables)
    corrected.save(tmp_path)
    assert Plan.load(tmp_path) == corrected != plan
    plan.save(tmp_path)
    edit(tmp_path, lambda d: d.update(schema_version="1.1"))
    assert Plan.load(tmp_path).tables.compensation_gain is None
    edit(tmp_path, lambda d: (d.update(schema_version="1.0"), d["recipe"].pop("compression")))
    assert Plan.load(tmp_path).tables == plan.tables


@pytest.mark.parametrize(
    ("gain", "offset", "named"),
    [
        (np.zeros((3, 2, 4)), None, "belong together"),
        (np.zeros((2, 2, 4)), np.zeros((2, 2, 4)), "compensation_gain"),
        (np.zeros((3, 2, 4)), np.zeros((3, 2, 5)), "compensation_offset"),
        (np.zeros((3, 2, 4)), np.full((3, 2, 4), np.nan), "NaN"),
        (np.zeros((3, 2, 4), np.float32), np.zeros((3, 2, 4)), "float32"),
    ],
)
def test_compensation_tables_that_do_not_fit_are_refused(gain: Any, offset: Any, named: str) -> None:
    plan = some_plan()
    with pytest.raises(PlanError, match=named):
        Plan(plan.recipe, Tables(plan.tables.guidance_multiplier, gain, offset))


def test_mixing_reads_memory_only_where_there_is_one() -> None:
    rows = np.zeros((3, 2, 4))
    mixing = np.zeros((3, 2, 3, 4))
    mixing[2, :, 2] = 0.5
    plain = some_plan()
    recipe = dataclasses.replace(plain.recipe, solver=tuple(dataclasses.replace(r, c=0.1) for r in plain.recipe.solver))
    tables = Tables(np.ones(3), rows, rows.copy(), mixing)
    assert Plan(recipe, tables).tables == tables
    early = mixing.copy()
    early[0, :, 2] = 0.5
    without = dataclasses.replace(recipe, solver=tuple(dataclasses.replace(row, c=0.0) for row in recipe.solver))
    for wrong_recipe, wrong in ((recipe, early), (without, mixing), (recipe, mixing[:, :1]), (recipe, mixing * np.nan)):
        with pytest.raises(PlanError, match="compensation_mixing"):
            Plan(wrong_recipe, Tables(np.ones(3), rows, rows, wrong))
    with pytest.raises(PlanError, match="belong together"):
        Plan(recipe, Tables(np.ones(3), None, None, mixing))
