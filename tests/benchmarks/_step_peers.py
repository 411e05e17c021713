"""The other side of ``train_step.py``: Hugging Face's BERT, and scGPT of torch's own layers.

Both take the padded batches of cellray and carry the published names, so that the adapters of
``cellray.models.upstream`` give them cellray's weights. They count their loss themselves.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cellray.core.batch import CellBatch, ModelOutput
from cellray.core.draw import Draw
from cellray.data.vocab import Vocab
from cellray.objectives.base import Loss

__all__ = ["HuggingFaceBert", "OwnLoss", "TorchScgpt", "transformers"]

Tensor = torch.Tensor


def transformers() -> Any:
    """The package, None where it is not installed."""
    if importlib.util.find_spec("transformers") is None:
        return None
    # tokenizers.py beside this file would stand in the place of the package it imports.
    before, here = sys.path[:], Path(__file__).parent
    sys.path[:] = [folder for folder in sys.path if Path(folder).resolve() != here.resolve()]
    try:
        package = importlib.import_module("transformers")
        _ = package.BertForMaskedLM  # its modules are imported when they are asked for
        return package
    finally:
        sys.path[:] = before


class HuggingFaceBert(nn.Module):
    """``BertForMaskedLM`` on a padded batch: logits everywhere, labels of -100 where not hidden."""

    def __init__(self, config: Any, vocab: Vocab, weights: dict[str, Tensor]) -> None:
        super().__init__()
        package = transformers()
        self.bert = package.BertForMaskedLM(
            package.BertConfig(
                vocab_size=vocab.num_tokens,
                hidden_size=config.width,
                num_hidden_layers=config.num_layers,
                num_attention_heads=config.num_heads,
                intermediate_size=config.ffn_width,
                hidden_act=config.activation,
                max_position_embeddings=config.max_positions,
                layer_norm_eps=config.layer_norm_eps,
                hidden_dropout_prob=0.0,
                attention_probs_dropout_prob=0.0,
                pad_token_id=vocab.pad,
            )
        )
        self.bert.load_state_dict(weights, strict=True)

    def forward(self, batch: CellBatch) -> ModelOutput:
        """Predicts ``total``, the summed loss, which is what Trainer makes of accumulated steps."""
        assert batch.targets is not None
        assert batch.target_mask is not None
        labels = torch.where(batch.target_mask, batch.targets, -100)
        mask = batch.attention_mask.long()
        out = self.bert(input_ids=batch.token_ids, attention_mask=mask, labels=labels)
        return _total(out.loss.float() * batch.target_mask.sum(), out.logits)


class TorchScgpt(nn.Module):
    """scGPT of torch's own layers, padded; its parameters carry the published names."""

    def __init__(self, config: Any, vocab: Vocab, weights: dict[str, Tensor]) -> None:
        super().__init__()
        width = config.width
        table = {
            "embedding": nn.Embedding(vocab.num_tokens, width),
            "enc_norm": nn.LayerNorm(width),
        }
        self.encoder = nn.ModuleDict(table)
        self.value_encoder = nn.ModuleDict(
            {
                "linear1": nn.Linear(1, width),
                "linear2": nn.Linear(width, width),
                "norm": nn.LayerNorm(width),
            }
        )
        self.flag_encoder = nn.Embedding(2, width)
        layer = nn.TransformerEncoderLayer(
            width, config.num_heads, config.ffn_width, dropout=0.0, batch_first=True
        )
        self.transformer_encoder = nn.TransformerEncoder(
            layer, config.num_layers, enable_nested_tensor=False
        )
        lines = [nn.Linear(width, width) for _ in range(2)]
        leaky = nn.LeakyReLU()
        fc = nn.Sequential(lines[0], leaky, lines[1], leaky, nn.Linear(width, 1))
        self.decoder = nn.ModuleDict({"fc": fc})
        query, product = nn.Linear(width, width), nn.Linear(width, width, bias=False)
        self.mvc_decoder = nn.ModuleDict({"gene2query": query, "W": product})
        self.num_heads = config.num_heads
        self.load_state_dict(weights, strict=True)

    def forward(self, batch: CellBatch) -> ModelOutput:
        """Predicts ``total``, the summed squared errors of both decoders, run at every position."""
        assert batch.targets is not None
        assert batch.target_mask is not None
        genes_BTD = self.encoder["enc_norm"](self.encoder["embedding"](batch.token_ids))
        lifted = torch.relu(self.value_encoder["linear1"](batch.values.clamp(max=512)[..., None]))
        second = self.value_encoder["norm"](self.value_encoder["linear2"](lifted))
        if batch.unknown_mask is None:
            padding_BT = ~batch.attention_mask
            hidden = self.transformer_encoder(genes_BTD + second, src_key_padding_mask=padding_BT)
        else:
            flag_D = self.flag_encoder.weight[1].to(second.dtype)
            second = torch.where(batch.unknown_mask[..., None], flag_D, second)
            hidden = self.transformer_encoder(genes_BTD + second, mask=self._mask(batch, second))
        gep_BT = self.decoder["fc"](hidden).squeeze(-1)
        query_BTD = torch.sigmoid(self.mvc_decoder["gene2query"](genes_BTD))
        gepc_BT = (self.mvc_decoder["W"](query_BTD) @ hidden[:, 0, :, None]).squeeze(-1)
        error = (gep_BT.float() - batch.targets).square()
        error = error + (gepc_BT.float() - batch.targets).square()
        return _total((error * batch.target_mask).sum(), hidden)

    def _mask(self, batch: CellBatch, like: Tensor) -> Tensor:
        """(B * H, T, T), 0 or -inf; padding is in it, which is faster than a mask of its own.

        Made once for all layers: torch would turn a bool mask into this one at every layer.
        """
        assert batch.unknown_mask is not None
        itself = torch.eye(batch.longest, dtype=torch.bool, device=like.device)
        allowed = (batch.attention_mask & ~batch.unknown_mask)[:, None, :] | itself
        mask = torch.zeros(allowed.shape, dtype=like.dtype, device=like.device)
        mask = mask.masked_fill_(~allowed, -torch.inf)
        return mask.repeat_interleave(self.num_heads, dim=0)


def _total(total: Tensor, hidden: Tensor) -> ModelOutput:
    """A model output that is its own loss."""
    return ModelOutput(hidden=hidden, cell=hidden, predictions={"total": total})


class OwnLoss:
    """The objective of a side that computes its loss itself."""

    def corrupt(self, batch: CellBatch, draw: Draw) -> CellBatch:
        return batch

    def loss(self, output: ModelOutput, batch: CellBatch) -> Loss:
        return Loss(output.predictions["total"], batch.num_targets)
