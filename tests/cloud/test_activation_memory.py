"""The memory forecast against the storages of a real call, and the previews' linear map."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor
from latentrelay.cloud.activation_memory import SCRATCH_SHARE, ActivationMemory, _LiveBytes, container_left, free_bytes
from latentrelay.cloud.engine import Engine
from latentrelay.cloud.latent_preview import fit_factors


def real_peak(unet: Any, requests: int, rows: int, columns: int) -> int:
    """The same count over a call on real tensors."""
    count = 2 * requests
    with torch.no_grad():
        sample, timesteps = torch.randn(count, 4, rows, columns), torch.full((count,), 7)
        embeds = torch.randn(count, 16, 16)
        with _LiveBytes() as live:
            live.know([*unet.parameters(), *unet.buffers()])
            unet(sample, timesteps, encoder_hidden_states=embeds)
    return int(live.peak)


SIZES = ((24, 24), (64, 64))


@pytest.mark.parametrize(("rows", "columns", "requests"), [(8, 8, 1), (8, 8, 5), (24, 24, 2), (64, 64, 1)])
def test_the_forecast_is_what_a_real_call_holds(tiny: Any, rows: int, columns: int, requests: int) -> None:
    unet = tiny.make_unet()
    memory = ActivationMemory(unet, 16, 2, SIZES)
    held = real_peak(unet, requests, rows, columns)
    assert memory.bytes(requests, rows, columns) == pytest.approx((1 + SCRATCH_SHARE) * held, rel=0.02)
    assert memory.most(memory.bytes(requests, rows, columns), rows, columns) == requests
    assert memory.most(memory.bytes(1, rows, columns) - 1, rows, columns) == 0


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize(("rows", "columns"), [(8, 16), (16, 24), (5, 61), (32, 32), (40, 48), (16, 128), (56, 64)])
def test_between_the_known_sizes_the_forecast_bounds_a_real_call(
    tiny: Any, rows: int, columns: int, fused: bool
) -> None:
    unet = tiny.make_unet()
    if not fused:  # attention that holds its scores: grows with the square of the latents
        unet.set_attn_processor(AttnProcessor())
    held = (1 + SCRATCH_SHARE) * real_peak(unet, 1, -(-rows // 8) * 8, -(-columns // 8) * 8)
    assert held <= ActivationMemory(unet, 16, 2, SIZES).bytes(1, rows, columns) <= 1.5 * held


def test_a_few_sizes_are_looked_into_once_whatever_is_asked(tiny: Any) -> None:
    unet = tiny.make_unet()
    seen: list[tuple[int, ...]] = []
    unet.register_forward_pre_hook(lambda module, given: seen.append(tuple(given[0].shape[2:])))
    memory = ActivationMemory(unet, 16, 2, ((16, 16), (60, 64)))
    memory.measure()
    assert memory.bytes(1, 9, 15) == memory.bytes(1, 16, 16) > memory.bytes(1, 8, 8)
    for rows in range(1, 129):
        memory.bytes(1, rows, 3 * rows)
    assert seen == [(8, 8), (16, 16), (64, 64)]


def test_nothing_is_computed_or_kept(tiny: Any) -> None:
    unet = tiny.make_unet()
    before = [each.clone() for each in unet.parameters()]
    memory = ActivationMemory(unet, 16, 2)
    assert memory.bytes(1, 512, 512) > 2**28  # more than one would like to allocate in a test
    assert all(torch.equal(a, b) for a, b in zip(before, unet.parameters(), strict=True))
    assert not any(type(each).__name__ == "FakeTensor" for each in unet.parameters())


def test_a_network_without_a_forecast_is_let_in(tiny: Any, caplog: pytest.LogCaptureFixture) -> None:
    unet = tiny.make_unet()
    unet.register_forward_pre_hook(lambda module, given: bool(given[0].sum() > 0))  # wants values
    memory = ActivationMemory(unet, 16, 2)
    assert memory.most(1.0, 8, 8) >= 1
    assert memory.most(1.0, 72, 80) >= 1
    assert "no memory forecast" in caplog.text


def test_free_memory_is_read() -> None:
    assert 2**20 < free_bytes(torch.device("cpu")) < 2**50


def test_a_containers_limit_counts_and_its_cached_files_do_not(tmp_path: Path) -> None:
    names = ("memory.max", "memory.current", "inactive_file")
    assert container_left(tmp_path, *names) == float("inf")
    (tmp_path / "memory.stat").write_text("anon 300\ninactive_file 500\n")
    (tmp_path / "memory.max").write_text("1000\n")
    (tmp_path / "memory.current").write_text("900\n")
    assert container_left(tmp_path, *names) == 600
    (tmp_path / "memory.max").write_text("max\n")
    assert container_left(tmp_path, *names) == float("inf")


def test_previews_follow_the_vae(tiny: Any, tmp_path: Path) -> None:
    pipeline = tiny.make_pipeline(tmp_path)
    engine = Engine(pipeline, name="tiny")
    latents = torch.randn(1, 4, 8, 12, generator=torch.Generator().manual_seed(3))
    picture = engine.preview(latents)
    assert (picture.shape, picture.dtype) == ((8, 12, 3), np.uint8)
    np.testing.assert_array_equal(picture, Engine(pipeline, name="again").preview(latents))


def test_a_linear_vae_is_found_exactly() -> None:
    matrix = torch.tensor([[0.3, 0.1, 0.0, -0.2], [0.0, 0.4, 0.1, 0.0], [0.1, 0.0, 0.2, 0.3]])

    class Linear:
        """Decodes by `matrix`, doubled in size, after diffusers' scaling."""

        class config:
            latent_channels = 4

        device, dtype = torch.device("cpu"), torch.float32

        def decode(self, latents: torch.Tensor, return_dict: bool) -> tuple[torch.Tensor]:
            rgb = torch.einsum("rc,nchw->nrhw", matrix, latents * 0.5) + 0.25
            return (torch.nn.functional.interpolate(rgb, scale_factor=2.0),)

    factors = fit_factors(Linear(), 0.5)
    torch.testing.assert_close(factors.factors, matrix, atol=1e-5, rtol=0)
    torch.testing.assert_close(factors.bias, torch.full((3,), 0.25), atol=1e-5, rtol=0)
    latents = torch.tensor([1.0, 0.0, 0.0, 0.0]).view(1, 4, 1, 1)
    expected = np.round((np.array([0.3, 0.0, 0.1]) + 0.25 + 1) / 2 * 255)
    np.testing.assert_allclose(factors.picture(latents)[0, 0], expected, atol=1)
