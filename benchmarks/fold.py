"""Fold the networks of timm, which nobody of this project wrote, and compare their outputs.

    pip install timm torchvision
    python benchmarks/fold.py [NETWORK ...] [--without-example]

For each network: the batch normalisation layers, how many fold, the largest difference of the outputs in their
standard deviation, in float32 and in float64, how far float32 itself is from float64, and the reasons of the layers
that are kept.
"""

import argparse
import copy
import re
import time
from collections import Counter

import timm
import torch
from torch import Tensor, nn

from bnlab.norm import fold

NAMES = (
    "resnet18 resnext26ts densenet121 mobilenetv2_050 mobilenetv3_small_050 efficientnet_lite0 efficientnet_b0 "
    "mnasnet_small regnetx_002 repvgg_a0 ghostnet_050 inception_v3 xception41 dla34 vovnet39a dpn48b vgg11_bn "
    "cspresnet50 skresnet18 resnest14d levit_128s fastvit_t8 rexnet_100 mixnet_s convnext_atto resnetv2_50 nf_resnet26"
)


def randomise(model: nn.Module, seed: int = 0) -> None:
    """Give the layers the statistics of their inputs, as a training would, and random gammas and betas."""
    torch.manual_seed(seed)
    norms = [m for m in model.modules() if isinstance(getattr(m, "running_var", None), Tensor)]
    for norm in norms:
        if isinstance(norm.weight, Tensor):
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.normal_(norm.bias, std=0.3)
        if isinstance(norm, nn.modules.batchnorm._BatchNorm):
            norm.reset_running_stats()
            norm.momentum = None
    size = model.default_cfg["input_size"]
    model.train()
    with torch.no_grad():
        model(torch.randn(8, *size))
    model.eval()
    for norm in norms:  # not exactly the statistics of any batch
        norm.running_mean += 0.3 * norm.running_var.sqrt() * torch.randn_like(norm.running_mean)
        norm.running_var *= torch.empty_like(norm.running_var).uniform_(0.6, 1.6)


def off(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).abs().max() / expected.double().std())


@torch.no_grad()
def measure(name: str, with_example: bool) -> tuple[int, int]:
    model = timm.create_model(name, num_classes=10).eval()
    randomise(model)
    x = torch.randn(4, *model.default_cfg["input_size"])
    began = time.perf_counter()
    folding = fold(model, x) if with_example else fold(model)
    seconds = time.perf_counter() - began
    double = copy.deepcopy(model).double()
    plain, found, exact = model(x), folding.model(x), double(x.double())
    in_double = fold(double, x.double()) if with_example else fold(double)
    layers = len(folding.folded) + len(folding.kept)
    print(
        f"| {name} | {layers} | {len(folding.folded)} | {off(found, plain):.1e} | {off(found, exact):.1e} | "
        f"{off(plain, exact):.1e} | {off(in_double.model(x.double()), exact):.1e} | {seconds:.1f} s |",
        flush=True,
    )
    reasons = Counter(re.sub(r"\S*\.\S+", "*", reason) for reason in folding.kept.values())
    for reason, times in reasons.most_common():
        print(f"    {times} kept: {reason}")
    return layers, len(folding.folded)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="*", default=NAMES.split())
    parser.add_argument("--without-example", action="store_true", help="fold by what can be traced alone")
    options = parser.parse_args()
    print(f"timm {timm.__version__}, torch {torch.__version__}; differences in standard deviations of the outputs\n")
    print(
        "| network | layers | folded | folded to plain | folded to float64 | plain to float64 | all in float64 | time |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    layers = folded = 0
    for name in options.networks:
        try:
            of_one = measure(name, not options.without_example)
        except Exception as error:  # the next network may do
            print(f"| {name} | {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''} |")
            continue
        layers, folded = layers + of_one[0], folded + of_one[1]
    print(f"\n{folded} of {layers} layers fold ({folded / max(layers, 1):.1%})")


if __name__ == "__main__":
    main()
