"""One rank's view of a run: which device is its own, and what all ranks add up together."""

from __future__ import annotations

import contextlib
import json
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from alexnet_fast.errors import InputError

RANKS_A_CORE = 8  # each holds a net of its own: more is a mistake
RESTARTED = "TORCHELASTIC_RESTART_COUNT"  # how often torchrun has started the ranks again


@dataclass(frozen=True)
class Ranks:
    """Rank ``rank`` of ``world``, computing on ``device``.

    ``sent`` counts the bytes that this rank has to send, by kind: gradients, activations, weights. They are computed
    from what is handed to each collective, as if each rank sent its part to each other one directly; a ring sends as
    many.
    """

    rank: int = 0
    world: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    sent: Counter[str] = field(default_factory=Counter)

    @property
    def main(self) -> bool:
        """Whether this rank writes files and talks to the user."""
        return self.rank == 0

    def add(self, values: Tensor) -> Tensor:
        """``values`` summed over ranks, in place; all ranks hold the same bits afterwards."""
        if self.world > 1:
            dist.all_reduce(values)
        return values

    def gather(self, record: object) -> list:
        """Every rank's record, in rank order; a record is what JSON can hold."""
        if self.world == 1:
            return [record]
        text = torch.tensor(list(json.dumps(record).encode()), dtype=torch.uint8, device=self.device)
        lengths = [torch.zeros(1, dtype=torch.int64, device=self.device) for _ in range(self.world)]
        dist.all_gather(lengths, torch.tensor([len(text)], device=self.device))
        longest = int(torch.cat(lengths).max())
        padded = [torch.zeros(longest, dtype=torch.uint8, device=self.device) for _ in range(self.world)]
        dist.all_gather(padded, torch.nn.functional.pad(text, (0, longest - len(text))))
        texts = [bytes(row[: int(length)].tolist()) for row, length in zip(padded, lengths, strict=True)]
        return [json.loads(text) for text in texts]

    def wait(self) -> None:
        """Returns when every rank has come here."""
        self.add(torch.zeros(1, device=self.device))


def plan_devices(local_ranks: int) -> str:
    """``cuda`` or ``cpu`` for the ranks of this machine; raises :class:`InputError` for more ranks than GPUs, or
    than cores can bear."""
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if gpus and local_ranks > gpus:
        raise InputError(
            f"{local_ranks} ranks, but torch sees {gpus} GPU(s) here (CUDA_VISIBLE_DEVICES= trains on the CPU)"
        )
    cores = len(os.sched_getaffinity(0))
    if not gpus and local_ranks > RANKS_A_CORE * cores:
        raise InputError(f"--nproc: {local_ranks} ranks on {cores} cores; at most {RANKS_A_CORE} a core can be started")
    return "cuda" if gpus else "cpu"


@contextlib.contextmanager
def joined(rank: int, world: int, local_rank: int, local_world: int, init_method: str) -> Iterator[Ranks]:
    """Joins the run's process group: NCCL with GPUs, gloo without; leaves it at the end of the block.

    On a CPU the ranks of one machine share its cores evenly.
    """
    device = torch.device(plan_devices(local_world), local_rank)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
        if local_world > 1:
            torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local_world))
    if world == 1:
        yield Ranks(device=device)
        return
    store = None
    if init_method == "env://":
        # torchrun keeps one store over all restarts. Without a prefix a rank would find the addresses of ranks that
        # died.
        kept, _, _ = next(rendezvous(init_method))
        store, init_method = dist.PrefixStore(f"attempt {os.environ.get(RESTARTED, 0)}", kept), None
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        init_method=init_method,
        store=store,
        rank=rank,
        world_size=world,
        device_id=device if device.type == "cuda" else None,
    )
    yield Ranks(rank, world, device)
    dist.destroy_process_group()  # not after a failure: it could wait for a rank that is gone
