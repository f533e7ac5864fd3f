"""Synthetic digits in MNIST's format that look handwritten, for where MNIST cannot be downloaded."""

import math
import struct
from pathlib import Path

import torch
from torch import Generator, Tensor

SIZES = {"train": 60_000, "t10k": 10_000}  # digits in the files of each of MNIST's two sets

# The ways people write each digit: (digit, how common among its ways, path). The paths were written by hand and the
# weights guessed; looking at real digits told which ways were missing, but nothing was computed from them. A path lists
# the points that the pen passes through in a smooth curve, "x,y" in percent of the digit's height, y pointing down; "^"
# after a point makes it a sharp corner, and ";" lifts the pen.
GLYPHS: tuple[tuple[int, int, str], ...] = (
    (0, 2, "38,3 20,3 5,25 2,52 8,82 28,98 48,86 58,52 50,18 34,2"),
    (0, 1, "45,12 25,2 5,22 2,55 12,88 32,98 54,80 60,45 48,12 28,4 18,10"),
    (0, 1, "24,6 6,30 4,66 22,96 46,92 58,60 50,22 40,10"),
    (1, 6, "30,0 30,50 30,100"),
    (1, 2, "12,25 32,0^ 32,50 32,100"),
    (1, 1, "12,22 32,0^ 32,50 32,100; 8,100 56,100"),
    (2, 2, "5,22 15,6 32,0 50,10 52,30 36,58 2,98^ 60,96"),
    (2, 2, "5,22 18,4 38,2 52,20 46,46 28,74 10,92 2,84 12,76 30,88 46,98 62,92"),
    (2, 1, "8,18 28,2 50,12 48,38 24,70 4,96^ 22,88 42,98 62,90"),
    (2, 1, "8,14 30,0 52,14 50,44 36,78 14,97 2,80 18,66 40,82 64,98"),
    (3, 3, "6,14 26,0 48,10 46,34 22,46^ 46,52 56,74 40,97 18,98 2,84"),
    (3, 1, "6,12 28,0 50,14 40,40 20,50 16,44 26,44 50,56 54,80 32,99 4,90"),
    (3, 1, "6,4 52,2^ 24,40^ 48,50 54,74 36,98 4,90"),
    (4, 2, "8,4 4,54^ 56,50; 46,0 44,50 42,100"),
    (4, 1, "44,2^ 2,62^ 60,62; 44,2 43,50 42,100"),
    (4, 1, "4,6 2,38 12,52 34,48 52,34; 56,2 50,50 42,100"),
    (5, 2, "16,4 10,44^ 34,36 54,52 52,80 30,98 2,90; 16,4 58,2"),
    (5, 1, "54,4 28,2 14,16 16,36 40,52 50,72 36,95 4,94"),
    (5, 1, "20,8 14,42^ 36,42 48,64 36,94 10,96 6,78; 20,8 66,2"),
    (6, 2, "46,0 20,22 4,56 8,88 28,99 50,86 50,62 32,52 10,68"),
    (6, 2, "36,0 14,36 4,72 16,97 40,94 46,72 30,62 8,80"),
    (6, 1, "20,0 8,34 4,68 16,96 44,98 60,78 48,60 24,66 14,88"),
    (6, 1, "54,8 38,0 16,20 3,60 14,94 38,98 54,78 42,56 20,60 8,76"),
    (7, 3, "2,6 56,4^ 40,40 24,100"),
    (7, 1, "2,6 56,4^ 40,40 26,100; 16,50 58,46"),
    (7, 1, "4,20 6,4^ 58,4^ 40,50 30,100"),
    (7, 2, "2,14 20,4 50,6 56,14 36,56 28,100"),
    (8, 1, "30,48 10,34 8,12 30,0 50,12 48,34 30,48 6,62 4,86 30,100 54,86 52,62 30,48"),
    (8, 1, "56,8 34,0 12,12 18,36 46,64 48,90 24,99 6,86 18,60 44,36 58,12"),
    (8, 2, "50,18 34,2 12,12 16,34 44,62 50,86 28,100 8,84 22,58 62,4"),
    (8, 1, "46,14 28,0 6,14 10,38 36,54 46,78 30,99 14,82 22,58 44,38 48,16"),
    (9, 2, "48,14 28,1 6,16 8,42 28,50 46,30 50,8^ 49,50 46,100"),
    (9, 1, "50,14 28,0 6,16 8,42 30,50 48,30 52,10 52,60 40,94 10,96"),
    (9, 2, "46,8 20,4 4,28 18,48 40,38 50,8^ 44,52 26,100"),
    (9, 2, "48,22 36,2 14,4 4,24 14,44 36,42 48,22 48,60 44,100"),
    (9, 1, "60,2 30,2 6,20 12,44 36,38 56,8^ 44,54 38,100"),
)

# MNIST's format: a digit fits a box of 20x20, and its centre of mass lies at pixel (14, 14) of the 28x28.
BOX, CANVAS, CENTRE = 20, 28, 14

DOTS = 72  # pen dots per digit: about a pixel apart along the longest paths, so that the line shows no beads
CHUNK = 100  # digits drawn at once: their dot-to-pixel distances (11 MB) about fit a processor's cache

# How far writers stray from the table, as standard deviations. Large enough that a network still makes mistakes,
# small enough that people make few.
JITTER = 0.035  # of each point of a path on its own, as a share of the digit's height
FIELD = 0.08  # of the field that moves neighbouring points together, as a share of the digit's height
FIELD_RANGE = 0.4  # how near "neighbouring" is, as a share of the digit's height
FIELD_WAVES = 8  # enough that the sum of the waves looks like no wave
WIDTH = 0.25  # of the logarithm of the stretch sideways
SLANT, MEAN_SLANT = 0.25, 0.15  # sideways per unit of height; most writers lean to the right
TURN = 0.1  # radians
PEN_WIDTH = (1.8, 4.0)  # pixels, uniform between: from a fine ballpoint to a felt tip that fills small loops


def draw_digits(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Draw digits, with a progress bar.

    Each digit takes one of its class's paths in `GLYPHS`, distorted at random: its points jittered, then moved by a
    smooth field (after the elastic distortions of Simard, Steinkraus and Platt, 2003, but applied to the pen's path,
    not to the image), then stretched, slanted and turned. A round pen of random width follows the path. The result is
    scaled into 20x20 pixels and centred by its mass in 28x28, as LeCun, Bottou, Bengio and Haffner (1998) made MNIST.

    Args:
        count: Number of digits, at least 1.
        seed: The same seed and count give the same digits (another machine may round a pixel differently).

    Returns:
        Images, (count, 28, 28) uint8, 0 for paper to 255 for ink; and labels, (count,) int64, 0 to 9, in random order,
        each equally frequent (to within one digit).
    """
    from rich.console import Console  # not for each `fit`
    from rich.progress import track

    generator = Generator().manual_seed(seed)
    digits, weights, points, curves = _table()
    labels = (torch.arange(count) % 10)[torch.randperm(count, generator=generator)]
    images = []
    for chunk in track(labels.split(CHUNK), f"Generating {count:,} synthetic digits", console=Console(stderr=True)):
        way = torch.multinomial(weights * (chunk[:, None] == digits), 1, generator=generator).squeeze(1)
        jitter = JITTER * torch.randn(len(chunk), *points.shape[1:], generator=generator)
        images.append(_ink(_distort(curves[way] @ (points[way] + jitter), generator), generator))
    return torch.cat(images), labels


def _table() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """GLYPHS as tensors: digits (G,), weights (G,), points (G, P, 2) and curves (G, DOTS, P).

    A glyph's curve is the matrix that takes its points to dots evenly spaced along its path: a spline is linear in its
    points, so one product draws a whole batch after jitter.
    """
    size = max(len(path.replace(";", " ").split()) for _, _, path in GLYPHS)
    points, curves = torch.zeros(len(GLYPHS), size, 2), torch.empty(len(GLYPHS), DOTS, size)
    for glyph, (_, _, path) in enumerate(GLYPHS):
        place, pieces = 0, []
        for stroke in path.split(";"):
            piece: list[int] = []
            for point in stroke.split():
                points[glyph, place] = torch.tensor([float(number) / 100 for number in point.rstrip("^").split(",")])
                piece.append(place)
                if point.endswith("^"):
                    pieces.append(piece)
                    piece = [place]
                place += 1
            pieces.append(piece)
        splines = [_spline(torch.eye(size)[piece]) for piece in pieces]
        steps = torch.cat([(spline @ points[glyph]).diff(dim=0).norm(dim=1) for spline in splines])
        travelled = steps.cumsum(0)
        even = (torch.arange(DOTS) + 0.5) / DOTS * travelled[-1]
        curves[glyph] = torch.cat([spline[1:] for spline in splines])[torch.searchsorted(travelled, even)]
    digits, weights = torch.tensor([glyph[:2] for glyph in GLYPHS]).float().T
    return digits, weights, points, curves


def _spline(points: Tensor, steps: int = 50) -> Tensor:
    """The Catmull-Rom curve through points (n, d), as ((n - 1) * steps + 1, d) points in order."""
    padded = torch.cat([2 * points[:1] - points[1:2], points, 2 * points[-1:] - points[-2:-1]])
    a, b, c, d = (padded[i : i + len(points) - 1, None] for i in range(4))
    t = torch.arange(steps)[:, None] / steps
    curve = b + t / 2 * (c - a + t * (2 * a - 5 * b + 4 * c - d + t * (3 * (b - c) + d - a)))
    return torch.cat([curve.flatten(0, 1), points[-1:]])


def _distort(dots: Tensor, generator: Generator) -> Tensor:
    """Bend, stretch, slant and turn each digit of dots (n, DOTS, 2) in its own way."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(len(dots), *shape, generator=generator)

    # A sum of sine waves of normally distributed frequency is as smooth as noise blurred by a Gaussian (Rahimi and
    # Recht, 2007), and can be had at the dots alone.
    phases = 2 * math.pi * torch.rand(len(dots), 1, FIELD_WAVES, generator=generator)
    waves = torch.sin(dots @ normal(2, FIELD_WAVES) / FIELD_RANGE + phases)
    dots = dots + FIELD * math.sqrt(2 / FIELD_WAVES) * waves @ normal(FIELD_WAVES, 2)

    y = dots[..., 1]
    x = dots[..., 0] * torch.exp(WIDTH * normal(1)) - (MEAN_SLANT + SLANT * normal(1)) * y
    turn = TURN * normal(1)
    return torch.stack([x * turn.cos() - y * turn.sin(), x * turn.sin() + y * turn.cos()], dim=2)


def _ink(dots: Tensor, generator: Generator) -> Tensor:
    """Images (n, 28, 28) of a round pen that went along the dots (n, DOTS, 2)."""
    thin, thick = PEN_WIDTH
    pen = thin + (thick - thin) * torch.rand(len(dots), 1, 1, generator=generator)
    low, high = dots.amin(1, keepdim=True), dots.amax(1, keepdim=True)
    dots = (dots - (low + high) / 2) * (BOX - pen) / (high - low).amax(2, keepdim=True)

    cells = torch.cartesian_prod(torch.arange(BOX), torch.arange(BOX))  # (row, column)
    pixels = cells.flip(1) - (BOX - 1) / 2  # (x, y) from the middle of the box
    # |dot - pixel|^2 = |dot|^2 - 2 dot.pixel + |pixel|^2: one product gives all but the last, which all dots share.
    terms = torch.cat([dots, dots.square().sum(2, keepdim=True)], dim=2)
    partial = terms @ torch.cat([-2 * pixels, torch.ones(len(pixels), 1)], dim=1).T
    nearest = (partial.amin(1) + pixels.square().sum(1)).clamp(min=0).sqrt()
    ink = (pen[:, 0] / 2 - nearest + 0.5).clamp(0, 1)  # the pixels on the pen's edge are partly inked

    mass = ink @ cells.float() / ink.sum(1, keepdim=True)
    corner = (CENTRE - mass).round().long().clamp(0, CANVAS - BOX)
    row, column = (cells + corner[:, None]).unbind(2)
    canvas = torch.zeros(len(dots), CANVAS * CANVAS).scatter_(1, row * CANVAS + column, ink)
    return (255 * canvas).round().to(torch.uint8).view(-1, CANVAS, CANVAS)


def make(directory: Path) -> None:
    """Draw the digits of the training and the test files from fixed seeds."""
    for seed, (split, size) in enumerate(SIZES.items()):
        images, labels = draw_digits(size, seed)
        for name, values in {"images-idx3": images, "labels-idx1": labels.to(torch.uint8)}.items():
            # The IDX format: 0, 0, the type (8 is unsigned bytes), the rank, each dimension; then the values.
            header = struct.pack(f">4B{values.ndim}I", 0, 0, 8, values.ndim, *values.shape)
            (directory / f"{split}-{name}-ubyte").write_bytes(header + values.numpy().tobytes())
