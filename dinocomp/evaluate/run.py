"""All protocols on one backbone: features are taken once, results are written one by one, what is done is left out."""

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from composer.utils import dist
from safetensors.torch import save_file
from torch import Tensor, nn

from dinocomp.data.listing import ClassName
from dinocomp.data.progress import Progress
from dinocomp.distributed import any_rank, on_rank_0
from dinocomp.errors import DataError
from dinocomp.evaluate.choose import Chosen, check_held_out, check_labels, draw, match_classes
from dinocomp.evaluate.features import Features, extract_features, gather_features
from dinocomp.evaluate.linear import Seen, linear_probe
from dinocomp.evaluate.logistic import c_grid, logistic_regression
from dinocomp.evaluate.mask_pairs import find_pairs
from dinocomp.evaluate.neighbours import fitting, knn
from dinocomp.evaluate.plan import LABELLED, Plan
from dinocomp.evaluate.results import Results, fingerprint
from dinocomp.evaluate.retrieval import check_queries, retrieval
from dinocomp.evaluate.saved import SavedHeads, read_features, save_features
from dinocomp.evaluate.segmentation import segmentation_probe
from dinocomp.interop import Backbone


class ClassToken(nn.Module):
    """Any backbone's class token after its last norm, as `extract_features` asks for it."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, images: Tensor) -> SimpleNamespace:
        return SimpleNamespace(cls=self.backbone.get_intermediate_layers(images, 1)[0][1])


class Evaluation:
    """One run over the protocols of a plan.

    Args:
        backbone: frozen, in eval mode, on the device to use.
        folder: gets `results.json`, `confusion.csv`, `predictions/` and `linear_head.safetensors`.
        say: prints a line, on rank 0.
    """

    def __init__(self, backbone: Backbone, plan: Plan, folder: Path, say: Callable[[str], None]) -> None:
        self.backbone, self.plan, self.folder, self.say = backbone, plan, folder, say
        self.device = next(backbone.parameters()).device
        self.first = dist.get_global_rank() == 0
        if plan.train is not None:
            labels = None if plan.val is None else match_classes(plan.train, plan.val)
            self.train = Chosen(plan.train, draw(len(plan.train), plan.limit_train))
            self.val = None if plan.val is None else Chosen(plan.val, draw(len(plan.val), plan.limit_val), labels)
        facts = {"weights": plan.weights, "iteration": plan.iteration}
        if plan.train is not None:
            facts |= {"train": plan.train.path, "train_images": len(self.train)}
        if plan.val is not None:
            facts |= {"val": plan.val.path, "val_images": len(self.val)}
        images = None if plan.train is None else fingerprint(self._images())
        self.results = Results(folder, facts, weights=fingerprint(plan.identity), images=images)

    def run(self) -> dict[str, Any]:
        """Does what is not done yet. Returns the content of `results.json`."""
        plan = self.plan
        marks = {name: self._mark(name) for name in plan.protocols}
        done = on_rank_0(lambda: self.results.keep(marks))
        if done:
            self.say(f"done before, with the same settings: {', '.join(done)}")
        todo = [name for name in plan.protocols if name not in done]
        if any(name in LABELLED for name in todo):
            self._load_features(todo)
        for name in todo:
            start = time.monotonic()
            settings, result, predicted = getattr(self, f"_{name}")()
            result |= {"seconds": round(time.monotonic() - start, 1), "settings": settings, "made_with": marks[name]}
            if self.first:
                labels = None if predicted is None else self.val_features.labels
                self.results.put(name, result, labels, predicted)
                if name == "linear":
                    self._saved().remove()  # nothing is left to go on with
            self.say(f"{name}: {result['headline']['measure']} {result['headline']['value']:.2%}")
        if self.first and plan.val is not None and any(name in LABELLED for name in todo):
            self.results.add_confusion(self._names())
            self._hint()
        return self.results.content

    def _hint(self) -> None:
        """What to make of a linear probe that is worse than the neighbours."""
        knn, linear = (self.results.content["protocols"].get(name) for name in ("knn", "linear"))
        if self.plan.linear.views != "random" or not knn or not linear:
            return
        if linear["top1"] < max(knn["top1"].values()) - 0.05:
            self.say(
                "note: the linear probe is below k-NN. It was trained on random crops, whose features may be unlike "
                "those of whole images; --linear-views centre trains on the view that is scored"
            )

    def _knn(self) -> tuple[dict, dict, Tensor]:
        settings = replace(self.plan.knn, ks=self.ks)
        with self._meter("k-NN", 1 + len(settings.shots) * settings.tries, "searches") as bar:
            result, predicted = knn(
                self.train_features,
                self.val_features,
                num_classes=self.num_classes,
                device=self.device,
                advance=bar.advance,
                **asdict(settings),
            )
        k = settings.ks[0]
        result["headline"] = {"measure": f"top-1 (k={k})", "value": result["top1"][str(k)]}
        return asdict(settings), result, predicted

    def _linear(self) -> tuple[dict, dict, Tensor]:
        result, predicted, head = linear_probe(
            self.backbone,
            self.train,
            self.train_features.labels,
            self.val,
            self.val_features.labels,
            seen=self.plan.seen,
            num_classes=self.num_classes,
            settings=self.plan.linear,
            saved=self._saved(),
            meter=self._meter,
        )
        if self.first:
            about = {name: str(value) for name, value in result["chosen"].items()}
            self.folder.mkdir(parents=True, exist_ok=True)
            save_file(head, self.folder / "linear_head.safetensors", metadata=about)
        dist.barrier()
        result["headline"] = {"measure": "top-1", "value": result["top1"]}
        if self.plan.linear.select_on == "val":
            result["headline"]["measure"] = "top-1 (head selected on the validation set: optimistic)"
        return asdict(self.plan.linear), result, predicted

    def _saved(self) -> SavedHeads:
        return SavedHeads(self.folder / "linear", self._mark("linear"))

    def _logreg(self) -> tuple[dict, dict, Tensor]:
        settings = self.plan.logreg
        values = c_grid(settings.c_values)
        mine = len(range(dist.get_global_rank(), len(values), dist.get_world_size()))
        with self._meter("logistic regression", mine, "fits") as bar:
            result, predicted = logistic_regression(
                self.train_features,
                self.val_features,
                c_values=values,
                fraction=settings.fraction,
                seed=settings.seed,
                max_iterations=settings.max_iterations,
                advance=bar.advance,
            )
        result["headline"] = {"measure": "top-1", "value": result["top1"]}
        return asdict(settings), result, predicted

    def _retrieval(self) -> tuple[dict, dict, None]:
        queries = None if self.val is None else self.val_features
        total = int((self.val_features.labels >= 0).sum())
        mine = len(range(dist.get_global_rank(), total, dist.get_world_size()))
        with self._meter("retrieval", mine, "queries") as bar:
            result = retrieval(self.train_features, queries, device=self.device, advance=bar.advance)
        result["headline"] = {"measure": "mAP", "value": result["map"]}
        return {}, result, None

    def _segmentation(self) -> tuple[dict, dict, None]:
        train, val = (find_pairs(text) for text in self.plan.masks)
        result = segmentation_probe(
            self.backbone,
            train,
            val,
            seen=self.plan.seen_masks,
            settings=self.plan.segmentation,
            meter=self._meter,
        )
        result |= {"train": train.name, "val": val.name, "headline": {"measure": "mIoU", "value": result["miou"]}}
        return asdict(self.plan.segmentation), result, None

    def _load_features(self, todo: list[str]) -> None:
        """Features, and whether all protocols that are to do can be done with them."""
        plan = self.plan
        self.train_features, seconds = self._features("train", self.train)
        self.val_features = self.train_features
        if self.val is not None:
            self.val_features, more = self._features("val", self.val)
            seconds += more
        number = len(self.train) + (0 if self.val is None else len(self.val))
        self.results.content["features"] = {"seconds": round(seconds, 1), "images": number}
        labels = [part.labels for part in (self.train_features, self.val_features)]
        self.num_classes = max(len(plan.train.classes), *(int(part.max()) + 1 for part in labels))
        check_labels(*labels, self._names(), plan.train.path, drawn=plan.limit_train > 0)
        if "knn" in todo:
            self._fit_ks(int((labels[0] >= 0).sum()))
        if "linear" in todo and plan.linear.select_on == "train":
            check_held_out(
                labels[0], plan.linear.fraction, plan.train.path, "linear", "choose a head with --select-on val"
            )
        if "logreg" in todo:
            others = ",".join(name for name in plan.protocols if name != "logreg") or "knn"
            check_held_out(
                labels[0], plan.logreg.fraction, plan.train.path, "logreg", f"leave it out: --protocols {others}"
            )
        if "retrieval" in todo:
            check_queries(labels[0], None if self.val is None else labels[1], plan.train.path)

    def _fit_ks(self, voters: int) -> None:
        """The k for which enough images can vote."""
        asked = self.plan.knn.ks
        self.ks = fitting(asked, voters)
        if self.ks != asked and self.plan.k_asked:
            raise DataError(f"--k {max(asked)} is more than the {voters} images that can vote; give smaller ones")
        if self.ks != asked:
            absent = ", ".join(str(k) for k in asked if k not in self.ks)
            self.say(
                f"note: {voters} images of train can vote, so k is {', '.join(map(str, self.ks))}; left out: {absent}"
            )

    def _features(self, split: str, images: Chosen) -> tuple[Features, float]:
        """Of all images, on every rank, and how many seconds it took to compute them, now or when they were kept."""
        start = time.monotonic()
        path = self.folder / "features" / f"{split}.safetensors"
        mark = fingerprint(self.plan.identity, self._shown(self.plan.seen), images.path, len(images))
        if self.plan.keep_features:
            kept = read_features(path, mark)
            if not any_rank(kept is None):  # else all compute them, for they do it together
                self.say(f"features of {split}: {path}")
                return kept
        total = len(range(dist.get_global_rank(), len(images), dist.get_world_size()))
        with self._meter(f"features of {split}", total) as bar:
            mine = extract_features(
                ClassToken(self.backbone),
                images,
                resize=self.plan.seen.resize,
                crop=self.plan.seen.crop,
                skip_bad=True,
                advance=bar.advance,
                **self.plan.seen.loading(),
            )
        features = gather_features(mine, len(images))
        seconds = time.monotonic() - start
        if self.plan.keep_features and self.first:
            save_features(path, mark, features, seconds)
        return features, seconds

    def _names(self) -> list[str]:
        """Of the classes, by label; two of the same name also have their ids."""
        classes = self.plan.train.classes or [ClassName(str(i), str(i)) for i in range(self.num_classes)]
        often = Counter(entry.name for entry in classes)
        return [entry.name if often[entry.name] == 1 else f"{entry.name} ({entry.id})" for entry in classes]

    def _meter(self, what: str, total: int, unit: str = "images") -> Progress:
        return Progress(what, total, enabled=self.first, unit=unit)

    def _mark(self, name: str) -> str:
        """Of everything that the result of a protocol is a function of."""
        plan = self.plan
        settings = {} if name == "retrieval" else asdict(getattr(plan, name))
        settings.pop("save_iterations", None)
        if name == "segmentation":
            files = [path for text in plan.masks for pair in [find_pairs(text)] for path in (*pair.images, *pair.masks)]
            states = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
            return fingerprint(plan.identity, self._shown(plan.seen_masks), states, settings)
        return fingerprint(plan.identity, self._shown(plan.seen), self._images(), settings)

    def _images(self) -> list:
        return [(part.path, len(part), len(part.images)) for part in (self.train, self.val) if part is not None]

    def _shown(self, seen: Seen) -> list:
        return [seen.resize, seen.crop, self.plan.precision]
