"""A script with one batch of NaN; its arguments are the precisions to train in."""

import sys

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


def main() -> None:
    x = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))
    y = x.sin().sum(1, keepdim=True)
    x[17] = float("nan")
    batches = DataLoader(TensorDataset(x, y), batch_size=8)
    for precision in sys.argv[1:]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 1))
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        scaler = torch.cpu.amp.GradScaler(enabled=precision == "fp16")
        dtype = torch.float16 if precision == "fp16" else torch.bfloat16
        for a, b in batches:
            optimizer.zero_grad()
            with torch.cpu.amp.autocast(enabled=precision != "fp32", dtype=dtype):
                loss = nn.functional.mse_loss(model(a).float(), b)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        state = [value.float() for value in model.state_dict().values()]
        print(precision, "finite" if all(torch.isfinite(v).all() for v in state) else "NaN")
    print("loaded", *sorted({name.partition(".")[0] for name in sys.modules}))
    sys.exit(7)


if __name__ == "__main__":
    main()
