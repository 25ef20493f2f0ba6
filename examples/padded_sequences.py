"""BatchNorm1d on sequences of different lengths: the output of a sequence depends on how much padding its batch has.

The story: pytorch/pytorch#70529 asks for batch normalisation that knows the lengths of the sequences, since padded
positions are counted in the statistics; Tomiinek/Multilingual_Text_to_Speech#81 sees large activations come of it.
Here most sequences are short and a few are long, and each batch is padded with zeros to its longest one.

The cause: zeros pull the means towards 0 and change the variances, and how much depends on the longest sequence of a
batch. So training normalises the same values in another way each time, and evaluation by the average of these ways.

What to do: give the layer the positions that are not padding, alone, as `normalise` does here. Sorting sequences into
batches of like length does much of it without a change of the network.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bnlab import health
from shapes import compare, tell, tell_change

LONGEST = 64
Sequences = list[tuple[Tensor, Tensor, Tensor]]  # batches: N x 4 x L, their lengths, N, and their classes, N


def is_padding(x: Tensor, lengths: Tensor) -> Tensor:
    return torch.arange(x.shape[2]) >= lengths[:, None]  # N x L


def normalise(norm: nn.Module, x: Tensor, mask: Tensor) -> Tensor:
    """Normalise the positions of x, N x C x L, where the mask, N x L, is true; the others become 0."""
    rows = x.transpose(1, 2)  # N x L x C
    out = torch.zeros_like(rows)
    out[mask] = norm(rows[mask])
    return out.transpose(1, 2)


class SequenceNet(nn.Module):
    """Two convolutions over time, and the mean of the positions that are not padding."""

    def __init__(self, *, masked: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.masked = masked
        self.convs = nn.ModuleList(nn.Conv1d(before, 16, 5, padding=2, bias=False) for before in (4, 16))
        self.norms = nn.ModuleList(nn.BatchNorm1d(16) for _ in self.convs)
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        mask = ~is_padding(x, lengths)  # N x L
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = conv(x)  # N x 16 x L
            x = F.relu(normalise(norm, x, mask) if self.masked else norm(x))
        return self.head((x * mask[:, None]).sum(2) / lengths[:, None])  # N x 4


def make_sequences(n: int, seed: int) -> Sequences:
    """Noisy waves around 3, of 12 to 64 positions and four frequencies, which are the classes."""
    random = torch.Generator().manual_seed(seed)
    labels = torch.randint(4, (n,), generator=random)
    lengths = (12 + (LONGEST - 11) * torch.rand(n, generator=random) ** 6).long()
    time = torch.arange(LONGEST) * (0.5 + 0.15 * labels[:, None]) + 6 * torch.rand(n, 1, generator=random)
    x = 3 + torch.sin(time[:, None] + torch.arange(4)[:, None] / 2) + 0.5 * torch.randn(n, 4, LONGEST, generator=random)
    x = x * ~is_padding(x, lengths)[:, None]
    rows = torch.arange(n).split(16)
    return [(x[i, :, : lengths[i].max()], lengths[i], labels[i]) for i in rows]


def fit(batches: Sequences, *, masked: bool) -> nn.Module:
    model = SequenceNet(masked=masked)
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1, 0.01, 3 * len(batches))
    for x, lengths, labels in batches * 3:
        optimizer.zero_grad()
        F.cross_entropy(model(x, lengths), labels).backward()
        optimizer.step()
        schedule.step()
    return model.eval()


@torch.no_grad()
def is_correct(model: nn.Module, batches: Sequences) -> Tensor:
    return torch.cat([(model(x, lengths).argmax(1) == labels).double() for x, lengths, labels in batches])


def main() -> dict[str, object]:
    train_batches, val_batches = make_sequences(1024, seed=1), make_sequences(512, seed=2)
    model, masked = (fit(train_batches, masked=choice) for choice in (False, True))
    report = health.diagnose(model, val_batches, padding=lambda batch: is_padding(batch[0], batch[1]))
    found = tell(report, ["BN025"])

    comparison = compare(is_correct(model, val_batches), is_correct(masked, val_batches))
    tell_change(comparison, "The same training, with padding left out of the statistics")
    print("The cause: the statistics count the zeros that pad the sequences.")
    return {"found": found, "before": comparison.before, "after": comparison.after}


if __name__ == "__main__":
    main()
