"""What ladders add to a process: measured in fresh processes against the preflight's prediction, and under a ceiling.

Hand-made step graphs at the size of the 224M geometry: ladders of two rungs, (2, 2, 320, 64, 64) each, behind a network
that holds as much as a U-Net does, twenty buffers of (2, 320, 64, 64) at its deepest.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from latentrelay.device_profiles.preflight import ladder_mib
from latentrelay.runtime import manifest as m
from onnx import TensorProto as T
from onnx import helper

pytestmark = pytest.mark.slow
RUNGS, STEPS, LATENT, DEEP = 2, 6, (1, 4, 64, 64), (2, 2, 320, 64, 64)
DEPTH = 20  # buffers of 10 MiB that the network holds at once
MASK = ("full", "predicted", "full", "predicted", "full", "predicted")
CHILD = """
import json, resource, sys
import numpy as np, onnxruntime
from pathlib import Path
from latentrelay.runtime.bundle import Bundle
from latentrelay.runtime.errors import LatentRelayError
from latentrelay.runtime.manifest import Manifest
from latentrelay.runtime.session import Session
folder, backend, ceiling = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
memory = lambda: {key: int(value.split()[0]) / 1024
                  for key, value in (line.split(":") for line in open("/proc/self/status")) if key.startswith("Vm")}
if ceiling:
    resource.setrlimit(resource.RLIMIT_AS, (ceiling, ceiling))
manifest = Manifest.from_json_bytes((folder / "manifest.json").read_bytes())
session = Session(Bundle(folder, manifest), backend=backend, threads=1)
latents, embeds = np.ones((1, 4, 64, 64), np.float32), np.zeros((2, 2, 2), np.float32)
try:
    for image in range(2):
        kinds = [event.kind for event in session.run_steps(latents, None, 0, embeds, 1.0)]
    print(json.dumps({**memory(), "kinds": kinds}))
except LatentRelayError as error:
    print(json.dumps({"refused": str(error)}))
"""


def write_graphs(folder: Path, streams: tuple[str, ...], dtype: str) -> None:
    """step_full.onnx and, with ladders, step_predicted.onnx."""
    make, value = helper.make_node, helper.make_tensor_value_info
    kind = T.FLOAT16 if dtype == "float16" else T.FLOAT
    update = np.zeros((2, STEPS, RUNGS, 1 + RUNGS), np.float32)
    update[1, :, 0, 0], update[1, 2:, 1, :2] = 1, (0.5, -0.5)
    rows = np.zeros((2, STEPS, RUNGS), np.float32)
    rows[1, :, 0], rows[1, 3:, 1] = 1, 1
    weights = {
        **{"per_channel": np.linspace(0, 1, 640).reshape(2, 320, 1, 1)},
        **{"tenth": np.array(0.1), "nothing": np.array(0.0), "U": update, "P": rows, "errors": np.zeros(STEPS)},
    }
    numbers = {"counts": np.ones((STEPS, 2)), "axis": np.array([0]), "as_rungs": np.array([RUNGS, 1, 1, 1, 1])}
    for o in range(RUNGS):
        numbers[f"rung{o}"] = np.array(o)
    numbers["rung2"] = np.array(2)
    tensors = [onnx.numpy_helper.from_array(array.astype(np.float32), name) for name, array in weights.items()]
    tensors += [onnx.numpy_helper.from_array(array.astype(np.int64), name) for name, array in numbers.items()]
    network = [
        make("ReduceMean", ["latents"], ["plane"], axes=[1], keepdims=1),
        make("Mul", ["plane", "per_channel"], ["lifted"]),
        make("Tanh", ["lifted"], ["probe"]),  # neither is held for a skip connection
        make("Tanh", ["probe"], ["feature"]),
        make("Tanh", ["feature"], ["down0"]),
        *(make("Tanh", [f"down{i}"], [f"down{i + 1}"]) for i in range(DEPTH)),
        make("Add", [f"down{DEPTH}", f"down{DEPTH - 1}"], [f"up{DEPTH - 1}"]),
        *(make("Add", [f"up{i + 1}", f"down{i}"], [f"up{i}"]) for i in reversed(range(DEPTH - 1))),
        make("Mul", ["up0", "tenth"], ["y"]),
    ]
    tail = [
        make("ReduceMean", ["y"], ["mean"], axes=[0, 1], keepdims=1),
        make("Mul", ["mean", "tenth"], ["small"]),
        make("Add", ["latents", "small"], ["next_latents"]),
    ]

    def table(name: str) -> list[Any]:
        return [
            make("Gather", [name, "split_row"], [name + "_"]),
            make("Gather", [name + "_", "step"], [name + "_row"]),
        ]

    def ladder(role: str) -> list[Any]:
        nodes, rungs, value_of = [], [], role.removesuffix("_ladder")
        if kind == T.FLOAT16:
            nodes.append(make("Cast", [role], [role + "_wide"], to=T.FLOAT))
        for o in range(RUNGS):
            terms = [f"{role}_{o}_own"]
            nodes.append(make("Gather", ["U_row", f"rung{o}"], [f"{role}_u{o}"]))
            nodes.append(make("Gather", [f"{role}_u{o}", "rung0"], [f"{role}_{o}_c"]))
            nodes.append(make("Mul", [f"{role}_{o}_c", value_of], [terms[0]]))
            for p in range(RUNGS):
                name = f"{role}_{o}_{p}"
                nodes.append(make("Gather", [f"{role}_u{o}", f"rung{p + 1}"], [name + "_c"]))
                nodes.append(make("Gather", [role + "_wide" if kind == T.FLOAT16 else role, f"rung{p}"], [name + "_l"]))
                nodes.append(make("Equal", [name + "_c", "nothing"], [name + "_unused"]))
                nodes.append(make("Where", [name + "_unused", value_of, name + "_l"], [name + "_old"]))
                nodes.append(make("Mul", [name + "_c", name + "_old"], [name]))
                terms.append(name)
            nodes.append(make("Sum", terms, [f"{role}_{o}_new"]))
            nodes.append(make("Unsqueeze", [f"{role}_{o}_new", "axis"], [f"{role}_{o}_rung"]))
            if kind == T.FLOAT16:
                nodes.append(make("Cast", [f"{role}_{o}_rung"], [f"{role}_{o}_half"], to=kind))
            rungs.append(f"{role}_{o}_half" if kind == T.FLOAT16 else f"{role}_{o}_rung")
        return [*nodes, make("Concat", rungs, ["next_" + role], axis=0)]

    inputs = [value("latents", T.FLOAT, LATENT), value("step", T.INT64, []), value("split_row", T.INT64, [])]
    ladders = [value(role, kind, DEEP) for role in streams]
    states, news = [value("next_latents", T.FLOAT, LATENT)], [value("next_" + role, kind, DEEP) for role in streams]
    updates = [node for role in streams for node in ladder(role)]
    full = [*network, *(table("U") if streams else []), *updates, *tail]
    predicted = [
        *table("P"),
        make("Reshape", ["P_row", "as_rungs"], ["c"]),
        make("Cast", ["feature_ladder"], ["wide_ladder"], to=T.FLOAT),
        make("Equal", ["c", "nothing"], ["unused"]),
        make("Mul", ["c", "wide_ladder"], ["products"]),
        make("Where", ["unused", "nothing", "products"], ["terms"]),
        make("ReduceSum", ["terms", "axis"], ["y"], keepdims=0),
        *tail,
    ]
    chosen = []
    if len(streams) > 1:
        predicted += [
            make("Gather", ["errors", "step"], ["probe_error"]),
            make("Gather", ["counts", "step"], ["choices"]),
        ]
        chosen = [value("choices", T.INT64, [2]), value("probe_error", T.FLOAT, [])]
    for name, nodes, outputs in (
        ("step_full", full, [*states, *news]),
        ("step_predicted", predicted, [*states, *chosen]),
    ):
        if name == "step_full" or streams:
            graph = helper.make_graph(nodes, name, [*inputs, *ladders], outputs, tensors)
            model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
            onnx.save(model, folder / f"{name}.onnx")


def write_bundle(folder: Path, streams: tuple[str, ...] = (), dtype: str = "float32") -> Path:
    """Step graphs and a manifest; the other components are named only."""
    folder.mkdir()
    write_graphs(folder, streams, dtype)
    port = lambda name, role, kind, *shape: m.Port(name, role, kind, shape)  # noqa: E731
    inputs = (port("latents", "latents", "float32", *LATENT), port("step", "step", "int64"))
    inputs += (port("split_row", "split_row", "int64"), *(port(role, role, dtype, *DEEP) for role in streams))
    state = (port("next_latents", "latents", "float32", *LATENT),)
    news = tuple(port("next_" + role, role, dtype, *DEEP) for role in streams)
    choice = (port("choices", "choices", "int64", 2), port("probe_error", "probe_error", "float32"))
    components = {name: m.Component(name, "other", (), ()) for name in ("text_encoder", "vae_decoder")}
    components["step_full"] = m.Component("step_full", "step_full.onnx", inputs, (*state, *news))
    spec = None
    if streams:
        outputs = (*state, *(choice if len(streams) > 1 else ()))
        components["step_predicted"] = m.Component("step_predicted", "step_predicted.onnx", inputs, outputs)
        probe = ("P1", "l2", DEEP) if len(streams) > 1 else ()
        spec = m.PredictionSpec("deep_feature", DEEP, (m.StepMask(0, 1, MASK),), dtype, *probe)
    manifest = m.Manifest(
        name="ladders",
        created_by={},
        source=m.Source("made by hand", "sd1", "sha256:" + "00" * 32, "Apache-2.0"),
        profile={},
        precision="fp32",
        latent=m.LatentSpec(*LATENT[1:], 1.0, 0.0, 8),
        image=m.ImageSpec(512, 512),
        prediction_type="epsilon",
        schedule=m.Schedule("ddim", "DDIMScheduler", "sha256:" + "00" * 32, STEPS, (1.0,) * STEPS, 1.0, False),
        guidance=m.Guidance(1.0),
        tokenizer=m.TokenizerSpec("other", 2, 0, 1, 1),
        components=components,
        files=tuple(m.FileEntry(path, 0, "0" * 64) for path in ("other", "step_full.onnx", "step_predicted.onnx")),
        backend=m.BackendSpec("onnxruntime", ("CPUExecutionProvider",), {"cpu_arena": False, "memory_pattern": False}),
        prediction=spec,
    )
    (folder / m.MANIFEST_NAME).write_bytes(manifest.sealed().to_json_bytes())
    return folder


def child(folder: Path, backend: str = "onnxruntime", ceiling_mib: float = 0.0) -> dict[str, Any]:
    """What a fresh process took in MiB to make two runs, or what it said instead."""
    ceiling = str(int(ceiling_mib * 2**20))
    command = [sys.executable, "-P", "-c", CHILD, str(folder), backend, ceiling]
    # A fixed threshold: freed buffers go back at once, so a peak is what was held and not what the allocator kept.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(2**20)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


CASES = {
    "feature, float32": (("feature_ladder",), "float32"),
    "feature, float16": (("feature_ladder",), "float16"),
    "feature and probe, float32": (("feature_ladder", "probe_ladder"), "float32"),
    "feature and probe, float16": (("feature_ladder", "probe_ladder"), "float16"),
}


def test_measured_ladders_are_within_a_tenth_of_the_prediction(
    tmp_path: Path, measured: Callable[[str, dict[str, Any]], Path]
) -> None:
    plain = child(write_bundle(tmp_path / "plain"))
    assert plain["kinds"] == ["full"] * STEPS
    rows = []
    for number, (name, (streams, dtype)) in enumerate(CASES.items()):
        taken = child(write_bundle(tmp_path / str(number), streams, dtype))
        assert taken["kinds"] == list(MASK)
        predicted = ladder_mib([DEEP] * len(streams), dtype)
        added = {key: round(taken[key] - plain[key], 2) for key in ("VmHWM", "VmRSS", "VmPeak")}
        rows.append(
            {"ladders": name, "predicted_mib": predicted, **added, "ratio": round(added["VmHWM"] / predicted, 3)}
        )
        print(rows[-1])
    measured("ladder_memory", {"plain_mib": plain["VmHWM"], "ladder_shape": list(DEEP), "rows": rows})
    assert all(0.9 <= row["ratio"] <= 1.1 for row in rows)


def test_a_run_finishes_under_the_address_space_that_preflight_allows_and_is_refused_in_words_below(
    tmp_path: Path,
) -> None:
    plain = child(write_bundle(tmp_path / "plain"))
    streams, dtype = CASES["feature and probe, float32"]
    bundle, needed = write_bundle(tmp_path / "ladders", streams, dtype), ladder_mib([DEEP] * 2, "float32")
    within = child(bundle, ceiling_mib=plain["VmPeak"] + 1.1 * needed)
    assert within.get("kinds") == list(MASK), within
    below = child(bundle, ceiling_mib=plain["VmPeak"] - 200 + 0.3 * needed)
    print(below)
    assert "refused" in below
