"""A measured step in numbers: rows for records, tables for people."""

import statistics
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks.kernels import Profile
from benchmarks.phases import PHASES


@dataclass(frozen=True)
class Steps:
    """What was measured.

    Attributes:
        images, images_per_pass: of a step, and of a micro-batch of it.
        warm_up, measured: seconds of each phase, step by step.
        memory_bytes: peak of the whole run, warm-up included: on a GPU what torch's allocator had handed out, on a CPU
            the resident memory of the process, libraries included.
        reserved_bytes: the same of what the allocator had taken from the GPU, CUDA graphs' own memory included.
        bad_steps: in which the optimizer moved nothing, for their numbers were not finite; warm-up included.
    """

    precision: str
    images: int
    images_per_pass: int
    warm_up: list[dict[str, float]]
    measured: list[dict[str, float]]
    memory_bytes: int
    reserved_bytes: int | None
    bad_steps: int
    profile: Profile | None


def utilisation(flops: float, seconds: float, peak: float) -> float:
    """MFU: the share of the device's peak that the operations which the method needs reach (Chowdhery et al. 2022,
    https://arxiv.org/abs/2204.02311, appendix B); not counted is what is computed twice to save memory.

    Args:
        flops: of a step.
        seconds: of a step.
        peak: operations a second.
    """
    return flops / seconds / peak


def row(steps: Steps, flops: int, peak: float | None) -> dict[str, Any]:
    """What was found, for a record: seconds, bytes, and shares of 1.

    `images_per_second` is of the median step, `..._p10` and `..._p90` of the slowest and the quickest tenth. Phases are
    means over the measured steps, and add up to `seconds_per_step_mean`.
    """
    seconds = [sum(step.values()) for step in steps.measured]
    warm_up = [sum(step.values()) for step in steps.warm_up]
    median = statistics.median(seconds)
    deciles = statistics.quantiles(seconds, n=10, method="inclusive") if len(seconds) > 1 else [median] * 9
    return {
        "precision": steps.precision,
        "images_per_step": steps.images,
        "images_per_pass": steps.images_per_pass,
        "images_per_second": steps.images / median,
        "images_per_second_p10": steps.images / deciles[-1],
        "images_per_second_p90": steps.images / deciles[0],
        "seconds_per_step": median,
        "seconds_per_step_mean": statistics.mean(seconds),
        "phases": {name: statistics.mean(step[name] for step in steps.measured) for name in PHASES},
        "iterations": len(seconds),
        "warm_up": len(warm_up),
        "first_step_seconds": warm_up[0] if warm_up else seconds[0],
        # What the warm-up took beyond its steps' own time: compilation, choice of kernels, first allocations.
        "start_seconds": sum(warm_up) - len(warm_up) * median,
        "flops_per_step": flops,
        "flops_per_second": flops / median,
        "peak_flops_per_second": peak,
        "mfu": utilisation(flops, median, peak) if peak else None,
        "memory_bytes": steps.memory_bytes,
        "reserved_bytes": steps.reserved_bytes,
        "bad_steps": steps.bad_steps,
        **({} if steps.profile is None else {"profile": asdict(steps.profile)}),
        "step_seconds": seconds,
    }


def table(found: dict[str, Any], *, gpu: bool) -> str:
    """Markdown, for people."""
    mfu = "not known (give --peak-tflops)" if found["mfu"] is None else f"{found['mfu']:.1%}"
    lines = [
        ("images/s, median step", f"{found['images_per_second']:.1f}"),
        ("images/s, 10th to 90th percentile", f"{found['images_per_second_p10']:.1f} to "
         f"{found['images_per_second_p90']:.1f}"),
        ("step", f"{found['seconds_per_step'] * 1e3:.1f} ms"),
        ("operations a step", f"{found['flops_per_step'] / 1e12:.3f} TFLOP"),
        ("MFU", mfu),
        ("peak memory" + ("" if gpu else " of the process"), f"{found['memory_bytes'] / 1e9:.2f} GB"),
        *([("reserved by the allocator", f"{found['reserved_bytes'] / 1e9:.2f} GB")] if gpu else []),
        ("first step", f"{found['first_step_seconds']:.2f} s"),
        ("warm-up beyond its steps' own time", f"{found['start_seconds']:.2f} s"),
        ("steps not taken (numbers not finite)", f"{found['bad_steps']}"),
    ]  # fmt: skip
    for name, seconds in found["phases"].items():
        share = seconds / found["seconds_per_step_mean"]
        lines.append((f"{name}: {PHASES[name]}", f"{seconds * 1e3:.2f} ms, {share:.1%}"))
    for name, value in found.get("profile", {}).items():
        if value is not None:
            lines.append((f"profiled step: {name}", f"{value:.4f}" if isinstance(value, float) else f"{value:,}"))
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in lines)])
