"""A grid of linear classifiers on the same frozen tokens, trained together but each as if it were alone."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinocomp.data.listing import NO_LABEL

# Of the reference, for a batch of 256 images.
LEARNING_RATES = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1)
MOMENTUM = 0.9
_STD = 0.01  # of first weights


@dataclass(frozen=True)
class Head:
    """One classifier of the grid. Two of them are the same only if all three are: no rounding makes them one.

    Attributes:
        blocks: it sees the class tokens of the last so many blocks,
        avgpool: and, where this is set, the mean of the last block's patch tokens.
        learning_rate: for a batch of 256 images; it is scaled linearly with the batch.
    """

    blocks: int
    avgpool: bool
    learning_rate: float

    def tokens(self, tokens: Tensor) -> Tensor:
        """Its part of `token_batches`' tokens: [B, L + 1, D] -> [B, F]."""
        last = tokens.shape[1] - 1
        return tokens[:, last - self.blocks : last + self.avgpool].flatten(1)


def grid(learning_rates: Sequence[float], blocks: Sequence[int]) -> list[Head]:
    """Every combination: learning rates x blocks x without and with the mean patch token."""
    return [Head(n, avgpool, rate) for n in blocks for avgpool in (False, True) for rate in learning_rates]


class HeadGroup(nn.Module):
    """The heads among `numbered` that see the same tokens, as one matrix.

    Args:
        numbered: number in the grid -> head; the first weights depend on it and the seed alone.
        width: F, numbers that a head sees.
    """

    def __init__(self, numbered: Mapping[int, Head], width: int, num_classes: int, seed: int) -> None:
        super().__init__()
        self.numbered = dict(numbered)
        weights = []
        for number in self.numbered:
            generator = torch.Generator().manual_seed(seed * 1_000_003 + number)
            weights.append(torch.empty(num_classes, width).normal_(0, _STD, generator=generator))
        self.weight = nn.Parameter(torch.stack(weights))  # [h, classes, F]
        self.bias = nn.Parameter(torch.zeros(len(weights), num_classes))  # [h, classes]

    def forward(self, tokens: Tensor) -> Tensor:
        """[B, L + 1, D] -> logits [h, B, classes]."""
        x = next(iter(self.numbered.values())).tokens(tokens)  # [B, F]
        logits = F.linear(x, self.weight.flatten(0, 1), self.bias.flatten())  # [B, h * classes]
        return logits.unflatten(1, self.bias.shape).transpose(0, 1)


class LinearHeads:
    """This rank's heads and their optimizer: SGD with momentum 0.9, no weight decay, a cosine to 0 over iterations.

    The heads' learning rates differ by constant factors. Times its factor in the loss, a head's gradient goes into the
    momentum as it would with that learning rate, so one optimizer and one schedule train all of them.

    Args:
        numbered: number in the grid -> head, of this rank.
        embed_dim: D.
        batch_size: images of a batch of all ranks, by which learning rates are scaled.
        iterations: of the whole training.
    """

    def __init__(
        self,
        numbered: Mapping[int, Head],
        *,
        embed_dim: int,
        num_classes: int,
        batch_size: int,
        iterations: int,
        seed: int,
        device: torch.device | str = "cpu",
    ) -> None:
        kinds: dict[tuple[int, bool], dict[int, Head]] = {}
        for number, head in numbered.items():
            kinds.setdefault((head.blocks, head.avgpool), {})[number] = head
        self.groups = nn.ModuleList(
            HeadGroup(heads, (blocks + avgpool) * embed_dim, num_classes, seed)
            for (blocks, avgpool), heads in kinds.items()
        ).to(device)
        self.scales = [
            torch.tensor([h.learning_rate * batch_size / 256 for h in g.numbered.values()], device=device)  # [h]
            for g in self.groups
        ]
        self.iterations = iterations
        # Of several ranks some may have no head.
        parameters = list(self.groups.parameters())
        self.optimizer = torch.optim.SGD(parameters, lr=1.0, momentum=MOMENTUM) if parameters else None

    def step(self, iteration: int, tokens: Tensor, labels: Tensor) -> None:
        """One step of every head, on the mean cross-entropy of the images [B, L + 1, D] that have a label."""
        if self.optimizer is None:
            return
        for group in self.optimizer.param_groups:
            group["lr"] = (1 + math.cos(math.pi * iteration / self.iterations)) / 2
        known = int((labels != NO_LABEL).sum())
        loss = tokens.new_zeros(())
        for heads, scale in zip(self.groups, self.scales, strict=True):
            logits = heads(tokens)  # [h, B, classes]
            target = labels.expand(len(logits), -1)  # [h, B]
            each = F.cross_entropy(logits.transpose(1, 2), target, ignore_index=NO_LABEL, reduction="none").sum(
                1
            )  # [h]
            loss = loss + (scale * each).sum() / max(known, 1)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()

    @torch.no_grad()
    def top(self, tokens: Tensor, number: int) -> dict[int, Tensor]:
        """Number in the grid -> its `number` likeliest classes, int32 [B, number], on the CPU."""
        found = {}
        for heads in self.groups:
            best = heads(tokens).topk(number, dim=2).indices.to(torch.int32).cpu()  # [h, B, number]
            found |= dict(zip(heads.numbered, best, strict=True))
        return found

    def state(self, numbers: Iterable[int] | None = None) -> dict[str, Tensor]:
        """Weights and momenta of each head by its number, for any number of ranks to go on from."""
        wanted = None if numbers is None else set(numbers)
        tensors = {}
        for heads in self.groups:
            for name, parameter in heads.named_parameters():
                momentum = self.optimizer.state[parameter].get("momentum_buffer", torch.zeros_like(parameter))
                for place, number in enumerate(heads.numbered):
                    if wanted is None or number in wanted:
                        tensors[f"{number}.{name}"] = parameter.detach()[place].cpu().clone()
                        tensors[f"{number}.{name}.momentum"] = momentum[place].cpu().clone()
        return tensors

    @torch.no_grad()
    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Goes on from `state`'s tensors of all ranks."""
        for heads in self.groups:
            for name, parameter in heads.named_parameters():
                parameter.copy_(torch.stack([tensors[f"{number}.{name}"] for number in heads.numbered]))
                momentum = torch.stack([tensors[f"{number}.{name}.momentum"] for number in heads.numbered])
                self.optimizer.state[parameter]["momentum_buffer"] = momentum.to(parameter.device)
