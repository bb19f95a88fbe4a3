"""What the sync and the async client share, without I/O: requests, answers, events, and what to do next."""

from __future__ import annotations
