"""torch.distributed on two CPU processes: DDP gradients, and an LM head sharded as FSDP2 does it."""

from __future__ import annotations

import contextlib
import os
import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import dpo_fast

pytestmark = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="torch without gloo")

S, T, H, V, WORLD = 8, 6, 16, 33, 2


def problem():
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(0, V, (S, T), generator=g)
    targets = torch.randint(0, V, (S, T), generator=g)
    targets[:, :2] = -100
    return ids, targets, torch.randn(S, generator=g), torch.randn(S, T, H, generator=g)


def share_of(rank):
    """Whole pairs: sequence i is chosen against i + S / 2."""
    chosen = [i for i in range(S // 2) if i % WORLD == rank]
    return torch.tensor([*chosen, *(i + S // 2 for i in chosen)])


def ddp(rank):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Embedding(V, H), torch.nn.Linear(H, V, bias=False))
    ids, targets, ref, _ = problem()
    mine = share_of(rank)
    wrapped = torch.nn.parallel.DistributedDataParallel(model)
    out = dpo_fast.dpo_loss(wrapped(ids[mine]), targets[mine], ref[mine], inplace_backward=True)
    out.loss.backward()
    found = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    dpo_fast.dpo_loss(model(ids), targets, ref).loss.backward()
    for grad, p in zip(found, model.parameters(), strict=True):
        torch.testing.assert_close(grad, p.grad)


def uneven_shares(rank):
    """Ranks with different numbers of pairs and tokens, in microbatches of one pair: the large batch's gradient."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Embedding(V, H), torch.nn.Linear(H, V, bias=False))
    ids, targets, ref, _ = problem()
    targets[0, 2:5] = -100
    options = {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5]}
    n_tokens = (targets[: S // 2] != -100).sum().item()
    wrapped = torch.nn.parallel.DistributedDataParallel(model)
    mine = [0] if rank == 0 else [1, 2, 3]
    total = {"num_pairs": S // 2 / WORLD, "num_chosen_tokens": n_tokens / WORLD}
    for k, p in enumerate(mine):
        rows = [p, p + S // 2]
        last = k == len(mine) - 1
        with contextlib.nullcontext() if last else wrapped.no_sync():
            out = dpo_fast.dpo_loss(wrapped(ids[rows]), targets[rows], ref[rows], **options, **total)
            out.loss.backward()
    found = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    dpo_fast.dpo_loss(model(ids), targets, ref, **options).loss.backward()
    for grad, p in zip(found, model.parameters(), strict=True):
        torch.testing.assert_close(grad, p.grad)


def sharded_head(rank):
    """A DTensor weight: gathered once, its gradient averaged over the ranks' different data and sharded again."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard, distribute_tensor

    torch.manual_seed(0)
    whole = torch.nn.Linear(H, V, bias=False).weight
    _, targets, ref, hidden = problem()
    mine = share_of(rank)
    mesh = init_device_mesh("cpu", (WORLD,))
    weight = torch.nn.Parameter(distribute_tensor(whole.detach(), mesh, [Shard(0)]))
    dpo_fast.linear_dpo_loss(hidden[mine], weight, targets[mine], ref[mine]).loss.backward()
    dpo_fast.linear_dpo_loss(hidden, whole, targets, ref).loss.backward()
    assert isinstance(weight.grad, DTensor)
    torch.testing.assert_close(weight.grad.full_tensor(), whole.grad)


def worker(rank, body, port):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=WORLD)
    try:
        body(rank)
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("body", [ddp, uneven_shares, sharded_head], ids=lambda body: body.__name__)
def test_two_processes(body):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    mp.spawn(worker, args=(body, port), nprocs=WORLD)
