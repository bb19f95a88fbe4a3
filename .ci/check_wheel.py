"""Build the wheel and look inside: every module, profile, template and weight is there, and nothing else is.

Building happens in a temporary copy of what git would hold, without isolation, so no network is used.
"""

import shutil
import subprocess
import sys
import tempfile
import tomllib
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DATA = {".toml", ".j2", ".json", ".safetensors", ".txt", ".typed", ".md"}


def expected(folders: dict[str, str]) -> set[str]:
    """Archive names that the folders should give."""
    names = set()
    for package, folder in folders.items():
        for path in (ROOT / folder).rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts and path.suffix in DATA | {".py"}:
                names.add(f"{package.replace('.', '/')}/{path.relative_to(ROOT / folder).as_posix()}")
    return names


def build(folders: dict[str, str], scratch: Path) -> Path:
    copy = scratch / "source"
    ignored = shutil.ignore_patterns("__pycache__")
    for folder in folders.values():
        shutil.copytree(ROOT / folder, copy / folder, ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy / name)
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-q",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(scratch),
        str(copy),
    ]
    subprocess.run(command, check=True)
    return next(scratch.glob("latentrelay-*.whl"))


def main() -> int:
    folders = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-dir"]
    with tempfile.TemporaryDirectory() as scratch:
        wheel = build(folders, Path(scratch))
        size = wheel.stat().st_size
        with zipfile.ZipFile(wheel) as archive:
            held = {name for name in archive.namelist() if ".dist-info/" not in name}
    wanted = expected(folders)
    problems = [f"missing from the wheel: {name}" for name in sorted(wanted - held)]
    problems += [f"not expected in the wheel: {name}" for name in sorted(held - wanted)]
    lines = [*problems, f"wheel: {len(held)} files, {size / 2**20:.1f} MiB, {len(problems)} problems"]
    sys.stdout.write("\n".join(lines) + "\n")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
