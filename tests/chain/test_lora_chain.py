"""Adapters on both sides: a bundle and a cloud that merged the same file belong together, others do not."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from latentrelay.cloud.loading import load_pipeline
from latentrelay.compress.lora import Adapter, LowRankUpdate, merge
from latentrelay.runtime import Bundle, CloudClient, Session, generate
from latentrelay.runtime.errors import CloudRefusedError
from safetensors.torch import save_file

STEPS = 3


@pytest.fixture(scope="module")
def folder(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    work = tmp_path_factory.mktemp("lora")
    pipeline = tiny.make_pipeline(work / "made")
    update = LowRankUpdate(pipeline.unet, rank=2)
    with torch.no_grad():
        for seed, up in enumerate(update.up):
            up.normal_(generator=torch.Generator().manual_seed(seed)).mul_(0.05)
    save_file(update.tensors(), work / "style.safetensors")
    tiny.save_pipeline(pipeline, work / "model", half=True)
    return work


def test_the_same_file_on_both_sides_and_only_then(
    folder: Path, serve_cloud: Callable[..., AbstractContextManager[str]], tmp_path: Path
) -> None:
    from latentrelay.export import export, load_source

    adapters = [Adapter(folder / "style.safetensors", 0.5)]
    plain = load_source(str(folder / "model"))
    source = load_source(str(folder / "model"), loras=adapters)
    assert source.digest != plain.digest
    built = export(source, "pixel-8", tmp_path / "bundle", num_steps=STEPS)
    recorded = Bundle.open(built.bundle).manifest.additional_metadata["adapters"]
    assert [(each["file"], each["scale"]) for each in recorded] == [("style.safetensors", 0.5)]
    adapted = load_pipeline(str(folder / "model"), adapt=partial(merge, adapters=adapters))
    bare = load_pipeline(str(folder / "model"))
    with Session(Bundle.open(built.bundle), threads=1) as session:
        with serve_cloud(adapted) as url, CloudClient(url) as cloud:
            result = generate(session, "a red cat", cloud=cloud, split=1, seed=5, fallback=False)
            assert result.path_taken == "hybrid"
        with serve_cloud(bare) as url, CloudClient(url) as cloud, pytest.raises(CloudRefusedError) as refused:
            generate(session, "a red cat", cloud=cloud, split=1, seed=5)
    assert (refused.value.status, refused.value.problem["field"]) == (409, "model_digest")
