"""The vision transformer of DINOv2, with the module names of its published weights."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dinocomp.models.attention import Groups
from dinocomp.models.block import Block, LayerScale
from dinocomp.models.embeddings import PatchEmbed, blur_pos_embed, interpolate_pos_embed
from dinocomp.models.init import normal_

# For each block the sequences of a crop tensor that drop path keeps: int64 [2, s] (attention, FFN), or None = all.
Kept = Sequence[Tensor | None]


class Tokens(NamedTuple):
    """What the network says of a batch of B images of N patches, with R registers and width D."""

    cls: Tensor  # [B, D], after the final norm
    registers: Tensor  # [B, R, D], after the final norm
    patches: Tensor  # [B, N, D], after the final norm, row by row
    prenorm: Tensor  # [B, 1 + R + N, D], before the final norm: class token, registers, patches


class Rows(NamedTuple):
    """What the network says of some tokens of B images, all that losses ask for."""

    cls: Tensor  # [B, D], after the final norm
    patches: Tensor  # [R, D], those asked for, after the final norm


class VisionTransformer(nn.Module):
    """Vision transformer (Dosovitskiy et al. 2021; Oquab et al. 2024; registers: Darcet et al. 2024).

    Images of any size that is a whole number of patches; several sizes can go through in one pass, packed.

    Args:
        img_size: side in pixels of the images that `pos_embed` is laid out for.
        patch_size: side in pixels of a patch.
        in_chans: channels of an image.
        embed_dim, depth, num_heads, mlp_ratio: width D, blocks, heads, and inner width of the FFN over D.
        qkv_bias, proj_bias, ffn_bias: whether these linear layers have a bias.
        ffn_layer: mlp, swiglu, swiglufused (the same) or identity.
        init_values: start of LayerScale; 0 or None for none.
        pos_embed_std: standard deviation that position embeddings start with. Beside projected patches,
            whose numbers start at about 0.6, the usual 0.02 is next to nothing: the network begins as one that sees a
            bag of patches, and takes a long run to find out where they are.
        pos_embed_blur: standard deviation of a Gaussian that position embeddings are blurred by at the start, as a
            share of the grid's side; 0 for none. Where patches are many and small, neighbours then begin alike, and
            what attention gathers at the start are regions, not scattered patches.
        linear_init: how weights of linear layers start: normal_0.02, or lecun_normal, with a standard deviation of
            1 / sqrt(inputs) (LeCun et al. 1998, section 4.6), which keeps the scale of what goes through them. At 0.02
            the blocks of a narrow network (96 wide: 0.1 would keep it) start as next to nothing.
        drop_path_rate: share of sequences that a branch skips while training; see `Block`.
        drop_path_uniform: that rate in every block, else rising from 0 to it.
        num_register_tokens: extra tokens without a position, after the class token.
        interpolate_offset, interpolate_antialias: see `interpolate_pos_embed`.
        kernel: attention kernel, see `packed_attention`.
        recompute: what blocks compute again in backward to save memory (none, selective, full); see `recompute.run`.
        recompute_every: block i does so where i is a multiple of this.
        offload: keep what backward needs of the blocks in the machine's memory.
    """

    def __init__(
        self,
        *,
        img_size: int = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        proj_bias: bool = True,
        ffn_bias: bool = True,
        ffn_layer: str = "mlp",
        init_values: float | None = None,
        pos_embed_std: float = 0.02,
        pos_embed_blur: float = 0.0,
        linear_init: str = "normal_0.02",
        drop_path_rate: float = 0.0,
        drop_path_uniform: bool = False,
        num_register_tokens: int = 0,
        interpolate_offset: float = 0.1,
        interpolate_antialias: bool = False,
        kernel: str = "auto",
        recompute: str = "none",
        recompute_every: int = 1,
        offload: bool = False,
    ) -> None:
        super().__init__()
        self.embed_dim = embed_dim
        self.patch_size = patch_size
        self.num_register_tokens = num_register_tokens
        self.pos_embed_std = pos_embed_std
        self.pos_embed_blur = pos_embed_blur
        self.linear_init = linear_init
        self.interpolate_offset = interpolate_offset
        self.interpolate_antialias = interpolate_antialias

        self.patch_embed = PatchEmbed(patch_size, in_chans, embed_dim)
        num_patches = (img_size // patch_size) ** 2
        self.cls_token = nn.Parameter(torch.empty(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + num_patches, embed_dim))
        self.mask_token = nn.Parameter(torch.empty(1, embed_dim))
        if num_register_tokens:
            self.register_tokens = nn.Parameter(torch.empty(1, num_register_tokens, embed_dim))
        rates = [drop_path_rate if drop_path_uniform else drop_path_rate * i / max(depth - 1, 1) for i in range(depth)]
        self.blocks = nn.ModuleList(
            Block(
                embed_dim,
                num_heads,
                mlp_ratio=mlp_ratio,
                qkv_bias=qkv_bias,
                proj_bias=proj_bias,
                ffn_bias=ffn_bias,
                ffn_layer=ffn_layer,
                init_values=init_values,
                drop_path=rate,
                kernel=kernel,
                recompute="none" if i % recompute_every else recompute,
                offload=offload,
            )
            for i, rate in enumerate(rates)
        )
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
        self.init_weights()

    def init_weights(self) -> None:
        """(Re)draws every weight from the global generator. The patch projection keeps a convolution's default."""
        nn.init.normal_(self.cls_token, std=1e-6)
        normal_(self.pos_embed, std=0.02)
        with torch.no_grad():  # scaled, so that all that is drawn is the same whatever they start with
            self.pos_embed *= self.pos_embed_std / 0.02
            if self.pos_embed_blur:
                self.pos_embed[:, 1:] = blur_pos_embed(self.pos_embed[:, 1:], self.pos_embed_blur)
        nn.init.zeros_(self.mask_token)
        if self.num_register_tokens:
            nn.init.normal_(self.register_tokens, std=1e-6)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                std = module.in_features**-0.5 if self.linear_init == "lecun_normal" else 0.02
                normal_(module.weight, std=std)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, LayerScale):
                nn.init.constant_(module.gamma, module.init_value)
            elif isinstance(module, (nn.Conv2d, nn.LayerNorm)):
                module.reset_parameters()

    @property
    def num_prefix_tokens(self) -> int:
        """Tokens before the first patch: the class token and the registers."""
        return 1 + self.num_register_tokens

    def _embed(self, images: Tensor, masks: Tensor | None) -> Tensor:
        """[B, C, H, W], masks [B, N] bool or None -> [B, 1 + R + N, D]."""
        grid = (images.shape[-2] // self.patch_size, images.shape[-1] // self.patch_size)
        x = self.patch_embed(images)  # [B, N, D]
        if masks is not None:
            x = torch.where(masks[..., None], self.mask_token.to(x.dtype), x)
        x = x + interpolate_pos_embed(
            self.pos_embed[:, 1:], grid, offset=self.interpolate_offset, antialias=self.interpolate_antialias
        )
        prefix = [self.cls_token + self.pos_embed[:, :1]]  # [1, 1, D]
        if self.num_register_tokens:
            prefix.append(self.register_tokens)  # [1, R, D], without a position
        return torch.cat([p.to(x.dtype).expand(len(x), -1, -1) for p in prefix] + [x], dim=1)

    def _split(self, prenorm: Tensor) -> Tokens:
        normed = self.norm(prenorm)  # [B, 1 + R + N, D]
        return Tokens(normed[:, 0], normed[:, 1 : self.num_prefix_tokens], normed[:, self.num_prefix_tokens :], prenorm)

    def draw_kept(self, sequences: int, device: torch.device) -> Kept:
        """Draws the sequences that drop path keeps of a crop tensor of so many, as a forward pass by itself does.

        For passes that have to drop the same: give it to both as `kept`.
        """
        counts = [block.count_kept(sequences) for block in self.blocks]
        if all(count is None for count in counts):
            return counts
        # One sort, for a permutation for each branch would be hundreds of kernels.
        order = torch.rand(len(counts), 2, sequences, device=device).argsort(dim=-1)  # [depth, 2, sequences]
        return [None if count is None else order[i, :, :count] for i, count in enumerate(counts)]

    def _kept_by_block(
        self, given: Sequence[Kept | None], groups: Groups, device: torch.device
    ) -> list[tuple[Tensor | None, ...]]:
        """What each block keeps of each group: as given, and drawn for the groups of which nothing is given."""
        by_group = [
            self.draw_kept(sequences, device) if kept is None else kept
            for (sequences, _), kept in zip(groups, given, strict=True)
        ]
        for kept in by_group:
            if len(kept) != len(self.blocks):
                raise ValueError(
                    f"kept has entries for {len(kept)} blocks, this network has {len(self.blocks)}; "
                    "give what draw_kept of the same network returned"
                )
        return list(zip(*by_group, strict=True))

    def _wanted(self, groups: Groups, patches: Sequence[Tensor | None], device: torch.device) -> list[Tensor]:
        """Positions of what `Rows` holds in the packed tokens, int64: class tokens and patches of each group."""
        found, offset = [], 0
        for (sequences, tokens), asked in zip(groups, patches, strict=True):
            asked = torch.empty(0, dtype=torch.int64, device=device) if asked is None else asked  # [R]
            number = tokens - self.num_prefix_tokens  # patches of an image
            found.append(offset + torch.arange(sequences, device=device) * tokens)
            found.append(offset + asked // number * tokens + self.num_prefix_tokens + asked % number)
            offset += sequences * tokens
        return found

    def forward_packed(
        self,
        crops: Sequence[Tensor],
        masks: Sequence[Tensor | None],
        kept: Sequence[Kept | None] | None = None,
        patches: Sequence[Tensor | None] | None = None,
    ) -> list[Tokens] | list[Rows]:
        """All crops in one pass over the blocks; attention stays inside each image.

        Args:
            crops: tensors [B_i, C, H_i, W_i], one for each size.
            masks: for each of them, [B_i, N_i] bool (True = replaced by the mask token) or None.
            kept: for each of them, what `draw_kept(B_i, device)` gave, or None to draw here; None to draw all here.
            patches: for each of them, which patches are asked for besides the class tokens: int64 [R_i], positions in
                [B_i * N_i], each once, or None for none. The last block's FFN, a good part of the network's work, is
                then computed for them alone. None for all tokens.

        Returns:
            `Tokens` of each crop tensor, or `Rows` where `patches` are given.
        """
        embedded = [self._embed(images, mask) for images, mask in zip(crops, masks, strict=True)]  # [B_i, T_i, D]
        groups = [tuple(x.shape[:2]) for x in embedded]
        x = torch.cat([x.flatten(0, 1) for x in embedded])  # [sum B_i * T_i, D]
        del embedded  # or it would live as long as the pass
        # Drawn before the blocks run, so that a block can be compiled, or computed again for its gradients.
        by_block = self._kept_by_block([None] * len(groups) if kept is None else kept, groups, x.device)
        wanted = None if patches is None else self._wanted(groups, patches, x.device)
        for block, of_groups in zip(self.blocks, by_block, strict=True):
            last = wanted is not None and block is self.blocks[-1]
            x = block(x, groups, of_groups, torch.cat(wanted) if last else None)
        if wanted is not None:
            rows = self.norm(x).split([len(some) for some in wanted])
            return [Rows(cls, of_patches) for cls, of_patches in zip(rows[::2], rows[1::2], strict=True)]
        parts = x.split([sequences * tokens for sequences, tokens in groups])
        return [self._split(part.unflatten(0, group)) for part, group in zip(parts, groups, strict=True)]

    def forward(
        self,
        images: Tensor | Sequence[Tensor],
        masks: Tensor | Sequence[Tensor | None] | None = None,
        kept: Kept | Sequence[Kept | None] | None = None,
        patches: Sequence[Tensor | None] | None = None,
    ) -> Tokens | list[Tokens] | list[Rows]:
        """A tensor [B, C, H, W] with masks [B, N] or None gives `Tokens`; lists of them give a list, packed.

        `kept` and `patches` as in `forward_packed`: `kept` of one tensor is what `draw_kept` gave, of lists a list of
        those; `patches` go with lists.
        """
        if isinstance(images, Tensor):
            return self.forward_packed([images], [masks], [kept])[0]
        return self.forward_packed(images, [None] * len(images) if masks is None else masks, kept, patches)

    def get_intermediate_layers(
        self, images: Tensor, n: int | Sequence[int] = 1, *, reshape: bool = False, norm: bool = True
    ) -> list[tuple[Tensor, Tensor]]:
        """Patch and class tokens after chosen blocks.

        Args:
            images: [B, C, H, W].
            n: how many of the last blocks, or the indices of the blocks.
            reshape: patches as a map [B, D, H / p, W / p] instead of [B, N, D].
            norm: through the final norm.

        Returns:
            (patches, class token [B, D]) for each block, first to last.
        """
        take = range(len(self.blocks) - n, len(self.blocks)) if isinstance(n, int) else n
        if not all(0 <= i < len(self.blocks) for i in take):
            raise ValueError(f"blocks {list(take)} were asked for; this network has blocks 0 to {len(self.blocks) - 1}")
        x = self._embed(images, None)
        groups = [tuple(x.shape[:2])]
        x, outputs = x.flatten(0, 1), []
        kept = self._kept_by_block([None], groups, x.device)
        for i, (block, of_groups) in enumerate(zip(self.blocks, kept, strict=True)):
            x = block(x, groups, of_groups)
            if i in take:
                outputs.append(x.unflatten(0, groups[0]))  # [B, 1 + R + N, D]
        if norm:
            outputs = [self.norm(out) for out in outputs]
        grid = (images.shape[-2] // self.patch_size, images.shape[-1] // self.patch_size)
        patches = [out[:, self.num_prefix_tokens :] for out in outputs]
        if reshape:
            patches = [p.transpose(1, 2).unflatten(2, grid) for p in patches]
        return [(p, out[:, 0]) for p, out in zip(patches, outputs, strict=True)]
