"""Named sizes of published models: exact parameter counts, built without memory."""

from __future__ import annotations

import pytest
import torch

from cellray.core import registry
from cellray.core.errors import ConfigError
from cellray.core.section import build_section
from cellray.data.vocab import Vocab
from cellray.models.base import BuildContext, family, with_preset
from cellray.runs import build_run

FAMILIES = registry.names("cellray.models")
PUBLISHED = [(n, p) for n in FAMILIES for p in family(n).presets]
COUNTS = {
    ("geneformer", "V1-10M"): 10_288_722,
    ("geneformer", "V1-40M"): 39_591_250,
    ("geneformer", "12L-38M"): 37_997_363,
    ("geneformer", "20L-151M"): 151_313_459,
    ("geneformer", "V2-104M"): 104_386_867,
    ("geneformer", "V2-316M"): 316_354_867,
    ("scbert", "panglao"): 8_388_607,
    ("scfoundation", "100M"): 119_252_285,
    ("scgpt", "whole-human"): 51_330_049,
    ("scgpt", "organ"): 38_979_073,
}


def built(name: str, preset: str) -> torch.nn.Module:
    unit = family(name)
    sizes = unit.presets[preset]
    ids = [f"G{i}" for i in range(sizes.num_genes)]
    vocab = Vocab.from_genes(ids, ids, specials=sizes.specials)
    model, tokenizer = with_preset(unit, {"family": name, "preset": preset}, {})
    config = build_section(unit.config, model)
    if name == "tosica":
        every = tuple(range(sizes.num_genes))
        vocab = vocab.with_gene_sets({f"P{i}": every for i in range(300)})
    context = BuildContext(vocab, max_tokens=tokenizer.get("max_tokens", 2048), tokenizer=tokenizer)
    with torch.device("meta"):
        return unit.build(config, context)


@pytest.mark.parametrize(("name", "preset"), PUBLISHED)
def test_parameter_counts_are_those_of_the_published_weights(name, preset):
    model = built(name, preset)
    count = sum(p.numel() for p in model.parameters())
    if name == "tosica":
        # dense, as its source holds it: 300 sets x 48 x 3,000 genes; with a head of 13 classes
        # 43.27 million numbers
        assert round((count + 13 * 49) / 1e6, 2) == 43.27
        return
    assert count == COUNTS[name, preset] == family(name).presets[preset].num_parameters


def test_scbert_trains_all_but_gene2vec():
    model = built("scbert", "panglao")
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 5_007_207


def test_a_preset_fills_in_what_is_not_given():
    raw = {
        "name": "x",
        "data": {"uri": "s"},
        "model": {"family": "geneformer", "preset": "V2-316M", "dropout": 0.3},
        "train": {"steps": 1},
    }
    run = build_run("pretrain", raw)
    assert run.model.width == 1152
    assert run.model.dropout == 0.3
    assert run.tokenizer.max_tokens == 4096
    assert run.tokenizer.specials is True
    raw["model"]["preset"] = "V2-361M"
    with pytest.raises(ConfigError, match="'V2-361M' is no preset.*Did you mean 'V2-316M'"):
        build_run("pretrain", raw)
