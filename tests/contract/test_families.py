"""What every model family must do, found by listing the package: a new file is tested at once."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import cellray
from cellray.core import registry
from cellray.core.batch import CellBatch, pack, unpack
from cellray.core.blocks import TokenBlock
from cellray.core.draw import Draw
from cellray.core.section import build_section, to_dict
from cellray.data.collate import collate_tokens
from cellray.data.vocab import Vocab
from cellray.models.base import (
    BuildContext,
    CellModel,
    EmbedsCells,
    EmbedsGenes,
    ExposesAttention,
    Family,
    PredictsExpression,
    build_model,
    family,
)
from cellray.objectives.base import Objective, Tallies
from cellray.testing import random_block
from cellray.train.microbatch import Collator

FAMILIES = registry.names("cellray.models")
NUM_GENES = 50
MAX_TOKENS = 64
# Sizes that most families share; a family that has other keys gets those it knows.
SMALL = {
    "width": 16,
    "num_layers": 2,
    "num_heads": 4,
    "ffn_width": 24,
    "head_width": 8,
    "gene_sets": "",  # random ones
    "max_sets": 6,
    "random_fraction": 0.3,
    "drop_path": 0.0,
    "decoder_width": 12,
    "decoder_layers": 1,
    "decoder_heads": 2,
    "decoder_head_width": 8,
    "decoder_ffn_width": 16,
    "value_bins": 7,
}
# Parameters that pretraining does not reach, and why.
WITHOUT_GRADIENT: dict[str, set[str]] = {
    "scfoundation": {"values.pad"},  # stands in where a cell has nothing to read
}
# Capabilities each family claims in the house plan.
CLAIMS: dict[str, set[type]] = {
    "geneformer": {EmbedsCells, EmbedsGenes, ExposesAttention},
    "scgpt": {EmbedsCells, EmbedsGenes, ExposesAttention, PredictsExpression},
    "scbert": {EmbedsCells, EmbedsGenes, ExposesAttention, PredictsExpression},
    "tosica": {EmbedsCells, ExposesAttention},
    "scfoundation": {EmbedsCells, EmbedsGenes, PredictsExpression},
}


def small_config(unit: Family, **extra: Any) -> Any:
    known = {k: v for k, v in {**SMALL, **extra}.items() if k in unit.config.model_fields}
    return build_section(unit.config, {"family": unit.name, **known})


class Small:
    """A family in a debug size with its tokenizer, its objective and cells to work on."""

    def __init__(self, name: str, **extra: Any) -> None:
        self.unit = family(name)
        tokenizer = registry.find("cellray.tokenizers", self.unit.tokenizer, "TOKENIZER")
        ids = [f"G{i}" for i in range(NUM_GENES)]
        vocab = Vocab.from_genes(ids, ids, specials=tokenizer.specials)
        if tokenizer.needs_medians:
            vocab = vocab.with_medians(np.linspace(0.5, 3, NUM_GENES).astype(np.float32))
        config = {"name": self.unit.tokenizer, "max_tokens": MAX_TOKENS}
        self.tokenize = tokenizer.build(build_section(tokenizer.config, config), vocab)
        self.classes = 3 if self.unit.objective == "classification" else 0  # learns from labels
        objective = registry.find("cellray.objectives", self.unit.objective, "OBJECTIVE")
        raw = {"name": self.unit.objective}
        self.objective: Objective = objective.build(build_section(objective.config, raw), vocab)
        self.config = small_config(self.unit, **extra)
        self.vocab = self.unit.prepare(self.config, vocab)
        self.context = BuildContext(self.vocab, max_tokens=MAX_TOKENS, tokenizer=config)

    def model(self, num_classes: int = 0) -> CellModel:
        torch.manual_seed(0)
        return build_model(self.unit.name, self.config, self.context, num_classes=num_classes)

    def trained(self) -> CellModel:
        """The model as its own objective trains it: with a classifier if it learns from labels."""
        return self.model(self.classes)

    def batch(self, rows: list[int] | None = None, step: int = 0) -> CellBatch:
        """Cells 0..7 of 20 genes, or those of ``rows``; cells 8..9 have 45."""
        short = random_block(8, num_genes=NUM_GENES, genes_per_cell=20, seed=0)
        long = random_block(2, num_genes=NUM_GENES, genes_per_cell=45, seed=1)
        block = replace(
            short,
            joinids=np.arange(10),
            indptr=np.concatenate([short.indptr, short.indptr[-1] + long.indptr[1:]]),
            genes=np.concatenate([short.genes, long.genes]),
            counts=np.concatenate([short.counts, long.counts]),
            library_sizes=np.concatenate([short.library_sizes, long.library_sizes]),
        )
        block = block.take(np.array(range(8) if rows is None else rows))
        return self.collate(self.tokenize(block, Draw(0)), step)

    def collate(self, tokens: TokenBlock, step: int = 0) -> CellBatch:
        codes = {"label": tokens.joinids % 3} if self.classes else {}
        return collate_tokens(tokens, pad=self.vocab.pad, covariates=codes, step=step)

    def corrupted(self, rows: list[int] | None = None, step: int = 0) -> CellBatch:
        return self.objective.corrupt(self.batch(rows, step), Draw(0))


@pytest.fixture(params=FAMILIES)
def small(request: pytest.FixtureRequest) -> Small:
    return Small(request.param)


def test_there_are_families():
    assert {"geneformer", "scgpt"} <= set(FAMILIES)


def test_the_name_equals_the_module_and_its_units_exist(small):
    assert small.unit.name in FAMILIES
    assert small.unit.config.model_fields["family"].default == small.unit.name
    assert small.unit.tokenizer in registry.names("cellray.tokenizers")
    assert small.unit.objective in registry.names("cellray.objectives")


@pytest.mark.parametrize(
    ("package", "attribute"),
    [
        ("cellray.tokenizers", "TOKENIZER"),
        ("cellray.objectives", "OBJECTIVE"),
        ("cellray.models", "FAMILY"),
    ],
)
def test_every_unit_has_its_modules_name_and_default_config(package, attribute):
    for name in registry.names(package):
        unit = registry.find(package, name, attribute)
        assert unit.name == name
        key = "family" if attribute == "FAMILY" else "name"
        assert getattr(build_section(unit.config, {key: name}), key) == name
    assert registry.names(package)


def test_the_config_round_trips(small):
    raw = to_dict(small.config)
    assert build_section(small.unit.config, raw) == small.config


def test_it_builds_on_the_meta_device_with_its_default_sizes(small):
    with torch.device("meta"):
        model = small.unit.build(small.unit.config(), small.context)
    assert all(p.is_meta for p in model.parameters())
    assert model.width % small.unit.config().width == 0


def test_a_few_steps_lower_the_loss_on_8_cells():
    for name in FAMILIES:
        small = Small(name, dropout=0.0)
        model, batch = small.trained().train(), small.corrupted()
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        losses = []
        for _ in range(12):
            optimizer.zero_grad()
            loss = small.objective.loss(model(batch), batch)
            (loss.total / loss.num_targets).backward()
            optimizer.step()
            losses.append(loss.total.item() / loss.num_targets)
        assert loss.num_targets == batch.num_targets > 0
        assert losses[-1] < 0.9 * losses[0], (name, losses)


def test_what_validation_reports_is_declared(small):
    model, batch = small.trained().eval(), small.corrupted()
    with torch.no_grad():
        output = model(batch)
    reported = set(small.objective.loss(output, batch).parts)
    if isinstance(small.objective, Tallies):
        tally = small.objective.tally(output, batch).double()
        reported |= set(small.objective.judged(tally))
    unit = registry.find("cellray.objectives", small.unit.objective, "OBJECTIVE")
    assert reported
    assert reported <= set(unit.metrics)


def assert_cell_alike(model: CellModel, small: Small, alone: CellBatch, other: CellBatch, row: int):
    length = alone.token_ids.shape[1]
    with torch.no_grad():
        one, many = model(alone), model(other)
    torch.testing.assert_close(many.cell[row], one.cell[0], atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(many.hidden[row, :length], one.hidden[0], atol=2e-6, rtol=1e-5)


def test_a_cell_does_not_depend_on_padding_or_batch_mates(small):
    model = small.model().eval()
    # Row 2 of the batch is cell 3, padded from 20 genes to 45.
    for make in (small.batch, small.corrupted):
        assert_cell_alike(model, small, make([3]), make([9, 0, 3, 8]), row=2)


def test_predictions_do_not_depend_on_batch_mates(small):
    model = small.trained().eval()
    alone, many = small.corrupted([3]), small.corrupted([9, 0, 3, 8])
    before = int(many.target_mask[:2].sum())
    with torch.no_grad():
        one, all_of_them = model(alone).predictions, model(many).predictions
    assert one.keys() == all_of_them.keys()
    assert alone.num_targets > 0
    for name, value in one.items():
        mine = all_of_them[name][before : before + alone.num_targets]
        torch.testing.assert_close(mine, value, atol=2e-6, rtol=1e-5)


# Cells of 20 and of 45 genes; the empty cell of `with_empty` has none.
MIXED = [9, 0, 3, 8, 5]


def with_empty(small: Small) -> CellBatch:
    some = random_block(6, num_genes=NUM_GENES, genes_per_cell=20, seed=0)
    indptr = np.concatenate([some.indptr[:3], some.indptr[2:]])  # an empty cell after two
    sizes = np.insert(some.library_sizes, 2, 0.0)
    block = replace(some, joinids=np.arange(7), indptr=indptr, library_sizes=sizes)
    return small.collate(small.tokenize(block, Draw(0)))


@pytest.mark.parametrize("step", [0, 10**6])
def test_a_packed_batch_is_hidden_like_the_padded_one(small, step):
    for padded in (small.batch(MIXED, step), with_empty(small)):
        want = pack(small.objective.corrupt(padded, Draw(0)))
        got = small.objective.corrupt(pack(padded), Draw(0))
        for name in ("token_ids", "values", "target_mask", "unknown_mask"):
            one, two = getattr(got, name), getattr(want, name)
            assert (one is None and two is None) or torch.equal(one, two), name
        assert torch.equal(got.targets[got.target_mask], want.targets[want.target_mask])
        assert got.num_targets > 0
        assert got.cell_prompt == want.cell_prompt


# Another cell embedding than the default one.
OTHER_CELL = {"geneformer": "cls", "scbert": "expressed", "scfoundation": "max"}


@pytest.mark.parametrize("other", [False, True])
@pytest.mark.parametrize("step", [0, 10**6])
def test_a_packed_batch_gives_the_outputs_loss_and_gradients_of_the_padded_one(small, step, other):
    name = small.unit.name
    extra: dict[str, Any] = {"gen_out_proj": False, "token_layout": "interleaved"} if other else {}
    if other and name in OTHER_CELL:
        extra["cell_embedding"] = OTHER_CELL[name]
    small = Small(name, dropout=0.0, **extra)
    for batch in (small.batch(MIXED, step), with_empty(small)):
        padded = small.objective.corrupt(batch, Draw(0))
        results = []
        for one in (padded, small.objective.corrupt(pack(batch), Draw(0))):
            model = small.trained().train()
            output = model(one)
            loss = small.objective.loss(output, one)
            loss.total.backward()
            results.append((output, loss, dict(model.named_parameters())))
        (want, want_loss, want_weights), (got, got_loss, got_weights) = results
        close = {"atol": 1e-5, "rtol": 1e-5}
        torch.testing.assert_close(got.hidden, want.hidden[padded.attention_mask], **close)
        torch.testing.assert_close(got.cell, want.cell, **close)
        assert got.predictions.keys() == want.predictions.keys()
        for name, value in want.predictions.items():
            torch.testing.assert_close(got.predictions[name], value, **close)
        assert got_loss.num_targets == want_loss.num_targets
        torch.testing.assert_close(got_loss.total, want_loss.total, atol=0, rtol=1e-5)
        for name, weight in want_weights.items():
            if weight.grad is not None:
                scale = float(weight.grad.abs().max())
                torch.testing.assert_close(
                    got_weights[name].grad, weight.grad, atol=1e-5 * max(scale, 1.0), rtol=1e-4
                )


def test_capabilities_and_classes_of_a_packed_batch_are_those_of_the_padded_one(small):
    padded = small.batch(MIXED)
    packed = pack(padded)
    assert torch.equal(unpack(packed, pad=small.vocab.pad).token_ids, padded.token_ids)
    model = small.model().eval()
    classifier = small.model(num_classes=3).eval()
    close = {"atol": 1e-5, "rtol": 1e-5}
    with torch.no_grad():
        one, two = classifier(packed).predictions, classifier(padded).predictions
        torch.testing.assert_close(one["class_logits"], two["class_logits"], **close)
        for name in ("embed_cells", "predict_expression", "attention"):
            if hasattr(model, name):
                ask = getattr(model, name)
                torch.testing.assert_close(ask(packed), ask(padded), **close)


@pytest.mark.parametrize("packed", [False, True])
def test_cutting_a_step_by_length_changes_no_loss_and_no_gradient(small, packed):
    small = Small(small.unit.name, dropout=0.0)
    block = replace(random_block(12, num_genes=NUM_GENES, genes_per_cell=20, seed=3))
    starts = block.indptr[:-1]
    keep = np.arange(1, 13)[::-1] + 6  # lengths 18 .. 7, longest first
    source = np.concatenate([np.arange(s, s + n) for s, n in zip(starts, keep, strict=True)])
    indptr = np.concatenate([[0], np.cumsum(keep)])
    block = replace(block, indptr=indptr, genes=block.genes[source], counts=block.counts[source])
    tokens = small.tokenize(block, Draw(0))
    sums = []
    for cells_micro, form in ((12, False), (3, packed)):
        collator = Collator(small.objective, small.vocab.pad, cells_micro, seed=0, packed=form)
        model = small.trained().train()
        losses = []
        codes = {"label": tokens.joinids % 3} if small.classes else {}
        for batch in collator(tokens, codes, epoch=0):
            loss = small.objective.loss(model(batch), batch)
            loss.total.backward()
            losses.append(loss)
        norm = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None])
        total = sum(float(loss.total.detach()) for loss in losses)
        sums.append((total, sum(x.num_targets for x in losses), norm))
    (want, want_count, want_norm), (got, got_count, got_norm) = sums
    assert got_count == want_count > 0
    assert got == pytest.approx(want, rel=1e-6)
    torch.testing.assert_close(got_norm, want_norm, atol=1e-5, rtol=1e-4)


def test_the_order_of_cells_makes_no_difference(small):
    model = small.model().eval()
    rows = [9, 0, 3, 8]
    with torch.no_grad():
        forth, back = model(small.batch(rows)).cell, model(small.batch(rows[::-1])).cell
    torch.testing.assert_close(forth, back.flip(0), atol=1e-6, rtol=1e-6)


def test_every_parameter_gets_a_gradient_in_pretraining(small):
    model = small.trained().train()
    for step in (0, 10**6):  # also with whatever an objective adds later
        model.zero_grad()
        batch = small.corrupted(step=step)
        small.objective.loss(model(batch), batch).total.backward()
        without = {
            name
            for name, p in model.named_parameters()
            if p.grad is None or not p.grad.abs().sum() > 0
        }
        assert without == WITHOUT_GRADIENT.get(small.unit.name, set())


def test_every_parameter_but_pretraining_heads_gets_a_gradient_in_classification(small):
    model = small.model(num_classes=3).train()
    logits = model(small.batch()).predictions["class_logits"]
    assert logits.shape == (8, 3)
    logits.square().sum().backward()
    names = [name for name, p in model.named_parameters() if p.grad is not None]
    assert any(name.startswith("head.") for name in names)
    assert any("blocks.0." in name for name in names)


def test_weights_are_saved_and_loaded_bit_for_bit(small, tmp_path):
    model, batch = small.model().eval(), small.corrupted()
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    torch.manual_seed(99)
    other = small.unit.build(small.config, small.context).eval()
    other.load_state_dict(torch.load(tmp_path / "weights.pt", weights_only=True))
    one, two = model(batch), other(batch)
    assert torch.equal(one.hidden, two.hidden)
    assert all(torch.equal(v, two.predictions[k]) for k, v in one.predictions.items())


def test_bf16_autocast_runs_and_keeps_the_loss_in_float32(small):
    model, batch = small.trained().train(), small.corrupted()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(batch)
    loss = small.objective.loss(output, batch)
    loss.total.backward()
    assert loss.total.dtype == torch.float32
    model.zero_grad()
    exact = small.objective.loss(small.trained().eval()(batch), batch).total
    assert loss.total.item() == pytest.approx(exact.item(), rel=0.2)


def test_a_cell_without_vocabulary_genes_gives_finite_numbers(small):
    empty = random_block(1, num_genes=NUM_GENES, genes_per_cell=0, seed=0)
    tokens = small.tokenize(empty, Draw(0))
    batch = small.collate(tokens)
    batch = small.objective.corrupt(batch, Draw(0))
    assert batch.num_targets == bool(small.classes)
    model = small.trained()
    output = model(batch)
    loss = small.objective.loss(output, batch)
    loss.total.backward()
    assert loss.total.item() == 0.0 or small.classes
    assert torch.isfinite(output.cell).all()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    assert all(torch.isfinite(g).all() for g in grads)


def test_claimed_capabilities_are_there_and_no_others(small):
    model = small.model()
    kinds = (EmbedsCells, EmbedsGenes, ExposesAttention, PredictsExpression)
    has = {kind for kind in kinds if isinstance(model, kind)}
    assert has == CLAIMS[small.unit.name]


def test_each_capability_has_its_shape(small):
    model, batch = small.model().eval(), small.batch([9, 0, 3, 8])
    b = len(batch)
    with torch.no_grad():
        if isinstance(model, EmbedsCells):
            cells = model.embed_cells(batch)
            assert cells.shape == (b, model.width)
            assert cells.dtype == torch.float32
        if isinstance(model, EmbedsGenes):
            genes = model.embed_genes()
            assert genes.shape[0] == NUM_GENES
            assert genes.ndim == 2
        if isinstance(model, PredictsExpression):
            values = model.predict_expression(batch)
            assert values.shape == (b, NUM_GENES)
            assert values.dtype == torch.float32
        if isinstance(model, ExposesAttention):
            for layer in (0, -1):
                weights = model.attention(batch, layer)
                assert weights.shape[0] == b
                real, panel = batch.attention_mask, model(batch).panel
                if panel is not None:  # a sequence of the model's own, without padding
                    real = torch.ones(panel.shape[:2], dtype=torch.bool)
                assert weights.shape[2:] == (real.shape[1], real.shape[1])
                assert (weights * ~real[:, None, None, :] == 0).all()
                assert (weights * ~real[:, None, :, None] == 0).all()
                sums = weights.sum(-1).masked_select(real[:, None, :])
                torch.testing.assert_close(sums, torch.ones_like(sums))


PAGES = Path(cellray.__file__).parent / "models" / "pages"


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_has_a_page_whose_switches_and_files_exist(name):
    page = (PAGES / f"{name}.md").read_text()
    unit = family(name)
    for preset in unit.presets:
        assert preset in page or name == "tosica", preset
    keys = set(unit.config.model_fields)
    named = {
        key for key in re.findall(r"`model\.([a-z_0-9]+)", page) if f"model.{key}(" not in page
    }
    assert named - {"safetensors"} <= keys, named - keys
    titles = re.findall(r"^## (.*)$", page, re.M)
    assert titles[0] == "What is faithful"
    assert "Weights" in titles
    for link in re.findall(r"\]\(([^)#]+)\)", page):
        if not link.startswith("http"):
            assert (PAGES / link).resolve().exists(), link
    assert f"import-weights {name}" in page


BLOCKED = """
import sys
for name in ("ray", "deepspeed", "tiledbsoma", "mlflow"):
    sys.modules[name] = None
import cellray.models.{name}
assert "numba" not in sys.modules, "a model needs no tokenizer"
"""


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_imports_without_ray_deepspeed_tiledbsoma_and_mlflow(name):
    done = subprocess.run(
        [sys.executable, "-c", BLOCKED.format(name=name)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
