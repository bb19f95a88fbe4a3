"""The device's side of the cloud's HTTP for asyncio: `CloudClient` with `await`; what both share is cloud_protocol.py."""

from __future__ import annotations
