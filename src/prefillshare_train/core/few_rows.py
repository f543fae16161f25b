"""Linear layers of decoding steps: a product of a few rows, where the weights' reading is all."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Beyond it the usual product is as fast (benchmarks/few_rows.py).
MOST_ROWS = 32
# One row takes longer than two, and three take longer than four.
_PADDED = {1: 2, 3: 4}


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear`, faster for a few rows in float32 on CPU.

    MKL multiplies `weight @ x.T` of two to four rows in half the time of `x @ weight.T`, which are
    the same sums (benchmarks/few_rows.py has other counts). Elsewhere, and where a gradient is
    kept, it is `F.linear` itself.

    Args:
        x: (..., in).
        weight: (out, in); bias: (out,).

    Returns:
        (..., out).
    """
    rows = x.numel() // x.shape[-1]
    on_cpu = x.device.type == "cpu" and x.dtype == weight.dtype == torch.float32
    if not on_cpu or not 1 <= rows <= MOST_ROWS or torch.is_grad_enabled():
        return F.linear(x, weight, bias)
    flat = x.reshape(rows, x.shape[-1]).contiguous()
    if rows in _PADDED:
        flat = F.pad(flat, (0, 0, 0, _PADDED[rows] - rows))
    # The next layer's product needs its rows whole again.
    output = (weight @ flat.t())[:, :rows].t().contiguous()
    if bias is not None:
        output += bias
    return output.view(*x.shape[:-1], weight.shape[0])


class FewRowsLinear(nn.Linear):
    """An `nn.Linear` over the very parameters of another, by this module's `linear`."""

    def __init__(self, layer: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.weight, self.bias = layer.weight, layer.bias
        self.train(layer.training)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        return linear(x, self.weight, self.bias)


def use_few_rows(model: nn.Module) -> None:
    """Let every plain linear layer of a model that only decodes run by `linear`."""
    for name, layer in list(model.named_modules()):
        if type(layer) is nn.Linear:
            model.set_submodule(name, FewRowsLinear(layer))
