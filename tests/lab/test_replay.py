from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from bnlab.lab.experiment import Experiment
from bnlab.lab.measurements import JobContext
from bnlab.lab.replay import (
    batch_at,
    is_probe_step,
    loss_and_gradients,
    preserving_state,
    replaying,
    set_parameters,
    use_batch_statistics,
)
from bnlab.lab.trained_network import Probe, train
from bnlab.nets import build
from bnlab.norm.layers import StatisticsMode
from bnlab.training.build import TrainingContext


class Comparison(Probe):
    """Compares each step of the loop with a replay of it."""

    def __init__(self) -> None:
        super().__init__()
        self.images: list[Tensor] = []
        self.moves: list[float] = []

    def before(self, step: int, context: TrainingContext) -> None:
        network = context.network
        batch = batch_at(step, context)
        state = {name: tensor.clone() for name, tensor in network.state_dict().items()}
        generator = torch.get_rng_state()
        parameters = dict(network.named_parameters())
        with replaying(context):
            set_parameters(parameters, {name: p + 1 for name, p in parameters.items()})
            set_parameters(parameters, state)
            _, self.gradients = loss_and_gradients(context, batch, list(parameters.values()), step)
            network.eval()
        assert all(torch.equal(tensor, state[name]) for name, tensor in network.state_dict().items())
        assert all(p.grad is None for p in parameters.values())
        assert all(module.training for module in network.modules())
        assert torch.equal(torch.get_rng_state(), generator)
        self.batch, self.start = batch, [p.detach().clone() for p in parameters.values()]
        self.hook = network.register_forward_pre_hook(lambda _, inputs: self.images.append(inputs[0]))

    def after(self, step: int, context: TrainingContext) -> None:
        self.hook.remove()
        assert torch.equal(self.images[-1], self.batch.images)
        rate = context.optimizer.param_groups[0]["lr"]
        for parameter, start, gradient in zip(context.network.parameters(), self.start, self.gradients, strict=True):
            assert torch.allclose(parameter, start - rate * gradient, atol=1e-6)
            self.moves.append(float((parameter.detach() - start).abs().max()))


@pytest.mark.parametrize(("network", "size", "mixup"), [("bn_small_inception", 16, 0.0), ("bn_mlp", 28, 1.0)])
def test_a_replayed_step_is_the_step_that_the_loop_takes(
    make_experiment: Callable[..., Experiment], tmp_path: Path, network: str, size: int, mixup: float
) -> None:
    experiment = make_experiment(momentum=0.0, weight_decay=0.0, dropout=0.3, mixup=mixup, schedule="constant")
    probe = Comparison()
    job = JobContext(split=experiment.splits.for_seed(1), folder=tmp_path, device="cpu", seed=1)
    train(job, experiment.recipe(network, size=size), probe=probe)
    assert len(probe.images) == 6  # more than one epoch
    assert max(probe.moves) > 1e-3


@pytest.mark.parametrize("options", [{"steps": 12}, {"steps": 0, "epochs": 3}])
def test_probe_steps_are_as_many_as_asked_however_the_length_is_given(
    make_experiment: Callable[..., Experiment], job: JobContext, options: dict[str, int]
) -> None:
    trained = train(job, make_experiment(**options).recipe("bn_mlp", size=28))
    context, steps = trained.context, options["steps"] or 3 * trained.context.loader.batches
    probe_steps = [step for step in range(steps) if is_probe_step(step, context, 3)]
    assert probe_steps == [(2 * i + 1) * (steps // 3) // 2 for i in range(3)]


def test_whatever_is_done_to_a_network_is_undone() -> None:
    network = build("bn_small_inception", classes=3, width=0.25)
    next(network.children()).eval()  # flags differ between layers
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    flags = [module.training for module in network.modules()]
    assert len(set(flags)) == 2
    layers = [layer for layer in network.modules() if isinstance(layer, StatisticsMode)]
    assert layers
    with pytest.raises(KeyError), preserving_state(network):
        network.eval()
        use_batch_statistics(network)
        assert {layer.statistics for layer in layers} == {"batch"}
        with torch.no_grad():
            for tensor in network.state_dict().values():
                tensor.add_(1)
        raise KeyError
    after = network.state_dict()
    assert all(torch.equal(before[name], tensor) for name, tensor in after.items())
    assert flags == [module.training for module in network.modules()]
    assert {layer.statistics for layer in layers} == {"running"}
