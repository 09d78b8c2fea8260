"""benchmarks/layerwise.py at tiny sizes: what is compared is right. Nothing here is timed."""

import itertools
import sys
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import layerwise
from measure import Products

from agri_moe.models.replaced import stock_model


def test_fixed_neurons_are_the_best_there_are_or_close():
    generator = torch.Generator().manual_seed(0)
    h, down = torch.randn(200, 7, generator=generator), torch.randn(7, 4, generator=generator)
    h = h @ torch.randn(7, 7, generator=generator)
    y = h @ down

    def error(subset):
        subset = torch.as_tensor(subset)
        return float((h[:, subset] @ down[subset] - y).norm())

    chosen = layerwise.fixed_neurons(h, down, torch.ones(7), 5)
    assert all(len(set(one.tolist())) == 5 for one in chosen.values())
    errors = sorted(error(subset) for subset in itertools.combinations(range(7), 5))
    assert error(chosen["greedy"]) <= errors[2]
    assert torch.equal(chosen["norm of the weights"].sort().values, down.norm(dim=1).topk(5).indices.sort().values)


def one_step(folder, name):
    return layerwise.one_step(folder, name, 256, 2, {"width": 64, "inner": 128})


def test_products_are_those_of_a_step(tmp_path):
    """A step does no more than what is counted for it, and less by what nobody needs: gradients of what is read.

    With unequal widths, since torch does not count grouped products; as many neurons are active on the whole.
    """
    module, batch, _ = one_step(tmp_path, "unequal widths")
    assert len(set(module.layers[0].widths)) > 1
    tokens = len(batch["positions"])
    with FlopCounterMode(display=False) as counted:
        module.training_step(batch, 0)["loss"].backward()
    frozen = [p for p in layerwise.step_products(module, tokens) if p.times]
    allowed = Products(frozen).flops
    totals = counted.get_flop_counts()["Global"]
    done = sum(flops for operator, flops in totals.items() if "attention" not in str(operator))
    assert 0.7 * allowed < done < 1.25 * allowed


def test_a_step_trains_and_the_stock_model_is_that_of_the_cell(tmp_path):
    module, _, run = one_step(tmp_path, "half width")
    before = module.layers[0].up_SD.detach().clone()
    run()
    assert not torch.equal(module.layers[0].up_SD, before)
    folder = layerwise.as_stock(module, tmp_path / "stock")
    assert (folder / "config.json").exists()
    assert stock_model is layerwise.stock_model


def test_options_are_the_module_s():
    for options in (*layerwise.CELLS.values(), *layerwise.OPTIONS.values()):
        module = layerwise.build("layerwise.LayerwiseModule", {"source": "none", **layerwise.RATE, **options})
        assert module.num_experts == 16
