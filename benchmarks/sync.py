"""How many layers of timm's networks `norm.convert_sync` synchronises, and whether two processes compute what one does.

    pip install timm
    python benchmarks/sync.py                        # the networks below
    python benchmarks/sync.py resnet18 densenet121   # others
    python benchmarks/sync.py --parity resnet18      # also a step of two processes (gloo) against one

Each line has the number of layers that derive from torch.nn's batch normalisation, of those that are synchronised, and
the reasons of the others. The parity compares one step in training: outputs, gradients and running statistics of two
processes, with half of the batch each, with those of one that has all of it. The error is the largest of all tensors,
in standard deviations of the tensor (or in millionths of the largest value of all, where it deviates by less).
"""

import argparse
import copy
import os
import tempfile
from collections import Counter
from pathlib import Path

import timm
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from bnlab import norm

NETWORKS = (
    *("resnet18", "resnext26ts", "densenet121", "mobilenetv2_050", "mobilenetv3_small_050", "efficientnet_lite0"),
    *("efficientnet_b0", "mnasnet_small", "regnetx_002", "repvgg_a0", "ghostnet_050", "inception_v3", "xception41"),
    *("dla34", "vovnet39a", "dpn48b", "vgg11_bn", "cspresnet50", "skresnet18", "resnest14d", "levit_128s"),
    *("fastvit_t8", "rexnet_100", "mixnet_s", "convnext_atto", "resnetv2_50", "nf_resnet26"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="*", default=NETWORKS)
    parser.add_argument("--parity", action="store_true", help="also compare a step of two processes with one")
    parser.add_argument("--dtype", choices=["float64", "float32"], default="float64", help="of the parity")
    parser.add_argument("--images", type=int, default=8, help="of the parity, in both processes together")
    arguments = parser.parse_args()
    layers = synchronised = 0
    for name in arguments.networks:
        model = create(name)
        found = [layer for layer in model.modules() if isinstance(layer, _BatchNorm)]
        conversion = norm.convert_sync(model)
        now = [layer for layer in found if isinstance(layer, norm.SyncBatchNorm)]
        assert len(now) == len(conversion.converted)
        layers, synchronised = layers + len(found), synchronised + len(now)
        line = f"{name}: {len(now)} of {len(found)} layers are synchronised"
        line += "".join(f"; {n} kept: {reason}" for reason, n in Counter(conversion.kept.values()).items())
        if arguments.parity and now:
            errors = parity(name, getattr(torch, arguments.dtype), arguments.images)
            line += f"; two processes are off by {', '.join(f'{e:.1e} ({what})' for what, e in errors.items())}"
        print(line, flush=True)
    print(f"in all {synchronised} of {layers} layers, {100 * synchronised / max(layers, 1):.1f}%")


def create(name: str) -> nn.Module:
    """Create a network with plausible statistics, gammas and betas."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=10, drop_rate=0.0)  # processes draw other numbers
    for layer in model.modules():
        if isinstance(layer, _BatchNorm):
            for tensor in (layer.running_var, layer.weight):
                if tensor is not None:
                    nn.init.uniform_(tensor, 0.5, 1.5)
            for tensor in (layer.running_mean, layer.bias):
                if tensor is not None:
                    nn.init.normal_(tensor, std=0.2)
    assert isinstance(model, nn.Module)
    return model.train()


def example(model: nn.Module, images: int, dtype: torch.dtype) -> Tensor:
    """Images of 96 pixels, or of 224 where the network is for those alone, N x 3 x H x W."""
    for side in (96, 224):
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(images, 3, side, side, generator=generator, dtype=torch.float64).to(dtype)
        try:
            copy.deepcopy(model)(x)
        except (AssertionError, RuntimeError, ValueError):
            continue
        return x
    raise ValueError("the network takes neither 96 nor 224 pixels")


def step(model: nn.Module, x: Tensor) -> dict[str, dict[str, Tensor]]:
    x = x.clone().requires_grad_()
    y = model(x)  # N x 10
    (y * torch.linspace(-1, 1, 10, dtype=y.dtype)).sin().sum().backward()
    assert x.grad is not None
    return {
        "outputs": {"y": y.detach()},
        "gradients": {"x": x.grad, **{n: p.grad for n, p in model.named_parameters() if p.grad is not None}},
        "statistics": {n: b for n, b in model.named_buffers() if b.is_floating_point()},
    }


def run_process(rank: int, name: str, dtype: torch.dtype, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    model = create(name).to(dtype)
    norm.convert_sync(model)
    x = torch.load(f"{folder}/x")
    torch.save(step(model, x.chunk(2)[rank]), f"{folder}/{rank}")
    dist.barrier()
    os._exit(0)  # torch's own way out aborts now and then


def parity(name: str, dtype: torch.dtype, images: int) -> dict[str, float]:
    model = create(name).to(dtype)
    x = example(model, images, dtype)
    with tempfile.TemporaryDirectory() as folder:
        torch.save(x, f"{folder}/x")
        torch.multiprocessing.spawn(run_process, args=(name, dtype, folder), nprocs=2)  # type: ignore[no-untyped-call]
        first, second = (torch.load(Path(folder) / str(rank)) for rank in range(2))
    one = step(model, x)
    gradients = {n: g + second["gradients"][n] for n, g in first["gradients"].items()}
    gradients["x"] = torch.cat([first["gradients"]["x"], second["gradients"]["x"]])
    return {
        "outputs": off({"y": torch.cat([first["outputs"]["y"], second["outputs"]["y"]])}, one["outputs"]),
        "gradients": off(gradients, one["gradients"]),
        "statistics": max(off(process["statistics"], one["statistics"]) for process in (first, second)),
    }


def off(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    # Some gradients are 0 but for rounding, such as that of a beta before a convolution and the next normalisation.
    least = max(float(t.abs().max()) for t in expected.values()) * 1e-6
    scales = {n: max(float(t.std(correction=0)), least) for n, t in expected.items()}
    return max(float((found[n] - t).abs().max()) / scales[n] for n, t in expected.items())


if __name__ == "__main__":
    main()
