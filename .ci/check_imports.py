"""Who may import whom, read off the syntax trees; every package folder is listed; no bare folder name is imported.

The table is the one in docs/architecture.md. Exit status 1 and one line a violation.
"""

import ast
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MAY_IMPORT = {
    "device_profiles": set(),
    "runtime": set(),
    "reference": {"compress"},
    "compress": {"device_profiles"},
    "export": {"compress", "device_profiles", "runtime"},
    "cloud": {"runtime"},
    "tools": {"cloud", "compress", "device_profiles", "export", "reference", "runtime"},
}
# Of a lower folder only these modules: formats, digests and errors; export opens graphs by the runtime's backends,
# since tables are fitted on the session that is deployed.
ONLY = {
    ("reference", "compress"): {"training", "light_vae", "distill_vae"},
    ("export", "runtime"): {
        "backend",
        "openvino_backend",
        "digest",
        "errors",
        "manifest",
        "samplers",
        "noise",
        "handoff",
        "strict_json",
    },
    ("cloud", "runtime"): {"digest", "errors", "handoff", "handoff_request", "noise", "samplers", "strict_json"},
}
HEAVY = {"torch", "diffusers", "transformers", "onnx", "accelerate", "optimum", "coremltools"}
LIGHT = {"runtime", "device_profiles"}
ON_DEMAND = {("runtime/coreml_backend.py", "coremltools")}  # inside the function that opens this backend


def imported(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Every absolute dotted name that a module imports, with its line; `from a import b` counts as a and as a.b."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.lineno, "." * node.level + (node.module or "")


def violations(folder: str, path: Path) -> Iterator[str]:
    for line, name in imported(ast.parse(path.read_text(encoding="utf-8"))):
        parts = name.split(".")
        where = f"{path.relative_to(ROOT)}:{line}"
        if parts[0] in MAY_IMPORT or name.startswith("."):
            yield f"{where}: imports {name}; expected the full name, latentrelay.<folder>"
        asked_for = (path.relative_to(ROOT).as_posix(), parts[0]) in ON_DEMAND
        if folder in LIGHT and parts[0] in HEAVY and not asked_for:
            yield f"{where}: {folder} imports {parts[0]}, which it must run without"
        if parts[0] != "latentrelay" or len(parts) < 2 or parts[1] == folder:
            continue
        if parts[1] not in MAY_IMPORT[folder]:
            allowed = sorted(MAY_IMPORT[folder]) or "nothing of ours"
            yield f"{where}: {folder} imports {parts[1]}; it may import {allowed}"
        elif len(parts) > 2 and parts[2] not in ONLY.get((folder, parts[1]), {parts[2]}):
            yield f"{where}: {folder} imports {name}; of {parts[1]} it may use {sorted(ONLY[folder, parts[1]])}"


def unlisted() -> Iterator[str]:
    """Packages on disk against pyproject: a forgotten subpackage works when editable and is missing from the wheel."""
    listed = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    found = {
        "latentrelay." + ".".join(path.parent.relative_to(ROOT).parts)
        for folder in MAY_IMPORT
        for path in (ROOT / folder).rglob("__init__.py")
    }
    yield from (f"pyproject.toml: package {name} is not listed" for name in sorted(found - listed))
    yield from (f"pyproject.toml: package {name} does not exist" for name in sorted(listed - found))


def main() -> int:
    found = list(unlisted())
    for folder in MAY_IMPORT:
        for path in sorted((ROOT / folder).rglob("*.py")):
            found += violations(folder, path)
    sys.stdout.write("\n".join([*found, f"imports: {len(found)} violations"]) + "\n")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
