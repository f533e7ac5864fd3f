"""What is kept of a test for the figures: all predictions, and few images, those that are drawn."""

import re
from itertools import zip_longest

import pytest
import torch

from mnist_lightning.digits.examples import FIRST, Collector, join


@pytest.mark.parametrize("by_confidence", [False, True])
@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("side", [10, 40])
def test_keeps_the_images_that_are_drawn_and_few_others(by_confidence: bool, processes: int, side: int) -> None:
    count = 3000
    images, labels, logits = torch.rand(count, side, side), torch.randint(5, (count,)), torch.randn(count, 5)
    logits[torch.arange(count), labels] += 2
    logits[:2000:2] *= 99  # many are equally sure
    collectors = [Collector(by_confidence, keeps_first=False) for _ in range(processes)]
    for minibatch in torch.arange(count).split(70):
        for collector, part in zip(collectors, minibatch.tensor_split(processes), strict=True):
            collector.add(logits[part], (images[part], labels[part]))
    kept = max(sum(len(part.images) for part in each.parts if not isinstance(part, str)) for each in collectors)
    assert kept < 100 + (FIRST if side == 10 else 0)

    examples = join([part for parts in zip_longest(*(each.parts for each in collectors)) for part in parts])
    confidences, predictions = logits.softmax(1).max(1)
    wrong, right = (predictions != labels).nonzero()[:, 0], (predictions == labels).nonzero()[:, 0]
    if by_confidence:
        wrong = wrong[confidences[wrong].argsort(descending=True, stable=True)]
    assert torch.equal(examples.predictions, predictions)
    assert torch.equal(examples.mistakes(by_confidence), wrong)
    assert torch.equal(examples.correct(), right)
    for numbers in (right[:9], wrong[:9], torch.arange(FIRST if side == 10 else 1)):
        assert torch.equal(examples.pictures(numbers), images[numbers])


PAIR = torch.rand(4, 3), torch.zeros(4, dtype=torch.long)
NO_LOGITS, NO_PAIR = "test_step returns no logits, (B, classes), but ", "a minibatch of the test is no pair of images"


@pytest.mark.parametrize(
    ("logits", "batch", "why"),
    [
        (None, PAIR, f"{NO_LOGITS}NoneType"),
        ({"loss": 1}, PAIR, f"{NO_LOGITS}dict"),
        (torch.rand(4), PAIR, f"{NO_LOGITS}a tensor (4,)"),
        (torch.rand(4, 1), PAIR, f"{NO_LOGITS}a tensor (4, 1)"),
        (torch.rand(5, 2), PAIR, NO_PAIR),
        (torch.rand(4, 2), PAIR[0], NO_PAIR),
        (torch.rand(4, 2), {"image": PAIR[0], "label": PAIR[1]}, NO_PAIR),
        (torch.rand(4, 2), (PAIR[0], torch.eye(4)), NO_PAIR),
        (torch.rand(4, 2), (PAIR[0], torch.rand(4)), NO_PAIR),
    ],
    ids=lambda each: type(each).__name__,
)
def test_says_what_it_cannot_take(logits: object, batch: object, why: str) -> None:
    collector = Collector(by_confidence=False, keeps_first=False)
    collector.add(torch.rand(4, 2), PAIR)
    for _ in range(2):
        collector.add(logits, batch)
    assert len(collector.parts) == 2
    with pytest.raises(ValueError, match=re.escape(why)):
        join(collector.parts)


def test_says_that_there_is_nothing() -> None:
    with pytest.raises(ValueError, match="the test has no minibatches"):
        join([])
