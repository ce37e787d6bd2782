"""UNet rows, seconds and bytes."""

import torch

from profusion.metrics.cost import measured, stored_bytes


def test_cost_counts_rows_and_calls_and_stops():
    network = torch.nn.Linear(3, 3)
    with measured(network) as cost:
        network(torch.zeros(4, 3))
        network(torch.zeros(2, 3))
    network(torch.zeros(8, 3))
    assert (cost.rows, cost.calls) == (6, 2) and cost.seconds > 0
    assert stored_bytes([torch.zeros(3, 5), torch.zeros(2, dtype=torch.float16)]) == 64
