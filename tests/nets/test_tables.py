import pytest
import torch
from torch import nn

from bnlab.errors import ShapeError
from bnlab.nets import build, registry, tables

TABLES = [(n, v) for n, network in registry.NETWORKS.items() for v in network.variants]


def outputs(name: str, variant: str, size: int, stem: str | None = None) -> dict[str, tuple[int, ...]]:
    """C x H x W of every row of the table."""
    with torch.device("meta"):
        network = build(name, classes=2, variant=variant, stem=stem).eval()
    seen: dict[str, tuple[int, ...]] = {}

    def note(row: str, output: torch.Tensor) -> None:
        seen[row] = tuple(output.shape[1:])

    for row in network.order:
        network.get_submodule(row).register_forward_hook(lambda _m, _i, output, row=row: note(row, output))
    with torch.no_grad():
        network(torch.zeros(1, 3, size, size, device="meta"))
    return seen


def test_googlenets_maps_have_the_shapes_of_its_paper() -> None:
    for variant in ("double", "5x5", "torchvision"):
        seen = outputs("googlenet", variant, 224)
        assert seen["conv1"] == (64, 112, 112)
        assert seen["pool2"] == (192, 28, 28)
        assert [seen[f"inception3{x}"] for x in "ab"] == [(256, 28, 28), (480, 28, 28)]
        assert [seen[f"inception4{x}"][0] for x in "abcde"] == [512, 512, 512, 528, 832]
        assert [seen[f"inception5{x}"] for x in "ab"] == [(832, 7, 7), (1024, 7, 7)]


@pytest.mark.parametrize(("variant", "contradiction"), [("literal", (608, 608, 1056)), ("corrected", (576, 576, 1024))])
def test_inceptions_maps_have_the_shapes_of_figure_5(variant: str, contradiction: tuple[int, ...]) -> None:
    seen = outputs("inception", variant, 224)
    assert [seen[f"inception3{x}"] for x in "abc"] == [(256, 28, 28), (320, 28, 28), (576, 14, 14)]
    assert [seen[f"inception4{x}"][0] for x in "abcde"] == [576, 576, *contradiction]
    assert seen["inception4e"][1:] == (7, 7)
    assert [seen[f"inception5{x}"] for x in "ab"] == [(1024, 7, 7), (1024, 7, 7)]


@pytest.mark.parametrize(("name", "variant"), TABLES)
def test_smallest_side_is_the_smallest_that_works(name: str, variant: str) -> None:
    for stem in (None, *registry.find(name).stems):
        network = build(name, classes=2, variant=variant, stem=stem, width=0.1).eval()
        side = network.smallest_side
        assert network(torch.zeros(1, 3, side + 3, side)).shape == (1, 2)
        if side > 1:
            network.smallest_side = 1
            with pytest.raises(ShapeError, match=r"\(MaxPool\) takes maps of at least "):
                network(torch.zeros(1, 3, side - 1, side - 1))


def test_a_separable_stem_has_the_papers_depth_multiplier() -> None:
    first = tables.separable_stem(tables.inception(128))[0]
    assert first == tables.Conv("conv1", 64, 7, stride=2, multiplier=8)
    conv1 = build("bn_inception", classes=2, stem="separable").get_submodule("conv1.conv")
    assert isinstance(conv1, nn.Sequential)
    assert [tuple(layer.weight.shape) for layer in conv1] == [(24, 1, 7, 7), (64, 24, 1, 1)]  # type: ignore[union-attr, arg-type]


def test_a_small_stem_makes_maps_four_times_as_high_and_wide() -> None:
    plain, small = tables.inception(128), tables.small_stem(tables.inception(128))
    assert small[0] == tables.Conv("conv1", 64, 3)
    assert [row.name for row in plain if row not in small] == ["conv1", "pool1"]
    assert [row.name for row in small if row not in plain] == ["conv1"]
    for stem, side in ((None, 1), ("small", 4)):
        assert outputs("inception", "literal", 32, stem)["inception5b"] == (1024, side, side)


def test_widen_multiplies_every_layer_and_nothing_vanishes() -> None:
    for name, variant in TABLES:
        table = registry.find(name).variants[variant]
        assert tables.widen(table, 1.0) == table
        double, least = tables.widen(table, 2), tables.widen(table, 0.001)
        for row, wide, thin in zip(table, double, least, strict=True):
            for key in set(row._fields) & {"channels", "one", "reduce3", "three", "reduce5", "five", "pool", "units"}:
                assert getattr(wide, key) == 2 * getattr(row, key)
                assert getattr(thin, key) == min(getattr(row, key), 1)
            for key in set(row._fields) & {"name", "kernel", "stride", "kernels", "side", "pooling"}:
                assert getattr(wide, key) == getattr(row, key)
