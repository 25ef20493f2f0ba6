"""Run the doctor on the networks of timm, which nobody of this project wrote: sound, and with planted faults.

    python benchmarks/doctor_zoo.py --out docs/results/doctor-zoo.md     all networks: hours on one core
    python benchmarks/doctor_zoo.py resnet18 levit_128s --faults bgr-input
    python benchmarks/doctor_zoo.py --known a.json b.json                what two runs side by side measured by --json
    python benchmarks/doctor_zoo.py --costs                              without the doctor: what each fault costs

timm is no dependency of bnlab. Install it in another environment, beside bnlab and a torchvision that fits the build of
torch there. No weights are downloaded.

A network is made sound as follows. Its weights are timm's initial ones; each gamma is drawn from N(1, 0.2) and each
beta from N(0, 0.2), where 0.2 is the standard deviation. Its running statistics are recalibrated on images of ten
classes, which are smooth random fields, in which finer detail is weaker, as in photos. Its last layer is fitted to the
classes by ridge regression. Other images of the same classes are what the doctor gets: their labels are the network's
own predictions, of which a fifth is replaced by another class, so that a sound network has an accuracy of 80% and a
fault lowers it. The unfitted network is the same one with running statistics that were moved at random: that they do
not fit is then a true finding.

A fault counts as found if one of the checks that are named for it reports an error or a warning which the sound network
does not get, and names the faulty layer where there is a single one. Only those checks are made of a planted fault, and
all checks of the sound and of the unfitted network.
"""

import argparse
import copy
import json
import shlex
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from bnlab.norm import recalibrate

NAMES = [
    "resnet18",
    "resnext26ts",
    "densenet121",
    "mobilenetv2_050",
    "mobilenetv3_small_050",
    "efficientnet_lite0",
    "efficientnet_b0",
    "mnasnet_small",
    "regnetx_002",
    "repvgg_a0",
    "ghostnet_050",
    "inception_v3",
    "xception41",
    "dla34",
    "vovnet39a",
    "dpn48b",
    "vgg11_bn",
    "cspresnet50",
    "skresnet18",
    "resnest14d",
    "levit_128s",
    "fastvit_t8",
    "rexnet_100",
    "mixnet_s",
    "convnext_atto",
    "resnetv2_50",
    "nf_resnet26",
]

SIZES = {"inception_v3": 128, "levit_128s": 224}  # 75 px are the least for the former; the latter takes 224 px alone
SIZE = 64  # of all others: 32 px suffice for them, with a single value of each image in the last layers

CLASSES, NOISE = 10, 0.2
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # the usual ones of ImageNet
BATCH, TRAINING, IMAGES = 48, 512, 384  # images; TRAINING are for the statistics and the last layer

Batch = tuple[Tensor, Tensor]  # images N x 3 x H x W as the network takes them, and labels N


# The data.


def fields(shape: tuple[int, int, int], size: int, decay: float, generator: torch.Generator) -> Tensor:
    """Smooth random fields, N x C x size x size: noise of doubling resolutions, of which the finer is the weaker."""
    total, width = torch.zeros(*shape[:2], size, size), 2
    while width <= min(size, shape[2]):
        noise = torch.randn(*shape[:2], width, width, generator=generator)
        total += width**-decay * F.interpolate(noise, (size, size), mode="bicubic", align_corners=False)
        width *= 2
    return total


def pixels(size: int, images: int, seed: int, part: int) -> Batch:
    """Image-like pixels in 0..1, N x 3 x size x size, and their classes, N; part 0 and 1 are different images.

    A class has a coloured field in common. Each image has its own place in it, its own finer field, brightness,
    contrast and hue. Red is brighter than blue, as in most photos.
    """
    prototypes = fields((CLASSES, 3, 8), 2 * size, 0.3, torch.Generator().manual_seed(seed))
    generator = torch.Generator().manual_seed(1_000_003 * (seed + 1) + part)
    classes = torch.randint(CLASSES, (images,), generator=generator)
    grey = fields((images, 1, 64), size, 0.9, generator)
    colour = fields((images, 3, 16), size, 0.9, generator)
    tops = torch.randint(size // 2, (images, 2), generator=generator)
    x = torch.stack([prototypes[c, :, i : i + size, j : j + size] for c, (i, j) in zip(classes, tops, strict=True)])
    x = 0.9 * x + 0.7 * grey + 0.3 * colour
    contrast = torch.empty(images, 1, 1, 1).uniform_(0.12, 0.25, generator=generator)
    light = 0.08 * torch.randn(images, 1, 1, 1, generator=generator)
    x = contrast * x + light + torch.tensor([0.50, 0.43, 0.33]).view(3, 1, 1)
    return (255 * x).round().clamp(0, 255) / 255, classes


def normalised(x: Tensor) -> Tensor:
    return (x - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


def raw(x: Tensor) -> Tensor:
    """The inverse of `normalised`."""
    return x * torch.tensor(STD).view(3, 1, 1) + torch.tensor(MEAN).view(3, 1, 1)


# Sound networks.


@dataclass
class Network:
    """A network in evaluation with sound statistics, and the images that it and the doctor get."""

    name: str
    model: nn.Module
    training: Batch  # with the true classes: what the statistics are recalibrated on
    batches: list[Batch]  # with the network's own labels: what the doctor gets
    size: int
    seed: int

    @property
    def layers(self) -> dict[str, nn.Module]:
        return norm_layers(self.model)


def norm_layers(model: nn.Module) -> dict[str, Any]:
    return {name: module for name, module in model.named_modules() if isinstance(module, _BatchNorm)}


def sound(name: str, seed: int = 0, *, images: int = IMAGES, batch: int = BATCH) -> Network:
    """A timm network with random gammas and betas, and with the statistics, last layer and labels that fit them."""
    import timm

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = timm.create_model(name, num_classes=CLASSES)
        with torch.no_grad():
            for module in model.modules():
                if isinstance(module, _BatchNorm) and module.affine:
                    module.weight.normal_(1, 0.2)
                    module.bias.normal_(0, 0.2)
                elif type(module).__name__.startswith("LayerScale"):  # 1e-5 at first: what it scales has no effect
                    for scale in module.parameters():
                        scale.uniform_(0.1, 0.5)
    size = SIZES.get(name, SIZE)
    training, (x, _) = pixels(size, TRAINING, seed, 0), pixels(size, images, seed, 1)
    model.eval()
    return fitted(Network(name, model, (normalised(training[0]), training[1]), cut(normalised(x), batch), size, seed))


def unfitted(network: Network) -> nn.Module:
    """A copy with running statistics of plausible size that do not fit: means off by 0.5 sigma, variances by x1.65."""
    model, generator = copy.deepcopy(network.model), torch.Generator().manual_seed(network.seed)
    for layer in norm_layers(model).values():
        scale = layer.running_var.sqrt()
        layer.running_mean.copy_(0.5 * scale * torch.randn(scale.shape, generator=generator))
        layer.running_var.mul_(torch.exp(0.5 * torch.randn(scale.shape, generator=generator)))
    return model


def cut(x: Tensor, batch: int) -> list[Batch]:
    """Batches without labels yet; a last one that is smaller is left out."""
    return [(part, torch.zeros(batch, dtype=torch.long)) for part in x.split(batch) if len(part) == batch]


@torch.no_grad()
def fitted(network: Network) -> Network:
    """Give the network's own model the statistics and the last layer that fit its weights, and label the batches."""
    model, (images, classes) = network.model, network.training
    recalibrate(model, images.split(BATCH))
    for layer in norm_layers(model).values():
        layer.num_batches_tracked.fill_(10_000)
    heads = last_layers(model)
    inputs: dict[nn.Module, list[Tensor]] = {head: [] for head in heads}
    hooks = [head.register_forward_pre_hook(lambda m, args: inputs[m].append(args[0].flatten(1))) for head in heads]
    for part in images.split(BATCH):
        model(part)
    for hook in hooks:
        hook.remove()
    for head in heads:
        fit_ridge(head, torch.cat(inputs[head]).double(), classes)
    generator = torch.Generator().manual_seed(network.seed)
    for i, (x, _) in enumerate(network.batches):
        own = model(x).argmax(1)
        other = (own + torch.randint(1, CLASSES, own.shape, generator=generator)) % CLASSES
        network.batches[i] = x, torch.where(torch.rand(own.shape, generator=generator) < NOISE, other, own)
    return network


def last_layers(model: nn.Module) -> list[Any]:
    """The linear layers, or convolutions of 1 x 1 values, that give the logits: two in a network with two heads."""
    found = model.get_classifier()
    heads = found if isinstance(found, tuple) else (found,)
    return [[m for m in head.modules() if isinstance(m, nn.Linear | nn.Conv2d)][-1] for head in heads]


def fit_ridge(head: Any, x: Tensor, classes: Tensor) -> None:
    """Set weight and bias so that the logits are near to 10 for the class and 0 for the others. x: N x C."""
    target = 10 * (F.one_hot(classes, CLASSES).double() - 1 / CLASSES)  # N x CLASSES
    mean = x.mean(0)
    x = x - mean
    gram = x @ x.T  # N x N
    ridge = 0.1 * gram.diagonal().mean() * torch.eye(len(x), dtype=torch.double)
    weight = torch.linalg.solve(gram + ridge, target).T @ x  # CLASSES x C
    head.weight.copy_(weight.view_as(head.weight))
    head.bias.copy_(10 / CLASSES - weight @ mean)


# The faults.


@dataclass
class Case:
    """A planted fault, as the doctor gets it."""

    model: nn.Module
    batches: list[Batch]
    arguments: dict[str, Any] = field(default_factory=dict)  # further ones of diagnose
    layer: str = ""  # the one faulty layer; empty: all or several are
    suffers: nn.Module | None = None  # whose accuracy the fault lowers, if not the model's
    costs: bool = True  # whether it costs accuracy already

    def accuracy(self) -> float:
        return accuracy(self.suffers or self.model, self.batches)


@torch.no_grad()
def accuracy(model: nn.Module, batches: Iterable[Batch]) -> float:
    """The accuracy in 0..1, with the model's flags as they are; what the forwards write to buffers is undone."""
    before = {buffer: buffer.clone() for buffer in model.buffers()}
    right = torch.cat([model(x).argmax(1) == labels for x, labels in batches])
    for buffer, values in before.items():
        buffer.copy_(values)
    return float(right.double().mean())


Plant = Callable[[Network, Path], Case]
FAULTS: dict[
    str, tuple[str, tuple[str, ...], Plant]
] = {}  # what it is, ids of the checks that should find it, function


def fault(name: str, what: str, *ids: str) -> Callable[[Plant], Plant]:
    def add(plant: Plant) -> Plant:
        FAULTS[name] = what, ids, plant
        return plant

    return add


@fault("stale-statistics", "running statistics of 100 steps at momentum 0.001, from (0, 1)", "BN102", "BN007")
def stale_statistics(network: Network, _: Path) -> Case:
    model = copy.deepcopy(network.model)
    initial = (1 - 0.001) ** 100
    for layer in norm_layers(model).values():  # what such an average is expected to be
        layer.running_mean.mul_(1 - initial)
        layer.running_var.mul_(1 - initial).add_(initial)
        layer.num_batches_tracked.fill_(100)
        layer.momentum = 0.001
    return Case(model, network.batches)


@fault("tensorflow-momentum", "momentum 0.99 as in TensorFlow: nearly the last batch's statistics", "BN006")
def tensorflow_momentum(network: Network, _: Path) -> Case:
    model = copy.deepcopy(network.model)
    for layer in norm_layers(model).values():
        layer.momentum = 0.99
        layer.train()
    with torch.no_grad():
        model(network.training[0][:32])
    return Case(model.eval(), network.batches)


@fault("layer-in-training", "the middle layer is still in training mode in evaluation", "BN002")
def layer_in_training(network: Network, _: Path) -> Case:
    model = copy.deepcopy(network.model)
    name, layer = middle(model)
    layer.train()
    return Case(model, network.batches, layer=name)


@fault("broken-buffer", "one channel's running variance is NaN in the middle layer", "BN008")
def broken_buffer(network: Network, _: Path) -> Case:
    model = copy.deepcopy(network.model)
    name, layer = middle(model)
    layer.running_var[0] = torch.nan
    return Case(model, network.batches, layer=name)


@fault(
    "frozen-but-moving",
    "all but the last layer without gradient; the training step sets all to training mode",
    "BN004",
    "BN005",
)
def frozen_but_moving(network: Network, _: Path) -> Case:
    model = copy.deepcopy(network.model).requires_grad_(False)
    trained = [parameter for head in last_layers(model) for parameter in head.requires_grad_(True).parameters()]
    optimizer = torch.optim.SGD(trained, 1e-3)

    def train_step(model: nn.Module, batch: Batch) -> None:
        model.train()
        outputs = model(batch[0])  # a list of two in a network with two heads
        losses = [F.cross_entropy(y, batch[1]) for y in (outputs if isinstance(outputs, list | tuple) else [outputs])]
        optimizer.zero_grad()
        torch.stack(losses).sum().backward()
        optimizer.step()

    return Case(model, network.batches, {"optimizer": optimizer, "train_step": train_step}, costs=False)


@fault("averaged-buffers", "averaged weights with the statistics of the raw ones", "BN017")
def averaged_buffers(network: Network, _: Path) -> Case:
    # The sound network is the average: the raw weights are it, and noise with half of its power, as a step leaves it.
    model, generator = copy.deepcopy(network.model), torch.Generator().manual_seed(network.seed)
    with torch.no_grad():
        for weight in heavy(model):
            noise = 0.5**0.5 * weight.std() * torch.randn(weight.shape, generator=generator)
            weight.add_(noise)
    recalibrate(model, network.training[0][:512].split(BATCH))
    for layer in norm_layers(model).values():
        layer.num_batches_tracked.fill_(10_000)
    averaged = copy.deepcopy(network.model)
    copy_statistics(model, averaged)
    return Case(model, network.batches, {"averaged": averaged}, suffers=averaged)


@fault("bgr-input", "the images' channels are in the order BGR", "BN112")
def bgr_input(network: Network, _: Path) -> Case:
    return Case(network.model, [(normalised(raw(x).flip(1)), labels) for x, labels in network.batches])


@fault("not-scaled-input", "pixels of 0 to 255 where 0 to 1 are expected", "BN112")
def not_scaled_input(network: Network, _: Path) -> Case:
    return Case(network.model, [(normalised(255 * raw(x)), labels) for x, labels in network.batches])


@fault("unsaved-statistics", "a checkpoint without the buffers", "BN021")
def unsaved_statistics(network: Network, folder: Path) -> Case:
    checkpoint, loaded = folder / "parameters.pt", copy.deepcopy(network.model)
    torch.save(dict(network.model.named_parameters()), checkpoint)
    for layer in norm_layers(loaded).values():
        layer.reset_running_stats()
    return Case(network.model, network.batches, {"checkpoint": checkpoint}, suffers=loaded)


@fault("lost-eps", "trained with eps 0.1, ported with the network's own", "BN026")
def lost_eps(network: Network, _: Path) -> Case:
    copied = copy.copy(network)
    copied.model, copied.batches = copy.deepcopy(network.model), list(network.batches)
    layers = norm_layers(copied.model).values()
    own = [layer.eps for layer in layers]
    for layer in layers:
        layer.eps = 0.1
    fitted(copied)
    for layer, eps in zip(layers, own, strict=True):
        layer.eps = eps
    return Case(copied.model, copied.batches)


@fault("pruned-weights", "the smaller 60% of each weight set to 0 after the statistics", "BN102", "BN027")
def pruned_weights(network: Network, _: Path) -> Case:
    # Labels by the pruned network with statistics measured after pruning: recalibration wins all back, as after one
    # that spares what was learned, and as it cannot where random weights are lost.
    copied = copy.copy(network)
    copied.model, copied.batches = copy.deepcopy(network.model), list(network.batches)
    with torch.no_grad():
        for weight in heavy(copied.model):
            least = weight.abs().flatten().kthvalue(max(1, int(0.6 * weight.numel()))).values
            weight[weight.abs() <= least] = 0
    fitted(copied)
    with torch.no_grad():
        copy_statistics(network.model, copied.model)
    return Case(copied.model, copied.batches)


def copy_statistics(source: nn.Module, target: nn.Module) -> None:
    of_source = norm_layers(source)
    for name, layer in norm_layers(target).items():
        for key, buffer in layer.named_buffers(recurse=False):
            buffer.copy_(getattr(of_source[name], key))


def middle(model: nn.Module) -> tuple[str, Any]:
    layers = list(norm_layers(model).items())
    return layers[len(layers) // 2]


def heavy(model: nn.Module) -> Iterator[Tensor]:
    """The weights of convolutions and linear layers, without the last ones: they only scale the logits."""
    last = last_layers(model)
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear) and module not in last:
            yield module.weight


# The measurement.


@dataclass
class Diagnosis:
    """What the doctor said of one model."""

    errors: dict[str, int] = field(default_factory=dict)  # findings by id
    warnings: dict[str, int] = field(default_factory=dict)
    crash: str = ""  # the exception, and where it was raised
    changed: list[str] = field(default_factory=list)  # tensors and flags that were not restored
    named: dict[str, list[str]] = field(default_factory=dict)  # layers by id, of errors and warnings

    @property
    def ids(self) -> set[str]:
        return {*self.errors, *self.warnings}


@dataclass
class Row:
    """What was measured of one network."""

    network: str
    layers: int
    size: int
    accuracy: float
    sound: Diagnosis
    unfitted: Diagnosis
    faults: dict[str, dict[str, Any]]  # by name; without those that do not apply


def diagnosed(case: Case, select: tuple[str, ...] = ()) -> Diagnosis:
    from bnlab.health import diagnose

    found = Diagnosis()
    models = [case.model, *(value for value in case.arguments.values() if isinstance(value, nn.Module))]
    before = [state(model) for model in models]
    try:
        report = diagnose(case.model, case.batches, mean=MEAN, std=STD, select=select, **case.arguments)
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        found.crash = f"{type(error).__name__} in {Path(place.filename).name}, line {place.lineno}: {error}"
    else:
        for finding in report.findings:
            if finding.severity in ("error", "warn"):
                counts = found.errors if finding.severity == "error" else found.warnings
                counts[finding.id] = counts.get(finding.id, 0) + 1
                found.named.setdefault(finding.id, []).extend(map(str, finding.layers))
    for model, old in zip(models, before, strict=True):
        new = state(model)
        found.changed += [key for key in old if not same(old[key], new.get(key))]
    return found


def state(model: nn.Module) -> dict[str, Any]:
    """Copies of all tensors, and each module's training flag, momentum and number of hooks."""
    tensors = {key: value.clone() for key, value in [*model.named_parameters(), *model.named_buffers()]}
    flags = {
        f"flags of {name}": (module.training, getattr(module, "momentum", None), len(module._forward_pre_hooks))
        for name, module in model.named_modules()
    }
    return {**tensors, **flags}


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and torch.equal(a.nan_to_num(1e30), b.nan_to_num(1e30))
    return bool(a == b)


def read(files: list[Path]) -> dict[str, Row]:
    """What was measured before, by network; of a fault in several files, the last one counts."""
    rows: dict[str, Row] = {}
    for file in files:
        for given in json.loads(file.read_text(encoding="utf-8"))["networks"]:
            row = Row(**given | {key: Diagnosis(**given[key]) for key in ("sound", "unfitted")})
            row.faults = rows[row.network].faults | row.faults if row.network in rows else row.faults
            rows[row.network] = row
    return rows


def found_by(case: Case, ids: tuple[str, ...], diagnosis: Diagnosis, sound: Diagnosis) -> list[str]:
    """The ids of the named checks that find this fault."""
    new = [one for one in ids if one in diagnosis.ids and one not in sound.ids]
    return [one for one in new if not case.layer or case.layer in diagnosis.named[one]]


def measure(name: str, chosen: list[str], options: argparse.Namespace) -> Row:
    network = sound(name, options.seed, images=options.images, batch=options.batch)
    base = diagnosed(Case(network.model, network.batches))
    other = diagnosed(Case(unfitted(network), network.batches)) if network.layers else base
    row = Row(name, len(network.layers), network.size, accuracy(network.model, network.batches), base, other, {})
    for key in chosen if network.layers else []:
        _, ids, plant = FAULTS[key]
        with tempfile.TemporaryDirectory() as folder:
            case = plant(network, Path(folder))
            diagnosis = diagnosed(case, ids)
            by = found_by(case, ids, diagnosis, base)
            row.faults[key] = {"found": by, "accuracy": case.accuracy() if case.costs else None, **asdict(diagnosis)}
    return row


def costs(name: str, chosen: list[str], options: argparse.Namespace) -> dict[str, Any]:
    """The accuracy of the sound network, by its running and by its batches' statistics, and under each fault."""
    network = sound(name, options.seed, images=options.images, batch=options.batch)
    values: dict[str, Any] = {"sound": accuracy(network.model, network.batches)}
    if network.layers:
        by_batch = copy.deepcopy(network.model)
        for layer in norm_layers(by_batch).values():
            layer.train()
        values |= {"batch": accuracy(by_batch, network.batches)}
        values |= {"unfitted": accuracy(unfitted(network), network.batches)}
        for key in chosen:
            with tempfile.TemporaryDirectory() as folder:
                case = FAULTS[key][2](network, Path(folder))
                values[key] = case.accuracy() if case.costs else None
    return {"network": name, "layers": len(network.layers), "size": network.size, **values}


# The tables.


def costs_table(rows: list[dict[str, Any]], chosen: list[str]) -> str:
    columns = ["sound", "batch", "unfitted", *chosen]
    lines = [f"| network | layers | px | {' | '.join(columns)} |", "| --- " * (len(columns) + 3) + "|"]
    for row in rows:
        cells = ["–" if (value := row.get(key)) is None else f"{value:.1%}" for key in columns]
        lines.append(f"| {row['network']} | {row['layers']} | {row['size']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def report(rows: list[Row], chosen: list[str]) -> str:
    return "\n\n".join([_totals(rows, chosen), _sound_table(rows), _fault_table(rows, chosen), _crashes(rows)])


def _totals(rows: list[Row], chosen: list[str]) -> str:
    sound_warnings = [sum(row.sound.warnings.values()) for row in rows]
    everything = [d for row in rows for d in (row.sound, row.unfitted)]
    crashes = sum(bool(d.crash) for d in everything) + sum(bool(f["crash"]) for r in rows for f in r.faults.values())
    changed = sum(bool(d.changed) for d in everything) + sum(
        bool(f["changed"]) for r in rows for f in r.faults.values()
    )
    lines = [
        f"- {len(rows)} networks, {len(everything) + sum(len(row.faults) for row in rows)} diagnoses: "
        f"{crashes} crashed, {changed} changed the model.",
        f"- Sound networks: {sum(bool(row.sound.errors) for row in rows)} with an error, "
        f"{sum(map(bool, sound_warnings))} with a warning, {sum(n > 1 for n in sound_warnings)} with more than one.",
        f"- Unfitted networks: {sum(bool(row.unfitted.errors) for row in rows)} with an error.",
        "",
        "| fault | what was done | checks that should find it | found | accuracy, median | by the checks |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for key in chosen:
        what, ids, _ = FAULTS[key]
        cases = [row.faults[key] for row in rows if key in row.faults]
        hits = sum(bool(case["found"]) for case in cases)
        by = Counter(one for case in cases for one in case["found"])
        with_cost = [case["accuracy"] for case in cases if case["accuracy"] is not None]
        cost = f"{torch.tensor(with_cost).median():.1%}" if with_cost else "–"
        counted = ", ".join(f"{one} {n}" for one, n in by.most_common())
        rate = f"{hits} of {len(cases)}" + (f" ({hits / len(cases):.0%})" if cases else "")
        lines.append(f"| {key} | {what} | {', '.join(ids)} | {rate} | {cost} | {counted} |")
    return "\n".join(lines)


def _sound_table(rows: list[Row]) -> str:
    head = "network | layers | px | accuracy | sound: errors | warnings | unfitted: errors | warnings"
    lines = ["## Sound and unfitted networks", "", f"| {head} |", "| --- " * 8 + "|"]
    for row in rows:
        cells = [
            "crash" if d.crash else ", ".join(f"{i} x {n}" if n > 1 else i for i, n in sorted(counts.items())) or "none"
            for d in (row.sound, row.unfitted)
            for counts in (d.errors, d.warnings)
        ]
        lines.append(f"| {row.network} | {row.layers} | {row.size} | {row.accuracy:.1%} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _fault_table(rows: list[Row], chosen: list[str]) -> str:
    lines = ["## Planted faults", "", f"| network | {' | '.join(chosen)} |", "| --- " * (len(chosen) + 1) + "|"]
    for row in rows:
        cells = []
        for key in chosen:
            case = row.faults.get(key)
            if case is None:
                cells.append("–")
            elif case["crash"]:
                cells.append("crash")
            else:
                cells.append(", ".join(case["found"]) or "**not found**")
        lines.append(f"| {row.network} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _crashes(rows: list[Row]) -> str:
    lines = []
    for row in rows:
        cases = {"sound": asdict(row.sound), "unfitted": asdict(row.unfitted), **row.faults}
        for key, case in cases.items():
            if case["crash"]:
                lines.append(f"- {row.network}, {key}: {case['crash']}")
            if case["changed"]:
                lines.append(f"- {row.network}, {key}: not restored: {', '.join(case['changed'][:3])}")
    return "\n".join(lines) if lines else "No diagnosis crashed, and each left its model as it was."


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="*", metavar="NETWORK", help="names in timm (default: 27 networks)")
    parser.add_argument("--faults", nargs="+", choices=FAULTS, metavar="FAULT", help=f"of: {', '.join(FAULTS)}")
    parser.add_argument("--images", type=int, default=IMAGES, help=f"that the doctor gets (default {IMAGES})")
    parser.add_argument("--batch", type=int, default=BATCH, help=f"images in each batch (default {BATCH})")
    parser.add_argument("--seed", type=int, default=0, help="of weights and images (default 0)")
    parser.add_argument(
        "--costs", action="store_true", help="measure the accuracy under each fault, without the doctor"
    )
    parser.add_argument("--out", type=Path, help="write the page to this file (default: print it)")
    parser.add_argument("--json", type=Path, help="write all measurements to this file")
    parser.add_argument(
        "--known", type=Path, nargs="+", default=[], help="files of --json, whose networks and faults are not measured"
    )
    options = parser.parse_args()
    names, chosen = options.networks or NAMES, options.faults or list(FAULTS)
    if options.images < 2 * options.batch:
        parser.error(f"--images {options.images} is less than two batches of {options.batch}")
    rows: list[Any] = []
    about = _about(options)
    known = read(options.known)
    for name in names:
        before = known.get(name)
        if before is not None and (not before.layers or before.faults.keys() >= {*chosen}):
            rows.append(before)
            continue
        rows.append((costs if options.costs else measure)(name, chosen, options))
        line = costs_table(rows[-1:], chosen).splitlines()[-1] if options.costs else _progress(rows[-1])
        print(line, file=sys.stderr, flush=True)
        if options.json:  # after each network: an interrupted run keeps what it measured
            plain = rows if options.costs else [asdict(row) for row in rows]
            options.json.write_text(json.dumps({"about": about, "networks": plain}, indent=1), encoding="utf-8")
    text = costs_table(rows, chosen) if options.costs else report(rows, chosen)
    page = f"# The doctor on the networks of timm\n\n{about}\n\n{text}\n"
    if options.out:
        options.out.write_text(page, encoding="utf-8")
    else:
        print(page)
    return 0


def _about(options: argparse.Namespace) -> str:
    versions = []
    for package in ("bnlab", "torch", "timm"):
        try:
            versions.append(f"{package} {version(package)}")
        except PackageNotFoundError:  # run from its source, which is not installed
            versions.append(f"{package} from source")
    command = shlex.join(["python", "benchmarks/doctor_zoo.py", *sys.argv[1:]])
    return (
        f"{date.today()}, {', '.join(versions)}; seed {options.seed}; for each diagnosis n = {options.images} images "
        f"in batches of {options.batch}, other than the {TRAINING:,} that the statistics were measured on. Made by "
        f"`{command}`, whose first lines say how the networks are made."
    )


def _progress(row: Row) -> str:
    missed = [key for key, case in row.faults.items() if not case["found"]]
    said = (
        f"sound {row.sound.crash or sorted(row.sound.ids)}, unfitted {row.unfitted.crash or sorted(row.unfitted.ids)}"
    )
    return f"{row.network}: {said}, faults not found: {missed}"


if __name__ == "__main__":
    sys.exit(main())
