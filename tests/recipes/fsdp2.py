import os

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from async_ckpt import AsyncCheckpointEngine, RankCoordinator
from async_ckpt.integrations.dcp import TrainingState, load_sharded, save_sharded

kind = "cuda" if torch.cuda.is_available() else "cpu"
if kind == "cuda":
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
dist.init_process_group("cuda:nccl,cpu:gloo" if kind == "cuda" else "gloo")
mesh = init_device_mesh(kind, (dist.get_world_size(),))
model = torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.Linear(64, 1))
fully_shard(model, mesh=mesh)
optimizer = torch.optim.AdamW(model.parameters())

with AsyncCheckpointEngine("checkpoints", coordinator=RankCoordinator.from_env()) as engine:
    engine.guard(optimizer)
    state = {"train": TrainingState(model, optimizer), "step": -1}
    tags = [engine.latest() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(tags)
    if tags[0]:
        load_sharded(engine, tags[0], state)  # whatever number of ranks has saved it
    start = state["step"] + 1
    for step in range(start, start + 30):
        loss = model(torch.randn(64, 32, device=kind)).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 10 == 9:
            save_sharded(engine, f"step-{step}", {**state, "step": step}, metadata={"step": step})

dist.destroy_process_group()
