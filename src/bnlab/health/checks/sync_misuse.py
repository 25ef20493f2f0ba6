"""Synchronised layers are used where they have no effect, do not run, or wait for ever.

## What it measures

Whether the model has synchronised layers (torch.nn.SyncBatchNorm, bnlab.norm.SyncBatchNorm), how many processes there
are, on which kind of device the model is, and, where all processes make a diagnosis, how often a forward calls each
of these layers in each process and how many batches each process has.

## Why it is bad

With one process, the layers are plain batch normalisation: the batch is as small as it is without them. In training
with several processes, torch's layer refuses tensors of the CPU. Each call of a layer waits for the same call of all
other processes: if one of them has a batch fewer, or takes another branch, the others wait until the time limit of
the group.

## Reported when

There are synchronised layers and: the processes call one of them unequally often, or have different numbers of
batches (error); several processes run, and torch's layers are on the CPU (warning); or there is one process (advice).

## Known limits

In one process, it is not known how the training ran. If it ran in several, converting back changes nothing in
evaluation. The calls and batches are those of the diagnosis, which stops at its limit of images: pass images=None to
compare whole epochs. The groups of processes of the layers are taken to be all processes.

## Remedy

Convert the layers back for one process. For several, give each process as many batches as the others: a
DistributedSampler does so, and `torch.distributed.algorithms.join` is for uneven ones. bnlab's SyncBatchNorm runs on
the CPU, and takes empty batches.

## References

The documentation of torch.nn.SyncBatchNorm and of torch.nn.parallel.DistributedDataParallel (uneven inputs).
"""

from bnlab.health.check import Check, Finding, name_layers
from bnlab.health.evidence import Evidence
from bnlab.health.gather.processes import Sync

CHECK = Check(
    id="BN016",
    name="sync-misuse",
    severity="info",
    stage="preview",
    safety="safe",
    needs=("sync",),
)
_SHOWN = 16  # processes


def check(evidence: Evidence) -> list[Finding]:
    sync = evidence.part("sync", Sync)
    if sync.processes == 1:
        return [
            CHECK.finding(
                layers=sync.layers,
                message=f"{name_layers(sync.layers)} synchronise with other processes, and there is one process",
                cause="the model was converted for a distributed training, and is used in one process",
                remedy="convert the layers back, if the model is not trained in several processes again",
                command="bnlab.norm.revert_sync(model)",
            )
        ]
    findings = []
    unequal = tuple(name for name in sync.layers if len({calls.get(name, 0) for calls in sync.calls}) > 1)
    if unequal:
        numbers = [calls.get(unequal[0], 0) for calls in sync.calls]
        findings.append(
            CHECK.finding(
                severity="error",
                safety="display only",
                layers=unequal,
                message=(
                    f"the processes call {name_layers(unequal)} unequally often in a forward: {unequal[0]} "
                    f"{_list(numbers)} times, by process"
                ),
                numbers={"calls": numbers},
                cause="the forward takes another branch in some processes",
                remedy="call each synchronised layer equally often in all processes",
            )
        )
    if len(set(sync.batches)) > 1:
        findings.append(
            CHECK.finding(
                severity="error",
                safety="display only",
                layers=sync.layers,
                message=(
                    f"the processes have {_list(list(sync.batches))} batches, and those with more wait for the others "
                    f"at {name_layers(sync.layers)} in training"
                ),
                numbers={"batches": [*sync.batches]},
                cause="the images are not shared out evenly",
                remedy="use a DistributedSampler, which gives each process as many images",
                command="DataLoader(dataset, sampler=DistributedSampler(dataset))",
            )
        )
    if sync.refuse_cpu and sync.device == "cpu":
        findings.append(
            CHECK.finding(
                severity="warn",
                layers=sync.refuse_cpu,
                message=(
                    f"{name_layers(sync.refuse_cpu)} of torch.nn.SyncBatchNorm are on the CPU, whose tensors they "
                    f"refuse in training with {sync.processes} processes"
                ),
                cause="the model is trained on the CPU, or was moved there",
                remedy="convert them to bnlab's synchronised layers, or move the model to a GPU",
                command="bnlab.norm.convert_sync(model)",
            )
        )
    return findings


def _list(numbers: list[int]) -> str:
    shown = [str(number) for number in numbers[:_SHOWN]] + ["..."] * (len(numbers) > _SHOWN)
    return ", ".join(shown[:-1]) + f" and {shown[-1]}"
