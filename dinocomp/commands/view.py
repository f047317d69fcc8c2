"""How images are shown to a frozen network, from `--resize` and `--crop`."""

from dinocomp.errors import ConfigError


def choose_view(view: tuple[int, int], resize: int | None, crop: int | None) -> tuple[int, int]:
    """(shorter side, side of the centre crop) in pixels; a crop alone shows the part of the image that `view` shows.

    Args:
        view: what the network expects, (resize, crop).

    Raises:
        ConfigError: the crop would be larger than the image, and so be filled up with black.
    """
    chosen = crop or view[1]
    side = resize or (max(1, round(view[0] * chosen / view[1])) if crop else view[0])
    if side < chosen:
        raise ConfigError(
            f"--resize {side} is smaller than the crop of {chosen} pixels; type --resize {chosen} or more"
        )
    return side, chosen


def check_patches(flag: str, pixels: int, patch: int) -> None:
    """
    Raises:
        ConfigError: `pixels`, given as `flag`, are no whole number of patches of `patch` pixels.
    """
    if pixels % patch:
        below = pixels // patch * patch
        fitting = " or ".join(str(n) for n in (below, below + patch) if n)
        raise ConfigError(f"{flag} {pixels} is no whole number of patches of {patch} pixels; type {flag} {fitting}")
