"""A fixture for tests that compile."""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    """Forget what other tests have compiled.

    torch.compile keeps what it compiled for each Python function, eight times at most: for `BatchNorm.forward`, say, of
    all layers in the process together.
    """
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
