"""Times of CUDA graphs: contenders take turns in one process, CUDA events, medians."""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch


def captured(work: Callable[[], object], warm_up: int = 3) -> torch.cuda.CUDAGraph:
    """``work`` as a CUDA graph, so that what is timed is the GPU and not Python."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(warm_up):
            work()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph


def milliseconds(contenders: dict[str, Callable[[], object]], rounds: int = 30) -> dict[str, list[float]]:
    """Time of each call, milliseconds, taken in turns: what disturbs one round disturbs all of it."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    events = {name: (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for name in contenders}
    for turn in range(rounds + 2):
        for name, call in contenders.items():
            begin, end = events[name]
            begin.record()
            call()
            end.record()
        torch.cuda.synchronize()
        if turn >= 2:  # the first two rounds warm up
            for name, (begin, end) in events.items():
                times[name].append(begin.elapsed_time(end))
    return times


def medians(contenders: dict[str, Callable[[], object]], rounds: int = 30) -> dict[str, float]:
    """Median time of each call, milliseconds."""
    return {name: statistics.median(values) for name, values in milliseconds(contenders, rounds).items()}
