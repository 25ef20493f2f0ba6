"""The networks of other programs, written out with plain torch.nn under their own names, with random statistics."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

GOOGLENET = {
    "inception3a": (192, 64, 96, 128, 16, 32, 32),
    "inception3b": (256, 128, 128, 192, 32, 96, 64),
    "inception4a": (480, 192, 96, 208, 16, 48, 64),
    "inception4b": (512, 160, 112, 224, 24, 64, 64),
    "inception4c": (512, 128, 128, 256, 24, 64, 64),
    "inception4d": (512, 112, 144, 288, 32, 64, 64),
    "inception4e": (528, 256, 160, 320, 32, 128, 128),
    "inception5a": (832, 256, 160, 320, 32, 128, 128),
    "inception5b": (832, 384, 192, 384, 48, 128, 128),
}


class BasicConv2d(nn.Module):
    """Convolution, batch normalisation (or none: eps None), ReLU."""

    def __init__(
        self, inputs: int, outputs: int, kernel: int, stride: int = 1, *, bias: bool, eps: float | None
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=bias)
        if eps is not None:
            self.bn = nn.BatchNorm2d(outputs, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return F.relu(self.bn(x) if hasattr(self, "bn") else x)


class InceptionBlock(nn.Module):
    def __init__(self, shape: tuple[int, ...], kernels: tuple[int, ...], *, bias: bool, eps: float | None) -> None:
        super().__init__()
        n, one, reduce3, three, reduce5, five, pool = shape
        kind = {"bias": bias, "eps": eps}
        self.branch1 = BasicConv2d(n, one, 1, **kind)
        self.branch2 = nn.Sequential(BasicConv2d(n, reduce3, 1, **kind), BasicConv2d(reduce3, three, 3, **kind))
        inner = [BasicConv2d(reduce5 if i == 0 else five, five, k, **kind) for i, k in enumerate(kernels)]
        self.branch3 = nn.Sequential(BasicConv2d(n, reduce5, 1, **kind), *inner)
        self.branch4 = nn.Sequential(nn.MaxPool2d(3, 1, 1, ceil_mode=True), BasicConv2d(n, pool, 1, **kind))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.branch1(x), self.branch2(x), self.branch3(x), self.branch4(x)], 1)


class InceptionAux(nn.Module):
    def __init__(self, inputs: int, classes: int, *, bias: bool, eps: float | None) -> None:
        super().__init__()
        self.conv = BasicConv2d(inputs, 128, 1, bias=bias, eps=eps)
        self.fc1 = nn.Linear(2048, 1024)
        self.fc2 = nn.Linear(1024, classes)


class GoogLeNet(nn.Module):
    """The tutorial's and torchvision's: they differ in biases, eps, the third branch and the last pool."""

    def __init__(
        self, classes: int, *, kernels: tuple[int, ...], bias: bool, eps: float | None, last_pool: int, aux: bool
    ) -> None:
        super().__init__()
        kind = {"bias": bias, "eps": eps}
        self.conv1 = BasicConv2d(3, 64, 7, 2, **kind)
        self.maxpool1 = nn.MaxPool2d(3, 2, ceil_mode=True)
        self.conv2 = BasicConv2d(64, 64, 1, **kind)
        self.conv3 = BasicConv2d(64, 192, 3, **kind)
        self.maxpool2 = nn.MaxPool2d(3, 2, ceil_mode=True)
        for name, shape in GOOGLENET.items():
            self.add_module(name, InceptionBlock(shape, kernels, **kind))
        self.maxpool3 = nn.MaxPool2d(3, 2, ceil_mode=True)
        self.maxpool4 = nn.MaxPool2d(last_pool, 2, ceil_mode=True)
        if aux:
            self.aux1 = InceptionAux(512, classes, **kind)
            self.aux2 = InceptionAux(528, classes, **kind)
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.dropout = nn.Dropout(0.4)
        self.fc = nn.Linear(1024, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool2(self.conv3(self.conv2(self.maxpool1(self.conv1(x)))))
        x = self.maxpool3(self.inception3b(self.inception3a(x)))
        for letter in "abcde":
            x = self.get_submodule(f"inception4{letter}")(x)
        x = self.inception5b(self.inception5a(self.maxpool4(x)))
        return self.fc(self.dropout(torch.flatten(self.avgpool(x), 1)))  # N x classes


def caffe_blocks(projection: int) -> dict[str, tuple[int, ...]]:
    """Inputs, 1x1, 3x3 reduce, 3x3, double reduce, double, projection."""
    four = 576 if projection == 96 else 608
    return {
        "3a": (192, 64, 64, 64, 64, 96, 32),
        "3b": (256, 64, 64, 96, 64, 96, 64),
        "3c": (320, 0, 128, 160, 64, 96, 0),
        "4a": (576, 224, 64, 96, 96, 128, 128),
        "4b": (576, 192, 96, 128, 96, 128, 128),
        "4c": (576, 160, 128, 160, 128, 160, projection),
        "4d": (four, 96, 128, 192, 160, 192, projection),
        "4e": (four, 0, 128, 192, 192, 256, 0),
        "5a": (1056 - (608 - four), 352, 192, 320, 160, 224, 128),
        "5b": (1024, 352, 192, 320, 192, 224, 128),
    }


class BNInception(nn.Module):
    """With Caffe's names, as Cadene and TSN publish it; sees BGR of 0 to 255 less (104, 117, 128)."""

    def __init__(self, classes: int, *, projection: int = 128, last: str = "last_linear") -> None:
        super().__init__()
        self.blocks, self.last = caffe_blocks(projection), last
        self.unit("conv1_7x7_s2", 3, 64, 7, 2)
        self.unit("conv2_3x3_reduce", 64, 64, 1)
        self.unit("conv2_3x3", 64, 192, 3)
        for block, (n, one, reduce3, three, reduce, double, projected) in self.blocks.items():
            stride = 1 if one else 2
            if one:
                self.unit(f"inception_{block}_1x1", n, one, 1)
                self.unit(f"inception_{block}_pool_proj", n, projected, 1)
            self.unit(f"inception_{block}_3x3_reduce", n, reduce3, 1)
            self.unit(f"inception_{block}_3x3", reduce3, three, 3, stride)
            self.unit(f"inception_{block}_double_3x3_reduce", n, reduce, 1)
            self.unit(f"inception_{block}_double_3x3_1", reduce, double, 3)
            self.unit(f"inception_{block}_double_3x3_2", double, double, 3, stride)
        self.add_module(last, nn.Linear(1024, classes))

    def unit(self, name: str, inputs: int, outputs: int, kernel: int, stride: int = 1) -> None:
        self.add_module(name, nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2))
        self.add_module(f"{name}_bn", nn.BatchNorm2d(outputs, eps=1e-5))

    def through(self, names: str, x: Tensor) -> Tensor:
        for name in names.split():
            x = F.relu(self.get_submodule(f"{name}_bn")(self.get_submodule(name)(x)))
        return x

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(self.through("conv1_7x7_s2", x), 3, 2, ceil_mode=True)
        x = F.max_pool2d(self.through("conv2_3x3_reduce conv2_3x3", x), 3, 2, ceil_mode=True)
        for block, (_, one, *_) in self.blocks.items():
            p = f"inception_{block}_"
            maps = [self.through(f"{p}1x1", x)] if one else []
            maps.append(self.through(f"{p}3x3_reduce {p}3x3", x))
            maps.append(self.through(f"{p}double_3x3_reduce {p}double_3x3_1 {p}double_3x3_2", x))
            if not one:
                maps.append(F.max_pool2d(x, 3, 2, ceil_mode=True))
            elif block == "5b":
                maps.append(self.through(f"{p}pool_proj", F.max_pool2d(x, 3, 1, 1, ceil_mode=True)))
            else:
                pooled = F.avg_pool2d(x, 3, 1, 1, ceil_mode=True, count_include_pad=True)
                maps.append(self.through(f"{p}pool_proj", pooled))
            x = torch.cat(maps, 1)
        return self.get_submodule(self.last)(x.mean((2, 3)))  # N x classes


def shaken(network: nn.Module, seed: int = 0) -> nn.Module:
    """In evaluation mode, with nothing left at 0 or 1: statistics, gamma, beta and biases at random."""
    torch.manual_seed(seed)
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            if module.bias is not None:
                nn.init.normal_(module.bias, std=0.3)
        if isinstance(getattr(module, "running_mean", None), Tensor):
            nn.init.uniform_(module.weight, 0.6, 1.4)
            nn.init.normal_(module.bias, std=0.2)
            nn.init.normal_(module.running_mean, std=0.3)
            if hasattr(module, "running_var"):
                nn.init.uniform_(module.running_var, 0.5, 2)
            else:
                size = module.running_covariance.shape[-1]
                noise = torch.randn_like(module.running_covariance) * 0.3
                module.running_covariance.copy_(noise @ noise.mT + torch.eye(size))
    if isinstance(network, BNInception):
        network.conv1_7x7_s2.weight.data /= 70  # it sees pixels of 0 to 255
    return network.eval()
