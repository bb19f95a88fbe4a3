"""What the ladders of a build with predicted steps are kept in: float32, or float16 where the device's memory is short.

In: the pipeline, its U-Net's graph and the profile. Out: "float32" | "float16", decided before anything is fitted, by
the footprint that `devices check` predicts and the widest ladders that the planner may choose. What float16 costs is
then part of every held-out score, and of the parity gate, which is 50 dB there.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnx
from latentrelay.compress.footprint import MIB, footprint
from latentrelay.compress.geometry import Geometry
from latentrelay.device_profiles import DeviceProfile
from latentrelay.device_profiles.preflight import LadderDtype, Predicted, ladder_dtype
from latentrelay.export.cut_unet import cut_points, probe_value, shape_of

RUNGS = 3  # of the highest order that is tried


def fitting_dtype(
    pipeline: Any, vae: Any, profile: DeviceProfile, precision: str, shapes: Sequence[Sequence[int]], rows: int,
    columns: int,
) -> LadderDtype:  # fmt: skip
    """What ladders of `shapes` are kept in on that device; `rows`, `columns` are latent rows and columns, `vae` the one
    whose decoder ships. Raises GeometryError for a configuration that is not served."""
    geometry = Geometry(
        name="source",
        unet=_config(pipeline.unet),
        vae=_config(vae),
        text_encoder=pipeline.text_encoder.config.to_dict(),
        rows=rows,
        columns=columns,
        tokens=int(pipeline.tokenizer.model_max_length),
    )
    found = footprint(geometry, precision)
    stages = {stage.name: stage.peak_mib for stage in found.stages}
    predicted = Predicted(
        precision,
        found.parameters,
        found.bytes,
        found.largest_file,
        found.largest_file_bytes / MIB,
        found.peak_memory_mib,
        found.limiting_stage,
        stages,
    )
    return ladder_dtype(profile, predicted, shapes)


def widest_ladders(
    unet: Path, targets: Sequence[str], probe: str | None, latent: Sequence[int]
) -> list[tuple[int, ...]]:
    """Shapes (rungs, 2, channels, rows, columns) of the widest ladders that a plan over the graph `unet` may have, one
    a stream; `latent`: channels, rows, columns. Raises CutError where it cannot be cut."""
    streams = [tuple(latent)]
    network = onnx.load(str(unet), load_external_data=False)
    points = cut_points(network)
    if "deep_feature" in targets:
        streams = [_sizes(network, points.deep)]
    if probe is not None:
        streams.append(_sizes(network, probe_value(points, probe)))
    return [(RUNGS, 2, *stream) for stream in streams]


def _sizes(network: onnx.ModelProto, value: str) -> tuple[int, ...]:
    return tuple(int(size) for size in shape_of(network, value)[1:])


def _config(module: Any) -> dict[str, Any]:
    return {**dict(module.config), "_class_name": type(module).__name__}
