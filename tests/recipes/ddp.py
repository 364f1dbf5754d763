import os

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from async_ckpt import AsyncCheckpointEngine, RankCoordinator

device = torch.device("cpu")
if torch.cuda.is_available():
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
dist.init_process_group("cuda:nccl,cpu:gloo" if device.type == "cuda" else "gloo")
rank = dist.get_rank()
model = DistributedDataParallel(torch.nn.Linear(32, 1).to(device))
optimizer = torch.optim.AdamW(model.parameters())

with AsyncCheckpointEngine("checkpoints", coordinator=RankCoordinator.from_env()) as engine:
    engine.guard(optimizer)
    start = 0
    tags = [engine.latest() if rank == 0 else None]
    dist.broadcast_object_list(tags)
    if tag := tags[0]:
        state = engine.load(f"{tag}/train.pt", map_location=device)
        model.module.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        start = state["step"] + 1
    for step in range(start, start + 30):
        loss = model(torch.randn(64, 32, device=device)).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 10 == 9:
            tag = f"step-{step}"
            engine.create(tag)
            state = {"model": model.module.state_dict(), "optimizer": optimizer.state_dict(), "step": step}
            engine.save(state, "train.pt", replicated=True)
            engine.save({"random": torch.get_rng_state()}, f"rank-{rank}.pt")
            engine.commit(tag)

dist.destroy_process_group()
