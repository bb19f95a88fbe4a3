"""`latentrelay evaluate --vae`: the light autoencoder beside the source's, on held-out Scenes.

In: latents of report scenes, encoded by the source's VAE, and of pictures that the source's U-Net generates. Out:
sizes, decoding times through ONNX Runtime (both decoders as bundles hold them, one thread, runs interleaved), PSNR of
the light decode to the source's, whole and on the objects of each texture, what the judge reads off both, and the
encoder's error.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from latentrelay.runtime.errors import RequestError
from latentrelay.tools.console import counting, emit, extra, table
from latentrelay.tools.models import resolve
from numpy.typing import NDArray

SPLITS = ("report", "gate")
ROUNDS = 60
_BATCH = 16
_SCENE_SEED = 21


@dataclass(frozen=True)
class Timing:
    """Milliseconds a decode: median, 10th and 90th percentile."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Timing:
        """From single runs."""
        return cls(*(float(np.percentile(values, share)) for share in (50, 10, 90)))

    def document(self) -> dict[str, float]:
        """As printed with `--json`."""
        return {"median_ms": round(self.median, 3), "p10_ms": round(self.low, 3), "p90_ms": round(self.high, 3)}


def run(
    model: str = "reference",
    light: Path | None = None,
    *,
    scenes: int = 256,
    generated: int = 64,
    seed: int = 0,
    split: str = "report",
    rounds: int = ROUNDS,
    sheet: Path | None = None,
    as_json: bool = False,
) -> None:
    """Measure and print. `light` is the light autoencoder's folder, by default `light_vae` in the model's; `generated`
    pictures of the source's U-Net are decoded by both too (0: none)."""
    if split not in SPLITS:
        raise RequestError("unknown data split", got=split, expected=" or ".join(SPLITS))
    with extra("compress", "evaluating a model"):
        from latentrelay.compress.light_vae import load_light_vae
        from latentrelay.reference import pipeline as reference
    folder = Path(resolve(model))
    light = light or folder / "light_vae"
    if not (light / "config.json").is_file():
        raise RequestError("the model has no light VAE", got=str(light), do="Name the folder of one with --decoder.")
    started = time.perf_counter()
    source, student = reference.load(folder), load_light_vae(light)
    with counting("measuring", None) as advance:
        document = {
            **sizes(source.vae, student),
            **speeds(source, student, rounds, advance),
            **held_out(source.vae, student, split, scenes, seed, advance, sheet),
        }
        if generated:
            document["generated"] = on_generated(source, student, split, generated, seed, advance)
    document |= {"model": model, "light": light.name, "split": split, "scenes": scenes, "seed": seed}
    document["seconds"] = round(time.perf_counter() - started, 1)
    emit(document, as_json, lambda console: _show(console, document))


def sizes(vae: Any, student: Any) -> dict[str, Any]:
    """Parameters of both decoders and encoders."""
    from latentrelay.compress.remove_blocks import parameter_count

    counts = {
        kind: {"source": parameter_count(getattr(vae, kind)), "light": parameter_count(getattr(student, kind))}
        for kind in ("decoder", "encoder")
    }
    return {
        "decoder_parameters": counts["decoder"],
        "encoder_parameters": counts["encoder"],
        "decoder_parameters_ratio": counts["decoder"]["light"] / counts["decoder"]["source"],
    }


def speeds(pipeline: Any, student: Any, rounds: int, advance: Callable[..., None]) -> dict[str, Any]:
    """Both decoders through ONNX Runtime on the CPU, one thread, a run of each in turn; the first five rounds are not
    counted. `decode_speedup` is the ratio of the median wall times, its spread the percentiles of each round's own
    ratio; `decode_speedup_cpu` is the same of processor times, which other programs on the machine disturb less."""
    import torch
    from latentrelay.export.onnx_graphs import decoder_graph, export_onnx

    latents = torch.zeros(2, pipeline.unet.config.in_channels, *[pipeline.unet.config.sample_size] * 2)
    feed = {"latent_sample": np.random.default_rng(0).standard_normal((1, *latents.shape[1:])).astype(np.float32)}
    sessions = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, vae in (("source", pipeline.vae), ("light", student)):
            advance(f"exporting the {name} decoder")
            path = Path(folder) / f"{name}.onnx"
            export_onnx(
                decoder_graph(vae),
                [latents],
                path,
                inputs=["latent_sample"],
                outputs=["sample"],
                opset=20,
                batched=["latent_sample"],
            )
            sessions[name] = _session(path)
    times, processor = interleaved({name: _decode(session, feed) for name, session in sessions.items()}, rounds)
    ratios = np.asarray(times["source"]) / np.asarray(times["light"])
    timings = {name: Timing.of(values) for name, values in times.items()}
    return {
        "decode_speedup": timings["source"].median / timings["light"].median,
        "decode_speedup_p10_p90": [float(value) for value in np.percentile(ratios, [10, 90])],
        "decode_speedup_cpu": float(np.median(processor["source"]) / np.median(processor["light"])),
        "decode_ms": {name: timing.document() for name, timing in timings.items()},
        "rounds": rounds,
    }


def _session(path: Path) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def _decode(session: Any, feed: dict[str, NDArray[np.float32]]) -> Callable[[], Any]:
    return lambda: session.run(None, feed)


Times = dict[str, list[float]]


def interleaved(tasks: Mapping[str, Callable[[], Any]], rounds: int, warm_up: int = 5) -> tuple[Times, Times]:
    """Milliseconds of each task, wall and processor time, one of each a round, so that whatever else the machine does
    falls on all of them."""
    wall: Times = {name: [] for name in tasks}
    processor: Times = {name: [] for name in tasks}
    for index in range(warm_up + rounds):
        for name, task in tasks.items():
            started, busy = time.perf_counter(), time.process_time()
            task()
            if index >= warm_up:
                wall[name].append((time.perf_counter() - started) * 1e3)
                processor[name].append((time.process_time() - busy) * 1e3)
    return wall, processor


def held_out(
    vae: Any, student: Any, split: str, count: int, seed: int, advance: Callable[..., None], sheet: Path | None
) -> dict[str, Any]:
    """PSNR of light decodes to source decodes of the same latents, the judge on both, and the encoder."""
    import torch
    from latentrelay.compress.light_vae import decode_scaled
    from latentrelay.reference import captions as grammar
    from latentrelay.reference.judge import pictures_of
    from latentrelay.tools.evaluate import evaluate_pictures

    pairs = grammar.sample_captions(split, count, seed + _SCENE_SEED)  # type: ignore[arg-type]
    truth = pictures_of([scene for scene, _ in pairs])
    collected: dict[str, list[Any]] = {}
    scale = vae.config.scaling_factor
    with torch.no_grad():
        for rows in torch.split(truth, _BATCH):
            advance("decoding held-out scenes")
            latents = vae.encode(rows).latent_dist.mean * scale
            guessed = student.encode(rows).latents
            parts = {
                "latents": latents,
                "guessed": guessed,
                "source": decode_scaled(vae, latents).clamp(-1, 1),
                "light": decode_scaled(student, latents).clamp(-1, 1),
                "from_guessed": decode_scaled(vae, guessed).clamp(-1, 1),
                "both_light": decode_scaled(student, guessed).clamp(-1, 1),
            }
            for name, value in parts.items():
                collected.setdefault(name, []).append(value)
    found = {name: torch.cat(values) for name, values in collected.items()}
    values = psnr(found["light"], found["source"])
    if sheet is not None:
        write_sheet([truth, found["source"], found["light"]], [caption.text for _, caption in pairs], sheet)
    error = (found["guessed"] - found["latents"]).square().mean()
    return {
        "psnr_db": float(values.mean()),
        "psnr_db_p10_p90": [float(value) for value in np.percentile(values, [10, 90])],
        "psnr_db_by_texture": texture_psnr(found["light"], found["source"], [scene for scene, _ in pairs]),
        "psnr_db_to_truth": {name: float(psnr(found[name], truth).mean()) for name in ("source", "light")},
        "encoder": {
            "latent_snr_db": float(10 * (found["latents"].square().mean() / error).log10()),
            "psnr_db_source_decoder": float(psnr(found["from_guessed"], found["source"]).mean()),
            "psnr_db_light_round_trip_to_truth": float(psnr(found["both_light"], truth).mean()),
        },
        "judge": {name: _judged(evaluate_pictures(found[name], pairs)) for name in ("source", "light")},
    }


def on_generated(
    pipeline: Any, student: Any, split: str, count: int, seed: int, advance: Callable[..., None]
) -> dict[str, Any]:
    """The same for latents that the source's U-Net makes from captions, which is what a device decodes."""
    import torch
    from latentrelay.compress.light_vae import decode_scaled
    from latentrelay.reference import captions as grammar
    from latentrelay.reference.pipeline import GUIDANCE
    from latentrelay.tools.evaluate import evaluate_pictures

    pairs = grammar.sample_captions(split, count, seed)  # type: ignore[arg-type]
    source, light = [], []
    for first in range(0, count, _BATCH):
        advance("generating pictures")
        texts = [caption.text for _, caption in pairs[first : first + _BATCH]]
        with torch.no_grad():
            latents = pipeline(
                texts,
                num_inference_steps=25,
                guidance_scale=GUIDANCE,
                generator=[torch.Generator().manual_seed(seed * 1_000_003 + first + row) for row in range(len(texts))],
                output_type="latent",
            ).images
            source.append(decode_scaled(pipeline.vae, latents).clamp(-1, 1))
            light.append(decode_scaled(student, latents).clamp(-1, 1))
    found = {"source": torch.cat(source), "light": torch.cat(light)}
    return {
        "pictures": count,
        "psnr_db": float(psnr(found["light"], found["source"]).mean()),
        "judge": {name: _judged(evaluate_pictures(pictures, pairs)) for name, pictures in found.items()},
    }


def psnr(pictures: Any, reference: Any) -> NDArray[np.float64]:
    """PSNR in dB (peak 1) of each picture (N, 3, H, W) in [-1, 1], (N,)."""
    squared = ((pictures - reference) / 2).square().flatten(1).mean(1).clamp(min=1e-12)
    values: NDArray[np.float64] = (-10 * squared.log10()).double().numpy()
    return values


def texture_psnr(pictures: Any, reference: Any, scenes: Sequence[Any]) -> dict[str, float]:
    """Mean PSNR in dB of the squares around the objects of each texture."""
    size = pictures.shape[-1]
    values: dict[str, list[float]] = {}
    for row, scene in enumerate(scenes):
        for item in scene.objects:
            sides = [
                slice(max(0, round((c - item.radius) * size)), round((c + item.radius) * size)) for c in item.centre
            ]
            crop = (slice(row, row + 1), slice(None), sides[1], sides[0])
            values.setdefault(item.texture, []).append(float(psnr(pictures[crop], reference[crop])[0]))
    return {texture: float(np.mean(found)) for texture, found in sorted(values.items())}


def write_sheet(rows: Sequence[Any], captions: Sequence[str], path: Path, columns: int = 8) -> None:
    """A PNG with one line a kind of picture: the truth, the source's decode, the light one's."""
    from latentrelay.tools.sheet import Cell, save_sheet

    names = ("rendered", "source decoder", "light decoder")
    lines = []
    for name, pictures in zip(names, rows, strict=True):
        shown = ((pictures[:columns] + 1) / 2).permute(0, 2, 3, 1).numpy()
        lines.append([Cell(picture, f"{name}: {text}") for picture, text in zip(shown, captions, strict=False)])
    save_sheet(lines, path)


def _judged(found: Any) -> dict[str, Any]:
    return {
        "attribute_accuracy": found.attribute_accuracy,
        "attribute_accuracy_95": list(found.interval),
        "texture_accuracy": found.by_attribute.get("texture"),
        "frechet_distance": found.frechet_distance,
    }


def _show(console: Any, document: Mapping[str, Any]) -> None:
    times, judged = document["decode_ms"], document["judge"]
    spread = document["decode_speedup_p10_p90"]
    rows = [
        ["decoder parameters", *(f"{document['decoder_parameters'][name]:,}" for name in ("source", "light"))],
        ["decode, median ms (1 thread)", *(f"{times[name]['median_ms']:.2f}" for name in ("source", "light"))],
        ["  10 % .. 90 %", *(f"{times[n]['p10_ms']:.2f} .. {times[n]['p90_ms']:.2f}" for n in ("source", "light"))],
        ["PSNR to the truth, dB", *(f"{document['psnr_db_to_truth'][name]:.2f}" for name in ("source", "light"))],
        ["attribute accuracy", *(f"{judged[name]['attribute_accuracy']:.1%}" for name in ("source", "light"))],
        ["Frechet distance", *(f"{judged[name]['frechet_distance']:.2f}" for name in ("source", "light"))],
    ]
    console.print(table([f"{document['scenes']} {document['split']} scenes", "source", "light"], rows))
    textures = ", ".join(f"{name} {value:.2f}" for name, value in document["psnr_db_by_texture"].items())
    console.print(
        f"light decode to source decode: [bold]{document['psnr_db']:.2f} dB[/] (objects: {textures})\n"
        f"parameters: {document['decoder_parameters_ratio']:.1%}; "
        f"faster by {document['decode_speedup']:.2f} ({spread[0]:.2f} .. {spread[1]:.2f})\n"
        f"encoder: {document['encoder']['latent_snr_db']:.2f} dB SNR of latents"
    )
    if "generated" in document:
        found = document["generated"]
        accuracy = [found["judge"][name]["attribute_accuracy"] for name in ("source", "light")]
        console.print(
            f"{found['pictures']} generated pictures: {found['psnr_db']:.2f} dB, "
            f"attribute accuracy {accuracy[0]:.1%} and {accuracy[1]:.1%}"
        )
