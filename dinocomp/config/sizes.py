"""Sizes in bytes of what a training step makes, each counted by the shapes of its tensors; `memory.py` adds them up.

Letters as elsewhere: B images of a micro-batch, L local crops, D width, K prototypes, R rows of masked patches. A
tensor of the compute type takes `c` bytes a number, one of the residual stream `r`.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from dinocomp.config.derive import SHARDED, HeadSize, architecture, global_patches, head_sizes, micro_batch
from dinocomp.config.distil import FrozenTeacher
from dinocomp.config.schema import Config

FP32 = 4
AT_A_TIME = {"cpu": 1 << 21, "cuda": 1 << 25}  # numbers, of `method/losses/cross_entropy.py`, which takes torch to read


@dataclass(frozen=True)
class Step:
    """The numbers that all parts of the estimate are made of."""

    config: Config
    parameters: Mapping[str, int]
    world_size: int
    strategy: str
    c: int
    masked: int  # R, patches that iBOT compares
    gpu: bool
    frozen: FrozenTeacher | None = None

    @property
    def sharded(self) -> bool:
        return self.strategy in SHARDED and self.world_size > 1

    @property
    def r(self) -> int:
        """Autocast leaves the residual stream in fp32; sharded units are given all in the compute type."""
        return self.c if self.sharded else FP32

    @property
    def passes(self) -> int:
        return self.config.train.batch_size_per_gpu // self.images

    @property
    def images(self) -> int:
        return micro_batch(self.config)

    @property
    def width(self) -> int:
        return architecture(self.config.student).embed_dim

    @property
    def depth(self) -> int:
        return architecture(self.config.student).depth

    @property
    def backbone(self) -> int:
        return self.parameters["backbone"]

    @property
    def numbers(self) -> int:
        return sum(self.parameters.values())

    @property
    def frozen_numbers(self) -> int:
        return sum(self.frozen.parameters.values()) if self.frozen else 0

    @property
    def groups(self) -> list[tuple[int, int]]:
        """(sequences, tokens in each) of global and local crops."""
        config = self.config
        prefix = 1 + config.student.num_register_tokens
        groups = [(2 * self.images, global_patches(config) + prefix)]
        if config.dino.loss_weight and config.crops.local_crops_number:
            patches = (config.crops.local_crops_size // config.student.patch_size) ** 2
            groups.append((config.crops.local_crops_number * self.images, patches + prefix))
        return groups

    @property
    def tokens(self) -> int:
        return sum(sequences * tokens for sequences, tokens in self.groups)

    @property
    def asked(self) -> tuple[int, int]:
        """Tokens that losses ask for, of the teacher and of the student; the last FFN and norm see no others."""
        of_global = 2 * self.images + self.masked
        return of_global, of_global + sum(sequences for sequences, _ in self.groups[1:])

    @property
    def class_rows(self) -> tuple[int, int]:
        """Class tokens that go through the student's head: of global and of local crops."""
        if not self.config.dino.loss_weight:
            return 0, 0
        return 2 * self.images, self.groups[1][0] if len(self.groups) > 1 else 0


def images(step: Step) -> float:
    """Pixels as bytes: the batch and a micro-batch's copy; normalised ones, and those in the compute type."""
    crops = step.config.crops
    pixels = 3 * (2 * crops.global_crops_size**2 + crops.local_crops_number * crops.local_crops_size**2)
    normalised = FP32 + (step.c if step.c < FP32 else 0)
    return pixels * (step.config.train.batch_size_per_gpu + step.images * normalised)


def units(step: Step) -> list[float]:
    """Parameters that are gathered together: of each block, and of each network what is not in one."""
    size = architecture(step.config.student)
    block = block_parameters(size.embed_dim, size.mlp_ratio, step.config.student.ffn_layer)
    heads = [number for name, number in step.parameters.items() if name != "backbone"]
    return [block] * size.depth + heads


def block_parameters(width: int, mlp_ratio: float, ffn_layer: str) -> int:
    """Weights of a block's matrices."""
    gate = 2 if ffn_layer.startswith("swiglu") else 1
    return width * (4 * width + (gate + 1) * ffn_width(width, mlp_ratio, ffn_layer))


def ffn_width(width: int, mlp_ratio: float, ffn_layer: str) -> int:
    """Hidden width of a feed-forward layer."""
    hidden = int(width * mlp_ratio)
    return (hidden * 2 // 3 + 7) // 8 * 8 if ffn_layer.startswith("swiglu") else hidden


def gathered(step: Step) -> float:
    """Sharded: two units in the compute type (one is computed, one on its way), the larger one's gradients in fp32."""
    if not step.sharded:
        return 0
    largest = max(units(step))
    student = 0 if step.config.parallelism.reshard_after_forward else step.c * step.numbers
    return student + largest * (2 * step.c + step.c + FP32)


def optimizer_scratch(step: Step) -> float:
    """On a GPU AdamW, not fused, makes a tensor for each weight of a group; with layerwise decay, of a block."""
    if not step.gpu or step.config.performance.fused_optimizer:
        return 0
    return FP32 * (max(units(step)) if step.config.optim.layerwise_decay < 1 else step.numbers)


def cast_weights(step: Step) -> float:
    """Autocast's copies of the student's weights, until the end of a forward pass."""
    return 0 if step.sharded or step.c == FP32 else step.c * step.numbers


def kept_casts(step: Step) -> float:
    """Those of them that backward reads."""
    recomputed = sum(mode_of(step, i) != "none" for i in range(step.depth)) / step.depth
    return cast_weights(step) * (1 - recomputed * step.backbone / step.numbers)


def inner_width(step: Step) -> int:
    size = architecture(step.config.student)
    return ffn_width(size.embed_dim, size.mlp_ratio, step.config.student.ffn_layer)


def block_keeps(step: Step, tokens: int, *, mode: str, asked: int | None = None) -> float:
    """What a block keeps of so many tokens of each branch: all for its backward ("none"), or products ("selective").

    `asked`: those that the FFN sees, where they are others (in the last block).
    """
    size, student = architecture(step.config.student), step.config.student
    width, c = size.embed_dim, step.c
    hidden = inner_width(step)
    asked = tokens if asked is None else asked
    scaled = 1 if student.layerscale else 0  # LayerScale keeps what it scales
    ffn = {"identity": (0, 0), "mlp": (hidden, hidden)}.get(student.ffn_layer, (2 * hidden, 2 * hidden))
    if mode == "selective":  # query, key and value, attention, its projection; both layers of the FFN
        attention = c * 5 * width + FP32 * size.num_heads
        return tokens * attention + asked * c * (ffn[0] + (width if ffn[0] else 0))
    norm = FP32 * width + c * width + 2 * FP32  # its input, always fp32, its output, mean and deviation
    attention = c * (3 * width + 2 * width + scaled * width) + FP32 * size.num_heads
    rows = 8 + FP32 if student.drop_path_rate else 0
    return tokens * (norm + attention + rows) + asked * (norm + c * (sum(ffn) + scaled * width) + rows)


def kept_tokens(step: Step, i: int) -> int:
    """Tokens of a branch of block i that drop path keeps."""
    student = step.config.student
    share = 1 if student.drop_path_uniform else i / max(step.depth - 1, 1)
    kept = 1 - share * student.drop_path_rate
    return sum(max(int(sequences * kept), 1) * tokens for sequences, tokens in step.groups)


def of_last(step: Step, i: int) -> int | None:
    """What the FFN of block i sees, where that are not the tokens of its attention."""
    return step.asked[1] if i == step.depth - 1 else None


def mode_of(step: Step, i: int) -> str:
    """What block i computes again."""
    parallel = step.config.parallelism
    return "none" if i % parallel.activation_checkpointing_every else parallel.activation_checkpointing


def kept_of_block(step: Step, i: int) -> float:
    """What block i keeps from its forward to its backward."""
    offload, mode = step.config.parallelism.activation_cpu_offload, mode_of(step, i)
    if mode == "none":
        return 0 if offload else block_keeps(step, kept_tokens(step, i), mode="none", asked=of_last(step, i))
    block_input = 0 if offload else stream(step)
    if mode != "selective":
        return block_input
    return block_input + block_keeps(step, kept_tokens(step, i), mode="selective", asked=of_last(step, i))


def backward_of_block(step: Step, i: int) -> float:
    """What is made in the backward of block i: activations that were not kept, and gradients."""
    tokens, mode, asked = kept_tokens(step, i), mode_of(step, i), of_last(step, i)
    again = 0.0
    if mode != "none" or step.config.parallelism.activation_cpu_offload:
        again = block_keeps(step, tokens, mode="none", asked=asked)
        again -= block_keeps(step, tokens, mode="selective", asked=asked) if mode == "selective" else 0
    return again + step.c * inner_width(step) * (tokens if asked is None else asked) + stream(step)


def stream(step: Step) -> float:
    """The residual stream of all crops, [tokens, D]."""
    return step.tokens * step.r * step.width


def final_norm(step: Step) -> float:
    """What the final norm keeps: its input, in fp32, and each token's mean and deviation."""
    return step.asked[1] * FP32 * (step.width + 2)


def target_widths(step: Step) -> tuple[int, int]:
    """Token width and the feed-forward layers' hidden width of the network that gives the targets."""
    if step.frozen is None:
        return step.width, inner_width(step)
    named = step.frozen.architecture
    width = named["embed_dim"]
    return width, ffn_width(width, named["mlp_ratio"], named["ffn_layer"])


def target_tokens(step: Step) -> tuple[int, int]:
    """(sequences, tokens in each) that it sees."""
    if step.frozen is None:
        return step.groups[0]
    named = step.frozen.architecture
    patches = (step.config.crops.global_crops_size // named["patch_size"]) ** 2
    return 2 * step.images, patches + 1 + named.get("num_register_tokens", 0)


def target_gathered(step: Step) -> float:
    """Of a frozen teacher that is sharded, two units in the compute type; autocast keeps no copy of frozen weights."""
    if step.frozen is None or not step.sharded:
        return 0
    named = step.frozen.architecture
    heads = [number for name, number in step.frozen.parameters.items() if name != "backbone"]
    block = block_parameters(named["embed_dim"], named["mlp_ratio"], named["ffn_layer"])
    return 2 * step.c * max(block, *heads)


def teacher(step: Step) -> float:
    """The forward pass of the network that gives the targets: one block's FFN at a time."""
    (width, inner), c = target_widths(step), step.c
    sequences, tokens = target_tokens(step)
    return sequences * tokens * (3 * step.r * width + (step.r + c) * width + 2 * c * inner)


def teacher_tokens(step: Step) -> float:
    """Before and after the final norm."""
    return 2 * step.r * step.asked[0] * target_widths(step)[0]


def tokens(step: Step) -> float:
    """The student's tokens after the final norm, until heads have read them."""
    return FP32 * step.asked[1] * step.width


def losses(step: Step) -> tuple[int, int, int, int, int]:
    """Rows and prototypes: (global, local, K of DINO, masked, K of iBOT)."""
    heads = head_sizes(step.config)
    dino = heads.get("dino_head")
    ibot = heads.get("ibot_head", dino)
    return (*step.class_rows, dino.prototypes if dino else 0, step.masked, ibot.prototypes if ibot else 0)


def logits(step: Step) -> float:
    """Of the student."""
    views, local, k_dino, masked, k_ibot = losses(step)
    return step.c * ((views + local) * k_dino + masked * k_ibot)


def targets(step: Step) -> float:
    """The teacher's logits of all rows that it has a say in: targets are made of them where they are summed."""
    views, _, k_dino, masked, k_ibot = losses(step)
    return step.c * (views * k_dino + masked * k_ibot)


def saved_by_heads(step: Step) -> float:
    """What the student's heads keep for backward besides logits."""
    heads = head_sizes(step.config)
    views, local, _, masked, _ = losses(step)
    rows = {"dino_head": views + local, "ibot_head": masked}
    if "ibot_head" not in heads:
        rows["dino_head"] += masked
    return sum(head(step, size, rows[name]) for name, size in heads.items())


def head(step: Step, size: HeadSize, rows: int) -> float:
    width, c = step.width, step.c
    numbers = width + 2 * (size.layers - 1) * size.hidden + size.bottleneck
    return rows * (c * numbers + 2 * FP32 * size.bottleneck) + c * size.prototypes * size.bottleneck


def making_targets(step: Step) -> float:
    """The teacher's logits, and where Sinkhorn-Knopp is not compiled, one loss's exponentials in fp32."""
    views, _, k_dino, masked, k_ibot = losses(step)
    kept = step.config.train.centering == "sinkhorn_knopp" and not step.config.performance.compile
    return targets(step) + (FP32 * max(views * k_dino, masked * k_ibot) if kept else at_a_time(step))


def loss(step: Step) -> float:
    """Logits and their gradients, which at last lie side by side and in one; before, with some rows in fp32."""
    views, local, k_dino, masked, k_ibot = losses(step)
    by_cls, by_patch = step.c * (views + local) * k_dino, step.c * masked * k_ibot
    return by_cls + by_patch + max(by_cls + at_a_time(step), by_cls + by_patch)


def at_a_time(step: Step) -> float:
    """Rows that losses have in fp32 at a time: both of their sides, and the student's logarithms."""
    views, local, k_dino, masked, k_ibot = losses(step)
    return 2.5 * FP32 * min(AT_A_TIME["cuda" if step.gpu else "cpu"], max((views + local) * k_dino, masked * k_ibot))
