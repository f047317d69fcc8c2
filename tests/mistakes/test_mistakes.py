"""Mistakes people make, and what they are told: one row is the words typed and what the message must hold.

Every message names the thing and the remedy, without a traceback; the exit status is not 0, and nothing has been
written, neither in the output folder nor in the cache. `train` stands for `composer dinocomp/train.py`, the rest are
commands of `dinocomp`. What lies in the folder they are typed in is in conftest.py.
"""

import os
import shlex
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from dinocomp import cli
from dinocomp.build import machine
from dinocomp.errors import ConfigError
from dinocomp.train import main

from ..helpers import ROOT, launch
from .conftest import photos

ROWS = [
    # The YAML
    ("train", "Name a YAML first", "composer dinocomp/train.py YAML"),
    ("train train.seed=3", "Name a YAML first", "'train.seed=3'"),
    ("train nowhere.yaml", "nowhere.yaml: no such file", "Shipped: imagenet100"),
    ("train vits61", "vits61", "Did you mean vits14 or vits16?"),
    ("train photos", "photos: this is a folder", "train.dataset_path=photos"),
    ("train registers", "registers: this is the name of a recipe", "YAML recipes=[registers]"),
    ("train tiny.yaml vits16.yaml", "vits16.yaml: a run has one YAML", "recipes=[vits16.yaml]"),
    ("train tab.yaml", "tab.yaml, line 2", "There is a tab; indent with spaces"),
    ("train list.yaml", "list.yaml: the top of the file is a list", "`train:` were expected"),
    ("train twice.yaml", "twice.yaml, line 2", "duplicate key train", "Mend"),
    ("train nothing.yaml", "nothing.yaml: the file says nothing", "`train:` were expected"),
    ("train dotted.yaml", "train.seed (dotted.yaml)", "a level of its own, without dots"),
    ("train words.yaml", "words.yaml: the file is plain text 'hello there'", "`train:` were expected"),
    ("train unclosed.yaml", "unclosed.yaml, line 2", "expected ',' or '}'"),
    ("train two.yaml", "two.yaml, line 2", "another document"),
    ("train latin1.yaml", "latin1.yaml", "byte 22 is not UTF-8", "Save the file as UTF-8"),
    ("train movie.mp4", "movie.mp4: the file is plain text", "`train:` were expected"),
    ("train misspelt.yaml", "train.sead = 1 (misspelt.yaml)", "Did you mean train.seed?"),
    ("train flat.yaml", "seed = 1 (flat.yaml)", "Did you mean train.seed?"),
    ("train quoted.yaml", "train.seed = '1' (quoted.yaml)", "whole number; write 1 (without quotes)"),
    ("train yes.yaml", "ibot.separate_head = 'yes' (yes.yaml)", "write true (without quotes)"),
    ("train nocolon.yaml", "train = 'seed:1' (nocolon.yaml)", "a space after the colon"),
    ("train unknown.yaml", "data.cache_dir", "'train.nowhere' not found", "the name of a key"),
    ("train variable.yaml", "data.cache_dir", "'NOT_SET_ANYWHERE' not found", "set it, or write ${oc.env:NAME,VALUE}"),
    ("train circle.yaml", "data.cache_dir", "refers back to itself", "give one of these keys a value"),
    ("train recipes.yaml", "regsters: no such file, and no recipe", "Did you mean registers?"),
    ("train code.yaml", "code.yaml, line 1", "could not determine a constructor", "Mend"),
    # Words
    ("train tiny.yaml train.seed = 3", "train.seed =: no spaces", "type train.seed=3"),
    ("train tiny.yaml train.seed =3", "train.seed =3: no spaces", "type train.seed=3"),
    ("train tiny.yaml train.seed= 3", "train.seed= 3: no spaces", "type train.seed=3"),
    ("train tiny.yaml train.seed:3", "'train.seed:3'", "type train.seed=3"),
    ("train tiny.yaml train.seed", "'train.seed'", "type train.seed=VALUE"),
    ("train tiny.yaml train.seed=", "train.seed = None", "null is not a value here; give one"),
    ("train tiny.yaml =3", "'=3'", "key=value"),
    ("train tiny.yaml --train.seed=3", "--train.seed=3", "type train.seed=3"),
    ("train tiny.yaml --train.seed 3", "--train.seed", "type train.seed=3"),
    ("train tiny.yaml --batch-size 64", "--batch-size", "type train.batch_size_per_gpu=64"),
    ("train tiny.yaml -n 4", "-n: a flag of composer", "composer -n 4 dinocomp/train.py"),
    ("train tiny.yaml --master_port=29500", "--master_port=29500", "composer --master_port 29500 dinocomp/train.py"),
    ("train tiny.yaml --frobnicate", "--frobnicate: there are no flags here", "key=value"),
    ("train --config-file tiny.yaml", "--config-file tiny.yaml", "composer dinocomp/train.py tiny.yaml"),
    ("train tiny.yaml --no-resume", "--no-resume", "type train.output_dir=A_NEW_FOLDER"),
    ("train tiny.yaml +train.seed=3", "+train.seed", "Write train.seed"),
    ("train tiny.yaml recipes=[unknown]", "unknown: no such file, and no recipe", "Shipped: activation_"),
    ("train tiny.yaml recipes=regsters", "regsters", "Did you mean registers?"),
    ("train tiny.yaml recipes=registers,sinkhorn", "several go in brackets", "type recipes=[registers,sinkhorn]"),
    ("train tiny.yaml recipes=[registers, sinkhorn]", "a list has no spaces", "type recipes=[registers,sinkhorn]"),
    ("train tiny.yaml recipes=vits16", "vits16: this is the name of a run", "as the first word, vits16"),
    ("train tiny.yaml recipe=registers", "recipe = 'registers'", "Did you mean recipes?"),
    ("train tiny.yaml recipes=photos", "photos: this is a folder", "a recipe is a YAML file"),
    # Keys
    ("train tiny.yaml train.batchsize=3", "train.batchsize = 3", "Did you mean train.batch_size_per_gpu?"),
    ("train tiny.yaml optim.learning_rate=1", "optim.learning_rate", "Did you mean optim.base_lr?"),
    ("train tiny.yaml train.epochs=3", "train.epochs = 3", "Did you mean optim.epochs"),
    ("train tiny.yaml Train.seed=3", "Train.seed = 3", "Did you mean train.seed?"),
    ("train tiny.yaml seed=3", "seed = 3", "Did you mean train.seed?"),
    ("train tiny.yaml zzz.qqq=3", "zzz.qqq = 3", "`dinocomp plan YAML --full` lists every key"),
    ("train tiny.yaml train=photos", "train is a section", "set a key in it, such as train.batch_size_per_gpu"),
    # Values
    ("train tiny.yaml train.seed=three", "train.seed = 'three'", "expected whole number"),
    ("train tiny.yaml train.seed=[1", "'train.seed=[1'", "brackets and quotes come in pairs"),
    ("train tiny.yaml train.seed=99999999999", "train.seed = 99999999999", "at most 4294967295"),
    ("train tiny.yaml optim.epochs=1.5", "optim.epochs = 1.5", "expected whole number"),
    ("train tiny.yaml optim.epochs=3.0", "optim.epochs = 3.0", "write 3"),
    ("train tiny.yaml optim.epochs=0", "optim.epochs = 0", "at least 1"),
    ("train tiny.yaml optim.base_lr=0,001", "optim.base_lr = '0,001'", "write 0.001"),
    ("train tiny.yaml optim.base_lr=1e-3x", "optim.base_lr = '1e-3x'", "expected number"),
    ("train tiny.yaml optim.scaling_rule=linear", "optim.scaling_rule", "expected one of sqrt_wrt_1024"),
    ("train tiny.yaml ibot.separate_head=1", "ibot.separate_head = 1", "write true"),
    ("train tiny.yaml dino.loss_weight=-1", "dino.loss_weight = -1", "at least 0"),
    ("train tiny.yaml teacher.teacher_temp=0", "teacher.teacher_temp = 0", "above 0"),
    ("train tiny.yaml crops.mean=0.5,0.5,0.5", "crops.mean", "write [0.5,0.5,0.5]"),
    ("train tiny.yaml crops.mean=0.5", "crops.mean = 0.5", "such as [0.485,0.456,0.406]"),
    ("train tiny.yaml evaluation.knn_k=5", "evaluation.knn_k = 5", "such as [10,20,100,200]"),
    ("train tiny.yaml evaluation.knn_k=[]", "evaluation.knn_k", "type evaluation.knn_k=[20]"),
    ("train tiny.yaml train.batch_size_per_gpu=0", "train.batch_size_per_gpu = 0", "at least 1"),
    ("train tiny.yaml train.num_workers=-1", "train.num_workers = -1", "at least 0"),
    ("train tiny.yaml train.device=cuda", "train.device = 'cuda'", "Did you mean gpu?"),
    ("train tiny.yaml performance.precision=float16", "performance.precision", "Did you mean fp16?"),
    ("train tiny.yaml train.centering=sinkhorn", "train.centering", "Did you mean sinkhorn_knopp?"),
    ("train tiny.yaml student.arch=vit_smal", "student.arch", "Did you mean vit_small?"),
    ("train tiny.yaml student.drop_path_rate=1", "student.drop_path_rate = 1", "below 1"),
    ("train tiny.yaml checkpoint.resume=yes", "checkpoint.resume = True", "one of auto, never, must"),
    ("train tiny.yaml checkpoint.save_frequency=0", "checkpoint.save_frequency = 0", "at least 1"),
    ("train tiny.yaml checkpoint.remote=s3:/bucket/run", "checkpoint.remote", "type checkpoint.remote=s3://bucket/run"),
    ("train tiny.yaml data.cache_limit=much", "data.cache_limit", "type data.cache_limit=500gb"),
    ("train tiny.yaml data.on_bad_image=ignore", "data.on_bad_image", "one of skip, raise"),
    ("train tiny.yaml loggers.wandb=true", "loggers.wandb = True", "Weights & Biases project"),
    ("train tiny.yaml loggers.tensorboard=tb", "loggers.tensorboard = 'tb'", "true or false"),
    # What cannot go together
    ("train tiny.yaml crops.local_crops_size=7", "patches of 4 px do not tile 7 px", "crops.local_crops_size=8"),
    ("train tiny.yaml student.patch_size=5", "patches of 5 px do not tile 16 px", "type crops.global_crops_size=15"),
    (
        "train tiny.yaml student.num_heads=5",
        "24 does not divide into 5",
        "change student.num_heads or student.embed_dim",
    ),
    ("train tiny.yaml student.depth=null", "student.arch=custom needs student.depth", "give whole numbers"),
    (
        "train tiny.yaml optim.warmup_epochs=50",
        "optim.warmup_epochs = 50",
        "type optim.warmup_epochs=0, or raise optim",
    ),
    ("train tiny.yaml optim.freeze_last_layer_epochs=50", "frozen beyond the end", "raise optim.epochs"),
    ("train tiny.yaml crops.global_crops_scale=[1,0.3]", "the least comes first", "crops.global_crops_scale=[0.3,1]"),
    ("train tiny.yaml crops.blur_kernel_size=4", "crops.blur_kernel_size = 4", "type crops.blur_kernel_size=5"),
    ("train tiny.yaml ibot.mask_sample_probability=0", "no crop would ever be masked", "ibot.loss_weight=0"),
    ("train tiny.yaml dino.loss_weight=0 ibot.loss_weight=0 dino.koleo_loss_weight=0", "nothing is left", "above 0"),
    ("train tiny.yaml recipes=[fp16]", "a CPU cannot train in fp16", "type performance.precision=fp32"),
    ("train tiny.yaml performance.precision=bf16", "bf16 needs a GPU", "performance.precision=fp32"),
    ("train tiny.yaml performance.attention=xformers", "xformers needs", "type performance.attention=sdpa"),
    (
        "train tiny.yaml train.microbatch_size=3",
        "no whole number of micro-batches of 3",
        "type train.microbatch_size=2",
    ),
    ("train tiny.yaml train.microbatch_size=auto", "on GPUs only", "such as train.microbatch_size=8"),
    ("train tiny.yaml train.microbatch_size=all", "train.microbatch_size = 'all'", "at least 0, or auto"),
    (
        "train tiny.yaml train.device=auto train.microbatch_size=auto parallelism.strategy=fsdp2",
        "with ddp and fsdp only",
        "type parallelism.strategy=fsdp",
    ),
    ("train tiny.yaml parallelism.strategy=fdsp", "parallelism.strategy = 'fdsp'", "Did you mean fsdp?"),
    # Images
    ("train tiny.yaml train.dataset_path=", "train.dataset_path=: it is empty", "a folder of images"),
    ("train tiny.yaml train.dataset_path=nowhere/at/all", "nowhere is the first part that is missing", "a folder of"),
    ("train tiny.yaml train.dataset_path=photoz", "photoz does not exist", "Did you mean photos?"),
    ("train tiny.yaml 'train.dataset_path=my photos #2'", "my photos #2 does not exist", "a folder of images"),
    ("train tiny.yaml train.dataset_path=Digits", "Digits does not exist", "Did you mean digits?"),
    ("train tiny.yaml train.dataset_path=Imagenet:root=photos", "does not exist", "Did you mean ImageNet:root=photos?"),
    ("train tiny.yaml train.dataset_path=s3:/bucket/x", "s3:/bucket/x does not", "Did you mean s3://bucket/x?"),
    ("train tiny.yaml train.dataset_path=https://a.b/c.tar", "https:// is not a store", "download them"),
    (
        "train tiny.yaml checkpoint.keep_every=10 checkpoint.save_frequency=3",
        "only some",
        "type checkpoint.keep_every=12",
    ),
    ("train tiny.yaml MODEL.KEEP_ITERATION=true", "no weights whose iteration", "MODEL.WEIGHTS=PATH"),
    ("train tiny.yaml train.dataset_path=empty", "no images found in empty", "images end in"),
    ("train tiny.yaml train.dataset_path=texts", "no images found in texts (files of other kinds: 1)", "images end in"),
    ("train tiny.yaml train.dataset_path=one", "has 1 image(s), fewer than the 8", "train.batch_size_per_gpu=1,"),
    (
        "train tiny.yaml train.batch_size_per_gpu=100",
        "24 image(s), fewer than the 100",
        "type train.batch_size_per_gpu=24",
    ),
    ("train tiny.yaml train.dataset_path=movie.mp4", "movie.mp4 is a file that cannot be read", "a folder of images"),
    (
        "train tiny.yaml train.dataset_path=entries.npy",
        "entries.npy is a file that cannot be read",
        "a folder of images",
    ),
    ("train tiny.yaml train.dataset_path=photos/a/0.png", "0.png is a file that cannot be read", "a folder of images"),
    ("train tiny.yaml train.dataset_path=bad.tar", "bad.tar cannot be read", "copy or download it again"),
    ("train tiny.yaml train.dataset_path=half", "half holds a conversion that was interrupted", "dinocomp convert"),
    ("train tiny.yaml train.dataset_path=noindex", "noindex/train/index.json, is missing", "copy it again, or delete"),
    ("train tiny.yaml train.dataset_path=badindex", "badindex/train/index.json is damaged", "copy it again or convert"),
    ("train tiny.yaml train.dataset_path=noshard", "shard.00000.mds is missing", "Copy the shard again"),
    ("train tiny.yaml train.dataset_path=cut", "shard.00000.mds has 100 bytes", "Copy the shard again"),
    ("train tiny.yaml train.dataset_path=onlyval", "onlyval has no split `train`", "give onlyval/val"),
    ("train tiny.yaml train.dataset_path=ImageNet:split=TRAIN", "has no root=", "add the folder that holds train/"),
    ("train tiny.yaml train.dataset_path=ImageNet:split=TRIAN:root=photos", "split=TRIAN", "none of TRAIN, VAL, TEST"),
    ("train tiny.yaml train.dataset_path=ImageNet:split=VAL:root=photos", "no split `val`", "type split=TRAIN"),
    ("train tiny.yaml train.dataset_path=ImageNet22k:root=photos", "ImageNet22k is not read", "dinocomp convert"),
    (
        "train tiny.yaml evaluation.train_dataset_path=nowhere",
        "evaluation.train_dataset_path: nowhere does not exist",
        "does not exist",
    ),
    ("train tiny.yaml evaluation.train_dataset_path=photos", "no `val` split", "set evaluation.val_dataset_path=PATH"),
    (
        "train tiny.yaml evaluation.train_dataset_path=few evaluation.val_dataset_path=photos",
        "evaluation.train_dataset_path=few has no labels",
        "a folder with class folders",
    ),
    ("train tiny.yaml data.cache_dir=file", "file is a file, not a folder", "type data.cache_dir=FOLDER"),
    # The output folder
    ("train tiny.yaml train.output_dir=", "train.output_dir = ''", "type train.output_dir=output/NAME"),
    ("train tiny.yaml train.output_dir=file", "file is a file, not a folder", "give another folder"),
    ("train tiny.yaml train.output_dir=file/run", "file is a file, not a folder", "give another folder"),
    ("train tiny.yaml train.output_dir=nothing-there", "is a link to something that does not", "give another folder"),
    ("train tiny.yaml train.output_dir=/proc/run", "train.output_dir=/proc/run cannot be written to", "give another"),
    ("train tiny.yaml train.output_dir=mine", "mine holds other things (thesis)", "train.output_dir=mine/NAME"),
    ("train tiny.yaml train.output_dir=.", "holds other things", "train.output_dir=NAME"),
    ("train tiny.yaml train.output_dir=photos", "lies in train.dataset_path=photos", "train.output_dir=output/NAME"),
    (
        "train tiny.yaml train.output_dir=photos/run",
        "lies in train.dataset_path=photos",
        "train.output_dir=output/NAME",
    ),
    ("train tiny.yaml train.output_dir=s3://b/run", "writes to a local folder", "checkpoint.remote=s3://b/run"),
    (
        "train tiny.yaml train.output_dir=run student.embed_dim=48",
        "other networks: student.embed_dim was 24",
        "another",
    ),
    (
        "train tiny.yaml train.output_dir=run checkpoint.resume=never",
        "checkpoint.resume=never",
        "another train.output_dir",
    ),
    ("train tiny.yaml checkpoint.resume=must", "there is no checkpoint in out", "type checkpoint.resume=auto"),
    # Weights
    ("train tiny.yaml MODEL.WEIGHTS=othre.pth", "MODEL.WEIGHTS=othre.pth", "Did you mean other.pth or"),
    ("train tiny.yaml MODEL.WEIGHTS=run", "this is a folder", "such as MODEL.WEIGHTS=run/teacher.safetensors"),
    ("train tiny.yaml MODEL.WEIGHTS=https://a.b/c.pth", "MODEL.WEIGHTS=https://a.b/c.pth", "Download it"),
    ("train tiny.yaml MODEL.WEIGHTS=model_0003749.rank_0.pth", "one process's share", "teacher_checkpoint.pth"),
    ("train tiny.yaml MODEL.WEIGHTS=text.pth", "text.pth is no file of weights", "give a .safetensors file"),
    ("train tiny.yaml MODEL.WEIGHTS=empty.pth", "empty.pth is damaged or cut short (0 bytes)", "copy it again"),
    ("train tiny.yaml MODEL.WEIGHTS=cut.safetensors", "cut.safetensors is damaged or cut short", "copy it again"),
    ("train tiny.yaml MODEL.WEIGHTS=evil.pth", "evil.pth", "could run code", "Save its state_dict alone"),
    ("train tiny.yaml MODEL.WEIGHTS=other.pth", "other.pth has no weights of backbone", "student.pretrained_weights"),
    (
        "train tiny.yaml MODEL.WEIGHTS=run/teacher.safetensors student.embed_dim=48",
        "cls_token is [1, 1, 24], the network's is [1, 1, 48]",
        "Set student.arch",
    ),
    (
        "train tiny.yaml student.pretrained_weights=run/teacher.safetensors student.num_register_tokens=2",
        "missing: register_tokens",
        "Set student.arch, patch_size, num_register_tokens",
    ),
    ("train tiny.yaml student.pretrained_weights=dinov2_vits14", "dinov2_vits14 does not exist", "give the path"),
    # The other commands
    ("frobnicate", "invalid choice: 'frobnicate'", "convert", "plan", "recipes"),
    ("convert photos", "required: DST", "usage: dinocomp convert"),
    ("convert photoz out", "photoz does not exist", "Did you mean photos?"),
    ("convert empty out", "no images found in empty", "images end in"),
    ("convert movie.mp4 out", "movie.mp4 is a file, but not a tar file", "give a folder of images"),
    ("convert shards out", "shards holds shards already", "give it as train.dataset_path"),
    ("convert photos photos", "photos lies in photos", "such as photos-shards"),
    ("convert photos photos/shards", "photos/shards lies in photos", "such as photos-shards"),
    ("convert photos shards", "shards/train holds a conversion of other images", "give another DST"),
    ("convert photos file", "the folder file cannot be made", "a place you may write to"),
    ("convert photos s3://bucket/x", "s3://bucket/x", "copy that to the store"),
    ("convert photos out --val-fraction 0.001", "leaves one split empty", "choose another"),
    ("convert photos out --workers many", "'many' is not a whole number", "usage: dinocomp convert"),
    ("convert photos out --compression gzip", "invalid choice: 'gzip'", "'zstd'"),
    ("convert photos out --wrokers 2", "unrecognized arguments: --wrokers", "Did you mean --workers?"),
    ("plan", "required: YAML", "usage: dinocomp plan"),
    ("plan nowhere", "nowhere: no such file", "Shipped: imagenet100"),
    ("plan tiny.yaml train.sead=3", "train.sead = 3", "Did you mean train.seed?"),
    ("plan tiny.yaml --wrld-size 2", "unrecognized arguments: --wrld-size", "Did you mean --world-size?"),
    ("plan tiny.yaml --world-size 0", "'0' is not a whole number of at least 1", "--world-size"),
    ("recipes regsters", "regsters", "Did you mean registers?"),
]


def snapshot(place: Path) -> dict[str, int]:
    """Every file with its time of change, and every folder."""
    return {str(p): 0 if p.is_dir() else p.lstat().st_mtime_ns for p in place.rglob("*")}


def told(line: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """(exit status, what stands on stderr) of a command."""
    command, *words = shlex.split(line)
    try:
        status = main(words) if command == "train" else cli.main([command, *words])
    except SystemExit as stop:
        status = stop.code
    return status, capsys.readouterr().err


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0])
def test_mistakes(row: tuple[str, ...], place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line, *fragments = row
    before = snapshot(place)
    status, message = told(line, capsys)
    assert status == 2, message
    for fragment in fragments:
        assert fragment in message
    assert "Traceback" not in message
    assert snapshot(place) == before


def test_images_that_turn_out_unreadable(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Only reading them shows it: by then the folder for the shards is there."""
    photos(place / "broken", 8)
    for path in (place / "broken").rglob("*.png"):
        path.write_bytes(b"no image")
    for line, remedy in (
        ("convert broken broken-shards --strict", "mend or remove them, or convert without --strict"),
        ("convert broken broken-shards", "none of the 8 images of broken can be read"),
        ("train tiny.yaml train.dataset_path=broken train.output_dir=broken-run", "none of the 8 images"),
    ):
        status, message = told(line, capsys)
        assert status in (1, 2) and remedy in message and "a/0.png" in message and "Traceback" not in message


def test_debug_gives_the_traceback(place: Path) -> None:
    with pytest.raises(ConfigError, match=r"train\.seed"):
        main(["tiny.yaml", "train.sead=3", "--debug"])


def test_help_is_no_mistake(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["vits16", "--help"]) == 0
    assert "composer dinocomp/train.py YAML" in capsys.readouterr().out


def test_gpus_that_are_not_there(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """None at all, and fewer than the launcher started processes for."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    status, message = told("train tiny.yaml train.device=gpu", capsys)
    assert status == 2 and "no CUDA device" in message and "train.device=cpu" in message
    status, message = told("train tiny.yaml train.device=auto performance.attention=xformers", capsys)
    assert status == 2 and "there is no GPU" in message and "performance.attention=sdpa" in message
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    status, message = told("train tiny.yaml train.device=auto", capsys)
    assert status == 2 and "8 processes" in message and "composer -n 2" in message
    assert not (place / "out").exists()


@pytest.mark.parametrize("key", ["tensorboard=true", "wandb=project", "mlflow=experiment"])
def test_a_logger_that_is_not_installed(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], key: str
) -> None:
    monkeypatch.setattr(machine.importlib.util, "find_spec", lambda name: None)
    status, message = told(f"train tiny.yaml loggers.{key}", capsys)
    package = key.partition("=")[0]
    assert (
        status == 2 and f"the package {package} is not" in message and f"pip install 'dinocomp[{package}]'" in message
    )
    assert not (place / "out").exists()


def test_wandb_without_a_key(place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("wandb")
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    status, message = told("train tiny.yaml loggers.wandb=project", capsys)
    assert status == 2 and "loggers.wandb=project" in message and "wandb login" in message
    assert not (place / "out").exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write and read everywhere")
def test_folders_without_permission(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (place / "locked").mkdir(mode=0o500)
    status, message = told("train tiny.yaml train.output_dir=locked/run", capsys)
    assert status == 2 and "you may not write to" in message and "give another folder" in message
    (place / "secret").mkdir(mode=0)
    status, message = told("train tiny.yaml train.dataset_path=secret", capsys)
    assert status == 2 and "permission" in message.lower() and "Traceback" not in message


@pytest.mark.parametrize("launched", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_port_in_use(place: Path, launched: bool) -> None:
    """As rank 0 meets it, and through the launcher, where the other rank must not be waited for."""
    words = [str(place / "tiny.yaml"), f"train.dataset_path={place}/photos", f"train.output_dir={place}/elsewhere"]
    with socket.socket() as listener:
        listener.bind(("", 0))
        listener.listen()
        port = str(listener.getsockname()[1])
        if launched:
            done = launch(*words, processes=2, flags=("--master_port", port))
            assert "exited with code -9" not in done.stderr
        else:
            rank = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2", "NODE_RANK": "0"}
            environment = os.environ | rank | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            command = [sys.executable, "dinocomp/train.py", *words]
            done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2
    assert f"{port} is in use" in done.stderr and "Leave --master_port out" in done.stderr
    assert "Traceback" not in done.stderr and not (place / "elsewhere").exists()


def test_variables_of_a_launcher_that_are_incomplete(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(device: object, timeout: float) -> None:
        raise ValueError("Error initializing torch.distributed: environment variable MASTER_ADDR expected, but not set")

    monkeypatch.setattr(machine.dist, "initialize_dist", refuse)
    with pytest.raises(ConfigError, match=r"MASTER_ADDR.*Start with composer"):
        machine.join_processes(False)


def test_names_with_spaces_links_and_home_work(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What is no mistake: umlauts, spaces, a # and a colon, ~, links, a folder that holds the YAML and a log."""
    photos(place / "home" / "Fotos: Müller #2", 8)
    (place / "link").symlink_to(place / "home" / "Fotos: Müller #2")
    output = place / "runs: ä [1]"
    output.mkdir()
    Image.new("RGB", (8, 8)).save(place / "home" / "Fotos: Müller #2" / "x.png")
    for name in ("run.yaml", "slurm-1.out", ".hidden"):
        (output / name).write_text("train: {seed: 1}\n")
    for dataset, folder in (("~/Fotos: Müller #2", str(output)), ("link", "~/run")):
        words = ["tiny.yaml", f"train.dataset_path={dataset}", f"train.output_dir={folder}", "optim.epochs=1"]
        assert main(words) == 0, capsys.readouterr().err
        assert (Path(folder).expanduser() / "teacher.safetensors").is_file()
