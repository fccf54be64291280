"""One batch of NaN under the Hugging Face Trainer, then under Lightning."""

import sys

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset


class Rows(Dataset):
    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        x = torch.randn(6, generator=torch.Generator().manual_seed(index))
        if index == 9:
            x[0] = float("nan")
        return {"x": x, "labels": x.nan_to_num().sum(0, keepdim=True)}


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 1))

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        found = self.layers(x)
        return {"loss": nn.functional.mse_loss(found.float(), labels), "logits": found}


def say(name: str, model: nn.Module) -> None:
    is_finite = all(bool(torch.isfinite(v).all()) for v in model.state_dict().values())
    print(name, "finite" if is_finite else "NaN", flush=True)


def train_with_transformers(folder: str) -> None:
    from transformers import Trainer, TrainingArguments

    arguments = TrainingArguments(
        output_dir=folder,
        per_device_train_batch_size=4,
        num_train_epochs=2,
        use_cpu=True,
        bf16=True,
        report_to=[],
        save_strategy="no",
    )
    model = Model()
    Trainer(model=model, args=arguments, train_dataset=Rows()).train()
    say("trainer", model)


def train_with_lightning() -> None:
    import lightning

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = Model()

        def training_step(self, batch: dict[str, torch.Tensor], _index: int) -> torch.Tensor:
            return self.model(**batch)["loss"]

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.parameters(), lr=1e-3)

    module = Module()
    lightning.Trainer(
        max_epochs=2,
        accelerator="cpu",
        precision="bf16-mixed",
        gradient_clip_val=1.0,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    ).fit(module, DataLoader(Rows(), batch_size=4))
    say("lightning", module)


if __name__ == "__main__":
    torch.manual_seed(0)
    train_with_transformers(sys.argv[1])
    train_with_lightning()
