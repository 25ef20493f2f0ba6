import pytest

from bnlab.lab.experiment import WITH_BN, WITHOUT_BN, Experiment


@pytest.fixture
def mlps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Studies of a network with BN and without train the quickest such pair."""
    monkeypatch.setattr(Experiment, "network_pair", lambda _: {WITH_BN: "bn_mlp", WITHOUT_BN: "mlp"})
