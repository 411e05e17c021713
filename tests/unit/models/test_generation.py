"""scGPT's extensions: iterative generation, integration losses, domain norm, batch labels."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from cellray.core.batch import CellBatch, ModelOutput, pack
from cellray.core.draw import Draw
from cellray.core.errors import ConfigError, DataError
from cellray.core.section import build_section
from cellray.data.vocab import Vocab
from cellray.models._generation import generate_values
from cellray.models.base import BuildContext
from cellray.models.scgpt import FAMILY, Scgpt, ScgptConfig
from cellray.nn.domain import DomainNorm, reverse_gradient
from cellray.objectives.generative import OBJECTIVE, elastic_similarity

SPECIALS = ("<pad>", "<cls>", "<eoc>")


def vocab(genes: int = 20) -> Vocab:
    ids = [f"G{i}" for i in range(genes)]
    return Vocab.from_genes(ids, ids, specials=SPECIALS)


def model(**keys: object) -> Scgpt:
    torch.manual_seed(0)
    sizes = {"width": 16, "num_layers": 2, "num_heads": 2, "ffn_width": 16, "dropout": 0.0}
    config = build_section(ScgptConfig, {"family": "scgpt", **sizes, **keys})
    built = FAMILY.build(config, BuildContext(vocab(), {"batch": 2}))
    assert isinstance(built, Scgpt)
    with torch.no_grad():
        built.expression.layers[-1].bias += 20.0  # values in the range of bins, none below 0
    return built.eval()


def batch(lengths: tuple[int, ...] = (9, 6, 4)) -> CellBatch:
    gen = torch.Generator().manual_seed(1)
    longest = max(lengths)
    tokens = torch.zeros(len(lengths), longest, dtype=torch.int64)
    for row, length in enumerate(lengths):
        tokens[row, :length] = torch.randperm(20, generator=gen)[:length] + 3
        tokens[row, 0] = 1
    mask = tokens != 0
    values = torch.randint(1, 51, tokens.shape, generator=gen).float() * mask
    return CellBatch(
        cell_ids=torch.arange(len(lengths)),
        token_ids=tokens,
        values=values,
        attention_mask=mask,
        covariates={"batch": torch.tensor([0, 1, 0])[: len(lengths)]},
    )


def with_unknown(given: CellBatch) -> CellBatch:
    unknown = given.attention_mask.clone()
    unknown[:, :2] = False
    return replace(given, unknown_mask=unknown)


class Oracle:
    """Predicts 10 x place; is the surer of a token, the later it stands."""

    def __init__(self) -> None:
        self.asked: list[torch.Tensor] = []

    def predict_unknown(self, given: CellBatch, cell_prompt=None):
        self.asked.append(given.unknown_mask.clone())
        places = torch.nonzero(given.unknown_mask)[:, 1].float()
        return places * 10, places * 10 + 1 / (1 + places)


def test_the_surest_share_of_each_cell_becomes_known_in_every_iteration():
    oracle = Oracle()
    given = with_unknown(batch())  # 7, 4 and 2 unknown genes
    values = generate_values(oracle, given, num_iterations=3)
    left = [mask.sum(1).tolist() for mask in oracle.asked]
    # after one iteration ceil(n / 3) are known, after two ceil(2 n / 3)
    assert left == [[7, 4, 2], [4, 2, 1], [2, 1, 0]]
    assert not oracle.asked[1][0, 6:].any()  # the last three of the first cell were surest
    want = torch.arange(9).float() * 10
    assert torch.equal(values[given.unknown_mask], want.expand(3, -1)[given.unknown_mask])
    assert torch.equal(values[~given.unknown_mask], given.values[~given.unknown_mask])


def test_one_iteration_is_the_plain_prediction_and_later_ones_see_the_earlier():
    net, given = model(), with_unknown(batch())
    with torch.no_grad():
        one = net.generate(given, num_iterations=1)
        first, _ = net.predict_unknown(replace(given, values=given.values * ~given.unknown_mask))
        many = net.generate(given, num_iterations=100)  # more than there are genes
    torch.testing.assert_close(one[given.unknown_mask], first.clamp(min=0))
    assert not torch.equal(many, one)
    assert (many >= given.values.min()).all()


def test_generation_is_the_same_for_packed_cells_and_any_company():
    net, given = model(), with_unknown(batch())
    with torch.no_grad():
        padded = net.generate(given, num_iterations=3)
        flat = net.generate(pack(given), num_iterations=3)
        names = ("cell_ids", "token_ids", "values", "attention_mask", "unknown_mask")
        one = replace(given, **{name: getattr(given, name)[:1] for name in names})
        alone = net.generate(one, num_iterations=3)
    torch.testing.assert_close(flat, padded[given.attention_mask], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(alone[0], padded[0], atol=1e-4, rtol=1e-4)


def test_a_cell_prompt_stands_in_the_place_of_cls():
    net, given = model(), batch()
    unknown = given.attention_mask.clone()
    unknown[:, 0] = False
    given = replace(given, unknown_mask=unknown)
    with torch.no_grad():
        prompts = torch.randn(2, 3, 16)
        one, two = (net.generate(given, num_iterations=2, cell_prompt=p) for p in prompts)
    assert not torch.allclose(one, two)


def test_what_generation_needs_is_said():
    net = model()
    with pytest.raises(ConfigError, match="num_iterations = 0"):
        net.generate(with_unknown(batch()), num_iterations=0)
    with pytest.raises(DataError, match="no unknown_mask"):
        net.generate(batch(), num_iterations=2)
    with pytest.raises(ConfigError, match="no flag for hidden genes"):
        model(flag=False).generate(with_unknown(batch()), num_iterations=1)
    with pytest.raises(ConfigError, match="no decoder of values from the cell"):
        model(gepc=False).predict_expression(batch())


def test_domain_norm_takes_each_batch_by_itself_and_leaves_padding_out():
    norm = DomainNorm(4, num_domains=2).train()
    x = torch.randn(3, 5, 4) * 3 + 1
    real = torch.ones(3, 5, dtype=torch.bool)
    real[1, 3:] = False
    domains = torch.tensor([0, 1, 0])[:, None].expand(3, 5)
    out = norm(x, domains, real)
    for code in (0, 1):
        here = out[real & (domains == code)]
        torch.testing.assert_close(here.mean(0), torch.zeros(4), atol=1e-5, rtol=0)
        torch.testing.assert_close(here.var(0, correction=0), torch.ones(4), atol=1e-3, rtol=0)
    assert torch.equal(out[~real], x[~real])
    norm.eval()
    moved = norm.norms[1]
    want = (x[1, :3] - moved.running_mean) / (moved.running_var + 6.1e-5).sqrt()
    torch.testing.assert_close(norm(x, domains, real)[1, :3], want)


def test_domain_norm_of_one_token_or_an_unknown_batch():
    norm = DomainNorm(4, num_domains=2).train()
    x, real = torch.randn(1, 1, 4), torch.ones(1, 1, dtype=torch.bool)
    assert torch.isfinite(norm(x, torch.zeros(1, 1).long(), real)).all()
    assert torch.equal(norm(x, torch.full((1, 1), -1), real), x)


def test_the_gradient_comes_back_reversed():
    x = torch.randn(3, requires_grad=True)
    reverse_gradient(x, 2.0).sum().backward()
    assert torch.equal(x.grad, torch.full((3,), -2.0))


def test_elastic_similarity_by_hand():
    cells = torch.tensor([[1.0, 0.0], [1.0, 1.0], [-1.0, 0.0]])
    c = np.sqrt(0.5)
    # cosines: 0-1 c, 0-2 -1 -> 0, 1-2 -c -> 0, itself 0
    want = (2 * (1 - (c - 0.6) ** 2) + 7 * (1 - 0.36)) / 9
    assert elastic_similarity(cells, 0.6).item() == pytest.approx(want, rel=1e-5)


def integration_loss(keys: dict[str, object], **config: object):
    raw = {"name": "generative", "hide": "value", "mask_ratios": [0.4], **config}
    objective = OBJECTIVE.build(build_section(OBJECTIVE.config, raw), vocab())
    hidden = objective.corrupt(batch(), Draw(0))
    net = model(batch_key="batch", **keys).train()
    return objective, hidden, net, objective.loss(net(hidden), hidden)


def test_the_integration_recipe_sums_all_its_losses():
    keys = {"batch_labels": True, "domain_norm": "domain", "adversary": True, "expressed": True}
    weights = {"ecs_weight": 10.0, "dar_weight": 1.0, "cell_prompt_after_steps": 10**9}
    _, hidden, net, loss = integration_loss(keys, **weights)
    assert hidden.unknown_mask is None
    assert (hidden.values[hidden.target_mask] == -1).all()
    parts = {name: float(part) for name, part in loss.parts.items()}
    assert set(parts) == {
        "gep", "gepc", "cell_prompt", "expressed", "expressed_from_cell", "ecs", "dar"
    }  # fmt: skip
    want = parts["gep"] + parts["gepc"] + parts["expressed"] + parts["expressed_from_cell"]
    assert loss.total.item() == pytest.approx(want + 10 * parts["ecs"] + parts["dar"], rel=1e-5)
    output = net(hidden)
    told = torch.nn.functional.cross_entropy(
        output.predictions["batch_logits"], hidden.covariates["batch"], reduction="none"
    )
    assert parts["dar"] == pytest.approx(
        (told @ hidden.target_mask.sum(1).float()).item(), rel=1e-4
    )
    loss.total.backward()
    names = {n for n, p in net.named_parameters() if p.grad is None or not p.grad.any()}
    assert names == {"flag.weight"}  # nothing is hidden by a flag


def test_the_adversary_pushes_the_encoder_the_other_way():
    _, hidden, net, _ = integration_loss({"adversary": True}, dar_weight=1.0)
    output = net(hidden)
    cell = output.cell.detach().requires_grad_()
    told = torch.nn.functional.cross_entropy
    told(net.adversary(cell), hidden.covariates["batch"]).backward()
    plain = cell.detach().requires_grad_()
    told(net.adversary.classifier(plain), hidden.covariates["batch"]).backward()
    torch.testing.assert_close(cell.grad, -plain.grad)


def test_losses_that_the_model_cannot_give_are_named():
    raw = {"name": "generative", "dar_weight": 1.0}
    objective = OBJECTIVE.build(build_section(OBJECTIVE.config, raw), vocab())
    hidden = objective.corrupt(batch(), Draw(0))
    with pytest.raises(DataError, match="reads the prediction 'batch_logits'"):
        objective.loss(model()(hidden), hidden)
    given = {"expression": hidden.targets[hidden.target_mask]}
    with pytest.raises(DataError, match="'expression_from_cell'"):
        objective.loss(ModelOutput(torch.zeros(1), torch.zeros(1), given), hidden)


def test_switches_that_need_a_batch_key_say_so():
    with pytest.raises(ConfigError, match="adversary: needs batch_key"):
        model(adversary=True)
    with pytest.raises(ConfigError, match="model.batch_key = 'bach'.*Did you mean 'batch'"):
        model(batch_key="bach", adversary=True)


def test_what_batches_cost_does_not_depend_on_micro_batches():
    objective, hidden, net, whole = integration_loss({"adversary": True}, dar_weight=1.0)
    names = ("cell_ids", "token_ids", "values", "attention_mask", "targets", "target_mask")
    total = 0.0
    for row in range(3):
        parts = {name: getattr(hidden, name)[row : row + 1] for name in names}
        codes = {"batch": hidden.covariates["batch"][row : row + 1]}
        one = replace(hidden, **parts, covariates=codes)
        total += objective.loss(net(one), one).total.item()
    assert total == pytest.approx(whole.total.item(), rel=1e-6)
