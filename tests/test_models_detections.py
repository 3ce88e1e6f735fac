"""Final detections: looking at the best candidates first must change nothing."""

from __future__ import annotations

import pytest
import torch

from detkit.config import BoxConfig
from detkit.models.heads import detections
from detkit.models.heads.detections import best_detections
from detkit.ops import batched_nms


@pytest.mark.parametrize("spread", [4.0, 60.0, 400.0])  # few, some and nearly all boxes survive
def test_the_best_survivors_are_those_of_all_candidates(
    spread: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    g = torch.Generator().manual_seed(0)
    corner = torch.rand(900, 2, generator=g) * spread
    boxes = torch.cat([corner, corner + 20 + torch.rand(900, 2, generator=g) * 4], 1)
    labels = torch.randint(1, 4, (900,), generator=g)
    scores = torch.randint(0, 200, (900,), generator=g) / 200  # many ties
    image = torch.randint(0, 2, (900,), generator=g)
    sizes, config = torch.tensor([[500, 500]] * 2), BoxConfig(max_detections=7)
    looked_at: list[int] = []

    def counted(*arguments: torch.Tensor) -> torch.Tensor:
        looked_at.append(len(arguments[0]))
        return batched_nms(*arguments)

    monkeypatch.setattr(detections, "batched_nms", counted)
    found = best_detections(boxes, labels, scores, image, sizes, config)
    for i in range(2):
        own = (image == i).nonzero().flatten()
        best = own[batched_nms(boxes[own], scores[own], labels[own], config.nms_iou)][:7]
        assert torch.equal(found[i]["boxes"], boxes[best])
        assert torch.equal(found[i]["labels"], labels[best])
        assert torch.equal(found[i]["scores"], scores[best])
    # all of an image's candidates only where too few of the first ones survive
    assert (max(looked_at) > 16 * 7) == (spread == 4.0)


def test_no_candidates_give_no_detections() -> None:
    none = torch.zeros(0, dtype=torch.int64)
    sizes = torch.tensor([[30, 40], [50, 60]])
    found = best_detections(torch.zeros(0, 4), none, torch.zeros(0), none, sizes, BoxConfig())
    assert [len(one["boxes"]) for one in found] == [0, 0]
