"""Which training images a supernet learns from and which score its paths (DetNAS, section 3.3).

The search takes images of the training split that no weight was trained on; the validation split
is for the networks that come out at the end.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from detkit.errors import CheckpointError, DataError
from detkit.nas.paths import SPLIT, generator

ImageId = int | str
LARGEST_SHARE = 5
"""One in so many training images at most is held out."""


@dataclass(frozen=True)
class SearchSplit:
    """The images of a training split, parted in two.

    Attributes:
        seed: What they were drawn with.
        train: Ids of the images to train on.
        search: Ids of the images that score candidates; none of ``train``.
    """

    seed: int
    train: tuple[ImageId, ...]
    search: tuple[ImageId, ...]

    @classmethod
    def draw(cls, image_ids: Sequence[ImageId], count: int, seed: int) -> SearchSplit:
        """``count`` images for the search, at most a fifth, the others to train on.

        What is drawn follows from the seed and the ids alone, and not from their order.

        Args:
            image_ids: Of the whole training split; each once.
            count: Images wanted for the search, at least 1.
            seed: Zero or more.

        Raises:
            DataError: There are fewer than five images, or an id comes twice.
        """
        ids = sorted(image_ids, key=_order)
        if len(set(map(_order, ids))) != len(ids):
            raise DataError("search split: image ids must be unique, got some twice")
        held = min(count, len(ids) // LARGEST_SHARE)
        if held < 1:
            raise DataError(
                f"search split: must have at least {LARGEST_SHARE} training images, one of which "
                f"is held out for the search, got {len(ids)}"
            )
        places = generator(seed, SPLIT, 0).permutation(len(ids))
        train, search = sorted(places[held:]), sorted(places[:held])
        return cls(seed, tuple(ids[i] for i in train), tuple(ids[i] for i in search))

    def covers(self, image_ids: Sequence[ImageId]) -> bool:
        """Whether it was drawn from just these images."""
        ours = {_order(image_id) for image_id in (*self.train, *self.search)}
        return ours == set(map(_order, image_ids))

    def indices(self, image_ids: Sequence[ImageId]) -> tuple[list[int], list[int]]:
        """Where the images to train on and those for the search lie in a data set, in its order.

        Raises:
            CheckpointError: The data set does not hold just these images.
        """
        places = {_order(image_id): i for i, image_id in enumerate(image_ids)}
        ours = {_order(image_id) for image_id in (*self.train, *self.search)}
        missing, foreign = ours - places.keys(), places.keys() - ours
        if missing or foreign:
            raise CheckpointError(
                f"search split: the training split must hold the {len(ours)} images it was drawn "
                f"from, got {len(missing)} of them missing and {len(foreign)} others; give the "
                "data set that the supernet was trained on"
            )
        train, search = (
            sorted(places[_order(i)] for i in part) for part in (self.train, self.search)
        )
        return train, search

    def to_plain(self) -> dict[str, Any]:
        """Plain types, as checkpoints and ``search_split.json`` hold them."""
        return {"seed": self.seed, "train": list(self.train), "search": list(self.search)}

    def to_json(self) -> str:
        """Text of ``search_split.json``."""
        return json.dumps(self.to_plain()) + "\n"

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> SearchSplit:
        """The split that :meth:`to_plain` wrote.

        Raises:
            CheckpointError: It is none, or an image is in both parts.
        """
        try:
            found = cls(int(plain["seed"]), tuple(plain["train"]), tuple(plain["search"]))
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"search split: must hold seed, train and search, got {plain!r:.80}"
            ) from error
        both = {_order(i) for i in found.train} & {_order(i) for i in found.search}
        if both or not found.search:
            raise CheckpointError(
                "search split: must have images for the search, none of them trained on, got "
                f"{len(found.search)} with {len(both)} in both parts"
            )
        return found


def _order(image_id: ImageId) -> tuple[bool, ImageId]:
    """Integers before strings; 7 and "7" are two images."""
    return isinstance(image_id, str), image_id
