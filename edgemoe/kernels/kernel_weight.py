"""Weights that multiply by a kernel, for modules that call `F.linear` with a weight of their own, as routers do.

In bf16, PyTorch takes longer to begin a router's product for one token than to read its weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional as F

from edgemoe.kernels.batch_invariant_linear import has_kernel
from edgemoe.kernels.cpu.arrays import Groups
from edgemoe.kernels.cpu.slot_matrix import SlotMatrix
from edgemoe.kernels.cpu.threads import KernelThreads, kernels_have_the_cores

if TYPE_CHECKING:
    from edgemoe.kernels.cpu.program import Program


class KernelWeight(nn.Parameter):
    """A weight [rows, columns] whose products in its own dtype are a kernel's. Other uses are as usual.

    A token's product has the same bits in any company, as long as kernels have the cores.
    """

    product: _Product

    def __new__(cls, weight: torch.Tensor, threads: KernelThreads) -> KernelWeight:
        """Shares the memory of `weight`, which must stay where it is, on the CPU and contiguous."""
        made = super().__new__(cls, weight.detach(), False)
        made.product = _Product(weight.detach(), threads)
        return made

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """See PyTorch's `__torch_function__`."""
        with torch._C.DisableTorchFunctionSubclass():
            if has_product(func, args, kwargs):
                input, weight = args
                return weight.product.of(input)
            return func(*args, **(kwargs or {}))


class _Product:
    """The kernel of one weight."""

    def __init__(self, weight: torch.Tensor, threads: KernelThreads) -> None:
        self._matrix = SlotMatrix.of_weight(weight)
        self._threads = threads
        self._rows, self._columns = weight.shape
        self._dtype = weight.dtype
        self._one: tuple[Program, torch.Tensor, torch.Tensor] | None = None
        """For a single token: the program, which is made once, its input and its output."""

    def fits(self, input: Any) -> bool:
        """Whether the kernel computes the product with `input`."""
        usable = isinstance(input, torch.Tensor) and input.dtype is self._dtype and input.shape[-1] == self._columns
        return usable and input.numel() > 0 and kernels_have_the_cores(self._threads)

    def of(self, input: torch.Tensor) -> torch.Tensor:
        """The product, [..., rows] in the dtype of `input`."""
        flat = input.reshape(-1, self._columns)
        if len(flat) > 1:
            product = self._matrix.multiply_one(self._threads, flat)
        else:
            program, own, product = self._one or self._prepare()
            own.copy_(flat)
            program.run()
            # The next token writes over it.
            product = product.clone() if self._dtype is torch.float32 else product
        return product.to(self._dtype).view(*input.shape[:-1], self._rows)

    def _prepare(self) -> tuple[Program, torch.Tensor, torch.Tensor]:
        # Later passes may write to its memory in another mode than this one's.
        with torch.inference_mode(False):
            own = torch.empty(1, self._columns, dtype=self._matrix.inputs)
            out, steps = self._matrix.product(Groups.of_one(1), own)
        self._one = self._threads.program(steps), own, out
        return self._one


def has_product(func: Any, args: Sequence[Any], kwargs: dict[str, Any] | None) -> bool:
    """Whether a call of `func` is a product that the kernel of a KernelWeight computes: one without a bias."""
    if func is not F.linear or len(args) != 2 or kwargs:
        return False
    input, weight = args
    return isinstance(weight, KernelWeight) and weight.product.fits(input)


def install_kernel_weights(model: nn.Module, threads: KernelThreads) -> None:
    """Gives modules of `model` that are no layers of PyTorch a `KernelWeight` in the place of a large `weight`.

    The weights must stay where they are.
    """
    for module in model.modules():
        weight = module._parameters.get("weight")
        of_pytorch = type(module).__module__.startswith("torch.") or isinstance(module, nn.Embedding)
        if weight is None or of_pytorch or type(weight) is not nn.Parameter:
            continue
        if weight.dim() == 2 and has_kernel(weight):
            module._parameters["weight"] = KernelWeight(weight, threads)
