"""The conjugate collectives: values, and that each one's backward is its transpose."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.collectives import all_reduced, copy_to_group, gather_sequence, reduce_from_group, scatter_sequence
from tests.distributed.harness import run_distributed


def tensor_of(rank: int, salt: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(100 * salt + rank)
    return torch.randn(3, 4, generator=generator, dtype=torch.float64)


def _collectives() -> bool:
    rank = dist.get_rank()
    for ranks in ([0, 1, 2, 3], [0, 2], [1, 3]):
        group = dist.new_group(ranks)
        if rank not in ranks:
            continue
        total = sum((tensor_of(member) for member in ranks), torch.zeros(3, 4, dtype=torch.float64))
        upstream = tensor_of(rank, 1)
        upstream_total = sum((tensor_of(member, 1) for member in ranks), torch.zeros(3, 4, dtype=torch.float64))

        x = tensor_of(rank).requires_grad_()
        copied = copy_to_group(x, group)
        (gradient,) = torch.autograd.grad(copied, x, upstream)
        assert torch.equal(copied, x)
        torch.testing.assert_close(gradient, upstream_total, rtol=1e-14, atol=1e-14)
        assert torch.equal(upstream, tensor_of(rank, 1)), "the incoming gradient is not overwritten"

        reduced = reduce_from_group(x, group)
        (gradient,) = torch.autograd.grad(reduced, x, upstream)
        torch.testing.assert_close(reduced, total, rtol=1e-14, atol=1e-14)
        assert torch.equal(gradient, upstream)
        assert torch.equal(x, tensor_of(rank)), "nor is the input"

        # <A x, y> = <x, A^T y> holds for a map and its transpose only. One side of each map is the same tensor on every
        # rank and counts once; the other is a tensor of each rank and is summed over them.
        x, y = tensor_of(0, 2).requires_grad_(), tensor_of(rank, 3)
        copied = copy_to_group(x, group)
        (pulled,) = torch.autograd.grad(copied, x, y)
        left, right = all_reduced((copied * y).sum().detach(), group), (x * pulled).sum()
        torch.testing.assert_close(left, right.detach(), rtol=1e-12, atol=1e-12)

        x, y = tensor_of(rank, 2).requires_grad_(), tensor_of(0, 3)
        reduced = reduce_from_group(x, group)
        (pulled,) = torch.autograd.grad(reduced, x, y)
        left, right = (reduced * y).sum(), all_reduced((x * pulled).sum().detach(), group)
        torch.testing.assert_close(left.detach(), right, rtol=1e-12, atol=1e-12)

        transposed = tensor_of(rank).T
        torch.testing.assert_close(all_reduced(transposed, group), total.T, rtol=1e-14, atol=1e-14)
        assert torch.equal(transposed, tensor_of(rank).T)
    return True


def test_each_is_the_others_transpose() -> None:
    assert all(run_distributed(_collectives, 4))


def _sequences() -> bool:
    """A batch of 2 and of 1 (which takes no copies), with a dim behind the sequence and without."""
    rank = dist.get_rank()
    for ranks in ([0, 1, 2, 3], [0, 2], [1, 3]):
        group = dist.new_group(ranks)
        if rank not in ranks:
            continue
        for shape in ((2, 12, 3), (1, 12, 3), (2, 12)):
            mine = slice(12 // len(ranks) * ranks.index(rank), 12 // len(ranks) * (ranks.index(rank) + 1))
            whole = {member: torch.randn(shape, dtype=torch.float64, generator=seeded(member)) for member in ranks}
            total = torch.stack(list(whole.values())).sum(dim=0)

            part = whole[ranks[0]][:, mine].clone().requires_grad_()  # the parts of one tensor
            gathered = gather_sequence(part, group)
            (gradient,) = torch.autograd.grad(gathered, part, whole[rank])
            assert torch.equal(gathered, whole[ranks[0]])
            torch.testing.assert_close(gradient, total[:, mine], rtol=1e-14, atol=1e-14)

            partial = whole[rank].clone().requires_grad_()
            scattered = scatter_sequence(partial, group)
            (gradient,) = torch.autograd.grad(scattered, partial, whole[ranks[0]][:, mine])
            torch.testing.assert_close(scattered, total[:, mine], rtol=1e-14, atol=1e-14)
            assert torch.equal(gradient, whole[ranks[0]]), "every rank gets the whole gradient"
            assert torch.equal(partial, whole[rank]), "the input is not overwritten"
    return True


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_sequences_are_gathered_and_scattered() -> None:
    assert all(run_distributed(_sequences, 4))


def _alone() -> bool:
    group = dist.new_group([dist.get_rank()])
    x = tensor_of(0).requires_grad_()
    return all(f(x, group) is x for f in (copy_to_group, reduce_from_group, gather_sequence, scatter_sequence))


def test_a_group_of_one_costs_nothing() -> None:
    assert run_distributed(_alone, 1) == [True]
