"""Importing the package needs no extra; using it without one says which to install."""

from __future__ import annotations

import subprocess
import sys

SCRIPT = """
import sys
sys.modules["torch"] = None
import latentrelay.cloud
from latentrelay.runtime.errors import MissingExtraError
assert "diffusers" not in sys.modules
try:
    latentrelay.cloud.Engine
except MissingExtraError as error:
    print(error.exit_status, error)
"""


def test_without_torch_the_extra_is_named() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("2 the cloud service needs the module 'torch'")
    assert 'pip install "latentrelay[cloud]"' in done.stdout
