"""Every key of a run: name, type, default and one line of meaning. The only place where a default is written down.

Names and defaults of the reference (facebookresearch/dinov2, `ssl_default_config.yaml`) are kept; keys it does not have
follow its style. An "official epoch" is `train.OFFICIAL_EPOCH_LENGTH` iterations, whatever the size of the dataset.
"""

from dataclasses import dataclass

from dinocomp.config.keys import key, section

# ruff: noqa: RUF009 (`section` returns a dataclass field with a factory: nothing mutable is shared)
_DTYPES = ("fp32", "fp16", "bf16")
_SHARDING = ("NO_SHARD", "SHARD_GRAD_OP", "FULL_SHARD")
_ONE_STRATEGY = (
    "one strategy for all networks, parallelism.strategy; the teacher's weights are always freed after its forward"
)
_ONE_PRECISION = "one precision for the whole model, performance.precision"


@dataclass(frozen=True)
class Weights:
    WEIGHTS: str = key("", "checkpoint to start from (path; '' = none)")
    KEEP_ITERATION: bool = key(
        False, "start at the iteration of the checkpoint in WEIGHTS, as the reference does (false = at 0)"
    )


@dataclass(frozen=True)
class MixedPrecision:
    param_dtype: str = key(
        "fp16",
        "compute type of the network",
        choices=_DTYPES,
        no_longer=_ONE_PRECISION,
    )
    reduce_dtype: str = key(
        "fp16", "type of gradient sums between processes", choices=_DTYPES, no_longer=_ONE_PRECISION
    )
    buffer_dtype: str = key("fp32", "type of buffers", choices=_DTYPES, no_longer=_ONE_PRECISION)


@dataclass(frozen=True)
class NetworkPrecision:
    sharding_strategy: str = key(
        "SHARD_GRAD_OP",
        "how the network is split over processes",
        choices=_SHARDING,
        no_longer=_ONE_STRATEGY,
    )
    mixed_precision: MixedPrecision = section(MixedPrecision, "number types of the network")


@dataclass(frozen=True)
class StudentBackboneNumbers(MixedPrecision):
    param_dtype: str = key(
        "fp16",
        "compute type of the whole model on a GPU where performance.precision is auto (fp16 counts as not given: bf16)",
        choices=_DTYPES,
    )


@dataclass(frozen=True)
class StudentBackbonePrecision(NetworkPrecision):
    sharding_strategy: str = key(
        "SHARD_GRAD_OP",
        "where parallelism.strategy is auto: NO_SHARD = ddp, FULL_SHARD = sharded (SHARD_GRAD_OP counts as not given)",
        choices=_SHARDING,
    )


def _student_backbone() -> NetworkPrecision:
    return StudentBackbonePrecision(mixed_precision=StudentBackboneNumbers())


def _student_head() -> NetworkPrecision:
    return NetworkPrecision(mixed_precision=MixedPrecision(reduce_dtype="fp32"))


@dataclass(frozen=True)
class TeacherPrecision:
    backbone: NetworkPrecision = section(NetworkPrecision, "teacher backbone")
    dino_head: NetworkPrecision = section(NetworkPrecision, "teacher DINO head")
    ibot_head: NetworkPrecision = section(NetworkPrecision, "teacher iBOT head")


@dataclass(frozen=True)
class StudentPrecision:
    backbone: NetworkPrecision = section(_student_backbone, "student backbone")
    dino_head: NetworkPrecision = section(_student_head, "student DINO head")
    ibot_head: NetworkPrecision = section(_student_head, "student iBOT head")


@dataclass(frozen=True)
class ComputePrecision:
    grad_scaler: bool = key(
        True, "scale the loss against fp16 underflow", no_longer="Composer scales gradients in fp16, and only there"
    )
    teacher: TeacherPrecision = section(TeacherPrecision, "the teacher's networks")
    student: StudentPrecision = section(StudentPrecision, "the student's networks")


@dataclass(frozen=True)
class Dino:
    loss_weight: float = key(1.0, "weight of the DINO loss (0 = off)", minimum=0)
    head_n_prototypes: int = key(65536, "prototypes (outputs) of the DINO head", minimum=2, auto=True)
    head_bottleneck_dim: int = key(256, "width of the head's normalised bottleneck", minimum=1)
    head_nlayers: int = key(3, "linear layers up to the bottleneck", minimum=1)
    head_hidden_dim: int = key(2048, "width of the head's hidden layers", minimum=1)
    koleo_loss_weight: float = key(0.1, "weight of the KoLeo loss, which spreads features apart (0 = off)", minimum=0)
    koleo_distributed: bool = key(
        False, "KoLeo looks for neighbours among the images of all processes (false = of its own, as the reference)"
    )
    student_temp: float = key(0.1, "student temperature, for both losses", above=0)
    center_momentum: float = key(0.9, "momentum of the teacher's running centre, for both losses", minimum=0, maximum=1)
    sinkhorn_iterations: int = key(3, "Sinkhorn-Knopp iterations, for both losses", minimum=1)


@dataclass(frozen=True)
class Ibot:
    loss_weight: float = key(1.0, "weight of the iBOT masked-patch loss (0 = off, and no masks)", minimum=0)
    mask_sample_probability: float = key(0.5, "fraction of the global crops that get a mask", minimum=0, maximum=1)
    mask_ratio_min_max: tuple[float, float] = key(
        (0.1, 0.5), "least and largest fraction of masked patches", minimum=0, maximum=1
    )
    all_patches: bool = key(
        False, "compare all patches of the global crops (false = the masked ones; true is for distillation)"
    )
    separate_head: bool = key(False, "give patches a head of their own (false = they share the DINO head)")
    head_n_prototypes: int = key(65536, "prototypes of the separate iBOT head", minimum=2, auto=True)
    head_bottleneck_dim: int = key(256, "width of the separate head's bottleneck", minimum=1)
    head_nlayers: int = key(3, "linear layers of the separate head up to the bottleneck", minimum=1)
    head_hidden_dim: int = key(2048, "width of the separate head's hidden layers", minimum=1)
    mask_block_min_patches: int = key(4, "smallest block of a mask (patches)", minimum=1)
    mask_block_max_fraction: float = key(0.5, "largest block of a mask (fraction of the patches)", above=0, maximum=1)
    mask_block_min_aspect: float = key(
        0.3, "least height:width ratio of a block (its inverse is the largest)", above=0, maximum=1
    )


@dataclass(frozen=True)
class Train:
    batch_size_per_gpu: int = key(64, "images an iteration on each process", minimum=1)
    microbatch_size: int | str = key(
        0,
        "images of a process in memory at a time (0 = all of batch_size_per_gpu, auto = as many as fit on a GPU)",
        choices=("auto",),
        minimum=0,
    )
    dataset_path: str = key(
        "ImageNet:split=TRAIN", "training images: shards, remote, image folder, ImageNet:… string or digits"
    )
    output_dir: str = key(".", "folder for everything the run writes (new, empty, or of a run to go on with)")
    saveckp_freq: int = key(
        20, "checkpoint period of the reference, never read there", no_longer="the period is checkpoint.save_frequency"
    )
    seed: int = key(0, "seed of weights, order, crops and masks", minimum=0, maximum=2**32 - 1)
    num_workers: int = key(10, "data worker processes for each training process", minimum=0)
    OFFICIAL_EPOCH_LENGTH: int = key(1250, "iterations in one official epoch", minimum=1)
    cache_dataset: bool = key(
        True, "dataset caching of the reference, never read there", no_longer="shards are cached in data.cache_dir"
    )
    centering: str = key("centering", "how teacher outputs become targets", choices=("centering", "sinkhorn_knopp"))
    device: str = key("auto", "where to train (auto = GPU if there is one)", choices=("auto", "cpu", "gpu"))


@dataclass(frozen=True)
class Student:
    arch: str = key("vit_large", "network: vit_small, vit_base, vit_large, vit_giant2 or custom")
    patch_size: int = key(16, "side of a patch (pixels)", minimum=1)
    drop_path_rate: float = key(0.3, "fraction of the batch that skips a residual branch", minimum=0, below=1)
    layerscale: float | None = key(1e-5, "initial LayerScale factor (0 or null = no LayerScale)", minimum=0)
    pos_embed_std: float = key(0.02, "standard deviation that position embeddings start with", above=0)
    pos_embed_blur: float = key(
        0.0,
        "blur of position embeddings at the start, so that neighbours are alike (share of the grid's side)",
        minimum=0,
        auto=True,
    )
    linear_init: str = key(
        "normal_0.02",
        "how linear layers' weights start: standard deviation 0.02, or 1 / sqrt(inputs)",
        choices=("normal_0.02", "lecun_normal"),
    )
    drop_path_uniform: bool = key(True, "same drop path rate in every block (false = rising from 0 with depth)")
    pretrained_weights: str = key("", "weights for the student's backbone before training (path; '' = none)")
    ffn_layer: str = key("mlp", "feed-forward layer", choices=("mlp", "swiglu", "swiglufused", "identity"))
    block_chunks: int = key(
        0,
        "groups of blocks for sharding",
        minimum=0,
        no_longer="blocks are never chunked: their names are the published ones",
    )
    qkv_bias: bool = key(True, "bias in the query, key and value projection")
    proj_bias: bool = key(True, "bias in the attention's output projection")
    ffn_bias: bool = key(True, "bias in the feed-forward layers")
    num_register_tokens: int = key(0, "register tokens", minimum=0)
    interpolate_antialias: bool = key(False, "antialias when position embeddings are resized")
    interpolate_offset: float = key(
        0.1, "offset (patches) when position embeddings are resized (0 = by size)", minimum=0
    )
    embed_dim: int | None = key(None, "token width (null = the named arch's; needed for custom)", minimum=1)
    depth: int | None = key(None, "transformer blocks (null = the named arch's; needed for custom)", minimum=1)
    num_heads: int | None = key(None, "attention heads (null = the named arch's; needed for custom)", minimum=1)
    mlp_ratio: float = key(4.0, "hidden width of the feed-forward layer over the token width", above=0)


@dataclass(frozen=True)
class Teacher:
    momentum_teacher: float = key(0.992, "teacher momentum at the start", minimum=0, maximum=1, auto=True)
    final_momentum_teacher: float = key(1.0, "teacher momentum at the end (cosine between)", minimum=0, maximum=1)
    warmup_teacher_temp: float = key(0.04, "teacher temperature at the start", above=0)
    teacher_temp: float = key(0.07, "teacher temperature after its warm-up", above=0, auto=True)
    warmup_teacher_temp_epochs: int = key(
        30, "length of the teacher temperature's linear warm-up (official epochs)", minimum=0, auto=True
    )
    distil_from: str = key(
        "",
        "a run's teacher.safetensors, of any size, that stays as it is and gives the targets; the student's moving "
        "average is then the final model alone ('' = the moving average gives them)",
    )


@dataclass(frozen=True)
class Optim:
    epochs: int = key(100, "length of the run (official epochs)", minimum=1)
    weight_decay: float = key(0.04, "weight decay at the start", minimum=0)
    weight_decay_end: float = key(0.4, "weight decay at the end (cosine between)", minimum=0)
    base_lr: float = key(0.004, "peak learning rate at 1024 images an iteration", minimum=0, auto=True)
    lr: float = key(0.0, "peak learning rate as it stands, without scaling (0 = from base_lr)", minimum=0)
    warmup_epochs: int = key(10, "length of the learning rate's linear warm-up (official epochs)", minimum=0, auto=True)
    min_lr: float = key(1e-6, "learning rate at the end (never scaled)", minimum=0)
    clip_grad: float = key(
        3.0, "largest gradient norm, for backbone and each head separately (0 = no clipping)", minimum=0
    )
    freeze_last_layer_epochs: int = key(1, "the heads' last layer stays still this long (official epochs)", minimum=0)
    freeze_backbone_epochs: int = key(
        0,
        "the student's backbone stays as it starts this long, and its learning rate then warms up as the heads' did "
        "(official epochs; for pretrained weights)",
        minimum=0,
    )
    scaling_rule: str = key(
        "sqrt_wrt_1024", "peak learning rate = base_lr * sqrt(images an iteration / 1024)", choices=("sqrt_wrt_1024",)
    )
    patch_embed_lr_mult: float = key(0.2, "learning rate multiplier of the patch embedding", minimum=0)
    layerwise_decay: float = key(0.9, "learning rate multiplier from each block to the one below", above=0, maximum=1)
    adamw_beta1: float = key(0.9, "AdamW's first decay rate", minimum=0, below=1)
    adamw_beta2: float = key(0.999, "AdamW's second decay rate", minimum=0, below=1)
    max_bad_steps: int = key(
        20, "stop after so many steps in a row whose loss or gradient is not finite (0 = never)", minimum=0
    )


@dataclass(frozen=True)
class Crops:
    global_crops_scale: tuple[float, float] = key(
        (0.32, 1.0), "area of a global crop (fractions of the image)", above=0, maximum=1
    )
    local_crops_number: int = key(8, "local crops of each image (0 = none)", minimum=0, auto=True)
    local_crops_scale: tuple[float, float] = key(
        (0.05, 0.32), "area of a local crop (fractions of the image)", above=0, maximum=1
    )
    global_crops_size: int = key(224, "side of a global crop (pixels)", minimum=1, auto=True)
    local_crops_size: int = key(96, "side of a local crop (pixels)", minimum=1, auto=True)
    aspect_ratio: tuple[float, float] = key((0.75, 4 / 3), "least and largest width:height ratio of a crop", above=0)
    horizontal_flip_probability: float = key(0.5, "probability of a left-right flip", minimum=0, maximum=1)
    color_jitter_probability: float = key(0.8, "probability of colour jitter", minimum=0, maximum=1)
    brightness: float = key(0.4, "largest relative change of brightness", minimum=0)
    contrast: float = key(0.4, "largest relative change of contrast", minimum=0)
    saturation: float = key(0.2, "largest relative change of saturation", minimum=0)
    hue: float = key(0.1, "largest turn of the hue (turns)", minimum=0, maximum=0.5)
    grayscale_probability: float = key(0.2, "probability of losing all colour", minimum=0, maximum=1)
    blur_probability: tuple[float, float, float] = key(
        (0.0, 0.9, 0.5), "probability of blur: first global, second global, local crops", minimum=0, maximum=1
    )
    blur_kernel_size: int = key(9, "side of the Gaussian blur kernel (pixels, odd)", minimum=1)
    blur_sigma: tuple[float, float] = key((0.1, 2.0), "least and largest sigma of the blur (pixels)", above=0)
    solarize_probability: float = key(0.2, "probability of solarising the second global crop", minimum=0, maximum=1)
    solarize_threshold: int = key(128, "values from here on are inverted (0 to 256 = never)", minimum=0, maximum=256)
    mean: tuple[float, float, float] = key((0.485, 0.456, 0.406), "red, green, blue mean subtracted (pixels in 0..1)")
    std: tuple[float, float, float] = key(
        (0.229, 0.224, 0.225), "red, green, blue deviation divided by (pixels in 0..1)", above=0
    )


@dataclass(frozen=True)
class Curriculum:
    fraction: float = key(
        0.0, "share of the iterations, from the first on, that see smaller crops (0 = none)", minimum=0, below=1
    )
    global_crops_size: int = key(
        0, "side of a global crop in them (pixels; 0 = half of crops.global_crops_size, up to whole patches)", minimum=0
    )
    local_crops_size: int = key(
        0, "side of a local crop in them (pixels; 0 = half of crops.local_crops_size, up to whole patches)", minimum=0
    )


@dataclass(frozen=True)
class Evaluation:
    eval_period_iterations: int = key(
        12500, "evaluate the teacher, and keep a copy of it, every so many iterations (0 = at the end alone)", minimum=0
    )
    train_dataset_path: str = key("", "labelled reference images ('' = the training data's train split, if labelled)")
    val_dataset_path: str = key("", "labelled held-out images ('' = the training data's val split, if labelled)")
    train_images: int = key(
        0, "of the labelled reference images, compare with a fixed draw of so many (0 = all)", minimum=0
    )
    val_images: int = key(0, "of the labelled held-out images, score a fixed draw of so many (0 = all)", minimum=0)
    knn_k: tuple[int, ...] = key((10, 20, 100, 200), "neighbours that vote; one accuracy for each number", minimum=1)
    knn_temperature: float = key(0.07, "temperature of the votes", above=0)
    batch_size: int = key(256, "images a forward pass of the evaluation", minimum=1)
    at_start: bool = key(
        False, "also evaluate before the first iteration, and raw pixels with it: what features have to beat"
    )
    budget: float = key(
        0.1,
        "largest share of the run's time that evaluations take: one that comes too soon after the one before is left "
        "out, but for the last (1 = none)",
        above=0,
        maximum=1,
    )
    label_free: str = key(
        "auto",
        "measures that need no labels: effective rank, LiDAR, neighbour consistency (auto = where there is no labelled "
        "pair)",
        choices=("auto", "always", "never"),
    )
    label_free_images: int = key(1024, "images that label-free measures look at (a fixed draw)", minimum=16)
    label_free_views: int = key(8, "augmented views of each of them", minimum=2)
    pictures: bool = key(
        True, "draw the teacher's features at each evaluation, into OUTPUT/pictures and to the loggers"
    )


@dataclass(frozen=True)
class Data:
    cache_dir: str = key("", "folder for converted and downloaded shards ('' = the user's cache folder)")
    prefetch_factor: int = key(2, "batches each data worker prepares ahead", minimum=1)
    timeout_seconds: int = key(600, "fail when a batch takes longer than this (seconds; 0 = wait for ever)", minimum=0)
    cache_limit: str = key(
        "", "most disk that fetched remote shards take on a machine (such as 500gb; '' = all of them)"
    )
    on_bad_image: str = key(
        "skip",
        "when an image cannot be decoded while training: skip = another takes its place, raise = stop",
        choices=("skip", "raise"),
    )
    max_bad_images: int = key(100, "stop when more images than this could not be decoded", minimum=0)


@dataclass(frozen=True)
class Checkpoint:
    save_frequency: int = key(3, "save every so many official epochs", minimum=1)
    max_to_keep: int = key(3, "checkpoints kept, the newest ones (0 = all)", minimum=0)
    keep_every: int = key(0, "also keep for ever those of every so many official epochs (0 = none)", minimum=0)
    remote: str = key("", "address in an object store that checkpoints are copied to (s3://bucket/run; '' = none)")
    remote_wait_seconds: int = key(
        1800, "how long the end of a run waits for its last copies to reach checkpoint.remote (seconds)", minimum=0
    )
    on_save_failure: str = key(
        "raise",
        "when a checkpoint cannot be written (full disk, quota): raise = stop, warn = go on and try at the next",
        choices=("raise", "warn"),
    )
    resume: str = key(
        "auto",
        "go on from output_dir: auto = if there is a checkpoint, must = or fail",
        choices=("auto", "never", "must"),
    )


@dataclass(frozen=True)
class Loggers:
    period_iterations: int = key(10, "log metrics every so many iterations", minimum=1)
    tensorboard: bool = key(False, "also write TensorBoard files")
    wandb: str = key("", "also log to this Weights & Biases project ('' = no)")
    mlflow: str = key("", "also log to this MLflow experiment ('' = no)")
    report: bool = key(True, "keep OUTPUT/report.html up to date: the run on one page")


@dataclass(frozen=True)
class Performance:
    precision: str = key(
        "auto", "compute type (auto = bf16 on GPU, fp32 on CPU)", choices=("auto", "fp32", "bf16", "fp16")
    )
    attention: str = key(
        "auto",
        "attention kernel (auto = xformers on GPU where installed and not compiled, else sdpa; varlen = torch's, from "
        "2.10 on)",
        choices=("auto", "xformers", "varlen", "sdpa"),
    )
    compile: bool = key(
        False,
        "compile transformer blocks, heads, and what reads logits (torch.compile; some minutes when a process starts)",
    )
    cuda_graphs: bool = key(False, "replay what is compiled as CUDA graphs, for small batches that wait for launches")
    fused_optimizer: bool = key(False, "AdamW in one kernel for many weights, without scratch memory")
    async_step: bool = key(
        False, "do not wait for the GPU where Composer reads the loss and counts images in each step"
    )
    collect_garbage_every: int = key(
        0,
        "let Python look for circular garbage every so many iterations, on all ranks alike (0 = when it likes)",
        minimum=0,
    )
    device_augment: bool = key(
        False,
        "change the crops' colours on the training device instead of in the data workers: several times as many images "
        "a core, the same augmentation",
    )
    scaled_decode: bool = key(
        False,
        "decode a JPEG at a half, quarter or eighth of its size where every crop has at least twice its pixels there: "
        "for large images; crops differ by about one level in 255",
    )


@dataclass(frozen=True)
class Parallelism:
    strategy: str = key(
        "auto",
        "how networks lie on processes: ddp = whole on each, fsdp and fsdp2 = a share on each, single = one process "
        "(auto = ddp, or fsdp2 where whole ones would fill a third of a GPU)",
        choices=("auto", "single", "ddp", "fsdp", "fsdp2"),
    )
    reshard_after_forward: bool = key(
        True,
        "where networks are sharded: free the student's gathered weights until backward (false = faster, more memory)",
    )
    activation_checkpointing: str = key(
        "none",
        "what is computed again in backward: none, all of a block (full), or all but its matrix products and attention "
        "(selective)",
        choices=("none", "selective", "full"),
    )
    activation_checkpointing_every: int = key(1, "of every so many blocks, one is computed again", minimum=1)
    activation_cpu_offload: bool = key(
        False, "keep what backward needs of the student's blocks in the machine's memory (slow)"
    )


@dataclass(frozen=True)
class Config:
    """A whole run. Immutable: `dataclasses.replace` makes changed copies, `load_config` checked ones."""

    MODEL: Weights = section(Weights, "what to start from")
    compute_precision: ComputePrecision = section(ComputePrecision, "number types and sharding, network by network")
    dino: Dino = section(Dino, "image-level loss and head")
    ibot: Ibot = section(Ibot, "patch-level loss, its head and masks")
    train: Train = section(Train, "batch, data, place and length of an official epoch")
    student: Student = section(Student, "the network")
    teacher: Teacher = section(Teacher, "momentum and temperature of the teacher")
    optim: Optim = section(Optim, "AdamW and its schedules")
    crops: Crops = section(Crops, "crops and augmentation")
    curriculum: Curriculum = section(Curriculum, "smaller crops at the beginning")
    evaluation: Evaluation = section(Evaluation, "what the teacher's features are worth, while training")
    data: Data = section(Data, "shards and loading")
    checkpoint: Checkpoint = section(Checkpoint, "saving and resuming")
    loggers: Loggers = section(Loggers, "where metrics go")
    performance: Performance = section(Performance, "speed and precision")
    parallelism: Parallelism = section(Parallelism, "many processes, and networks larger than a GPU")
    recipes: tuple[str, ...] = key((), "recipes applied on top of this file, in order (names or paths)")
