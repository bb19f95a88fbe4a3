"""Session and step loop against the NumPy reference, the tokenizer's rule, sentinels, and the self-test."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
from latentrelay.runtime import Bundle, Session
from latentrelay.runtime.errors import (
    BundleTamperedError,
    NonFiniteError,
    RequestError,
    SessionError,
)
from latentrelay.runtime.manifest import BackendSpec, SelftestSpec
from latentrelay.runtime.selftest import snr_db


def rewrite_weight(graph: Path, name: str, values: np.ndarray) -> None:
    model = onnx.load(graph, load_external_data=False)
    tensor = next(item for item in model.graph.initializer if item.name == name)
    tensor.CopyFrom(onnx.numpy_helper.from_array(values, name))
    graph.write_bytes(model.SerializeToString())


def test_encode_stacks_negative_then_positive(bundle_folder: Path, kit: SimpleNamespace) -> None:
    with Session(Bundle.open(bundle_folder)) as session:
        embeds = session.encode("a red circle", "blue")
        assert session.providers_used == ("CPUExecutionProvider",)
    assert embeds.shape == (2, kit.TOKENS, kit.WIDTH)
    assert embeds.dtype == np.float32
    np.testing.assert_array_equal(embeds[0], kit.reference_embeds(np.array([0, 6, 1, 1, 1, 1])))
    np.testing.assert_array_equal(embeds[1], kit.reference_embeds(np.array([0, 2, 3, 4, 1, 1])))


def test_tokenizer_cuts_and_pads_by_the_manifest(bundle_folder: Path) -> None:
    tokenizer = Session(Bundle.open(bundle_folder)).tokenizer
    assert tokenizer.ids("").tolist() == [[0, 1, 1, 1, 1, 1]]
    assert tokenizer.ids("a red circle on").tolist() == [[0, 2, 3, 4, 5, 1]]
    assert tokenizer.ids("a red circle on a blue square").tolist() == [[0, 2, 3, 4, 5, 1]]
    assert tokenizer.ids("a").dtype == np.int64
    assert not tokenizer.is_cut("a red circle on")
    assert tokenizer.is_cut("a red circle on a")
    for text in ("\ud800", 3):
        with pytest.raises(RequestError, match="Unicode"):
            tokenizer.ids(text)  # type: ignore[arg-type]


@pytest.mark.parametrize("first", [0, 1, 3, 4])
def test_every_split_of_the_loop_is_the_reference(bundle_folder: Path, kit: SimpleNamespace, first: int) -> None:
    with Session(Bundle.open(bundle_folder)) as session:
        embeds = session.encode("a red circle", "blue")
        latents, memory = session.initial_latents(5), np.zeros((1, 4, 2, 2), np.float32)
        for step in range(first):
            latents, memory = kit.reference_step(latents, memory, step, embeds, 2.0)
        events = list(session.run_steps(latents, memory if first else None, first, embeds, 2.0))
    assert [event.step for event in events] == list(range(first, 4))
    for event in events:
        latents, memory = kit.reference_step(latents, memory, event.step, embeds, 2.0)
        np.testing.assert_allclose(event.latents, latents, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(event.x0_prev, memory, rtol=1e-5, atol=1e-6)
        assert (event.num_steps, event.timestep, event.kind) == (4, kit.TIMESTEPS[event.step], "full")
        assert event.ms > 0


def test_memory_is_selected_away_at_the_first_step(bundle_folder: Path) -> None:
    with Session(Bundle.open(bundle_folder)) as session:
        embeds, latents = session.encode("a"), session.initial_latents(1)
        clean = next(iter(session.run_steps(latents, None, 0, embeds, 2.0))).latents
        dirty = next(iter(session.run_steps(latents, np.full_like(latents, np.nan), 0, embeds, 2.0))).latents
    np.testing.assert_array_equal(clean, dirty)


def test_decode_is_the_reference(bundle_folder: Path, kit: SimpleNamespace) -> None:
    with Session(Bundle.open(bundle_folder)) as session:
        latents = session.initial_latents(2)
        pixels = session.decode(latents)
    assert pixels.shape == (16, 16, 3)
    np.testing.assert_allclose(pixels, kit.reference_pixels(latents), rtol=1e-5, atol=1e-6)


def test_components_open_when_used_and_can_be_freed(bundle_folder: Path) -> None:
    session = Session(Bundle.open(bundle_folder))
    assert session.providers_used == ()
    assert session.load_ms == 0
    session.encode("a")
    assert [session.is_open(name) for name in ("text_encoder", "step_full")] == [True, False]
    session.release("text_encoder")
    assert not session.is_open("text_encoder")
    assert session.load_ms > 0
    assert session.providers_by_component == {"text_encoder": ("CPUExecutionProvider",)}
    session.close()


def test_nan_names_stage_and_step(bundle_folder: Path, kit: SimpleNamespace) -> None:
    rewrite_weight(bundle_folder / "unet/step_full.onnx", "B", np.array([0.3, -0.2, np.nan, 1], np.float32))
    kit.reseal(bundle_folder)
    with Session(Bundle.open(bundle_folder)) as session:
        steps = session.run_steps(session.initial_latents(0), None, 0, session.encode("a"), 2.0)
        assert [next(steps).step, next(steps).step] == [0, 1]
        with pytest.raises(NonFiniteError, match="step_full, step 2") as caught:
            next(steps)
        assert (caught.value.stage, caught.value.step, caught.value.exit_status) == ("step_full", 2, 1)
        with pytest.raises(NonFiniteError, match="vae_decoder"):
            session.decode(np.full((1, 4, 2, 2), np.nan, np.float32))


def test_arguments_that_do_not_fit_are_misuse(bundle_folder: Path) -> None:
    with Session(Bundle.open(bundle_folder)) as session:
        latents, embeds = session.initial_latents(0), session.encode("a")
        with pytest.raises(RequestError, match="first_step"):
            session.run_steps(latents, None, 5, embeds, 2.0)
        with pytest.raises(RequestError, match="x0_prev"):
            session.run_steps(latents, None, 1, embeds, 2.0)
        with pytest.raises(RequestError, match="latents has a wrong shape"):
            next(session.run_steps(latents[:, :2], None, 0, embeds, 2.0))
        with pytest.raises(RequestError, match="prompt_embeds has a wrong shape"):
            next(session.run_steps(latents, None, 0, embeds[:1], 2.0))
        with pytest.raises(RequestError, match="guidance is missing"):
            session.run_component("step_full", {"latents": latents, "step": np.array(0), "prompt_embeds": embeds})
        with pytest.raises(SessionError, match="no such component"):
            session.open("vae_encoder")
        inputs = {"latents": latents, "step": np.array(9), "prompt_embeds": embeds, "x0_prev": latents}
        with pytest.raises(SessionError, match="ONNX Runtime failed"):  # step 9 is outside the tables
            session.run_component("step_full", {**inputs, "guidance": np.array(1.0)})


def test_providers_missing_here_are_skipped_but_not_when_asked_for(bundle_folder: Path, kit: SimpleNamespace) -> None:
    spec = BackendSpec(
        "onnxruntime", ("QNNExecutionProvider",), {"graph_optimization": "basic", "memory_pattern": False}
    )
    kit.reseal(bundle_folder, backend=spec)
    bundle = Bundle.open(bundle_folder)
    with Session(bundle, threads=1) as session:
        session.encode("a")
        assert session.providers_used == ("CPUExecutionProvider",)
    with pytest.raises(SessionError, match="got QNNExecutionProvider"):
        Session(bundle, providers=["QNNExecutionProvider"])
    with pytest.raises(RequestError, match="threads"):
        Session(bundle, threads=-1)


@pytest.mark.parametrize("options", [{"colour": 1}, {"graph_optimization": "most"}])
def test_unknown_session_options_are_named(
    bundle_folder: Path, kit: SimpleNamespace, options: dict[str, int | str]
) -> None:
    kit.reseal(bundle_folder, backend=BackendSpec("onnxruntime", (), options))
    with pytest.raises(SessionError, match=next(iter(options))):
        Session(Bundle.open(bundle_folder))


def test_options_reach_onnx_runtime(bundle_folder: Path, kit: SimpleNamespace) -> None:
    options = {"intra_op_threads": 2, "inter_op_threads": 1, "config.session.intra_op.allow_spinning": "0"}
    kit.reseal(bundle_folder, backend=BackendSpec("onnxruntime", (), options))
    session = Session(Bundle.open(bundle_folder), threads=1)
    made = session._backend._options  # type: ignore[attr-defined]
    assert (made.intra_op_num_threads, made.inter_op_num_threads) == (1, 1)
    assert made.get_session_config_entry("session.intra_op.allow_spinning") == "0"


def test_an_unknown_backend_is_refused(bundle_folder: Path, kit: SimpleNamespace) -> None:
    kit.reseal(bundle_folder, backend=BackendSpec("abacus", ()))
    with pytest.raises(SessionError, match="abacus"):
        Session(Bundle.open(bundle_folder))


def test_a_graph_unlike_its_manifest_is_refused(bundle_folder: Path, kit: SimpleNamespace) -> None:
    parts = kit.components()
    parts["vae_decoder"] = kit.m.Component(
        "vae_decoder", "text_encoder/model.onnx", parts["vae_decoder"].inputs, parts["vae_decoder"].outputs
    )
    kit.reseal(bundle_folder, components=parts)
    with Session(Bundle.open(bundle_folder)) as session, pytest.raises(SessionError, match="other inputs"):
        session.open("vae_decoder")


def test_a_role_from_the_future_is_refused(bundle_folder: Path, kit: SimpleNamespace) -> None:
    parts = kit.components()
    ports = tuple(
        kit.port(p.name, "aspect" if p.name == "x0_prev" else p.role, p.dtype, *p.shape)
        for p in parts["step_full"].inputs
    )
    parts["step_full"] = kit.m.Component("step_full", "unet/step_full.onnx", ports, parts["step_full"].outputs)
    kit.reseal(bundle_folder, components=parts)
    with Session(Bundle.open(bundle_folder)) as session, pytest.raises(SessionError, match="got aspect"):
        next(session.run_steps(session.initial_latents(0), None, 0, session.encode("a"), 2.0))


def test_selftest_passes_here(bundle_folder: Path) -> None:
    with Session(Bundle.open(bundle_folder)) as session:
        report = session.selftest()
        assert not session.is_open("step_full")
    assert report.ok
    assert report.snr_db["text_encoder"] == float("inf")
    assert report.snr_db["step_full"] > 100
    assert report.worst[0] == "step_full"


def test_selftest_shows_a_wrong_weight(bundle_folder: Path, kit: SimpleNamespace) -> None:
    rewrite_weight(bundle_folder / "unet/step_full.onnx", "B", np.array([0.3, -0.2, 0.11, -0.4], np.float32))
    kit.reseal(bundle_folder)
    with Session(Bundle.open(bundle_folder)) as session:
        report = session.selftest()
    assert not report.ok
    assert 10 < report.snr_db["step_full"] < 60


def test_a_selftest_that_contradicts_the_manifest(bundle_folder: Path, kit: SimpleNamespace) -> None:
    path = bundle_folder / "selftest.safetensors"
    for tensors in ({"step_full.in.colour": np.zeros(1)}, {"x": np.zeros(1)}, {"vae.out.sample": np.zeros(1)}):
        kit.safetensors.numpy.save_file(tensors, path)
        kit.reseal(bundle_folder)
        with Session(Bundle.open(bundle_folder)) as session, pytest.raises(BundleTamperedError, match="does not know"):
            session.selftest()
    path.write_bytes(b"no safetensors")
    kit.reseal(bundle_folder)
    with Session(Bundle.open(bundle_folder)) as session, pytest.raises(BundleTamperedError, match="not a safetensors"):
        session.selftest()
    kit.reseal(bundle_folder, selftest=None)
    with Session(Bundle.open(bundle_folder)) as session, pytest.raises(RequestError, match="no self-test"):
        session.selftest()
    kit.safetensors.numpy.save_file({}, path)
    kit.reseal(bundle_folder, selftest=SelftestSpec("selftest.safetensors", 1.0))
    with Session(Bundle.open(bundle_folder)) as session:
        assert not session.selftest().ok


def test_snr_by_hand() -> None:
    reference = np.array([3.0, 4.0])
    assert snr_db(reference, np.array([3.0, 4.5])) == pytest.approx(20.0)
    assert snr_db(reference, reference) == float("inf")
    assert snr_db(reference, np.array([3.0, np.nan])) == -float("inf")
    assert snr_db(reference, np.array([3.0])) == -float("inf")
    assert snr_db(np.zeros(2), np.ones(2)) == -float("inf")
