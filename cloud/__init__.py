"""The cloud service: the first k of N steps with the full-size model, handed over as one blob.

`Engine.load(model)` runs requests in this process; `create_app(engine)` is the ASGI application, with a `FolderStore`
for jobs that outlive it and `Tokens` for who may call; `latentrelay.cloud.serve.serve(engine)` answers on a socket.
Needs the extra `cloud` (torch, diffusers, starlette, uvicorn); importing this package alone needs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from latentrelay.runtime.errors import MissingExtraError

if TYPE_CHECKING:
    from latentrelay.cloud.app import create_app
    from latentrelay.cloud.cancel import Cancellation
    from latentrelay.cloud.engine import Engine
    from latentrelay.cloud.folder_store import FolderStore
    from latentrelay.cloud.limits import Limits
    from latentrelay.cloud.requests import RunRequest
    from latentrelay.cloud.serve import CloudServer
    from latentrelay.cloud.service_options import ServiceOptions
    from latentrelay.cloud.tokens import Tokens

__all__ = [
    "Cancellation",
    "CloudServer",
    "Engine",
    "FolderStore",
    "Limits",
    "RunRequest",
    "ServiceOptions",
    "Tokens",
    "create_app",
]

_HOMES = {
    "Cancellation": "cancel",
    "CloudServer": "serve",
    "Engine": "engine",
    "FolderStore": "folder_store",
    "Limits": "limits",
    "RunRequest": "requests",
    "ServiceOptions": "service_options",
    "Tokens": "tokens",
    "create_app": "app",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        module = importlib.import_module(f"{__name__}.{_HOMES[name]}")
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("latentrelay"):
            raise
        raise MissingExtraError(error.name, "cloud", purpose="the cloud service") from error
    value = getattr(module, name)
    globals()[name] = value
    return value
