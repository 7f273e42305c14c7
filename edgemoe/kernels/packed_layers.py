"""Layers whose matrices stay in packed formats: they multiply, or look rows up, without a widened copy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import nn

from edgemoe.formats.weight_format import WeightFormat
from edgemoe.kernels.cpu.threads import KernelThreads, kernels_have_the_cores
from edgemoe.kernels.packed_linear import packed_linear
from edgemoe.kernels.row_linear import BATCH_INVARIANT_TOKENS, few_on_cpu

if TYPE_CHECKING:
    from edgemoe.kernels.cpu.packed.packed_matrix import PackedMatrix
    from edgemoe.kernels.triton.device_linear import PackedDense
    from edgemoe.kernels.triton.launcher import Launcher


class PackedWeight:
    """A matrix [rows, columns] in a packed format, in memory of its own."""

    def __init__(
        self, kind: WeightFormat, parts: Mapping[str, torch.Tensor], shape: tuple[int, int], dtype: torch.dtype
    ) -> None:
        """`parts` are those of `kind.parts("", shape)`, on one device. `dtype` is that of the model's tensors."""
        self.kind = kind
        self.parts = dict(parts)
        self.shape = shape
        self.dtype = dtype

    @property
    def nbytes(self) -> int:
        """Bytes of all parts."""
        return sum(part.nbytes for part in self.parts.values())

    def dequantize(self) -> torch.Tensor:
        """The whole matrix, widened to `dtype`."""
        return self.kind.dequantize(self.parts, "").to(self.dtype)


class PackedLinear(nn.Module):
    """`nn.Linear` with a packed weight. Products are summed in float32."""

    def __init__(self, weight: PackedWeight, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.bias = bias
        self.packed = weight
        self.matrix: PackedMatrix | None = None
        """What multiplies by the weight, where a kernel does."""
        self._threads: KernelThreads | None = None
        self._dense: PackedDense | None = None
        self._dense_tokens = 0

    @property
    def weight(self) -> torch.Tensor:
        """A widened copy of the weight, for code that does not call the layer."""
        return self.packed.dequantize()

    def use_kernels(self, threads: KernelThreads) -> None:
        """Multiplies by CPU kernels, on `threads`, where there are any for the format."""
        from edgemoe.kernels.cpu.packed import packed_matrix

        kind, columns = self.packed.kind, self.in_features
        if packed_matrix.fits(kind, columns):
            self.matrix = packed_matrix.PackedMatrix.of_views(kind, self.packed.parts, "", columns)
            self._threads = threads

    def use_launcher(self, launcher: Launcher, max_tokens: int) -> None:
        """Multiplies up to `max_tokens` tokens by a kernel of the device that the weight is on, where there is one."""
        # Imported late: it needs Triton.
        from edgemoe.kernels.triton.device_linear import PackedDense

        try:
            dense = PackedDense(launcher, self.packed.kind, self.packed.parts, self.packed.shape)
        except ValueError:
            return
        self.packed.parts = dense.parts
        self._dense, self._dense_tokens = dense, max_tokens

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """The product with `input`, [..., columns], and the bias, [..., rows] in the dtype of `input`."""
        flat = input.reshape(-1, self.in_features)
        product = self._product(flat)
        if self.bias is not None:
            product = product + self.bias.float()
        return product.to(input.dtype).view(*input.shape[:-1], self.out_features)

    def _product(self, x: torch.Tensor) -> torch.Tensor:
        if self._dense is not None and 0 < len(x) <= self._dense_tokens:
            return self._dense.multiply(x)
        matrix, threads = self.matrix, self._threads
        if matrix is None or threads is None:
            few, packed = few_on_cpu(x), self.packed
            return packed_linear(x, packed.kind, packed.parts, "", self.out_features, row_by_row=few)
        if 0 < len(x) <= matrix.max_tokens and kernels_have_the_cores(threads):
            return matrix.multiply_one(threads, x)
        return matrix.linear(0, x)


class PackedEmbedding(nn.Module):
    """`nn.Embedding` with a packed weight whose parts have a row for each token."""

    def __init__(self, weight: PackedWeight) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim = weight.shape
        self.packed = weight
        self._matrix: PackedMatrix | None = None

    def use_kernels(self) -> None:
        """Reads a few rows by a CPU kernel, where there is one for the format."""
        from edgemoe.kernels.cpu.packed import packed_matrix

        kind, columns = self.packed.kind, self.embedding_dim
        if packed_matrix.fits(kind, columns):
            matrix = packed_matrix.PackedMatrix.of_views(kind, self.packed.parts, "", columns)
            self._matrix = None if matrix.interleaved else matrix

    @property
    def weight(self) -> torch.Tensor:
        """See `PackedLinear`."""
        return self.packed.dequantize()

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """The rows of the ids `input`, [..., columns]."""
        packed = self.packed
        ids = input.reshape(-1)
        if self._matrix is not None and 0 < len(ids) <= BATCH_INVARIANT_TOKENS:
            found = [self._matrix.rows(0, each, each + 1) for each in ids.tolist()]
            return torch.cat(found).to(packed.dtype).view(*input.shape, self.embedding_dim)
        rows = {name: part.index_select(0, ids) for name, part in packed.parts.items()}
        values = packed.kind.rows(rows, "", 0, len(ids)).to(packed.dtype)
        return values.view(*input.shape, self.embedding_dim)
