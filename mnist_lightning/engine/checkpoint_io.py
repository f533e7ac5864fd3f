"""How the Trainer saves and loads checkpoints."""

import io
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO

from .checkpoint_file import CheckpointError, load_checkpoint, write_whole
from .run import rank


class CheckpointIO(TorchCheckpointIO):
    """Lets the Trainer replace checkpoints in one step and load them safely, whatever its caller asks for.

    Args:
        module_class: The class of the network whose checkpoints are loaded.
    """

    def __init__(self, module_class: type[pl.LightningModule]) -> None:
        self.module_class = module_class
        self._directories: set[Path] = set()

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Replace the checkpoint at `path`, if there is one, by `write_whole`.

        Raises:
            CheckpointError: It cannot be written; the checkpoint that was there before is left as it was.
        """
        path = Path(path)
        content = io.BytesIO()
        torch.save(checkpoint, content)
        try:
            write_whole(path, content.getvalue())
        except OSError as error:
            raise CheckpointError(
                f"{path} cannot be saved: {error.strerror}; what was saved before, if anything, is whole: mend that "
                "and resume with --ckpt_path"
            ) from error
        self._directories.add(path.resolve().parent)

    def remove_checkpoint(self, path: str | Path) -> None:
        """Remove a checkpoint beside those saved here, and nothing else that an untrusted one may name."""
        path = Path(path).resolve()
        if path.is_file() and path.suffix == ".ckpt" and path.parent in self._directories:
            path.unlink()

    def load_checkpoint(
        self, path: str | Path, map_location: Any = None, weights_only: bool | None = True
    ) -> dict[str, Any]:
        """Load a checkpoint by `checkpoint_file.load_checkpoint`: tensors and plain values only, to the CPU.

        Of several processes, the first one reads for all: the others may be on machines that do not have the file.

        Raises:
            CheckpointError: As there, in all processes.
        """
        if not torch.distributed.is_initialized():
            return load_checkpoint(Path(path), self.module_class)
        found: list[Any] = [None]
        if rank() == 0:
            try:
                found = [load_checkpoint(Path(path), self.module_class)]
            except CheckpointError as error:
                found = [error]
        torch.distributed.broadcast_object_list(found)
        if isinstance(found[0], CheckpointError):
            raise found[0]
        checkpoint: dict[str, Any] = found[0]
        return checkpoint
