"""Work in many processes: what it returns comes in the order of the jobs."""

from __future__ import annotations

from msvmamba_jax.data.making import run


def test_results_come_in_order() -> None:
    jobs = [range(3_000_000)] * 8 + [range(number) for number in range(9)]  # the second chunk is done first
    assert run(sum, jobs, processes=2) == [sum(job) for job in jobs]
