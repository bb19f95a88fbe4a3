"""The network that a benchmark compares, on disk once for every row: U-Net, plan, inputs, and what comes out in torch.

In: a geometry's name (random weights) or a model's folder. Out, in one folder: `unet/` in diffusers' layout, plan.json,
`inputs.npz` (one guided step: latents (1,C,h,w), timestep, states (2,T,D), `noise_pred` (2,C,h,w) of torch in float32)
and `calibration.npz` (steps spread over the run, for ranges). Random weights have no meaning but their size.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from latentrelay.runtime.errors import RequestError
from numpy.typing import NDArray

GEOMETRIES = ("hybrid-sd-224m", "sd14", "tiny")
SEED, NUM_STEPS, GUIDANCE = 0, 25, 7.5
CALIBRATION_STEPS = 4
INPUTS, CALIBRATION, FACTS = "inputs.npz", "calibration.npz", "network.json"
_TINY: dict[str, Any] = {
    "_class_name": "UNet2DConditionModel",
    "sample_size": 8,
    "block_out_channels": [32, 64],
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    "layers_per_block": 1,
    "attention_head_dim": 2,
    "cross_attention_dim": 32,
    "norm_num_groups": 8,
}
Feeds = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class Network:
    """Where it lies, what it is called, and the shape of one guided step. `first_row`: a and b of the first step's
    `x' = a x + b e`; `memory`: whether the solver has one (an input of our step graph)."""

    folder: Path
    name: str
    parameters: int
    rows: int
    columns: int
    tokens: int
    first_row: tuple[float, float]
    memory: bool

    @property
    def unet(self) -> Path:
        """The U-Net's folder in diffusers' layout."""
        return self.folder / "unet"

    def inputs(self) -> Feeds:
        """One guided step: latents, timestep, encoder_hidden_states, noise_pred (torch's)."""
        with np.load(self.folder / INPUTS) as arrays:
            return dict(arrays)

    def calibration(self) -> Iterator[tuple[int, Feeds]]:
        """(step, the U-Net's feeds) of a few steps over the whole run: sample (2,C,h,w), timestep, states."""
        with np.load(self.folder / CALIBRATION) as arrays:
            for row, step in enumerate(arrays["step"]):
                names = ("sample", "timestep", "encoder_hidden_states")
                yield int(step), {name: np.asarray(arrays[name][row]) for name in names}

    @classmethod
    def read(cls, folder: Path) -> Network:
        """What `write_geometry` or `write_model` wrote into `folder`."""
        return cls(folder, **json.loads((folder / FACTS).read_text(encoding="utf-8")))


def write_geometry(folder: Path, name: str) -> None:
    """Write the network of a geometry with random weights, drawn from SEED. Raises RequestError."""
    if name not in GEOMETRIES:
        raise RequestError("no such geometry", got=name, expected=" | ".join(GEOMETRIES))
    import torch
    from diffusers import DPMSolverMultistepScheduler
    from latentrelay.compress.geometry import sd14
    from latentrelay.runtime.samplers import sampler_rule

    torch.manual_seed(SEED)
    scheduler = DPMSolverMultistepScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1,
        **dict(sampler_rule("dpmsolver++").overrides),
    )  # fmt: skip
    tokens = 8 if name == "tiny" else sd14().tokens
    _write(folder, f"{name}, random weights", _random_unet(name), scheduler, tokens)


def write_model(folder: Path, model: str, student: str | None) -> None:
    """Write the network of 'reference' or of a folder in diffusers' layout, or of a student made from it.

    Raises SourceError, UnsupportedSourceError and their kin.
    """
    import diffusers
    from latentrelay.export.source import load_source
    from latentrelay.export.student import with_student
    from latentrelay.reference import pipeline as reference
    from latentrelay.runtime.samplers import sampler_for, sampler_rule

    source = load_source(reference.load(), name=reference.NAME) if model == "reference" else load_source(model)
    if student is not None:
        source, _ = with_student(source, student)
    own = source.pipeline.scheduler
    rule = sampler_rule(sampler_for(type(own).__name__))
    if rule.branches != 2:
        raise RequestError("the benchmark times a guided step, which a few-step network has not", got=model)
    scheduler = getattr(diffusers, rule.scheduler_class).from_config(own.config, **rule.overrides)
    name = model if student is None else f"{model}, student {Path(student).name}"
    _write(folder, name, source.pipeline.unet, scheduler, int(source.pipeline.tokenizer.model_max_length))


def _random_unet(name: str) -> Any:
    from diffusers import UNet2DConditionModel
    from latentrelay.compress.geometry import sd14
    from latentrelay.compress.prunable_units import prunable_units
    from latentrelay.compress.prune_unet import prune_unet
    from latentrelay.compress.published_recipes import RECIPES, published_widths
    from latentrelay.compress.remove_blocks import remove_blocks

    full: Any = UNet2DConditionModel.from_config(dict(_TINY if name == "tiny" else sd14().unet)).eval()
    if name not in RECIPES:
        return full
    smaller = remove_blocks(full, RECIPES[name].blocks)
    return prune_unet(smaller, published_widths(RECIPES[name], prunable_units(smaller)))


def _write(folder: Path, name: str, unet: Any, scheduler: Any, tokens: int) -> None:
    import torch
    from latentrelay.compress.plan import PlanSource, full_plan
    from latentrelay.compress.solver_tables import solver_table
    from latentrelay.runtime.samplers import sampler_for, sampler_rule, scheduler_digest

    table = solver_table(scheduler, NUM_STEPS)
    kind, digest = type(scheduler).__name__, scheduler_digest(type(scheduler).__name__, dict(scheduler.config))
    source = PlanSource(name, "sha256:" + "0" * 64, "sd1")
    full_plan(source, {}, sampler_for(kind), kind, digest, table).save(folder)
    unet.eval().save_pretrained(folder / "unet", safe_serialization=True)

    size = unet.config.sample_size
    rows, columns = size if isinstance(size, (list, tuple)) else (size, size)
    width = unet.config.cross_attention_dim
    rng = np.random.default_rng(SEED)

    def normal(*shape: int) -> NDArray[np.float32]:
        return rng.standard_normal(shape, dtype=np.float32)

    latents, states = normal(1, unet.config.in_channels, rows, columns), normal(2, tokens, width)
    timestep, scale = np.float32(table.timesteps[0]), np.float32(table.rows[0].s)
    with torch.no_grad():
        sample = torch.from_numpy(np.repeat(latents * scale, 2, axis=0))
        noise_pred = unet(sample, torch.tensor(timestep), torch.from_numpy(states), return_dict=False)[0].numpy()
    np.savez(folder / INPUTS, latents=latents, timestep=timestep, encoder_hidden_states=states, noise_pred=noise_pred)
    steps = np.linspace(0, NUM_STEPS - 1, CALIBRATION_STEPS).round().astype(np.int64)
    np.savez(
        folder / CALIBRATION,
        step=steps,
        sample=np.stack([np.repeat(normal(*latents.shape), 2, axis=0) for _ in steps]),
        timestep=np.array([table.timesteps[step] for step in steps], np.float32),
        encoder_hidden_states=np.stack([normal(2, tokens, width) for _ in steps]),
    )
    facts = {
        "name": name,
        "parameters": sum(parameter.numel() for parameter in unet.parameters()),
        "rows": int(rows),
        "columns": int(columns),
        "tokens": tokens,
        "first_row": [table.rows[0].a, table.rows[0].b],
        "memory": sampler_rule(sampler_for(kind)).needs_x0_prev,
    }
    (folder / FACTS).write_text(json.dumps(facts), encoding="utf-8")
