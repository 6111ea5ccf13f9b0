from __future__ import annotations

import torch

from anomaly_clip.methods.musc_images import drawn_order, resize_grids


def test_the_drawn_order_depends_on_seed_and_category() -> None:
    orders = {
        (seed, name): drawn_order(30, seed, name).tolist() for seed in (0, 1) for name in ("a", "b")
    }
    for order in orders.values():
        assert sorted(order) == list(range(30))
    assert len({str(order) for order in orders.values()}) == 4
    torch.manual_seed(7)  # no global state
    state = torch.get_rng_state()
    assert drawn_order(30, 0, "a").tolist() == orders[0, "a"]
    assert torch.equal(state, torch.get_rng_state())


def test_grids_are_averaged_or_interpolated() -> None:
    grids = torch.arange(16.0).view(1, 1, 4, 4)
    assert resize_grids(grids, torch.Size((4, 4))) is grids
    averaged = resize_grids(grids, torch.Size((2, 2)))
    assert averaged.tolist() == [[[[2.5, 4.5], [10.5, 12.5]]]]
    finer = resize_grids(averaged, torch.Size((4, 4)))
    row = [2.5, 3.0, 4.0, 4.5]  # half-pixel centres: a quarter and three quarters in between
    assert finer[0, 0, 0].tolist() == row
