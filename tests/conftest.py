"""Fixtures shared by the folders, and the named list of third-party warnings that are not ours to fix.

`tiny` is tests/tiny_pipeline.py as a module; so are `uninterrupted`, `handoff_mutations`, `hostile_target` and more.
`tiny_bundle` is one fp32 bundle exported once for the whole session; `serve_cloud(pipeline)` is a real server on a
loopback port.
"""

import importlib.util
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

THIRD_PARTY_WARNINGS = (
    # diffusers 0.39's DPM-Solver++ calls np.array() on a tensor; torch 2.13 and numpy 2 disagree about `copy`
    "ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning",
    # torch.onnx of torch 2.13 pickles its own deprecated LeafSpec
    "ignore:.isinstance.treespec, LeafSpec.. is deprecated:FutureWarning",
    # optimum reads configuration entries as attributes
    "ignore:Accessing config attribute:FutureWarning",
)


def pytest_configure(config: pytest.Config) -> None:
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]  # OpenVINO would report the tests' use
    for line in THIRD_PARTY_WARNINGS:
        config.addinivalue_line("filterwarnings", line)


def load_beside(name: str) -> ModuleType:
    """tests/<name>.py, imported once under its own name."""
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
        if spec is None or spec.loader is None:
            raise ImportError(f"tests/{name}.py is missing")
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
    return sys.modules[name]


@pytest.fixture(scope="session")
def tiny() -> Any:
    """The factory module: `tiny.make_pipeline(folder, ...)`, `tiny.save_pipeline(pipeline, folder)`."""
    return load_beside("tiny_pipeline")


@pytest.fixture(scope="session")
def uninterrupted() -> Any:
    """The module that runs diffusers alone: `final_latents(pipeline, sampler, ...)`, `snr_db(expected, got)`."""
    return load_beside("uninterrupted")


@pytest.fixture(scope="session")
def handoff_mutations() -> Any:
    """The module that makes hostile blobs: `cases(seeds, count, seed)`, `examined(blob)`, `apart`, `together`."""
    return load_beside("handoff_mutations")


@pytest.fixture(scope="session")
def hostile_target() -> Any:
    """The module with `Target(model_folder, folder)`: a real server process and bare sockets to it."""
    return load_beside("hostile_target")


@pytest.fixture(scope="session")
def openapi_cases() -> Any:
    """The module with `run(url, token, examples, jobs)`: requests made up from the OpenAPI document."""
    return load_beside("openapi_cases")


@pytest.fixture(scope="session")
def tiny_pipeline(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The pipeline behind `tiny_bundle`: epsilon prediction, 16x16 pixels. Read only."""
    return tiny.make_pipeline(tmp_path_factory.mktemp("tiny-pipeline"))


@pytest.fixture(scope="session")
def tiny_export(tiny_pipeline: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """One fp32 export of `tiny_pipeline` (DPM-Solver++(2M), 25 steps, static shapes), made once: an ExportResult."""
    from latentrelay.export import export

    return export(tiny_pipeline, "pixel-8", tmp_path_factory.mktemp("tiny-export") / "bundle")


@pytest.fixture(scope="session")
def tiny_bundle(tiny_export: Any) -> Path:
    """The folder of `tiny_export`. Read only: copy it before changing anything."""
    return Path(tiny_export.bundle)


@contextmanager
def _served(pipeline: Any, name: str = "tiny") -> Iterator[str]:
    from latentrelay.cloud.app import create_app
    from latentrelay.cloud.engine import Engine
    from latentrelay.cloud.serve import CloudServer

    server = CloudServer(create_app(Engine(pipeline, name=name)))
    ready = threading.Event()
    thread = threading.Thread(target=server.run, args=(lambda url, port: ready.set(),))
    thread.start()
    try:
        if not ready.wait(20):
            raise TimeoutError("the server did not start")
        yield server.url
    finally:
        server.stop()
        thread.join(20)
        if thread.is_alive():
            raise TimeoutError("the server did not stop")


@pytest.fixture(scope="session")
def serve_cloud() -> Callable[..., AbstractContextManager[str]]:
    """`with serve_cloud(pipeline, name=...) as url`: the cloud's service in a thread, on a real socket."""
    return _served


@pytest.fixture(scope="session")
def tiny_cloud(tiny_pipeline: Any) -> Iterator[str]:
    """The address of a server that runs `tiny_pipeline` for the whole session."""
    with _served(tiny_pipeline) as url:
        yield url


@pytest.fixture
def scripted() -> Iterator[Any]:
    """tests/scripted_cloud.py as a module; `scripted.ScriptedCloud(...)` made here stop with the test."""
    module = load_beside("scripted_cloud")
    made: list[Any] = []

    class Kept(module.ScriptedCloud):  # type: ignore[misc, name-defined]
        def __post_init__(self) -> None:
            super().__post_init__()
            made.append(self)

    names = {name: getattr(module, name) for name in ("Cut", "Raw", "Refuse", "Hang")}
    yield SimpleNamespace(ScriptedCloud=Kept, **names)
    for each in made:
        each.stop()


@pytest.fixture
def dead_url() -> str:
    """A loopback address at which nobody answers."""
    import socket

    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    return f"http://127.0.0.1:{port}"
