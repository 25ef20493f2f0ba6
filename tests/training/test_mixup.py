import pytest
import torch

from bnlab.recipe import Recipe
from bnlab.training.mixup import mix

CLASSES = torch.tensor([0, 1, 2, 1])


def photos() -> torch.Tensor:
    """Each of one value: 0, 1, 2, 3."""
    return torch.arange(4.0).view(4, 1, 1, 1).expand(4, 3, 20, 20).clone()


def test_nothing_is_mixed_unless_asked() -> None:
    images, targets = mix(photos(), CLASSES, Recipe(), 0)
    assert torch.equal(images, photos())
    assert (targets.other, targets.weight) == (None, 1.0)


def test_mixup_blends_a_photo_with_the_one_before_it() -> None:
    weights = set()
    for step in range(30):
        images, targets = mix(photos(), CLASSES, Recipe(mixup=0.5), step)
        assert targets.main.tolist() == [0, 1, 2, 1]
        assert targets.other is not None
        assert targets.other.tolist() == [1, 0, 1, 2]
        for i in range(4):
            assert images[i].unique() == pytest.approx(
                targets.weight * i + (1 - targets.weight) * ((i - 1) % 4), abs=1e-5
            )
        weights.add(round(targets.weight, 3))
    assert min(weights) < 0.1
    assert max(weights) > 0.9


def test_cutmix_pastes_a_rectangle_of_the_photo_before() -> None:
    for step in range(30):
        images, targets = mix(photos(), CLASSES, Recipe(cutmix=1.0), step)
        for i in range(4):
            kept, pasted = (images[i, 0] == i).sum().item(), (images[i, 0] == (i - 1) % 4).sum().item()
            assert kept + pasted == 400
            assert targets.weight == pytest.approx(kept / 400)
        rows = (images[1, 0] == 0).any(1).nonzero().flatten()
        columns = (images[1, 0] == 0).any(0).nonzero().flatten()
        assert (images[1, 0] == 0).sum() == len(rows) * len(columns)


def test_with_both_each_step_has_one_of_them() -> None:
    recipe = Recipe(mixup=1.0, cutmix=1.0)
    blended = [bool((mix(photos(), CLASSES, recipe, step)[0] % 1).any()) for step in range(40)]
    assert 8 < sum(blended) < 32


def test_it_follows_from_seed_and_step() -> None:
    def weight(seed: int, step: int) -> float:
        return mix(photos(), CLASSES, Recipe(mixup=1.0, seed=seed), step)[1].weight

    assert weight(0, 5) == weight(0, 5)
    assert len({weight(0, 5), weight(0, 6), weight(1, 5)}) == 3
