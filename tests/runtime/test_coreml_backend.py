"""Core ML behind the backend protocol: refused away from macOS, and the arrays adapted to what a package declares.

The model is a stand-in object: nothing outside macOS runs a package. What it is given and what is made of its answer
are what these tests are about; conversion and parity are tested where packages are made.
"""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from latentrelay.runtime import Bundle, Session
from latentrelay.runtime.coreml_backend import CoreMLBackend
from latentrelay.runtime.errors import BackendUnavailableError, SessionError
from latentrelay.runtime.manifest import BackendSpec, Component, CoreMLPackage, Port

SPEC = BackendSpec("coreml", ("CPUExecutionProvider",))
COMPONENT = Component(
    "step_full",
    "unet/step_full.onnx",
    (
        Port("latents", "latents", "float32", (1, 4, 2, 2)),
        Port("step", "step", "int64", ()),
        Port("prompt_embeds", "prompt_embeds", "float32", (2, 6, 3)),
    ),
    (Port("next_latents", "latents", "float32", (1, 4, 2, 2)),),
)
INPUTS = {
    "latents": np.arange(16.0).reshape(1, 4, 2, 2),
    "step": np.array(3),
    "prompt_embeds": np.arange(36.0).reshape(2, 6, 3),
}


def package(part: int, parts: int, inputs: tuple[Port, ...], outputs: tuple[Port, ...]) -> CoreMLPackage:
    return CoreMLPackage(
        "step_full", f"coreml/{part}.mlpackage", 1, "fp16", 60.0, "iOS17", "CPU_AND_NE", inputs, outputs, part, parts
    )


WHOLE = package(
    1,
    1,
    (
        Port("latents", "latents", "float32", (1, 4, 2, 2)),
        Port("step", "step", "int32", (1,)),
        Port("encoder_hidden_states", "prompt_embeds", "float16", (2, 3, 1, 6)),
    ),
    (Port("x", "latents", "float16", (1, 4, 2, 2)),),
)


class Model:
    """Records what it is given and answers with a function of it."""

    def __init__(self, answer: Any) -> None:
        self.answer, self.given = answer, {}

    def predict(self, inputs: dict[str, Any]) -> dict[str, Any]:
        self.given = inputs
        return self.answer(inputs)


@pytest.mark.skipif(sys.platform == "darwin", reason="macOS has Core ML")
def test_away_from_macos_it_is_refused_with_the_way_round(bundle_folder: Path) -> None:
    with pytest.raises(BackendUnavailableError, match=r"expected macOS\. Choose the backend onnxruntime") as caught:
        Session(Bundle.open(bundle_folder), backend="coreml")
    assert caught.value.exit_status == 3


def test_arrays_are_adapted_to_the_package_and_back() -> None:
    model = Model(lambda given: {"x": given["latents"].astype(np.float16) * 2})
    opened = []
    backend = CoreMLBackend(SPEC, [WHOLE], Path("/b"), lambda path, units: opened.append((path, units)) or model)
    graph = backend.load(Path("unused"), COMPONENT)
    assert opened == [(Path("/b/coreml/1.mlpackage"), "CPU_AND_NE")]
    assert graph.providers == ("CoreML CPU_AND_NE",)
    outputs = graph.run(INPUTS)
    assert model.given["step"].dtype == np.int32
    assert model.given["step"].tolist() == [3]
    assert model.given["encoder_hidden_states"].dtype == np.float16
    np.testing.assert_array_equal(model.given["encoder_hidden_states"][1, :, 0, 4], INPUTS["prompt_embeds"][1, 4])
    assert outputs["next_latents"].dtype == np.float32
    np.testing.assert_array_equal(outputs["next_latents"], 2 * INPUTS["latents"])


def test_parts_run_in_order_each_on_what_the_one_before_made() -> None:
    half = Port("half", "half", "float32", (1, 4, 2, 2))
    first = package(1, 2, (COMPONENT.inputs[0],), (half,))
    second = package(
        2, 2, (half, Port("step", "step", "int32", (1,))), (Port("out", "latents", "float32", (1, 4, 2, 2)),)
    )
    models = {
        "1.mlpackage": Model(lambda given: {"half": given["latents"] + 1}),
        "2.mlpackage": Model(lambda given: {"out": given["half"] * given["step"]}),
    }
    backend = CoreMLBackend(SPEC, [second, first], Path("/b"), lambda path, units: models[path.name])
    outputs = backend.load(Path("unused"), COMPONENT).run(INPUTS)
    np.testing.assert_array_equal(outputs["next_latents"], (INPUTS["latents"] + 1) * 3)


def test_a_missing_part_a_wrong_shape_and_a_failure_are_session_errors() -> None:
    backend = CoreMLBackend(SPEC, [package(2, 2, (), ())], Path("/b"), lambda path, units: Model(dict))
    with pytest.raises(SessionError, match="no complete Core ML package for step_full"):
        backend.load(Path("unused"), COMPONENT)
    short = CoreMLBackend(SPEC, [WHOLE], None, lambda path, units: Model(lambda given: {"x": np.zeros((1, 4, 2))}))
    with pytest.raises(SessionError, match="next_latents has a wrong shape"):
        short.load(Path("unused"), COMPONENT).run(INPUTS)

    def fail(path: Path, units: str) -> Any:
        raise RuntimeError("no such model")

    with pytest.raises(SessionError, match=r"Core ML cannot load coreml/1\.mlpackage: no such model"):
        CoreMLBackend(SPEC, [WHOLE], None, fail).load(Path("unused"), COMPONENT)
    with pytest.raises(SessionError, match="got FAST, expected ALL"):
        CoreMLBackend(BackendSpec("coreml", (), {"compute_units": "FAST"}), [], None, fail)
