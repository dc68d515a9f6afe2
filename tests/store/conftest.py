from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from tests.store.bases import Base, make_adapter, make_base


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> Iterator[None]:
    """Tiny matrices: a second thread only waits for the first."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def base_of(tmp_path_factory) -> Callable[[str], Base]:
    """The tiny base of a kind, made once a session."""
    made: dict[str, Base] = {}

    def get(kind: str) -> Base:
        if kind not in made:
            made[kind] = make_base(tmp_path_factory.mktemp(kind) / "base", kind)
        return made[kind]

    return get


@pytest.fixture(scope="session")
def base(base_of) -> Base:
    return base_of("llama")


@pytest.fixture(scope="session")
def plain_adapter(base, tmp_path_factory) -> Path:
    """A sound adapter, not to be changed."""
    return make_adapter(base, tmp_path_factory.mktemp("plain") / "plain", target_modules=["q_proj", "down_proj"])
