"""Adapters: both layouts against a by-hand merge, what is refused and by which words, and the bits of the sum."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import LCMScheduler
from latentrelay.compress.errors import AdapterError
from latentrelay.compress.lora import FEW_STEP, Adapter, LowRankUpdate, merge, ordered_product
from safetensors.torch import save_file

LINEAR = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
CONV = "mid_block.resnets.0.conv1"
TEXT = "text_model.encoder.layers.0.self_attn.q_proj"
RANK = 3


@pytest.fixture
def pipeline(tiny: Any, tmp_path: Path) -> Any:
    return tiny.make_pipeline(tmp_path / "made")


def factors(module: torch.nn.Module, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """A (r, in[, k, k]) and B (out, r[, 1, 1]) for a layer."""
    shape = module.weight.shape  # type: ignore[union-attr]
    generator = torch.Generator().manual_seed(seed)
    down = torch.randn((RANK, *shape[1:]), generator=generator)  # type: ignore[misc]
    return down, torch.randn((shape[0], RANK) + (1,) * (len(shape) - 2), generator=generator)  # type: ignore[operator]


def layers(pipeline: Any) -> dict[str, torch.nn.Module]:
    return {
        LINEAR: pipeline.unet.get_submodule(LINEAR),
        CONV: pipeline.unet.get_submodule(CONV),
        TEXT: pipeline.text_encoder.get_submodule(TEXT),
    }


def peft_key(path: str, half: str) -> str:
    return f"{'text_encoder' if path == TEXT else 'unet'}.{path}.lora_{half}.weight"


def kohya_key(path: str, ending: str) -> str:
    return f"{'lora_te' if path == TEXT else 'lora_unet'}_{path.replace('.', '_')}.{ending}"


@pytest.mark.parametrize("layout", ["peft", "kohya"])
def test_a_merged_layer_is_weight_plus_scaled_product(layout: str, pipeline: Any, tmp_path: Path) -> None:
    tensors, expected, alpha, scale = {}, {}, 1.5, 0.5
    for path, layer in layers(pipeline).items():
        down, up = factors(layer)
        weight = layer.weight.detach().clone()  # type: ignore[operator]
        strength = scale * (alpha / RANK if layout == "kohya" else 1.0)
        expected[path] = weight + strength * (up.reshape(-1, RANK) @ down.reshape(RANK, -1)).reshape(weight.shape)
        if layout == "peft":
            tensors[peft_key(path, "A")], tensors[peft_key(path, "B")] = down, up
        else:
            tensors[kohya_key(path, "lora_down.weight")] = down
            tensors[kohya_key(path, "lora_up.weight")] = up
            tensors[kohya_key(path, "alpha")] = torch.tensor(alpha)
    untouched = pipeline.unet.conv_in.weight.detach().clone()
    save_file(tensors, tmp_path / "style.safetensors")
    (merged,) = merge(pipeline, [Adapter(tmp_path / "style.safetensors", scale)])
    assert (merged.file, merged.scale, merged.layers, len(merged.sha256)) == ("style.safetensors", 0.5, 3, 64)
    for path, layer in layers(pipeline).items():
        torch.testing.assert_close(layer.weight, expected[path], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(pipeline.unet.conv_in.weight, untouched, rtol=0, atol=0)


def test_diffusers_reads_our_peft_layout_alike(pipeline: Any, tmp_path: Path) -> None:
    """Keys and shapes are those that diffusers itself would accept: every one names a layer, A before B."""
    update = LowRankUpdate(pipeline.unet, rank=2)
    with torch.no_grad():
        for up in update.up:
            up.normal_(generator=torch.Generator().manual_seed(5))
    wanted = {name: weight.detach().clone() for name, weight in update.weights().items()}
    save_file(update.tensors(), tmp_path / "lora.safetensors")
    (merged,) = merge(pipeline, [Adapter(tmp_path / "lora.safetensors")])
    assert merged.layers == len(wanted)
    for name, weight in wanted.items():  # float16 on the way
        torch.testing.assert_close(pipeline.unet.get_parameter(name), weight, rtol=2e-2, atol=2e-2)


def test_training_changes_nothing_until_b_does(pipeline: Any) -> None:
    update = LowRankUpdate(pipeline.unet, rank=4)
    for name, weight in update.weights().items():
        torch.testing.assert_close(weight, pipeline.unet.get_parameter(name), rtol=0, atol=0)


def test_the_sum_is_the_same_bits_however_it_is_cut() -> None:
    """Rank by rank in float64: equal to a plain loop bit for bit, which a library's product is not bound to be."""
    generator = torch.Generator().manual_seed(1)
    up, down = torch.randn(700, 5, generator=generator), torch.randn(5, 300, generator=generator)
    expected = torch.zeros(700, 300, dtype=torch.float64)
    for rank in range(5):
        expected += torch.outer(up[:, rank].double(), down[rank].double())
    assert torch.equal(ordered_product(up, down), expected)
    torch.testing.assert_close(expected, up.double() @ down.double())


def test_a_consistency_adapter_brings_its_scheduler(pipeline: Any, tmp_path: Path) -> None:
    down, up = factors(pipeline.unet.get_submodule(LINEAR))
    tensors = {peft_key(LINEAR, "A"): down, peft_key(LINEAR, "B"): up}
    save_file(tensors, tmp_path / "few.safetensors", {FEW_STEP: json.dumps({"guidance": 4.0, "num_steps": [4, 8]})})
    before = pipeline.scheduler.config
    (merged,) = merge(pipeline, [Adapter(tmp_path / "few.safetensors")])
    assert merged.few_step == {"guidance": 4.0, "num_steps": [4, 8]}
    assert isinstance(pipeline.scheduler, LCMScheduler)
    assert pipeline.scheduler.config.prediction_type == before.prediction_type
    assert pipeline.scheduler.config.beta_end == before.beta_end


def _drop(tensors: dict[str, torch.Tensor]) -> None:
    del tensors[peft_key(LINEAR, "B")]


def _rename(tensors: dict[str, torch.Tensor]) -> None:
    for half in "AB":
        tensors[f"unet.no.such.layer.lora_{half}.weight"] = tensors.pop(peft_key(LINEAR, half))


def _wrong_shape(tensors: dict[str, torch.Tensor]) -> None:
    tensors[peft_key(CONV, "A")] = tensors[peft_key(CONV, "A")][:, :, :1].contiguous()


def _dora(tensors: dict[str, torch.Tensor]) -> None:
    tensors[f"unet.{LINEAR}.lora_magnitude_vector"] = torch.ones(3)


def _poison(tensors: dict[str, torch.Tensor]) -> None:
    tensors[peft_key(CONV, "B")][0, 0] = float("nan")


def _empty(tensors: dict[str, torch.Tensor]) -> None:
    tensors.clear()


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (_drop, "half of a pair"),
        (_rename, "does not have.*no.such.layer"),
        (_wrong_shape, "do not fit"),
        (_dora, "DoRA"),
        (_poison, "NaN"),
        (_empty, "no adapter"),
    ],
)
def test_what_does_not_fit_is_refused_and_changes_nothing(
    spoil: Callable[[dict[str, torch.Tensor]], None], words: str, pipeline: Any, tmp_path: Path
) -> None:
    tensors: dict[str, torch.Tensor] = {}
    for seed, (path, layer) in enumerate(layers(pipeline).items()):
        tensors[peft_key(path, "A")], tensors[peft_key(path, "B")] = factors(layer, seed)
    spoil(tensors)
    save_file(tensors, tmp_path / "bad.safetensors")
    before = {path: layer.weight.detach().clone() for path, layer in layers(pipeline).items()}  # type: ignore[operator]
    with pytest.raises(AdapterError, match=words) as caught:
        merge(pipeline, [Adapter(tmp_path / "bad.safetensors")])
    assert (caught.value.file, caught.value.exit_status) == ("bad.safetensors", 3)
    for path, layer in layers(pipeline).items():
        assert torch.equal(layer.weight, before[path])  # type: ignore[arg-type]


def test_files_that_are_no_safetensors_or_are_not_there_are_refused(pipeline: Any, tmp_path: Path) -> None:
    (tmp_path / "note.safetensors").write_bytes(b"not safetensors at all")
    with pytest.raises(AdapterError, match="not a safetensors file"):
        merge(pipeline, [Adapter(tmp_path / "note.safetensors")])
    with pytest.raises(AdapterError, match="no such file"):
        merge(pipeline, [Adapter(tmp_path / "absent.safetensors")])


def test_a_scale_may_stand_behind_a_colon() -> None:
    assert Adapter.parse("a/b.safetensors") == Adapter(Path("a/b.safetensors"), 1.0)
    assert Adapter.parse("a/b.safetensors:0.8") == Adapter(Path("a/b.safetensors"), 0.8)
    assert Adapter.parse(r"C:\b.safetensors") == Adapter(Path(r"C:\b.safetensors"), 1.0)
    with pytest.raises(AdapterError, match="not finite"):
        Adapter.parse("b.safetensors:nan")
