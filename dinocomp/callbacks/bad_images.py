"""At each batch: which images could not be shown, on all ranks together."""

import logging
from typing import Any

from composer import Callback, Logger, State
from composer.utils import dist

from dinocomp.data import Images
from dinocomp.distributed import any_rank
from dinocomp.errors import DataError

log = logging.getLogger(__name__)

_LAST = 5  # images named when the run stops


class BadImages(Callback):
    """Logs, counts and bounds the images whose place another took; see `Batch.replaced`.

    Args:
        most: stop the run when more different ones than this were met, on all ranks and since the run began.

    Attributes:
        met: sample -> key of every one met so far, the same on all ranks.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self.met: dict[int, str] = {}

    def after_dataloader(self, state: State, logger: Logger) -> None:
        """Here the batch is still on the CPU, so that no GPU is waited for."""
        if "replaced" not in state.batch:  # batches that somebody else made
            return
        replaced = state.batch["replaced"]  # [B]
        new = sorted({sample for sample in replaced[replaced >= 0].tolist() if sample not in self.met})
        if not any_rank(bool(new)):
            return
        images: Images = state.train_dataloader.dataset.images
        found = [entry for part in dist.all_gather_object([(n, *images.fault(n)) for n in new]) for entry in part]
        for sample, key, reason in sorted(found):
            if sample not in self.met:  # two ranks may meet one in the same batch
                self.met[sample] = key
                if dist.get_global_rank() == 0:
                    log.warning("another image is shown in its place: %s", reason)
        if len(self.met) > self.most:
            last = ", ".join(repr(key) for key in list(self.met.values())[-_LAST:])
            raise DataError(
                f"{len(self.met)} images of {images.path} could not be decoded, more than data.max_bad_images="
                f"{self.most}; the last ones are {last}. train.log has the reason of each, and names the shards that "
                "do not match their hash: copy those again, or convert the images again with `dinocomp convert SRC "
                "DST`. Type a larger data.max_bad_images to train without these images"
            )

    def state_dict(self) -> dict[str, Any]:
        return {"met": {str(sample): key for sample, key in self.met.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.met = {int(sample): key for sample, key in state["met"].items()}
