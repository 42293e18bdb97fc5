"""Forward-mode differentiation of a U-Net at the price of 2.5 to 3 forward passes.

`Dual` carries a value and its tangent through an unchanged network. A linear operation acts on both alike. SiLU,
softmax and group normalisation have symmetric Jacobians, so J v, which forward mode needs, equals v^T J, which the
fused backward kernels of PyTorch compute. What comes before the first dual input is computed without a tangent.

`torch.func.jvp` decomposes the same operations into elementary ones and takes 4 to 5 forward passes; it fails on
channels_last group normalisation and on fused attention. The tangent is never a difference of two near numbers, so it
keeps its digits in bf16. An operation that is not in the table below is an error, not a wrong derivative.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn import functional as F

# What depends on shapes and types only: methods, and attributes (but .T, .real, .data, ... are operations).
QUERIES = {"dim", "size", "stride", "is_contiguous", "is_floating_point"}
ATTRIBUTES = {"shape", "ndim", "dtype", "device", "requires_grad"}


class Dual(torch.Tensor):
    """Holds a value and its first-order change: `primal` and `tangent`, of the same shape.

    Under autocast the two may be of different floating types.
    """

    primal: torch.Tensor
    tangent: torch.Tensor

    def __new__(cls, primal: torch.Tensor, tangent: torch.Tensor) -> Dual:
        dual = torch.Tensor._make_subclass(cls, primal)
        dual.primal, dual.tangent = primal, tangent
        return dual

    @classmethod
    def __torch_function__(cls, func: Callable, types, args=(), kwargs=None):
        with torch._C.DisableTorchFunctionSubclass():
            if func in RULES:
                return RULES[func](func, *args, **kwargs or {})
            name = getattr(func, "__name__", str(func))
            attribute = getattr(getattr(func, "__self__", None), "__name__", "") if name == "__get__" else ""
            if name in QUERIES or attribute in ATTRIBUTES:
                return func(*args, **kwargs or {})
        raise NotImplementedError(
            f"derivative 'exact' has no rule for {attribute or name}, which this network_def uses; "
            "add it to custom_modules/methods/forward_mode.py, or take --derivative finite_difference."
        )


def split(x: torch.Tensor | Dual) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Returns value and tangent; a plain tensor is a constant, and its tangent is None."""
    return (x.primal, x.tangent) if isinstance(x, Dual) else (x, None)


def linear(func: Callable, x: Dual, *args, **kwargs) -> Dual:
    return Dual(func(x.primal, *args, **kwargs), func(x.tangent, *args, **kwargs))


def affine(func: Callable, x: Dual, weight: torch.Tensor, bias: torch.Tensor | None = None, *args, **kwargs) -> Dual:
    return Dual(func(x.primal, weight, bias, *args, **kwargs), func(x.tangent, weight, None, *args, **kwargs))


def symmetric(func: Callable, x: Dual, *args, **kwargs) -> Dual:
    """Applies an operation with a symmetric Jacobian: its backward pass is its forward derivative."""
    with torch.enable_grad():
        primal = x.primal.detach().requires_grad_()
        value = func(primal, *args, **kwargs)
        return Dual(value.detach(), torch.autograd.grad(value, primal, x.tangent.to(value.dtype))[0])


def group_norm(func: Callable, x: Dual, num_groups: int, weight=None, bias=None, eps: float = 1e-5) -> Dual:
    normal = symmetric(func, x, num_groups, eps=eps)  # the Jacobian is symmetric before the affine part only
    if weight is None:
        return normal
    weight, bias = (v.to(x.primal.dtype).view(1, -1, *[1] * (x.ndim - 2)) for v in (weight, bias))
    return Dual(torch.addcmul(bias, normal.primal, weight), normal.tangent.mul_(weight))


def dropout(func: Callable, x: Dual, p: float = 0.5, training: bool = True, inplace: bool = False) -> Dual:
    if training and p:
        raise NotImplementedError("derivative 'exact' needs a network in evaluation mode: dropout is on.")
    return x


def add(func: Callable, a, b) -> Dual:
    (p, dp), (q, dq) = split(a), split(b)
    value = func(p, q)
    if dp is not None and dq is not None:
        return Dual(value, func(dp, dq))
    return Dual(value, torch.empty_like(value).copy_(dq if dp is None else dp))  # broadcast, in the value's layout


def product(func: Callable, a, b) -> Dual:
    (p, dp), (q, dq) = split(a), split(b)
    if dp is None or dq is None:
        return Dual(func(p, q), func(p, dq) if dp is None else func(dp, q))
    return Dual(func(p, q), func(dp, q) + func(p, dq))


def einsum(func: Callable, equation: str, a, b) -> Dual:
    return product(lambda p, q: func(equation, p, q), a, b)


def cat(func: Callable, tensors, dim: int = 0) -> Dual:
    parts = [split(x) for x in tensors]
    return Dual(
        func([p for p, _ in parts], dim), func([torch.zeros_like(p) if dp is None else dp for p, dp in parts], dim)
    )


RULES: dict[Callable, Callable] = {
    torch.conv2d: affine,
    F.linear: affine,
    F.silu: symmetric,
    torch.Tensor.softmax: symmetric,
    F.group_norm: group_norm,
    torch.Tensor.add: add,
    torch.Tensor.mul: product,
    torch.Tensor.matmul: product,
    torch.functional.einsum: einsum,
    torch.cat: cat,
    F.dropout: dropout,
    **dict.fromkeys((F.interpolate, torch.pixel_shuffle, torch.pixel_unshuffle), linear),
    **dict.fromkeys((torch.Tensor.reshape, torch.Tensor.transpose, torch.Tensor.permute), linear),
    **dict.fromkeys((torch.Tensor.__getitem__, torch.Tensor.to, torch.Tensor.contiguous), linear),
}
