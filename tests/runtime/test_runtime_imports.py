"""The runtime without torch: what it imports, how long that takes, and a picture made where torch cannot be had."""

import ast
import json
import resource
import subprocess
import sys
from pathlib import Path

import latentrelay.runtime
import pytest
from latentrelay.runtime.errors import MissingExtraError

RUNTIME = Path(latentrelay.runtime.__file__).parent
BLOCKED = ("torch", "diffusers", "transformers", "onnx", "optimum", "coremltools", "openvino")
BLOCK = f"import sys; sys.modules.update(dict.fromkeys({BLOCKED!r}));"


def run(code: str, *arguments: str) -> str:
    command = [sys.executable, "-P", "-W", "error", "-c", code, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd="/")
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_module_imports_without_torch() -> None:
    modules = sorted(f"latentrelay.runtime.{path.stem}" for path in RUNTIME.glob("*.py"))
    code = f"{BLOCK} import importlib; [importlib.import_module(name) for name in {modules!r}]; print('ok')"
    assert run(code) == "ok\n"


def test_import_is_light() -> None:
    heavy = [*BLOCKED, "onnxruntime", "httpx", "PIL", "tokenizers", "safetensors", "pydantic", "cryptography"]
    heavy += ["tenacity", "asyncio", "latentrelay.runtime.cloud_client"]
    code = f"import sys, latentrelay.runtime; print([name for name in {heavy!r} if name in sys.modules])"
    assert run(code) == "[]\n"


def test_import_takes_less_than_half_a_second() -> None:
    """Processor time of a fresh process, interpreter start included: wall time counts what else the machine does."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    run("import latentrelay.runtime")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert (after.ru_utime + after.ru_stime) - (before.ru_utime + before.ru_stime) < 0.5


def test_a_picture_without_torch(bundle_folder: Path, tmp_path: Path) -> None:
    code = (
        f"{BLOCK} import json; from latentrelay.runtime import generate;"
        "r = generate(sys.argv[1], 'a red circle', seed=3);"
        "r.save_png(sys.argv[2]); print(json.dumps([r.path_taken, float(r.latents.sum())]))"
    )
    path_taken, total = json.loads(run(code, str(bundle_folder), str(tmp_path / "out.png")))
    here = latentrelay.runtime.generate(bundle_folder, "a red circle", seed=3)
    assert path_taken == "device"
    assert total == pytest.approx(float(here.latents.sum()), abs=1e-5)
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")


def test_the_runtime_imports_nothing_else_of_ours() -> None:
    allowed = {"latentrelay.runtime", "numpy", "onnxruntime", "tokenizers", "safetensors", "httpx", "PIL"}
    allowed |= {"openvino", "coremltools", "cryptography", "tenacity"}
    for path in RUNTIME.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                assert node.level == 0, path
                names = [node.module or ""]
            for name in names:
                root = name.split(".")[0]
                known = root in sys.stdlib_module_names or root in allowed or name.startswith("latentrelay.runtime")
                assert known, f"{path.name} imports {name}"


MISSING = [
    ("onnxruntime", "from latentrelay.runtime import *; Session(Bundle.open(sys.argv[1]))"),
    ("tokenizers", "from latentrelay.runtime import *; Session(Bundle.open(sys.argv[1])).encode('a')"),
    ("safetensors.numpy", "from latentrelay.runtime import *; Session(Bundle.open(sys.argv[1])).selftest()"),
    ("httpx", "from latentrelay.runtime import *; generate(sys.argv[1], 'a', cloud='http://127.0.0.1:1')"),
    ("PIL", "from latentrelay.runtime import *; generate(sys.argv[1], 'a').image"),
]


@pytest.mark.parametrize(("module", "code"), MISSING, ids=[item[0] for item in MISSING])
def test_a_missing_dependency_is_named_with_the_way_to_get_it(bundle_folder: Path, module: str, code: str) -> None:
    script = (
        f"import sys; sys.modules[{module!r}] = None\ntry:\n    {code}\n"
        "except Exception as error:\n    print(type(error).__name__, error.exit_status, error)"
    )
    output = run(script, str(bundle_folder))
    assert output.startswith(f"{MissingExtraError.__name__} 2 ")
    assert module.split(".")[0] in output
    assert 'pip install "latentrelay"' in output
