"""Make .typing/latentrelay/<folder> links, so that mypy sees the folders under their import name."""

import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def main() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    home = ROOT / ".typing" / "latentrelay"
    home.mkdir(parents=True, exist_ok=True)
    for name, folder in settings["package-dir"].items():
        link = home / name.removeprefix("latentrelay.")
        if not link.is_symlink():
            link.symlink_to(ROOT / folder, target_is_directory=True)
    for stale in home.iterdir():
        if stale.is_symlink() and not stale.exists():
            stale.unlink()


if __name__ == "__main__":
    main()
