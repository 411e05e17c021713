"""Geneformer: published sizes, and a forward pass against a BERT written out by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn import functional

from cellray.core.batch import CellBatch
from cellray.core.errors import ConfigError
from cellray.core.section import build_section
from cellray.data.vocab import Vocab
from cellray.models.base import BuildContext, build_model
from cellray.models.geneformer import FAMILY, Geneformer, GeneformerConfig

SPECIALS = ("<pad>", "<mask>", "<cls>", "<eos>")


def make_vocab(num_tokens: int, specials: tuple[str, ...] = SPECIALS) -> Vocab:
    num_genes = num_tokens - len(specials)
    return Vocab(
        gene_ids=tuple(f"G{i}" for i in range(num_genes)),
        symbols=("",) * num_genes,
        gene_tokens=np.arange(num_genes, dtype=np.int32) + len(specials),
        specials={name: i for i, name in enumerate(specials)},
    )


def make_model(max_tokens: int = 16, **config: object) -> Geneformer:
    torch.manual_seed(0)
    sizes = {"width": 16, "num_layers": 2, "num_heads": 4, "ffn_width": 24, **config}
    context = BuildContext(make_vocab(30), max_tokens=max_tokens)
    model = FAMILY.build(GeneformerConfig(**sizes), context)
    assert isinstance(model, Geneformer)
    for parameter in model.parameters():  # so that no bias or norm is trivially right
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def make_batch() -> CellBatch:
    tokens = torch.tensor([[2, 9, 5, 20, 3], [2, 29, 3, 0, 0]])
    return CellBatch(
        cell_ids=torch.arange(2),
        token_ids=tokens,
        values=torch.zeros(2, 5),
        attention_mask=tokens != 0,
    )


# Counts of the published models: doi:10.1038/s41586-023-06139-9 (V1) and the V2 configurations.
PUBLISHED = {
    "V1-10M": (25_426, 2_048, 6, 256, 4, 512, 10_288_722),
    "V1-40M": (25_426, 2_048, 12, 512, 8, 1_024, 39_591_250),
    "12L-38M": (20_275, 4_096, 12, 512, 8, 1_024, 37_997_363),
    "20L-151M": (20_275, 4_096, 20, 896, 14, 1_792, 151_313_459),
    "V2-104M": (20_275, 4_096, 12, 768, 12, 3_072, 104_386_867),
    "V2-316M": (20_275, 4_096, 18, 1_152, 18, 4_608, 316_354_867),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameter_counts_of_the_published_shapes(name):
    vocab, positions, layers, width, heads, ffn, expected = PUBLISHED[name]
    config = GeneformerConfig(width=width, num_layers=layers, num_heads=heads, ffn_width=ffn)
    with torch.device("meta"):
        model = FAMILY.build(config, BuildContext(make_vocab(vocab), max_tokens=positions))
    assert sum(p.numel() for p in model.parameters()) == expected


def bert_by_hand(model: Geneformer, tokens: torch.Tensor) -> list[torch.Tensor]:
    """Hidden states of one cell without padding, (T, D) each, embedding first; plain loops."""
    state = model.state_dict()

    def linear(x, name):
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    def norm(x, name):
        return functional.layer_norm(
            x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], eps=1e-12
        )

    x = state["embedding.token.weight"][tokens]
    x = x + state["embedding.position.weight"][: len(tokens)]
    x = norm(x + state["embedding.token_type.weight"][0], "embedding.norm")
    states = [x]
    for layer in range(model.config.num_layers):
        at = f"encoder.blocks.{layer}"
        q, k, v = linear(x, f"{at}.attention.qkv").chunk(3, dim=-1)
        mixed = []
        for head in range(4):
            columns = slice(4 * head, 4 * head + 4)
            logits = q[:, columns] @ k[:, columns].T / math.sqrt(4)
            mixed.append(torch.softmax(logits, -1) @ v[:, columns])
        joined = linear(torch.cat(mixed, -1), f"{at}.attention.out")
        x = norm(x + joined, f"{at}.attention_norm")
        inner = torch.relu(linear(x, f"{at}.expand"))
        x = norm(x + linear(inner, f"{at}.contract"), f"{at}.ffn_norm")
        states.append(x)
    return states


def test_hidden_states_and_logits_equal_bert_written_out():
    model, batch = make_model(), make_batch()
    where = torch.zeros(2, 5, dtype=torch.bool)
    where[0, [1, 3]] = True
    where[1, 1] = True
    out = model(replace(batch, target_mask=where))
    hand = [bert_by_hand(model, row[row != 0])[-1] for row in batch.token_ids]
    torch.testing.assert_close(out.hidden[0], hand[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(out.hidden[1, :3], hand[1], atol=1e-5, rtol=1e-5)
    picked = torch.stack([hand[0][1], hand[0][3], hand[1][1]])
    state = model.state_dict()
    dense = picked @ state["decoder.dense.weight"].T + state["decoder.dense.bias"]
    dense = functional.layer_norm(
        torch.relu(dense), (16,), state["decoder.norm.weight"], state["decoder.norm.bias"], 1e-12
    )
    want = dense @ state["embedding.token.weight"].T + state["decoder.bias"]
    torch.testing.assert_close(out.predictions["token_logits"], want, atol=1e-4, rtol=1e-4)


def test_cell_embeddings_are_means_over_genes_of_the_second_to_last_layer():
    model, batch = make_model(), make_batch()
    got = model.embed_cells(batch)
    first = bert_by_hand(model, batch.token_ids[0])[1][1:4].mean(0)
    second = bert_by_hand(model, batch.token_ids[1, :3])[1][1]
    torch.testing.assert_close(got, torch.stack([first, second]), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("layer", "index"), [(0, 2), (-1, 1), (-2, 0)])
def test_embedding_layer_counts_back_from_the_last(layer, index):
    model, batch = make_model(embedding_layer=layer, cell_embedding="cls"), make_batch()
    want = bert_by_hand(model, batch.token_ids[0])[index][0]
    torch.testing.assert_close(model.embed_cells(batch)[0], want, atol=1e-5, rtol=1e-5)


def test_a_cell_without_genes_is_the_mean_of_what_it_has():
    model = make_model(embedding_layer=0)
    tokens = torch.tensor([[2, 3], [0, 0]])
    mask = torch.tensor([[True, True], [True, False]])
    batch = replace(make_batch(), token_ids=tokens, attention_mask=mask)
    out = model(batch)
    torch.testing.assert_close(out.cell[0], out.hidden[0].mean(0))
    torch.testing.assert_close(out.cell[1], out.hidden[1, 0])


def test_gene_embeddings_are_rows_of_the_token_table():
    model = make_model()
    assert torch.equal(model.embed_genes(), model.embedding.token.weight[4:])


def test_position_matters():
    model, batch = make_model(embedding_layer=0), make_batch()
    swapped = replace(batch, token_ids=batch.token_ids[:, [0, 2, 1, 3, 4]])
    assert (model.embed_cells(batch)[0] - model.embed_cells(swapped)[0]).abs().max() > 1e-3


def test_the_classifier_pools_with_tanh():
    context = BuildContext(make_vocab(30), max_tokens=16)
    config = GeneformerConfig(width=16, num_layers=1, num_heads=4, ffn_width=24)
    model = build_model("geneformer", config, context, num_classes=3).eval()
    assert [name for name, _ in model.head.named_children()] == ["pooler", "dropout", "classifier"]
    assert model(make_batch()).predictions["class_logits"].shape == (2, 3)


def test_cells_longer_than_the_position_table_are_refused():
    with pytest.raises(ConfigError, match=r"max_tokens = 16 is more than model.max_positions = 8"):
        make_model(max_tokens=16, max_positions=8)
    with pytest.raises(ConfigError, match="a cell of 5 tokens does not fit into 4 positions"):
        make_model(max_tokens=4)(make_batch())
    assert make_model(max_tokens=16, max_positions=20).num_positions == 20


@pytest.mark.parametrize(
    ("raw", "text"),
    [
        ({"width": 10, "num_heads": 4}, "width = 10 is not a multiple of num_heads = 4"),
        ({"num_layers": 2, "embedding_layer": -3}, r"embedding_layer = -3.*allowed: -2 \.\. 0"),
        ({"activation": "tanh"}, "activation"),
        ({"num_layer": 2}, "did you mean 'num_layers'|Did you mean 'num_layers'"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(raw, text):
    with pytest.raises(ConfigError, match=text):
        build_section(GeneformerConfig, {"family": "geneformer", **raw})
