"""A module's own, faster way to the same optimizer step: allowed where it is the same, and tried before it is used."""

import contextlib
from collections.abc import Callable
from typing import Any, TypeAlias

import lightning.pytorch as pl
import torch
from lightning.pytorch.plugins.precision import DoublePrecision, Precision
from torch import Tensor
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

# What `module.fast_step(optimizer, batch)` returns: it does one whole step with a batch, to the bit, and logs nothing;
# it returns the loss, (), or, with nothing done, None for a batch that is not like the first.
FastStep: TypeAlias = Callable[[Any], Tensor | None]

# Methods that a fast step replaces: where a subclass has one of its own, there is no fast step.
REPLACED = ("training_step", "forward", "backward", "configure_gradient_clipping", "log", "log_dict")


def make(trainer: pl.Trainer, batch: Any) -> FastStep | None:
    """The module's fast step for batches like this one; another network or optimizer may not have what it looks for."""
    fast_step: Callable[..., FastStep | None] = trainer.lightning_module.fast_step  # type: ignore[assignment]
    with contextlib.suppress(AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError):
        return fast_step(trainer.optimizers[0], batch)
    return None


def try_out(
    fast: FastStep, trainer: pl.Trainer, batch: Any, step: Callable[[], Tensor | None]
) -> tuple[bool, Tensor | None]:
    """Try a fast step on a batch, take it back, and do the ordinary `step`.

    Returns:
        Whether both left the same bits in the network and the optimizer; and what `step` returned.
    """
    module, (optimizer,) = trainer.lightning_module, trainer.optimizers
    tensors = [*module.parameters(), *module.buffers()]
    tensors += [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
    before, random = [tensor.detach().clone() for tensor in tensors], torch.get_rng_state()
    done = False
    with contextlib.suppress(AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError):
        done = fast(batch) is not None
    trial = [tensor.detach().clone() for tensor in tensors]
    with torch.no_grad():
        for tensor, value in zip(tensors, before, strict=True):
            tensor.copy_(value)
    torch.set_rng_state(random)
    loss = step()
    return done and all(map(torch.equal, tensors, trial)), loss


def allowed(trainer: pl.Trainer) -> bool:
    """Whether there is a fast step, and no hook, subclass or setting that its author could not foresee."""
    module, (optimizer,) = trainer.lightning_module, trainer.optimizers
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return (
        getattr(module, "fast_step", None) is not None
        and module.device.type == "cpu"
        and trainer.world_size == 1
        and type(trainer.precision_plugin) in (Precision, DoublePrecision)
        and not trainer.gradient_clip_val
        and all(_is_of_the_author(module, name) for name in REPLACED)
        and not torch.nn.modules.module._has_any_global_hook()
        and not any(getattr(part, name) for part in module.modules() for name in hooks)
        and not any(p._backward_hooks or p._post_accumulate_grad_hooks for p in module.parameters())
        and not any((optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks))
        and not any((_global_optimizer_pre_hooks, _global_optimizer_post_hooks))
        and all(parameter.requires_grad for parameter in module.parameters())
    )


def _is_of_the_author(module: pl.LightningModule, name: str) -> bool:
    """Whether a method is as it was where `fast_step` was written: in the same class or above, and not replaced."""
    classes = type(module).__mro__
    author = next((c for c in classes if "fast_step" in vars(c)), object)  # not of a class, if set on the instance
    owner = next(c for c in classes if name in vars(c))
    function = vars(owner)[name]
    is_its_own = (function.__module__, function.__qualname__) == (owner.__module__, f"{owner.__qualname__}.{name}")
    return issubclass(author, owner) and is_its_own and name not in vars(module)
