"""The providers of the loss: this package, eager PyTorch and other packages ("peers").

Each is called as its users call it. A provider takes a batch and the tensors that need a gradient, and
returns the loss. If a peer computes only log-probabilities, `token_losses` follows in eager PyTorch. If a
provider cannot do a workload, it gives a reason, which the results show.
"""

from .from_hidden import (
    compiled_linear_with_kl,
    eager_linear,
    eager_linear_with_kl,
    ours_in_bf16,
    ours_linear,
    ours_skipping,
    refused_without_idle_rows,
)
from .from_logits import (
    compiled_with_kl,
    eager,
    eager_logps,
    eager_with_kl,
    ours,
    ours_inplace,
    ours_selective,
)
from .provider import PROVIDERS, Loss, Provider, installed_version, needs_gpu

__all__ = [
    "PROVIDERS",
    "Loss",
    "Provider",
    "compiled_linear_with_kl",
    "compiled_with_kl",
    "eager",
    "eager_linear",
    "eager_linear_with_kl",
    "eager_logps",
    "eager_with_kl",
    "installed_version",
    "needs_gpu",
    "ours",
    "ours_in_bf16",
    "ours_inplace",
    "ours_linear",
    "ours_selective",
    "ours_skipping",
    "refused_without_idle_rows",
]
