"""One exported bundle, looked at from outside: figures, layout, shared weights, Optimum, the runtime's own loop."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from latentrelay.compress.plan import Plan
from latentrelay.export.parity import open_session, snr_db
from latentrelay.export.reference_run import SEED, record_run
from latentrelay.export.source import model_digest
from latentrelay.runtime.digest import sha256_file
from latentrelay.runtime.manifest import Manifest
from latentrelay.runtime.samplers import sampler_rule
from safetensors.numpy import load_file


def manifest_of(bundle: Path) -> Manifest:
    return Manifest.from_json_bytes((bundle / "manifest.json").read_bytes())


def test_parity_is_above_the_gates_and_in_the_manifest(tiny_export: Any) -> None:
    parity = tiny_export.parity_db
    assert set(parity) == {"text_encoder", "unet", "step_full", "vae_decoder", "chained_run"}
    assert min(parity.values()) >= 60.0
    manifest = manifest_of(tiny_export.bundle)
    assert manifest.digest == tiny_export.digest
    assert {name: values["snr_db"] for name, values in manifest.parity.items()} == parity
    assert {"reference_run", "unet", "parity"} <= set(tiny_export.seconds)


def test_every_file_is_listed_with_its_size_and_hash(tiny_bundle: Path) -> None:
    listed = {entry.path: entry for entry in manifest_of(tiny_bundle).files}
    found = {path.relative_to(tiny_bundle).as_posix() for path in tiny_bundle.rglob("*") if path.is_file()}
    assert found == set(listed) | {"manifest.json"}
    for path, entry in listed.items():
        assert (tiny_bundle / path).stat().st_size == entry.bytes
        assert sha256_file(tiny_bundle / path) == entry.sha256


def test_the_manifest_describes_the_source(tiny_bundle: Path, tiny_pipeline: Any) -> None:
    manifest = manifest_of(tiny_bundle)
    assert manifest.source.digest == model_digest(tiny_pipeline)
    assert (manifest.latent.channels, manifest.latent.height, manifest.latent.width) == (4, 8, 8)
    assert (manifest.image.height, manifest.image.width, manifest.latent.downscale) == (16, 16, 2)
    assert manifest.schedule.num_steps == 25
    assert manifest.schedule.needs_x0_prev
    assert [port.name for port in manifest.components["step_full"].inputs] == [
        "latents",
        "step",
        "prompt_embeds",
        "guidance",
        "x0_prev",
    ]
    assert [port.role for port in manifest.components["step_full"].outputs] == ["latents", "x0_prev"]
    plan = Plan.load(tiny_bundle)
    assert plan.recipe.timesteps == tuple(int(t) for t in manifest.schedule.timesteps)
    assert plan.recipe.source.digest == manifest.source.digest


def test_the_graphs_declare_what_the_manifest_says(tiny_bundle: Path) -> None:
    types = {"tensor(float)": "float32", "tensor(int64)": "int64"}
    for component in manifest_of(tiny_bundle).components.values():
        session = open_session(tiny_bundle / component.path)
        for ports, values in ((component.inputs, session.get_inputs()), (component.outputs, session.get_outputs())):
            got = {value.name: (types[value.type], tuple(value.shape)) for value in values}
            assert got == {port.name: (port.dtype, port.shape) for port in ports}


def test_the_step_graph_shares_the_unet_weights(tiny_bundle: Path) -> None:
    graphs = [
        onnx.load(str(tiny_bundle / "unet" / name), load_external_data=False)
        for name in ("model.onnx", "step_full.onnx")
    ]
    places: list[set[tuple[str, ...]]] = []
    for graph in graphs:
        external = [tensor for tensor in graph.graph.initializer if tensor.external_data]
        places.append({tuple(entry.value for entry in tensor.external_data) for tensor in external})
    assert places[0] == places[1]
    assert {place[0] for place in places[0]} == {"model.onnx_data"}
    data = (tiny_bundle / "unet" / "model.onnx_data").stat().st_size
    assert (tiny_bundle / "unet" / "step_full.onnx").stat().st_size < data  # graph only


def test_unwritten_memory_is_selected_away(tiny_bundle: Path) -> None:
    tensors = load_file(tiny_bundle / "selftest.safetensors")
    feeds = {
        name.removeprefix("step_full.in."): array for name, array in tensors.items() if name.startswith("step_full.in.")
    }
    session = open_session(tiny_bundle / "unet" / "step_full.onnx")
    feeds["step"] = np.array(0, dtype=np.int64)
    zeros = session.run(None, {**feeds, "x0_prev": np.zeros_like(feeds["latents"])})
    rubbish = session.run(None, {**feeds, "x0_prev": np.full_like(feeds["latents"], np.nan)})
    for clean, dirty in zip(zeros, rubbish, strict=True):
        np.testing.assert_array_equal(clean, dirty)


def test_the_selftest_holds_for_every_component(tiny_bundle: Path) -> None:
    manifest = manifest_of(tiny_bundle)
    assert manifest.selftest is not None
    tensors = load_file(tiny_bundle / manifest.selftest.path)
    for name, component in manifest.components.items():
        session = open_session(tiny_bundle / component.path)
        outputs = session.run(
            [port.name for port in component.outputs],
            {port.name: tensors[f"{name}.in.{port.name}"] for port in component.inputs},
        )
        for port, got in zip(component.outputs, outputs, strict=True):
            assert snr_db(tensors[f"{name}.out.{port.name}"], got) >= manifest.selftest.tolerance_db


def test_optimum_opens_the_bundle_and_paints_the_same_picture(tiny_bundle: Path, tiny_pipeline: Any) -> None:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # optimum pulls in torch.jit and reads configurations in deprecated ways
        from optimum.onnxruntime import ORTStableDiffusionPipeline

        other = ORTStableDiffusionPipeline.from_pretrained(str(tiny_bundle))
        other.set_progress_bar_config(disable=True)
        request: dict[str, Any] = {
            "prompt": "a red cat",
            "negative_prompt": "the thing",
            "latents": torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3)),
            "num_inference_steps": 25,
            "output_type": "np",
        }
        got = other(**request).images[0]
        expected = tiny_pipeline(**request).images[0]
    psnr = -10 * np.log10(np.mean((got - expected) ** 2))
    assert expected.std() > 0.05
    assert psnr >= 40.0


def test_model_index_names_what_optimum_loads(tiny_bundle: Path) -> None:
    index = json.loads((tiny_bundle / "model_index.json").read_text())
    assert index["scheduler"] == ["diffusers", "DPMSolverMultistepScheduler"]
    assert index["safety_checker"] == [None, None]
    for component in ("unet", "vae_decoder", "text_encoder"):
        config = json.loads((tiny_bundle / component / "config.json").read_text())
        assert {key for key in config if key.startswith("_")} <= {"_class_name", "_diffusers_version"}


def test_cloud_then_device_equals_the_uninterrupted_run_at_every_split(tiny_bundle: Path, tiny_pipeline: Any) -> None:
    scheduler = type(tiny_pipeline.scheduler).from_config(tiny_pipeline.scheduler.config)
    run = record_run(tiny_pipeline, scheduler, 25, 16, 16, 7.5, sampler_rule("dpmsolver++"))
    session = open_session(tiny_bundle / "unet" / "step_full.onnx")
    for split in range(26):
        latents, memory = run.latents[split], run.x0_prev[split]
        for step in range(split, 25):
            latents, memory = session.run(
                ["next_latents", "next_x0_prev"],
                {
                    "latents": latents,
                    "step": np.array(step, dtype=np.int64),
                    "prompt_embeds": run.prompt_embeds,
                    "guidance": np.array(run.guidance, dtype=np.float32),
                    "x0_prev": memory,
                },
            )
        assert snr_db(run.latents[-1], latents) >= 50.0, f"split {split}"


def test_the_recorded_run_is_what_the_pipeline_does_from_that_seed(tiny_pipeline: Any) -> None:
    scheduler = type(tiny_pipeline.scheduler).from_config(tiny_pipeline.scheduler.config)
    run = record_run(tiny_pipeline, scheduler, 4, 16, 16, 7.5, sampler_rule("ddim"))
    expected = tiny_pipeline(
        prompt_embeds=torch.from_numpy(run.prompt_embeds[1:]),
        negative_prompt_embeds=torch.from_numpy(run.prompt_embeds[:1]),
        num_inference_steps=4,
        generator=torch.Generator().manual_seed(SEED),
        output_type="latent",
    ).images
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(SEED))
    np.testing.assert_array_equal(run.latents[0], noise.numpy())
    np.testing.assert_array_equal(run.latents[-1], expected.numpy())
    assert run.latents[0].shape == run.x0_prev[0].shape == (1, 4, 8, 8)
    assert not run.x0_prev[0].any()
