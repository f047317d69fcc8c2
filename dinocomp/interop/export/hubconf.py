"""A DINOv2 backbone in plain torch: torch.hub.load(FOLDER, "backbone", source="local").

`dinocomp export --to hub` copies this file beside the weights (backbone.pth, by the published names), their
architecture (config.json) and how images are to be prepared (preprocessing.json). It needs torch alone; `transform`
needs torchvision, too.
"""

import json
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

dependencies = ["torch"]

_HERE = Path(__file__).resolve().parent


def backbone(pretrained=True, **changes):
    """The network, in eval mode. `changes` are arguments of `VisionTransformer`, such as interpolate_antialias."""
    net = VisionTransformer(**(json.loads((_HERE / "config.json").read_text()) | changes))
    if pretrained:
        net.load_state_dict(torch.load(_HERE / "backbone.pth", map_location="cpu", weights_only=True))
    return net.eval()


def transform():
    """From a PIL image, or uint8 pixels [3, H, W], to the network's input [3, crop, crop]."""
    from torchvision.transforms import v2

    about = json.loads((_HERE / "preprocessing.json").read_text())
    return v2.Compose(
        [
            v2.ToImage(),
            v2.RGB(),
            v2.Resize(about["resize"], interpolation=v2.InterpolationMode.BICUBIC, antialias=True),
            v2.CenterCrop(about["crop"]),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(about["mean"], about["std"]),
        ]
    )


class VisionTransformer(nn.Module):
    """DINOv2's network for use, not for training; names and results are the published ones.

    Images are [B, C, H, W], normalised, of any size that is a whole number of patches.
    """

    def __init__(
        self,
        *,
        img_size,
        patch_size,
        in_chans,
        embed_dim,
        depth,
        num_heads,
        mlp_ratio,
        qkv_bias,
        proj_bias,
        ffn_bias,
        ffn_layer,
        init_values,
        num_register_tokens,
        interpolate_offset,
        interpolate_antialias,
    ):
        super().__init__()
        self.embed_dim, self.patch_size, self.num_register_tokens = embed_dim, patch_size, num_register_tokens
        self.interpolate_offset, self.interpolate_antialias = interpolate_offset, interpolate_antialias
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(in_chans, embed_dim, patch_size, patch_size)})
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + (img_size // patch_size) ** 2, embed_dim))
        self.mask_token = nn.Parameter(torch.zeros(1, embed_dim))
        if num_register_tokens:
            self.register_tokens = nn.Parameter(torch.zeros(1, num_register_tokens, embed_dim))
        ffn = {"mlp": Mlp, "identity": None}.get(ffn_layer, SwiGLU)
        self.blocks = nn.ModuleList(
            Block(embed_dim, num_heads, int(embed_dim * mlp_ratio), qkv_bias, proj_bias, ffn_bias, ffn, init_values)
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)

    def positions(self, high, wide):
        """[1, 1 + high * wide, D]: the class token's, and a grid resampled from the square one of training."""
        side = math.isqrt(self.pos_embed.shape[1] - 1)
        if (high, wide) == (side, side):
            return self.pos_embed
        image = self.pos_embed[:, 1:].float().unflatten(1, (side, side)).permute(0, 3, 1, 2)  # [1, D, side, side]
        offset = self.interpolate_offset
        where = {"scale_factor": ((high + offset) / side, (wide + offset) / side)} if offset else {"size": (high, wide)}
        image = F.interpolate(image, mode="bicubic", antialias=self.interpolate_antialias, **where)
        patches = image.flatten(2).transpose(1, 2).to(self.pos_embed.dtype)  # [1, high * wide, D]
        return torch.cat([self.pos_embed[:, :1], patches], dim=1)

    def embed(self, images, masks=None):
        high, wide = (side // self.patch_size for side in images.shape[-2:])
        x = self.patch_embed["proj"](images).flatten(2).transpose(1, 2)  # [B, N, D]
        if masks is not None:  # [B, N]
            x = torch.where(masks[..., None], self.mask_token, x)
        positions = self.positions(high, wide)
        prefix = [self.cls_token + positions[:, :1]]
        if self.num_register_tokens:
            prefix.append(self.register_tokens)
        prefix = torch.cat(prefix, dim=1).expand(x.shape[0], -1, -1)
        return torch.cat([prefix, x + positions[:, 1:]], dim=1)  # [B, 1 + R + N, D]

    def forward_features(self, images, masks=None):
        """Tokens by DINOv2's names; `x_prenorm` is [B, 1 + R + N, D]."""
        x = self.embed(images, masks)
        for block in self.blocks:
            x = block(x)
        normed, first = self.norm(x), 1 + self.num_register_tokens
        return {
            "x_norm_clstoken": normed[:, 0],
            "x_norm_regtokens": normed[:, 1:first],
            "x_norm_patchtokens": normed[:, first:],
            "x_prenorm": x,
            "masks": masks,
        }

    def get_intermediate_layers(self, x, n=1, reshape=False, return_class_token=False, norm=True):
        """Patches [B, N, D] (or maps [B, D, h, w]) after the last n blocks, or those of these numbers; with
        `return_class_token` pairs of them and class tokens [B, D]."""
        take = range(len(self.blocks) - n, len(self.blocks)) if isinstance(n, int) else n
        grid = [side // self.patch_size for side in x.shape[-2:]]
        x, found = self.embed(x), []
        for i, block in enumerate(self.blocks):
            x = block(x)
            if i in take:
                out = self.norm(x) if norm else x
                patches = out[:, 1 + self.num_register_tokens :]
                patches = patches.transpose(1, 2).unflatten(2, grid) if reshape else patches
                found.append((patches, out[:, 0]) if return_class_token else patches)
        return tuple(found)

    def forward(self, images):
        """Class tokens [B, D]."""
        return self.forward_features(images)["x_norm_clstoken"]


class Block(nn.Module):
    def __init__(self, dim, heads, hidden, qkv_bias, proj_bias, ffn_bias, ffn, init_values):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, heads, qkv_bias, proj_bias)
        self.mlp = nn.Identity() if ffn is None else ffn(dim, hidden, ffn_bias)
        self.ls1, self.ls2 = (LayerScale(dim) if init_values else nn.Identity() for _ in range(2))

    def forward(self, x):
        x = x + self.ls1(self.attn(self.norm1(x)))
        return x + self.ls2(self.mlp(self.norm2(x)))


class LayerScale(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim))

    def forward(self, x):
        return x * self.gamma


class Attention(nn.Module):
    def __init__(self, dim, heads, qkv_bias, proj_bias):
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(dim, 3 * dim, bias=qkv_bias), nn.Linear(dim, dim, bias=proj_bias)

    def forward(self, x):
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # [3, B, heads, N, D / heads]
        out = F.scaled_dot_product_attention(qkv[0], qkv[1], qkv[2])  # [B, heads, N, D / heads]
        return self.proj(out.transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    def __init__(self, dim, hidden, bias):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, hidden, bias=bias), nn.Linear(hidden, dim, bias=bias)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class SwiGLU(nn.Module):
    def __init__(self, dim, hidden, bias):
        super().__init__()
        inner = (hidden * 2 // 3 + 7) // 8 * 8
        self.w12, self.w3 = nn.Linear(dim, 2 * inner, bias=bias), nn.Linear(inner, dim, bias=bias)

    def forward(self, x):
        gate, value = self.w12(x).chunk(2, dim=-1)
        return self.w3(F.silu(gate) * value)
