"""OpenVINO behind the backend protocol, with the real library: the tiny bundle, what ran, errors, and no reports."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from latentrelay.runtime import Bundle, Session, generate
from latentrelay.runtime.errors import RequestError, SessionError
from latentrelay.runtime.manifest import BackendSpec, Component

CPU = "CPUExecutionProvider"


@pytest.fixture(scope="module", autouse=True)
def openvino() -> None:
    pytest.importorskip("openvino")


def spec(**options: object) -> BackendSpec:
    return BackendSpec("openvino", (CPU,), {"intra_op_threads": 1, **options})


def test_a_bundle_for_openvino_makes_the_picture_onnx_runtime_makes(bundle_folder: Path, kit: SimpleNamespace) -> None:
    here = generate(bundle_folder, "a red circle", negative_prompt="blue", seed=3)
    kit.reseal(bundle_folder, backend=spec())
    with Session(Bundle.open(bundle_folder)) as session:
        assert session.selftest().ok  # the step graph has its weight in an external file
        result = generate(session, "a red circle", negative_prompt="blue", seed=3)
        assert session.providers_by_component["step_full"] == ("OpenVINO CPU f32",)
    np.testing.assert_allclose(result.latents, here.latents, atol=1e-5)
    assert result.providers == ("OpenVINO CPU f32",)


def test_any_bundle_runs_with_openvino_by_name(bundle_folder: Path, kit: SimpleNamespace) -> None:
    manifest = kit.reseal(bundle_folder, backend=BackendSpec("onnxruntime", (CPU,), {"cpu_arena": False}))
    assert manifest.backend.name == "onnxruntime"
    with Session(Bundle.open(bundle_folder), backend="openvino", threads=1) as session:
        assert session.selftest().ok


def test_bf16_runs_where_the_processor_has_it_and_says_so(bundle_folder: Path, kit: SimpleNamespace) -> None:
    from latentrelay.runtime.openvino_backend import import_openvino

    has = "BF16" in import_openvino().Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    kit.reseal(bundle_folder, backend=spec(inference_precision="bf16"))
    with Session(Bundle.open(bundle_folder)) as session:
        session.open("step_full")
        assert session.providers_used == (("OpenVINO CPU bf16",) if has else ("OpenVINO CPU f32",))


def test_outputs_are_fresh_and_inputs_untouched(bundle_folder: Path, kit: SimpleNamespace) -> None:
    kit.reseal(bundle_folder, backend=spec())
    with Session(Bundle.open(bundle_folder)) as session:
        ids = np.array([[0, 2, 3, 4, 1, 1]], np.int64)
        first = session.run_component("text_encoder", {"input_ids": ids})["last_hidden_state"]
        kept = first.copy()
        second = session.run_component("text_encoder", {"input_ids": ids * 0})["last_hidden_state"]
    np.testing.assert_array_equal(first, kept)
    np.testing.assert_array_equal(first, kit.reference_embeds(ids))
    assert not np.array_equal(first, second)


def test_another_signature_than_the_manifest_is_refused(bundle_folder: Path, kit: SimpleNamespace) -> None:
    components = kit.components()
    text = components["text_encoder"]
    wrong = Component(text.role, text.path, (kit.port("ids", "input_ids", "int64", 1, kit.TOKENS),), text.outputs)
    kit.reseal(bundle_folder, backend=spec(), components={**components, "text_encoder": wrong})
    with (
        Session(Bundle.open(bundle_folder)) as session,
        pytest.raises(SessionError, match=r"other inputs than the manifest: got \{'input_ids': 'int64'\}"),
    ):
        session.open("text_encoder")


def test_errors_are_translated(bundle_folder: Path, kit: SimpleNamespace) -> None:
    with pytest.raises(SessionError, match="inference_precision=int3"):
        Session(
            SimpleNamespace(
                manifest=kit.make_manifest(bundle_folder, backend=spec(inference_precision="int3")), path=bundle_folder
            )
        )
    (bundle_folder / "vae_decoder/model.onnx").write_bytes(b"\x08\x08\x12\x00")
    kit.reseal(bundle_folder, backend=spec())
    with Session(Bundle.open(bundle_folder)) as session:
        with pytest.raises(SessionError, match=r"OpenVINO cannot load vae_decoder/model\.onnx: "):
            session.open("vae_decoder")
        with pytest.raises(RequestError, match="input_ids has a wrong shape"):
            session.run_component("text_encoder", {"input_ids": np.zeros((1, 9), np.int64)})


def test_without_the_library_the_extra_and_the_way_round_are_named(bundle_folder: Path, kit: SimpleNamespace) -> None:
    kit.reseal(bundle_folder, backend=spec())
    code = (
        "import sys; sys.modules['openvino'] = None\n"
        "from latentrelay.runtime import *\n"
        "try:\n    Session(Bundle.open(sys.argv[1]))\n"
        "except LatentRelayError as error:\n    print(type(error).__name__, error)\n"
        "print(generate(Session(Bundle.open(sys.argv[1]), backend='onnxruntime'), 'a', seed=1).path_taken)"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", code, str(bundle_folder)], capture_output=True, text=True, check=True, cwd="/"
    )
    first, second = done.stdout.splitlines()
    assert first.startswith("MissingExtraError ")
    assert 'pip install "latentrelay[openvino]"' in first
    assert "onnxruntime" in first
    assert second == "device"


def test_importing_openvino_here_reports_nothing() -> None:
    code = (
        "import sys; from latentrelay.runtime.openvino_backend import import_openvino; import_openvino();"
        "print([name for name in sys.modules if name.startswith('openvino_telemetry')])"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True, cwd="/")
    assert done.stdout == "[]\n"
