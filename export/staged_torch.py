"""A U-Net in torch as a `StagedDenoiser`: what fits prediction on the float network asks for, arrays in and out.

Latents (1, C, h, w) and prompt_embeds (2, T, D) of a step -> noise_pred (2, C, h, w), the deep feature and the probe,
float32 all; the modules are `staged_unet.py`'s. Sessions of exported graphs have the same face in `staged_onnx.py`.
"""

from __future__ import annotations

import numpy as np
import torch
from latentrelay.compress.denoising_chain import Floats
from latentrelay.compress.predicted_chain import Staged
from latentrelay.compress.solver_tables import SolverTable
from latentrelay.export.staged_unet import FullUNet, ProbeUNet, ShallowUNet
from torch import Tensor, nn


class StagedTorch:
    """A `StagedDenoiser` (compress/predicted_chain.py); the network is in evaluation mode, on the CPU, in float32.

    `table` is the run's solver rows and timesteps. Raises UnsupportedSourceError.
    """

    def __init__(self, unet: nn.Module, table: SolverTable, probe: str | None = "P1") -> None:
        self._table = table
        self._full, self._shallow = FullUNet(unet, probe), ShallowUNet(unet)
        self._probe = None if probe is None else ProbeUNet(unet, probe)

    @torch.no_grad()
    def full(self, latents: Floats, step: int, prompt_embeds: Floats) -> Staged:
        """latents (1,C,h,w), prompt_embeds (2,T,D) -> noise_pred (2,C,h,w), feature (2,Cf,hf,wf), probe or None."""
        made = [each.numpy() for each in self._full(*self._inputs(latents, step, prompt_embeds))]
        return Staged(made[0], made[1], made[2] if len(made) > 2 else None)

    @torch.no_grad()
    def probe(self, latents: Floats, step: int, prompt_embeds: Floats) -> Floats:
        """The probe (2,Cp,hp,wp) alone. Raises ValueError where none was named."""
        if self._probe is None:
            raise ValueError("this network was opened without a probe")
        found: Floats = self._probe(*self._inputs(latents, step, prompt_embeds)).numpy()
        return found

    @torch.no_grad()
    def shallow(self, latents: Floats, step: int, prompt_embeds: Floats, feature: Floats) -> Floats:
        """noise_pred (2,C,h,w) over a deep feature (2,Cf,hf,wf)."""
        deep = torch.from_numpy(np.ascontiguousarray(feature, dtype=np.float32))
        found: Floats = self._shallow(*self._inputs(latents, step, prompt_embeds), deep).numpy()
        return found

    def _inputs(self, latents: Floats, step: int, prompt_embeds: Floats) -> tuple[Tensor, Tensor, Tensor]:
        scaled = latents * np.float32(self._table.rows[step].s)
        timestep = torch.tensor(self._table.timesteps[step], dtype=torch.float32)
        sample = torch.from_numpy(np.repeat(scaled, len(prompt_embeds), axis=0).astype(np.float32))
        return sample, timestep, torch.from_numpy(np.ascontiguousarray(prompt_embeds))
