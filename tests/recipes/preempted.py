import torch
from torch.utils.data import DataLoader, TensorDataset

from async_ckpt import AsyncCheckpointEngine, ignore_preemption

model = torch.nn.Linear(64, 64)
optimizer = torch.optim.AdamW(model.parameters())
# Schedulers signal the whole process group: without it, the loader's workers would die before the last save.
loader = DataLoader(
    TensorDataset(torch.randn(100_000, 64)), batch_size=8, num_workers=2, worker_init_fn=ignore_preemption
)

with AsyncCheckpointEngine("checkpoints") as engine:
    step = 0

    def save() -> None:
        tag = f"step-{step}"
        engine.create(tag)
        engine.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step}, "train.pt")
        engine.commit(tag, metadata={"step": step})

    engine.on_preemption(deadline_s=25, save=save)
    for (batch,) in loader:
        loss = model(batch).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        print("step", step, flush=True)
        if engine.poll_preemption():
            break
