"""Networks of other libraries, asked as if they were ours."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from dinocomp.errors import WeightsError
from dinocomp.interop.weights import read_tensors

_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet


class TimmBackbone(nn.Module):
    """A network of timm as a `Backbone`.

    A network without a class token, such as a convolutional one, gives the mean of its patches for it.
    """

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        about = net.pretrained_cfg
        self.embed_dim = net.num_features
        self.patch_size = net.feature_info[-1]["reduction"] if getattr(net, "feature_info", None) else 1
        self.mean, self.std = about["mean"], about["std"]
        size = about["input_size"][-1]
        self.view = (round(size / about.get("crop_pct", 1.0)), size)

    def get_intermediate_layers(
        self, images: Tensor, n: int | Sequence[int] = 1, *, reshape: bool = False, norm: bool = True
    ) -> list[tuple[Tensor, Tensor]]:
        """See `VisionTransformer.get_intermediate_layers`; `n` counts what timm calls stages."""
        tokens = hasattr(self.net, "num_prefix_tokens")
        more = {"norm": norm, "return_prefix_tokens": True} if tokens else {}
        maps = self.net.forward_intermediates(
            images, indices=n if isinstance(n, int) else list(n), intermediates_only=True, output_fmt="NCHW", **more
        )
        found = []
        for item in maps:
            patches, prefix = item if isinstance(item, tuple) else (item, None)  # [B, D, h, w], [B, P, D]
            flat = patches.flatten(2).transpose(1, 2)  # [B, N, D]
            cls = flat.mean(dim=1) if prefix is None or not prefix.shape[1] else prefix[:, 0]  # [B, D]
            found.append((patches if reshape else flat, cls))
        return found


class HuggingFaceBackbone(nn.Module):
    """A vision transformer of transformers as a `Backbone`.

    A network without a class token gives the mean of its patches for it.
    """

    def __init__(self, net: nn.Module, preprocessing: dict[str, Any]) -> None:
        super().__init__()
        self.net = net
        config = net.config
        self.embed_dim, self.patch_size = config.hidden_size, config.patch_size
        self.mean = preprocessing.get("image_mean", _MEAN)
        self.std = preprocessing.get("image_std", _STD)
        crop = (preprocessing.get("crop_size") or {}).get("height", config.image_size)
        size = preprocessing.get("size") or {}
        self.view = (size.get("shortest_edge", size.get("height", crop)), crop)

    def get_intermediate_layers(
        self, images: Tensor, n: int | Sequence[int] = 1, *, reshape: bool = False, norm: bool = True
    ) -> list[tuple[Tensor, Tensor]]:
        """See `VisionTransformer.get_intermediate_layers`."""
        out = self.net(images, output_hidden_states=True)
        states = out.hidden_states[1:]  # [B, T, D] each, before the final norm
        chosen = states[-n:] if isinstance(n, int) else [states[i] for i in n]
        if norm:
            final = getattr(self.net, "layernorm", None) or getattr(self.net, "post_layernorm", None)
            chosen = [state if final is None else final(state) for state in chosen]
        grid = tuple(side // self.patch_size for side in images.shape[-2:])
        found = []
        for state in chosen:
            if state.ndim != 3 or state.shape[1] < grid[0] * grid[1]:
                raise WeightsError(
                    f"{type(self.net).__name__} gives {list(state.shape[1:])} numbers for {grid[0]} x {grid[1]} "
                    "patches; a network is needed that has a token for each patch"
                )
            patches = state[:, state.shape[1] - grid[0] * grid[1] :]  # [B, N, D]
            cls = state[:, 0] if patches.shape[1] < state.shape[1] else patches.mean(dim=1)  # [B, D]
            found.append((patches.transpose(1, 2).unflatten(2, grid) if reshape else patches, cls))
        return found


def open_timm(name: str) -> TimmBackbone:
    """A network by its timm name, with its published weights (which timm downloads unless it has them), or, as
    NAME=FILE, with those of a file.

    Raises:
        WeightsError: timm is not installed, or knows no such network, or cannot get its weights.
    """
    try:
        import timm
    except ImportError as error:
        raise WeightsError(f"timm:{name} needs timm ({error}); type pip install timm") from error
    model, _, path = name.partition("=")
    if not timm.is_model(model):
        close = ", ".join(timm.list_models(f"*{model.split('.')[0]}*")[:3])
        raise WeightsError(f"timm knows no network '{model}'" + (f"; it knows {close}" if close else ""))
    if path:
        read_tensors(path)  # refuses a file that holds code, which some versions of timm would run
    try:
        net = timm.create_model(model, pretrained=not path, checkpoint_path=path, num_classes=0)
    except (OSError, RuntimeError, ValueError) as error:
        raise WeightsError(f"timm cannot give {model} its weights: {error}") from error
    return TimmBackbone(net).eval().requires_grad_(False)


def open_hugging_face(name: str) -> HuggingFaceBackbone:
    """A vision transformer from a folder that `save_pretrained` wrote, or by its name on Hugging Face (which downloads
    it, unless it has been).

    Raises:
        WeightsError: transformers is not installed, or cannot load it.
    """
    try:
        from transformers import AutoModel
    except ImportError as error:
        raise WeightsError(f"hf:{name} needs transformers ({error}); type pip install transformers") from error
    try:
        net = AutoModel.from_pretrained(name, trust_remote_code=False, local_files_only=Path(name).is_dir())
    except (OSError, RuntimeError, ValueError) as error:
        raise WeightsError(f"transformers cannot load {name}: {error}") from error
    net = getattr(net, "vision_model", net)  # CLIP's, SigLIP's
    if not hasattr(net.config, "patch_size"):
        raise WeightsError(f"{name} is a {type(net).__name__}, which has no patches; give a vision transformer")
    return HuggingFaceBackbone(net, _preprocessing(name)).eval().requires_grad_(False)


def _preprocessing(name: str) -> dict[str, Any]:
    path = Path(name).expanduser() / "preprocessor_config.json"
    if path.is_file():
        return json.loads(path.read_text())
    if Path(name).expanduser().is_dir():
        return {}  # ImageNet's mean and deviation, and the size in the network's configuration
    from transformers import AutoImageProcessor

    return AutoImageProcessor.from_pretrained(name, trust_remote_code=False).to_dict()
