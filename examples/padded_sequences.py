"""A model of sequences is good on padded batches, and worse on one sequence at a time.

The story: pytorch/pytorch#70529 asks for batch normalisation that knows the lengths of the sequences, since the padded
positions are counted in the statistics; Tomiinek/Multilingual_Text_to_Speech#81 sees large activations come of it.
Here sequences of 12 to 96 positions are padded with zeros to 96 for training, and used alone, without padding.

The cause: zeros pull the means towards 0 and make the variances small, the more of them the shorter the sequences are.
A sequence alone has no padding, so the statistics are not those of its values.

What to do: measure the statistics of the positions that are not padding. This is done here by a layer that gets the
mask; sorting sequences into batches of like length does much of it without one.
"""

import torch
from shapes import compare, tell, tell_change
from torch import Tensor, nn
from torch.nn import functional as F

from bnlab import health

LONGEST = 96


class MaskedBatchNorm1d(nn.BatchNorm1d):
    """Batch normalisation of N x C x L that normalises the positions where `mask`, N x L, is true, and returns 0 elsewhere."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        if mask is None:
            return super().forward(x)
        rows = x.transpose(1, 2)  # N x L x C
        out = torch.zeros_like(rows)
        out[mask] = super().forward(rows[mask])
        return out.transpose(1, 2)


class SequenceNet(nn.Module):
    """Two convolutions over time, and the mean of the positions that are not padding."""

    def __init__(self, *, masked: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.masked = masked
        self.conv1, self.norm1 = nn.Conv1d(4, 16, 5, padding=2, bias=False), MaskedBatchNorm1d(16)
        self.conv2, self.norm2 = nn.Conv1d(16, 16, 5, padding=2, bias=False), MaskedBatchNorm1d(16)
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        mask = is_padding(x, lengths).logical_not()  # N x L
        known = mask if self.masked else None
        x = F.relu(self.norm1(self.conv1(x), known))
        x = F.relu(self.norm2(self.conv2(x), known))  # N x 16 x L
        return self.head((x * mask[:, None]).sum(2) / lengths[:, None])  # N x 4


def is_padding(x: Tensor, lengths: Tensor) -> Tensor:
    return torch.arange(x.shape[2]) >= lengths[:, None]  # N x L


def make_sequences(n: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Waves around a level, N x 4 x 96, zeros after their end; their lengths, and their class, which is the frequency."""
    random = torch.Generator().manual_seed(seed)
    labels = torch.randint(4, (n,), generator=random)
    lengths = (12 + (LONGEST - 11) * torch.rand(n, generator=random) ** 2).long()
    time = torch.arange(LONGEST) * (0.5 + 0.15 * labels[:, None]) + 6 * torch.rand(n, 1, generator=random)
    phases = torch.tensor([0.0, 0.5, 1.0, 1.5])[:, None]
    x = 1.5 + torch.sin(time[:, None] + phases) + 0.8 * torch.randn(n, 4, LONGEST, generator=random)
    return x * ~is_padding(x, lengths)[:, None], lengths, labels


@torch.no_grad()
def is_correct_alone(model: nn.Module, x: Tensor, lengths: Tensor, labels: Tensor) -> Tensor:
    """Which sequences are classified correctly one at a time, without padding: N, 0 or 1."""
    alone = [model(x[i : i + 1, :, :length], lengths[i : i + 1]) for i, length in enumerate(lengths.tolist())]
    return (torch.cat(alone).argmax(1) == labels).double()


def fit(*, masked: bool) -> nn.Module:
    model, (x, lengths, labels) = SequenceNet(masked=masked), make_sequences(1024, seed=1)
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    for rows in list(torch.arange(1024).split(32)) * 3:
        optimizer.zero_grad()
        F.cross_entropy(model(x[rows], lengths[rows]), labels[rows]).backward()
        optimizer.step()
    return model.eval()


def main() -> dict[str, object]:
    x, lengths, labels = make_sequences(384, seed=2)
    model, batches = fit(masked=False), list(zip(x.split(32), lengths.split(32), labels.split(32), strict=True))
    report = health.diagnose(model, batches, padding=lambda batch: is_padding(batch[0], batch[1]))
    found = tell(report, ["BN025"])

    before = is_correct_alone(model, x, lengths, labels)
    comparison = compare(before, is_correct_alone(fit(masked=True), x, lengths, labels))
    tell_change(comparison, "One sequence at a time, after a training that leaves padding out of the statistics")
    print("The cause: the statistics count the zeros that pad the sequences.")
    return {"found": found, "before": comparison.before, "after": comparison.after}


if __name__ == "__main__":
    main()
