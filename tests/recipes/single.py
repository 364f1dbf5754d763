import torch

from async_ckpt import AsyncCheckpointEngine

device = "cuda" if torch.cuda.is_available() else "cpu"
model = torch.nn.Linear(32, 1).to(device)
optimizer = torch.optim.AdamW(model.parameters())

with AsyncCheckpointEngine("checkpoints") as engine:
    engine.guard(optimizer)
    start = 0
    if tag := engine.latest():
        state = engine.load(f"{tag}/train.pt", map_location=device)
        model.load_state_dict(state["model"])
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
            engine.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step}, "train.pt")
            engine.commit(tag, metadata={"step": step})
