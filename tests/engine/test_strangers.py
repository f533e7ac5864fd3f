"""Modules as real projects write them: all is as with Lightning's Trainer, the order of hooks too; and resumes."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from conftest import slow
from engine.test_loop import Foreign, Make, Settings, compare, loader, pair
from engine.test_resumption import assert_exact_from_each
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor, nn
from torch.utils.data import DataLoader

from mnist_lightning.engine.hooks import BATCH_HOOKS

# Callbacks


def noting(name: str) -> Callable[..., None]:
    def note(callback: pl.Callback, trainer: pl.Trainer, module: Any, *args: Any, **kwargs: Any) -> None:
        module.seen.append((name, trainer.global_step, trainer.current_epoch))

    return note


OF_CALLBACKS = [name for name in vars(pl.Callback) if name.startswith("on_") or name in ("setup", "teardown")]
"""Of validation's batches too."""

# Two callbacks that note each hook: one needs the training's batches, so that hooks run in each iteration.
EachHook = type("EachHook", (pl.Callback,), {name: noting(name) for name in OF_CALLBACKS})
Others = type("Others", (pl.Callback,), {name: noting(name) for name in OF_CALLBACKS if name not in BATCH_HOOKS})


class ReadsMetrics(pl.Callback):
    """At the end of epochs and validations, as a logger of one's own does."""

    def read(self, trainer: pl.Trainer, module: Any, *args: Any) -> None:
        for metrics in (trainer.logged_metrics, trainer.callback_metrics, trainer.progress_bar_metrics):
            module.seen.append(("metrics", {name: float(value) for name, value in metrics.items()}))

    on_train_epoch_end = on_validation_end = on_train_end = read  # type: ignore[assignment]


# Modules


class Groups(Foreign):
    """Two groups and a schedule; the step takes the batch alone, and logs it by the step and by the epoch."""

    def training_step(self, batch: Any) -> Tensor:  # type: ignore[override]
        loss = self.loss(batch)
        self.log("loss", loss, on_step=True, on_epoch=True, prog_bar=True)
        self.log_dict({"size": float(len(batch[1])), "rate": self.lr_schedulers().get_last_lr()[0]})  # type: ignore
        return loss

    def configure_optimizers(self) -> Any:
        first, *_, last = self.net
        groups: list[Settings] = [{"params": first.parameters(), "weight_decay": 0.1}]
        groups += [{"params": last.parameters(), "lr": 0.01}]
        optimizer = torch.optim.AdamW(groups, lr=0.02)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, 0.03, int(self.trainer.estimated_stepping_batches), cycle_momentum=False
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step", "name": "rate"}}


class Collects(Foreign):
    """Lists that the end of an epoch reads, and that a checkpoint keeps."""

    def __init__(self) -> None:
        super().__init__()
        self.losses: list[Tensor] = []
        self.validated: list[Tensor] = []

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        loss = self.loss(batch)
        self.losses.append(loss.detach())
        return {"loss": loss}

    def on_train_epoch_end(self) -> None:
        self.log("val mean of train", torch.stack(self.losses).mean())
        self.losses.clear()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        super().validation_step(batch, batch_idx)
        self.validated.append(self(batch[0]))

    def on_validation_epoch_end(self) -> None:
        self.log("val_spread", torch.cat(self.validated).std())
        self.validated.clear()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["losses"] = list(self.losses)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.losses = checkpoint["losses"]


@dataclass
class Graphs:
    """A batch of one's own."""

    nodes: Tensor
    labels: Tensor
    moved: int = 0

    def to(self, *args: Any, **kwargs: Any) -> "Graphs":
        return Graphs(self.nodes.to(*args, **kwargs), self.labels.to(*args, **kwargs), self.moved + 1)


class OfGraphs(Foreign):
    def loss(self, batch: Any) -> Tensor:
        assert isinstance(batch, Graphs)
        self.seen.append((batch.moved, len(batch.labels)))
        return F.cross_entropy(self(batch.nodes), batch.labels)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        self.log("loss", loss, batch_size=len(batch.labels), on_epoch=True)
        return loss

    def val_dataloader(self) -> Any:
        return graphs(30, False)


def graphs(batch_size: int = 8, shuffle: bool = True) -> DataLoader[Any]:
    def collate(examples: list[Any]) -> Graphs:
        nodes, labels = zip(*examples, strict=True)
        return Graphs(torch.stack(nodes), torch.stack(labels))

    return DataLoader(loader().dataset, batch_size, shuffle, collate_fn=collate)


class Several(Foreign):
    """Training and validation data by name, in loaders of several lengths."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        losses = {f"train_{name}": self.loss(part) for name, part in batch.items() if part is not None}
        self.log_dict(losses, on_step=True, on_epoch=True)
        return torch.stack([*losses.values()]).sum()

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.log("val_loss", self.loss(batch))

    def val_dataloader(self) -> Any:
        return [loader(30, shuffle=False), loader(20, shuffle=False)]


class GAN(Foreign):
    """By hand, with two optimizers that take turns, and a schedule of each."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.generator, self.critic = nn.Linear(4, 6), nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 1))

    def training_step(self, batch: Any, batch_idx: int) -> None:
        real, noise = batch[0], torch.randn(len(batch[0]), 4)
        for number, optimizer in enumerate(self.optimizers()):
            self.toggle_optimizer(optimizer)
            made = self.critic(self.generator(noise))
            loss = F.softplus(-made).mean()
            if number == 1:
                loss = (F.softplus(made) + F.softplus(-self.critic(real))).mean()
            self.log(f"loss {number}", loss, prog_bar=True, on_step=True, on_epoch=True)
            optimizer.zero_grad()
            self.manual_backward(loss)
            self.clip_gradients(optimizer, 0.5, "norm")
            optimizer.step()
            self.untoggle_optimizer(optimizer)
        self.lr_schedulers()[number].step()  # type: ignore[index]

    def configure_optimizers(self) -> Any:
        optimizers = [torch.optim.Adam(part.parameters(), 0.02) for part in (self.generator, self.critic)]
        return optimizers, [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.95) for optimizer in optimizers]


STRANGERS: dict[str, tuple[Any, Make, Settings]] = {
    "groups": (Groups, loader, {}),
    "collects": (Collects, loader, {"val_check_interval": 5}),
    "graphs": (OfGraphs, graphs, {}),
    "several loaders": (Several, pair, {}),
    "several loaders, to the shortest": (
        Several,
        lambda: CombinedLoader(pair(), "min_size"),
        {"accumulate_grad_batches": 2},
    ),
    "several loaders, to the longest": (Several, lambda: CombinedLoader(pair(), "max_size"), {}),
    "GAN": (GAN, loader, {}),
}


@pytest.mark.parametrize("hooks", [EachHook, Others])
@pytest.mark.parametrize("case", STRANGERS)
def test_as_with_lightnings(case: str, hooks: Any, tmp_path: Path) -> None:
    """Weights, logged values, what callbacks read, and the order of hooks."""
    module, data, settings = STRANGERS[case]

    run = compare(tmp_path, module, data, lambda: [ReadsMetrics(), hooks()], **settings)
    needs_hooks = hooks is EachHook or case == "GAN" or "accumulate_grad_batches" in settings
    assert (run.without_hooks == 0) == needs_hooks
    noted = {name for name, *_ in run.left["seen"] if name in OF_CALLBACKS}
    assert {"on_fit_start", "on_validation_batch_end", "on_train_epoch_end"} <= noted


@pytest.mark.parametrize(
    "case", ["collects", "graphs", "GAN", *map(slow, ("groups", "several loaders, to the longest"))]
)
def test_resumed(case: str, tmp_path: Path) -> None:
    module, data, settings = STRANGERS[case]
    assert_exact_from_each(tmp_path, module, data, settings, {})
