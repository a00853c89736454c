"""The KL coefficient follows Ziegler et al.'s formula, or stays."""

import pytest

from chatrlhf.rl.kl_controller import KLController


@pytest.mark.parametrize(
    "kl, expected",
    [
        (6.6, 0.1 * (1 + 0.1 * 64 / 1000)),  # 6.6 / 6 - 1 = 0.1: inside the clip, up
        (5.4, 0.1 * (1 - 0.1 * 64 / 1000)),  # 5.4 / 6 - 1 = -0.1: down
        (60.0, 0.1 * (1 + 0.2 * 64 / 1000)),  # 9 is clipped to 0.2
        (0.0, 0.1 * (1 - 0.2 * 64 / 1000)),  # -1 is clipped to -0.2
        (-3.0, 0.1 * (1 - 0.2 * 64 / 1000)),  # an estimate below 0 counts as none
        (6.0, 0.1),  # on target
    ],
)
def test_one_update_by_hand(kl, expected):
    controller = KLController(coef=0.1, target=6.0, horizon=1000)
    controller.update(kl, num_sequences=64)
    assert controller.coef == pytest.approx(expected, rel=1e-12)


def test_updates_multiply():
    controller = KLController(coef=1.0, target=1.0, horizon=100)
    controller.update(2.0, 10)  # 1 + 0.2 * 10 / 100 = 1.02
    controller.update(0.9, 20)  # 1 - 0.1 * 20 / 100 = 0.98
    assert controller.coef == pytest.approx(1.02 * 0.98)


def test_without_a_target_the_coefficient_stays():
    controller = KLController(coef=0.05)
    controller.update(100.0, 64)
    assert controller.coef == 0.05


def test_state_goes_on_where_it_was():
    first = KLController(coef=0.1, target=6.0, horizon=1000)
    first.update(9.0, 64)
    second = KLController(coef=0.1, target=6.0, horizon=1000)
    second.load_state_dict(first.state_dict())
    for controller in (first, second):
        controller.update(3.0, 64)
    assert first.coef == second.coef != 0.1


def test_another_initial_coefficient_takes_the_place_of_the_adapted_one():
    first = KLController(coef=0.1, target=6.0, horizon=1000)
    first.update(9.0, 64)
    changed = KLController(coef=0.5, target=6.0, horizon=1000)
    changed.load_state_dict(first.state_dict())
    assert changed.coef == 0.5
    again = KLController(coef=0.5, target=6.0, horizon=1000)  # and is adapted from there
    changed.update(9.0, 64)
    again.load_state_dict(changed.state_dict())
    assert again.coef == changed.coef > 0.5
