"""The device's half of latentrelay: verified bundles, the step loop, the handoff and the cloud client.

NumPy alone at import; ONNX Runtime, tokenizers, httpx and pillow when they are used. Never torch, diffusers,
transformers or onnx.

    from latentrelay.runtime import generate
    generate("bundle", "a red circle", seed=7, cloud="http://127.0.0.1:8000", split=10).save_png("out.png")
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from latentrelay.runtime.bundle import Bundle
from latentrelay.runtime.errors import LatentRelayError
from latentrelay.runtime.generate import Result, generate
from latentrelay.runtime.handoff import MEDIA_TYPE, Handoff, HandoffMeta
from latentrelay.runtime.handoff_request import HandoffRequest
from latentrelay.runtime.manifest import Manifest
from latentrelay.runtime.noise import initial_noise
from latentrelay.runtime.selftest import SelftestReport
from latentrelay.runtime.session import Session
from latentrelay.runtime.step_loop import StepEvent

if TYPE_CHECKING:
    from latentrelay.runtime.async_cloud_client import AsyncCloudClient
    from latentrelay.runtime.cloud_client import CloudClient
    from latentrelay.runtime.degrade import Degradation, DeviceState

__all__ = [
    "MEDIA_TYPE",
    "AsyncCloudClient",
    "Bundle",
    "CloudClient",
    "Degradation",
    "DeviceState",
    "Handoff",
    "HandoffMeta",
    "HandoffRequest",
    "LatentRelayError",
    "Manifest",
    "Result",
    "SelftestReport",
    "Session",
    "StepEvent",
    "generate",
    "initial_noise",
]


_WHEN_ASKED_FOR = {
    "AsyncCloudClient": "async_cloud_client",
    "CloudClient": "cloud_client",
    "Degradation": "degrade",
    "DeviceState": "degrade",
}


def __getattr__(name: str) -> Any:
    """What talks to a cloud is imported when it is asked for; a device on its own starts without it."""
    if name not in _WHEN_ASKED_FOR:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_WHEN_ASKED_FOR[name]}"), name)
