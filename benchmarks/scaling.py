"""Tables of docs/scaling.md: `python -m benchmarks.scaling TABLE [TABLE ...]`, from the checkout's root.

`models`, `strategies`, `growth`, `passes`, `limits` and `published` are calculated, in seconds; `counters` trains on
processes of this machine's CPU, `host` and `flags` measure here what each rank does on its CPU: minutes, and 2 GB of
memory.
"""

import argparse
import socket
import tempfile
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from benchmarks.communication import Step, collectives, units
from benchmarks.cost import Machine, operations, state_bytes, step_time
from benchmarks.host import data_rows, flag_rows
from dinocomp.config import Config, derive, load_config

# Sizes, crops, registers and heads of facebookresearch/dinov3's dinov3_vit7b16_pretrain.yaml, which has rotary position
# embeddings where this network learns its own.
_7B = """
student.arch=custom student.embed_dim=4096 student.depth=40 student.num_heads=32 student.mlp_ratio=3
student.ffn_layer=swiglufused student.patch_size=16 student.num_register_tokens=4 student.drop_path_rate=0.4
dino.head_n_prototypes=262144 dino.head_hidden_dim=8192 dino.head_bottleneck_dim=512
ibot.head_n_prototypes=98304 ibot.head_hidden_dim=4096 ibot.head_bottleneck_dim=384
crops.global_crops_size=256 crops.local_crops_size=112
train.batch_size_per_gpu=16 parallelism.activation_checkpointing=full
"""
MODELS = {
    "ViT-L/14": ("vitl14", []),
    "ViT-g/14": ("vitg14", []),
    "ViT-7B/16": ("vitg14", _7B.split()),
}
STRATEGIES = {"ddp": "ddp", "fsdp": "fsdp", "fsdp2": "fsdp2", "fsdp2, kept": "fsdp2"}  # kept: gathered until backward
RANKS = (1, 8, 16, 64, 128, 256, 512, 1024)
MACHINE = Machine()


@cache
def model(name: str, *changes: str) -> Config:
    yaml, words = MODELS[name]
    return load_config(str(Path("yamls") / f"{yaml}.yaml"), [*words, *changes]).config


def step_of(name: str, strategy: str, ranks: int, *changes: str) -> Step:
    kept = ["parallelism.reshard_after_forward=false"] if strategy.endswith("kept") else []
    return Step(model(name, *changes, *kept), STRATEGIES[strategy] if ranks > 1 else "single", ranks)


def print_table(title: str, head: str, rows: Iterator[tuple]) -> None:
    names = head.split("|")
    print(f"\n{title}\n\n| {' | '.join(n.strip() for n in names)} |\n|{'---|' * len(names)}")
    for row in rows:
        print(f"| {' | '.join(str(cell) for cell in row)} |", flush=True)


def sent_bytes(step: Step) -> float:
    return sum(message.sent(step.ranks) for message in collectives(step) if not message.cpu)


def models() -> None:
    def rows() -> Iterator[tuple]:
        for name in MODELS:
            config, parts = model(name), units(model(name))
            of = {n: sum(u.parameters for u in parts if u.network == n) for n in ("backbone", "dino_head", "ibot_head")}
            ops = operations(config, config.train.batch_size_per_gpu)
            whole = (ops.student + ops.backward + ops.teacher) / config.train.batch_size_per_gpu
            yield (
                name,
                config.train.batch_size_per_gpu,
                *(f"{n / 1e6:,.0f} M" for n in of.values()),
                f"{parts[1].parameters / 1e6:.1f} M",
                f"{whole / 1e12:.2f}",
                f"{config.train.batch_size_per_gpu * whole / MACHINE.peak / MACHINE.utilisation * 1e3:.0f}",
            )

    print_table(
        "Models",
        "model | images a GPU | backbone | DINO head | iBOT head | a block | TFLOP an image | arithmetic, ms a step",
        rows(),
    )


def strategies() -> None:
    def rows() -> Iterator[tuple]:
        for name in MODELS:
            for strategy in STRATEGIES:
                for ranks in (8, 64, 1024):
                    step = step_of(name, strategy, ranks)
                    held = state_bytes(step)
                    states, room = sum(list(held.values())[:4]), sum(list(held.values())[4:])
                    fits = "" if states + room < MACHINE.gpu_bytes else ", too much"
                    messages = sum(m.times for m in collectives(step))
                    yield (
                        name,
                        strategy,
                        ranks,
                        f"{sent_bytes(step) / 1e9:.1f}",
                        messages,
                        f"{states / 1e9:.1f}",
                        (f"{room / 1e9:.1f}{fits}"),
                    )

    print_table(
        "A step with one micro-batch, bf16, and a rank's memory without activations",
        "model | strategy | GPUs | sent by each, GB | messages | states, GB | room to send, GB",
        rows(),
    )


def growth() -> None:
    shown = [
        ("ViT-L/14", "ddp"),
        ("ViT-g/14", "ddp"),
        ("ViT-g/14", "fsdp2"),
        ("ViT-7B/16", "fsdp"),
        ("ViT-7B/16", "fsdp2"),
    ]

    def rows() -> Iterator[tuple]:
        for name, strategy in shown:
            for ranks in RANKS:
                step = step_of(name, strategy, ranks)
                if sum(state_bytes(step).values()) > MACHINE.gpu_bytes:
                    yield name, strategy, ranks, "does not fit", *[""] * 6
                    continue
                t = step_time(step, MACHINE)
                yield (
                    name,
                    strategy if ranks > 1 else "single",
                    f"{ranks:,}",
                    f"{t.total * 1e3:,.0f}",
                    f"{t.sending * 1e3:,.0f}",
                    f"{t.flags * 1e3:.0f}",
                    f"{1 - t.compute / t.total:.0%}",
                    f"{derive.images_per_iteration(step.config, ranks) / t.total:,.0f}",
                    f"{t.compute / t.total:.0%}",
                    f"{t.compute / (t.total - t.flags):.0%}",
                )

    print_table(
        "Growth at a fixed number of images a GPU",
        "model | strategy | GPUs | step, ms | sending, ms | of it flags, ms | not hidden, share of the step | "
        "images/s | efficiency | were flags free",
        rows(),
    )


def passes() -> None:
    def rows() -> Iterator[tuple]:
        for name in ("ViT-g/14", "ViT-7B/16"):
            for number in (1, 2, 4):
                size = model(name).train.batch_size_per_gpu // number
                cells = []
                for strategy in STRATEGIES:
                    step = step_of(name, strategy, 64, f"train.microbatch_size={size}")
                    cells.append(f"{sent_bytes(step) / 1e9:.0f} GB, {step_time(step, MACHINE).total:.2f} s")
                heads = [
                    m.times * m.bytes
                    for u in units(model(name))
                    if u.network != "backbone"
                    for m in collectives(step_of(name, "fsdp2", 64, f"train.microbatch_size={size}"))
                    if m.purpose == "teacher" and m.bytes == u.gathered("fsdp2", 64, 2)
                ]
                yield name, number, *cells, f"{sum(heads) / 1e9:.0f} GB"

    print_table(
        "Micro-batches on 64 GPUs: sent by each GPU, and time of a step",
        "model | micro-batches | ddp (were there room) | fsdp | fsdp2 | fsdp2, kept | "
        "of fsdp2: teacher's heads gathered",
        rows(),
    )


def limits() -> None:
    def rows() -> Iterator[tuple]:
        for name in MODELS:
            for ranks in (64, 256, 1024):
                config, step = model(name), step_of(name, "fsdp2", ranks)
                parts = units(config)
                number = sum(u.parameters for u in parts)
                rest = parts[0].gathered("fsdp2", ranks, 2)
                t = step_time(step, MACHINE)
                images = derive.images_per_iteration(config, ranks)
                yield (
                    name,
                    f"{ranks:,}",
                    f"{images:,}",
                    f"{derive.peak_learning_rate(config, ranks):.1e}",
                    f"{derive.total_iterations(config) * images / 142e6:.0f}",
                    f"{2 * parts[0].parameters / 1e6:.0f} -> {rest / 1e6:,.0f}",
                    f"{sum(u.gathered('fsdp2', ranks, 2) for u in parts) / 2 / number:.2f}",
                    f"{2 * parts[1].parameters / ranks / 1e3:,.0f}",
                    f"{t.flags * 1e3:.0f}",
                    f"{8 * number / 1e9:.0f}",
                    f"{16 * number / 1e9:.0f} + {4 * number / 1e9:.0f}",
                )

    print_table(
        "What grows with the number of GPUs (fsdp2)",
        "model | GPUs | global batch | peak lr | passes over 142 M images | embeddings and norm, gathered, MB | "
        "padding, all weights | a block's share, kB | flags, ms | rank 0's memory at start, GB | "
        "checkpoint + teacher, GB",
        rows(),
    )


def published() -> None:
    """What share of the peak the published runs' GPU hours mean, by the operations counted here."""

    def rows() -> Iterator[tuple]:
        for name, images, hours in (("ViT-L/14", 3072, 3.3 * 24 * 96), ("ViT-g/14", 3072, 22_000)):
            ops = operations(model(name), 32)
            one = (ops.student + ops.backward + ops.teacher) / 32
            share = one * images * 625_000 / (hours * 3600 * 312e12)
            yield name, f"{one / 1e12:.2f}", f"{hours:,.0f}", f"{share:.0%}"

    print_table(
        "Published runs of the reference, 625,000 iterations of 3,072 images on A100s (312 TFLOP/s)",
        "model | TFLOP an image | GPU hours | share of the peak",
        rows(),
    )


def counters() -> None:
    from benchmarks.counters import STEPS, is_measured, measure, tally

    def rows() -> Iterator[tuple]:
        sinkhorn = {"train__centering": "sinkhorn_knopp", "ibot__separate_head": "true"}
        for strategy, ranks in (("ddp", 2), ("ddp", 4), ("fsdp", 2), ("fsdp", 4), ("fsdp2", 2), ("fsdp2", 4)):
            for label, changes in (("centring, 1", {}), ("Sinkhorn-Knopp, 2", sinkhorn)):
                size = 8 // ranks // int(label[-1])
                with tempfile.TemporaryDirectory() as folder, socket.socket() as listener:
                    listener.bind(("127.0.0.1", 0))
                    port = listener.getsockname()[1]
                    listener.close()
                    measured = measure(Path(folder), strategy, ranks, port, changes | {"train__microbatch_size": size})
                said: Counter[str] = Counter()
                for m in collectives(Step(measured.config, strategy, ranks, 4, is_measured(STEPS[0]))):
                    said[m.kind] += m.bytes * m.times
                found: Counter[str] = Counter()
                for (kind, bytes_), times in tally(measured.seen[0, STEPS[0]]).items():
                    found[kind] += bytes_ * times
                for kind in sorted(said | found):
                    yield strategy, ranks, label, kind, f"{found[kind]:,}", f"{said[kind]:,}"

    print_table(
        "Counted on CPUs (gloo), fp32, step 3 of a tiny network: bytes of whole tensors",
        "strategy | processes | targets, micro-batches | collective | counted | formula",
        iter(list(rows())),  # after all that the runs print
    )


def host() -> None:
    print_table("Measured on this machine's CPU", "what | when | time", data_rows())


def flags() -> None:
    print_table(
        "A flag of 8 bytes over gloo, all processes on this machine",
        "processes | files opened by each for the group | median time of a flag | a hop",
        flag_rows(),
    )


TABLES = {f.__name__: f for f in (models, strategies, growth, passes, limits, published, counters, host, flags)}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("table", nargs="+", choices=TABLES)
    for chosen in parser.parse_args().table:
        TABLES[chosen]()
