"""Preconditioned conjugate gradients on symmetric positive definite problems, many at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

Linear = Callable[[torch.Tensor], torch.Tensor]


def minimised(
    apply: Linear,
    precondition: Linear,
    right: torch.Tensor,
    over: tuple[int, ...],
    iterations: int,
    tolerance: float,
) -> torch.Tensor:
    """X near the least X' A X - 2 X' B, from 0; B = `right`, A and about its inverse as functions.

    Step lengths are by the sums over the axes `over`: each index of the others is a problem of its
    own. Ends after `iterations`, or where one lowers the sum of all objectives by less than
    `tolerance` of what all before it did.
    """
    x, rest = torch.zeros_like(right), right
    way = precondition(rest)
    size = (rest * way).sum(over, keepdim=True)
    total = 0.0
    for _ in range(iterations):
        applied = apply(way)
        curve = (way * applied).sum(over, keepdim=True)
        length = torch.where((curve > 0) & (size > 0), size / curve, 0.0)
        x = x.addcmul_(way, length)
        rest = rest.addcmul(applied, length, value=-1)
        lowered = float((length * size).double().sum())
        total += lowered
        if lowered <= tolerance * total:
            break
        towards = precondition(rest)
        before, size = size, (rest * towards).sum(over, keepdim=True)
        way = towards.addcmul_(way, torch.where(before > 0, size / before, 0.0))
    return x


@contextmanager
def fast_products(fast: bool = True) -> Iterator[None]:
    """Inside, a GPU multiplies float32 matrices in TF32, whose 11 bits are enough for iterations
    (the next one corrects what one loses) and for what is made from bfloat16.
    """
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = fast
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
