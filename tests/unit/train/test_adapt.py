"""What each way of fine-tuning trains, and that nothing else moves."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from cellray.core.errors import ConfigError
from cellray.nn.lora import has_factors, merge_factors
from cellray.train.adapt import check_adapt, count_parameters
from cellray.train.config import AdaptSection, OptimSection
from cellray.train.engine import build_engine
from helpers_adapting import adapted, classifier, logits_of
from helpers_training import FAMILIES

MODES = ("full", "last_layers", "lora", "probe")
OPTIM = OptimSection(lr=1e-2, clip_norm=0.0)


def train(ready, steps=3):
    engine = build_engine(
        ready.model, ready.objective, name="torch", zero_stage=0, optim=OPTIM, precision="fp32"
    )
    losses = [engine.step([ready.batch], lr=1e-2).loss for _ in range(steps)]
    return losses, engine


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_frozen_stays_to_the_bit_and_the_rest_learns(name, mode):
    ready = classifier(name, dropout=0.1)
    before = logits_of(ready.model, ready.batch)
    done = adapted(ready, mode=mode)
    assert torch.equal(logits_of(ready.model, ready.batch), before)  # step 0 is the base model
    old = {n: v.clone() for n, v in ready.model.state_dict().items()}
    trained = {n for n, p in ready.model.named_parameters() if p.requires_grad}
    losses, _ = train(ready)
    assert losses[-1] < losses[0]
    moved = {n for n, v in ready.model.state_dict().items() if not torch.equal(v, old[n])}
    parameters = dict(ready.model.named_parameters())
    assert moved & set(parameters) <= trained
    assert any(n.startswith("head.") for n in moved)
    counts = done.counts
    assert counts["n_params_trainable"] == sum(parameters[n].numel() for n in trained)
    if mode == "full":
        assert {n for n in trained if "blocks" in n}
    elif mode == "probe":
        assert all(n.startswith("head.") for n in moved)  # buffers, too
        assert not ready.model.backbone.training
        assert ready.model.head.training
    elif mode == "lora":
        assert all(n.startswith("head.") or ".lora." in n for n in trained)
        assert any(n.endswith("lora.up") for n in moved)
    else:
        assert counts["n_params_trainable"] < counts["n_params_total"]


@pytest.mark.parametrize("name", FAMILIES)
def test_the_last_layers_are_the_last_that_the_loss_goes_through(name):
    ready = classifier(name)
    adapted(ready, mode="last_layers", last_layers=1)
    trained = {n for n, p in ready.model.named_parameters() if p.requires_grad}
    numbers = {int(n.split("blocks.")[1].split(".")[0]) for n in trained if "blocks." in n}
    assert numbers == {1}  # of two; scFoundation's decoder is not reached
    assert not any("decoder" in n for n in trained)
    body = {n for n in trained if n.startswith("backbone.") and "blocks." not in n}
    assert body <= {
        f"backbone.{n}.{w}" for n in ("norm", "encoder_norm") for w in ("weight", "bias")
    } | {"backbone.pre_logits.weight", "backbone.pre_logits.bias"}
    for module in ready.model.modules():
        own = [p for p in module.parameters(recurse=False) if p.requires_grad]
        assert not own or module.training


def test_all_layers_of_last_layers_are_every_block():
    ready = classifier("geneformer")
    adapted(ready, mode="last_layers", last_layers=2)
    blocks = ready.model.backbone.encoder.blocks
    assert all(p.requires_grad for p in blocks.parameters())
    table = ready.model.backbone.embedding
    assert not any(p.requires_grad for p in table.parameters())
    assert not table.training
    ready.model.train()
    assert not table.training  # whatever its parents are set to


@pytest.mark.parametrize("name", FAMILIES)
def test_merged_factors_give_the_outputs_of_the_factors(name):
    ready = classifier(name)
    adapted(ready, mode="lora", rank=2, alpha=3.0, dropout=0.2)
    train(ready, steps=4)
    weights = ready.model.state_dict()
    assert has_factors(weights)
    merged = merge_factors(weights)
    plain = classifier(name).model
    assert merged.keys() == plain.state_dict().keys()
    plain.load_state_dict(merged)
    changed = logits_of(ready.model, ready.batch)
    torch.testing.assert_close(logits_of(plain, ready.batch), changed, rtol=0, atol=1e-5)
    assert (changed - logits_of(classifier(name).model, ready.batch)).abs().max() > 1e-3
    assert not has_factors(merged)
    assert merge_factors(merged).keys() == merged.keys()


def test_factors_lie_beside_every_linear_layer_of_a_block_or_the_named_ones():
    ready = classifier("scgpt")
    adapted(ready, mode="lora", rank=4)
    layers = {n for n, m in ready.model.named_modules() if n.endswith(".lora")}
    ends = {"attention.qkv", "attention.out", "expand", "contract"}
    assert layers == {f"backbone.encoder.blocks.{i}.{e}.lora" for i in (0, 1) for e in ends}
    few = classifier("scgpt")
    adapted(few, mode="lora", targets=["qkv"])
    layers = {n for n, m in few.model.named_modules() if n.endswith(".lora")}
    assert layers == {f"backbone.encoder.blocks.{i}.attention.qkv.lora" for i in (0, 1)}


def test_the_factors_are_drawn_by_the_seed():
    first, second = classifier("scgpt"), classifier("scgpt")
    for ready in (first, second):
        torch.manual_seed(99 if ready is second else 1)  # not by what was drawn before
        adapted(ready, mode="lora")
    for name, value in first.model.state_dict().items():
        assert torch.equal(value, second.model.state_dict()[name]), name


def test_batch_norms_of_a_frozen_body_keep_their_statistics():
    for mode in ("probe", "lora"):
        ready = classifier("scgpt", domain_norm="shared")
        adapted(ready, mode=mode)
        old = {n: b.clone() for n, b in ready.model.backbone.named_buffers()}
        assert any("running_mean" in n for n in old)
        train(ready)
        for name, buffer in ready.model.backbone.named_buffers():
            assert torch.equal(buffer, old[name]), (mode, name)


def test_counts_against_a_count_by_hand():
    model = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 3), nn.LayerNorm(3))
    model[2].requires_grad_(False)
    assert count_parameters(model) == {
        "n_params_total": 28 + 15 + 6,
        "n_params_trainable": 28 + 15,
        "n_params_nonembedding": 15 + 6,
    }


def test_what_does_not_fit_a_model_is_refused():
    model = classifier("geneformer").model
    with pytest.raises(ConfigError, match=r"last_layers = 5, but .* 2 blocks at most; give 1 to 2"):
        check_adapt(model, AdaptSection(mode="last_layers", last_layers=5))
    with pytest.raises(ConfigError, match=r"'query'; there are: attention\.out, attention\.qkv"):
        check_adapt(model, AdaptSection(mode="lora", targets=["query"]))
    with pytest.raises(ConfigError, match="needs a model of blocks .* has none; use 'full'"):
        check_adapt(nn.Linear(2, 2), AdaptSection(mode="lora"))
    with pytest.raises(ConfigError, match="classifier's head alone, and what this task learns"):
        check_adapt(model.backbone, AdaptSection(mode="probe"))
    ready = classifier("scfoundation")
    with pytest.raises(ConfigError, match=r"last_layers = 3, but .* 2 blocks at most"):
        adapted(ready, mode="last_layers", last_layers=3)  # of three, one of them a decoder's
