"""Compute-optimal sizes against what the papers print, and what `plan --budget` says and refuses."""

import itertools
import json
import math

import pytest

from t5x_like.__main__ import main
from t5x_like.planner.sizes import budget
from t5x_like.planner.sizes.budget import BESIROGLU, FITS, HOFFMANN, Fit

# Parameters: tokens that Hoffmann et al. print for approach 3 (arXiv 2203.15556, table A3).
TABLE_A3 = {
    400e6: 9.2e9,
    1e9: 27.1e9,
    10e9: 410.1e9,
    67e9: 4.1e12,
    175e9: 12.0e12,
    280e9: 20.1e12,
    520e9: 43.5e12,
    1e12: 94.1e12,
    10e12: 1425.5e12,
}
# The same by approach 1 (table 3), with which the correction agrees and approach 3 does not.
TABLE_3 = {400e6: 8.0e9, 1e9: 20.2e9, 10e9: 205.1e9, 67e9: 1.5e12, 175e9: 3.7e12, 280e9: 5.9e12, 520e9: 11.0e12}
CHINCHILLA = 5.76e23  # FLOPs, of 70e9 parameters on 1.4e12 tokens
# What Sardana et al. fit with (arXiv 2401.00448); their released program prints the figures below.
SARDANA = Fit("Sardana et al. 2024", "arXiv 2401.00448", E=1.69, A=406.4, B=410.7, alpha=0.336, beta=0.283)


@pytest.mark.parametrize(("parameters", "tokens"), TABLE_A3.items())
def test_the_fit_of_hoffmann_gives_the_tokens_of_its_table(parameters, tokens):
    assert HOFFMANN.of_parameters(parameters).tokens == pytest.approx(tokens, rel=0.2)


def test_printed_constants_would_not():
    rounded = Fit("", "", E=1.69, A=406.4, B=410.7, alpha=0.34, beta=0.28)
    assert rounded.of_parameters(67e9).tokens > 1.7 * TABLE_A3[67e9]


@pytest.mark.parametrize(("parameters", "tokens"), TABLE_3.items())
def test_the_correction_agrees_with_approach_1(parameters, tokens):
    assert BESIROGLU.of_parameters(parameters).tokens == pytest.approx(tokens, rel=0.25)


def test_the_correction_has_the_exponent_and_the_ratio_that_its_paper_prints():
    assert BESIROGLU.exponent == pytest.approx(0.5126, abs=5e-5)
    best = BESIROGLU.of_flops(CHINCHILLA)
    assert best.ratio == pytest.approx(20, rel=0.1)
    assert best.parameters == pytest.approx(70e9, rel=0.05)
    assert HOFFMANN.of_flops(CHINCHILLA).ratio > 50  # "about 70", against the 20 of their own model


def test_each_way_to_the_optimum_ends_at_the_same_model():
    for fit in FITS:
        best = fit.of_flops(1e22)
        assert best.flops == pytest.approx(1e22)
        others = fit.of_parameters(best.parameters), fit.of_tokens(best.tokens), fit.of_loss(best.loss)
        for other in others:
            assert (other.parameters, other.tokens) == pytest.approx((best.parameters, best.tokens), rel=1e-6)
        for share in (0.9, 1.1):
            assert fit.loss(share * best.parameters, best.tokens / share) > best.loss


def test_serving_makes_models_smaller_as_published():
    """`compute_optimal.py --loss 1.947 --inference_tokens 2e12` of the paper's repository."""
    best, chosen = SARDANA.of_loss(1.947), SARDANA.for_lifetime(1.947, 2e12)
    assert chosen.parameters == pytest.approx(2.418e10, rel=3e-4)
    assert chosen.tokens == pytest.approx(2.657e12, rel=3e-4)
    assert chosen.parameters / best.parameters == pytest.approx(0.7096, abs=1e-4)
    assert chosen.tokens / best.tokens == pytest.approx(1.4677, abs=1e-4)
    spent, before = (budget.lifetime_flops(each.parameters, each.tokens, 2e12) for each in (chosen, best))
    assert spent / before == pytest.approx(0.9522, abs=1e-4)


def test_a_13b_model_that_serves_two_trillion_tokens_is_better_as_7b():
    """Figure 1 of arXiv 2401.00448: 1.7e22 FLOPs less, 17%."""
    large = SARDANA.of_parameters(13e9)
    small = SARDANA.tokens_to(large.loss, 7e9)
    before, after = budget.lifetime_flops(13e9, large.tokens, 2e12), budget.lifetime_flops(7e9, small, 2e12)
    assert before - after == pytest.approx(1.7e22, rel=0.01)
    assert 1 - after / before == pytest.approx(0.17, abs=0.005)


def test_what_is_not_served_changes_nothing_and_a_model_too_small_never_gets_there():
    best = BESIROGLU.of_flops(1e22)
    assert BESIROGLU.for_lifetime(best.loss, 0).parameters == pytest.approx(best.parameters, rel=1e-3)
    assert math.isinf(BESIROGLU.tokens_to(best.loss, best.parameters / 100))
    [row] = budget.trade_off(BESIROGLU, best, shares=(0.01,))
    assert row.equal_loss is None and row.at_compute.loss > best.loss


def test_a_smaller_model_pays_from_where_both_cost_the_same():
    best = BESIROGLU.of_flops(1e22)
    for row in budget.trade_off(BESIROGLU, best):
        equal = row.equal_loss
        assert equal is not None and equal.tokens > row.at_compute.tokens
        both = [budget.lifetime_flops(each.parameters, each.tokens, row.pays_from) for each in (best, equal)]
        assert both[0] == pytest.approx(both[1])


def said(capsys, *arguments):
    assert main(["plan", "--budget", *arguments]) == 0
    return capsys.readouterr().out


def test_compute_is_said_once_with_its_source_and_the_spread_of_the_fits(capsys, tmp_path):
    path = tmp_path / "budget.json"
    text = said(capsys, "--flops=1e22", f"--json={path}")
    for part in ("1e+22 FLOPs, as given", "arXiv 2203.15556", "arXiv 2404.10102", "Estimates", "1.43x apart"):
        assert part in text
    assert "extrapolated: the runs behind them had 6e+18 to 3e+21 FLOPs" in text
    found = json.loads(path.read_text())
    assert found["estimate"] is True and found["flops"] == 1e22
    assert [fit["best"]["parameters"] for fit in found["fits"]] == [fit.of_flops(1e22).parameters for fit in FITS]
    assert "extrapolated" not in said(capsys, "--flops=1e20")


def test_chips_and_days_are_compute_at_an_assumed_mfu(capsys, tmp_path):
    path = tmp_path / "budget.json"
    text = said(capsys, "--chips=v5p:4x4x4", "--days=14", "--mfu=0.5", f"--json={path}")
    assert "64 chips of v5p:4x4x4 (459 TFLOP/s each) for 14 days at an assumed MFU of 50%" in text
    assert json.loads(path.read_text())["flops"] == pytest.approx(64 * 459e12 * 0.5 * 14 * 86400)


def test_a_model_and_its_tokens_are_set_beside_the_best(capsys, tmp_path):
    path = tmp_path / "budget.json"
    text = said(capsys, "--parameters=8B", "--tokens=15T", "--served=2T", "--chips=v5p:4x4x4", f"--json={path}")
    assert "+0.054 nats beside the best at the same compute" in text
    assert "709 d" in text and "2.00T tokens served (arXiv 2401.00448" in text
    fit = json.loads(path.read_text())["fits"][0]
    assert fit["given"]["loss"] == BESIROGLU.loss(8e9, 15e12)
    assert fit["lifetime"]["parameters"] < fit["best"]["parameters"]


@pytest.mark.parametrize(
    ("arguments", "status", "says"),
    [
        ([], 2, "nothing says how much; give one of --config, --flops"),
        (["--flops=1e22", "--tokens=1T"], 2, "--flops and --parameters or --tokens say it twice"),
        (["--flops=many"], 2, "--flops=many should be a number above 0, such as 8e9 or 8B"),
        (["--flops=0"], 2, "--flops=0 should be a number above 0"),
        (["--flops=1e300", "--served=1T"], 2, "--flops=1e300 should be from 1e-06 to 1e+40"),
        (["--flops=1e22", "--served=1e300"], 2, "--served=1e300 should be from"),
        (["--tokens=1e200"], 2, "--tokens=1e200 should be from"),
        (["--parameters=1e200", "--tokens=1e200"], 2, "--parameters=1e200 should be from"),
        (["--days=3"], 2, "--days=3 needs --chips"),
        (["--chips=v5p:3x3x3", "--days=3"], 2, "--chips=v5p:3x3x3 is no slice of v5p"),
        (["--flops=1e22", "--mfu=40"], 2, "--mfu=40 should be a share of the peak"),
        (["--tokens=1T", "--family=llama"], 2, "--family=llama chooses a size by compute"),
        (["--config.model.width=3"], 2, "--config.model.width=3 changes a config, and none is named"),
        (["--flops=1e22", "--length=0"], 2, "--length=0 should be at least 1"),
        (["--flops=1e22", "--json=/no/such/folder/b.json"], 1, "/no/such/folder"),
    ],
)
def test_bad_input_is_one_line(capsys, arguments, status, says):
    assert main(["plan", "--budget", *arguments]) == status
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("numbers", list(itertools.product(("1e-6", "1e40"), repeat=3)))
def test_the_largest_and_least_that_may_be_asked_have_an_estimate(capsys, numbers):
    parameters, tokens, served = numbers
    for asked in ([f"--parameters={parameters}", f"--tokens={tokens}"], [f"--flops={tokens}"], [f"--tokens={tokens}"]):
        assert main(["plan", "--budget", *asked, f"--served={served}"]) == 0
        assert "nan" not in capsys.readouterr().out
