"""The `w4a4` row of `evaluate --precision`: a student rounded in torch, as a network that the step chain can run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from latentrelay.compress.simulated import BITS, GROUP, simulated_w4a4
from latentrelay.compress.solver_tables import SolverTable
from latentrelay.export.deployed import TorchDenoiser
from latentrelay.runtime.digest import sha256_file
from latentrelay.tools.precision_runs import Floats, Variant

_WEIGHTS = "diffusion_pytorch_model.safetensors"


class SimulatedDenoiser:
    """`TorchDenoiser` of a network that is rounded while it runs."""

    def __init__(self, unet: torch.nn.Module, table: SolverTable) -> None:
        self._unet, self._denoiser = unet, TorchDenoiser(unet, table)

    def __call__(self, latents: Floats, step: int, prompt_embeds: Floats) -> Floats:
        """See `Denoiser`."""
        with simulated_w4a4(self._unet):
            return self._denoiser(latents, step, prompt_embeds)


def simulated(student: Path, table: SolverTable) -> tuple[Variant, int]:
    """The variant, and the bytes its weights would take: 4 bits and a float16 scale a group, the rest float16."""
    from latentrelay.compress.student_unet import StudentUNet2DConditionModel

    folder = student / "unet" if (student / "unet").is_dir() else student

    def load() -> Any:
        unet = StudentUNet2DConditionModel.from_pretrained(folder, torch_dtype=torch.float32, use_safetensors=True)
        return unet.eval().requires_grad_(False)

    unet = load()
    before = {name: value.clone() for name, value in unet.state_dict().items()}
    with simulated_w4a4(unet):
        changed = {name for name, value in unet.state_dict().items() if not torch.equal(value, before[name])}
    sizes = {name: value.numel() for name, value in before.items()}
    quarter = sum(size for name, size in sizes.items() if name in changed)
    size = quarter * BITS // 8 + quarter // GROUP * 2 + 2 * (sum(sizes.values()) - quarter)
    digest = f"simulated w4a4 of {sha256_file(folder / _WEIGHTS)}"
    return Variant(digest, lambda: SimulatedDenoiser(load(), table), table), size
