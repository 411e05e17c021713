"""First values of weights, as the source of each family sets them."""

from __future__ import annotations

from torch import nn

from cellray.nn.attention import SelfAttention

__all__ = ["init_bert", "init_transformer"]


def init_bert(module: nn.Module, *, std: float = 0.02) -> None:
    """Normal(0, ``std``) weights and zero biases in every linear layer and table.

    For ``module.apply``; layer norms keep their ones and zeros. 0.02 is BERT's value
    (doi:10.18653/v1/N19-1423).
    """
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=std)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)


def init_transformer(module: nn.Module) -> None:
    """Xavier-uniform query, key and value projections, zero attention biases, for ``apply``.

    The start that torch's own multi-head attention takes; other layers keep torch's defaults.
    """
    if isinstance(module, SelfAttention):
        nn.init.xavier_uniform_(module.qkv.weight)
        nn.init.zeros_(module.qkv.bias)
        nn.init.zeros_(module.out.bias)
