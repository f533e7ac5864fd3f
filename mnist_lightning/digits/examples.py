"""What figures need of a test: all predictions, and the few images that are drawn."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mnist_lightning.model import PIXELS

FIRST = 1000  # images whose activations are taken
DRAWN = 9


@dataclass
class Examples:
    """N test examples in order, on the CPU, and the images of M of them."""

    classes: int
    labels: Tensor  # (N,)
    predictions: Tensor  # (N,)
    confidences: Tensor  # (N,): the predictions' probabilities
    numbers: Tensor  # (M,): of the images, ascending
    images: Tensor  # (M, ...)

    def correct(self) -> Tensor:
        """Numbers of the examples that are classified correctly."""
        return (self.predictions == self.labels).nonzero()[:, 0]

    def mistakes(self, by_confidence: bool) -> Tensor:
        """Numbers of the misclassified examples: in order, or those with the largest confidences first."""
        mistakes = (self.predictions != self.labels).nonzero()[:, 0]
        return mistakes[self.confidences[mistakes].argsort(descending=True, stable=True)] if by_confidence else mistakes

    def pictures(self, numbers: Tensor) -> Tensor:
        """The images, (B, ...), of the examples with these numbers, (B,)."""
        return self.images[torch.searchsorted(self.numbers, numbers)]


class Collector:
    """Keeps of a test's minibatches what figures need: the predictions, and the images that may come to be drawn.

    Args:
        by_confidence: Of the misclassified images, those with the largest confidences are drawn, not the first ones.
        keeps_first: Keep the first thousand images also where they are large.
    """

    def __init__(self, by_confidence: bool, keeps_first: bool) -> None:
        self.by_confidence, self.keeps_first = by_confidence, keeps_first
        self.parts: list[Examples | str] = []  # of each minibatch; a text ends them, and says why there are no more
        self._count = 0
        # The scores of those correct, and those misclassified images that would be drawn by now.
        self._best = {kind: torch.full((DRAWN,), -torch.inf, dtype=torch.double) for kind in (True, False)}

    def add(self, logits: Any, batch: Any) -> None:
        """Take what `test_step` returned for a minibatch."""
        if self.parts and isinstance(self.parts[-1], str):
            return
        try:
            self.parts.append(self._examples(logits, *_images_and_labels(logits, batch)))
        except Exception as error:  # whatever a module returns must not fail its test
            self.parts.append(str(error) or type(error).__name__)

    def _examples(self, logits: Tensor, images: Tensor, labels: Tensor) -> Examples:
        labels = labels.cpu().long()
        confidences, predictions = logits.cpu().float().softmax(dim=1).max(dim=1)
        numbers = torch.arange(self._count, self._count + len(labels))
        self._count += len(labels)
        is_kept = numbers < (FIRST if self.keeps_first or images[:1].numel() <= PIXELS else 1)
        for is_correct, best in self._best.items():
            scores = (confidences if self.by_confidence and not is_correct else -numbers).double()
            scores = scores.where((predictions == labels) == is_correct, -torch.inf)
            top = scores.argsort(descending=True, stable=True)[:DRAWN]
            is_kept[top] |= scores[top] > best[-1]
            self._best[is_correct] = torch.cat([best, scores]).topk(DRAWN).values
        kept = images[is_kept.to(images.device)].cpu()
        return Examples(logits.shape[1], labels, predictions, confidences, is_kept.nonzero()[:, 0], kept)


def _images_and_labels(logits: Any, batch: Any) -> tuple[Tensor, Tensor]:
    """The two tensors of a minibatch; a ValueError where they, or the logits, are others."""
    if not isinstance(logits, Tensor) or logits.ndim != 2 or logits.shape[1] < 2:
        found = f"a tensor {tuple(logits.shape)}" if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(f"test_step returns no logits, (B, classes), but {found}")
    if isinstance(batch, list | tuple) and len(batch) == 2 and all(isinstance(each, Tensor) for each in batch):
        images, labels = batch
        if len(images) == len(labels) == len(logits) and labels.ndim == 1 and not labels.is_floating_point():
            return images, labels
    raise ValueError("a minibatch of the test is no pair of images, (B, ...), and class indices, (B,)")


def join(parts: list[Examples | str]) -> Examples:
    """Put the parts of a test together.

    Raises:
        ValueError: One of them is a text; it is the message.
    """
    found = [part for part in parts if isinstance(part, Examples)]
    if len(found) < len(parts) or not found:
        raise ValueError(next((part for part in parts if isinstance(part, str)), "the test has no minibatches"))
    labels, predictions, confidences, images = (
        torch.cat([getattr(part, name) for part in found])
        for name in ("labels", "predictions", "confidences", "images")
    )
    lengths = torch.tensor([0, *(len(part.labels) for part in found)]).cumsum(0).tolist()
    numbers = torch.cat([part.numbers + start for part, start in zip(found, lengths, strict=False)])
    return Examples(found[0].classes, labels, predictions, confidences, numbers, images)
