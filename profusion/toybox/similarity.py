"""How alike two appearances are, and how much a background moved: the two numbers by which a customised picture is
judged.

Pictures are IMAGE tensors (B, H, W, 3) in [0, 1], masks (B, H, W) in [0, 1].

An appearance is the distribution of colours x, and of pairs of colours (x, x') one step to the side or down, inside an
object. With the kernel k(x, y) = exp(-|x - y|^2 / 2 s^2) the likeness of two distributions P and Q is the cosine of
their mean embeddings (arXiv 1605.09522):  <P, Q> / sqrt(<P, P> <Q, Q>),  <P, Q> = E_{x~P, y~Q} k(x, y).
It is 1 for equal distributions wherever the object is; colours alone cannot tell stripes from dots, the pairs can.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ..decoding import PictureError

STEP = 11 / 128  # from one colour of a pair to the other, as a share of the picture's side: half a stripe's period
BANDWIDTH = 0.07  # s, in Oklab: a clearly visible difference of colour
LIGHTNESS = 0.5  # what a difference in lightness counts: objects are shaded
_STRIDE = 3  # every third pixel is looked at, each way
_BLUR = 1.0  # pixels; takes the crispness from drawn pictures that decoded ones do not have


def oklab(pictures: Tensor) -> Tensor:
    """sRGB in [0, 1] (..., 3) -> Oklab (..., 3): lightness 0..1 and two hues of about -0.3..0.3, evenly perceived."""
    linear = torch.where(pictures <= 0.04045, pictures / 12.92, ((pictures.clamp(min=0) + 0.055) / 1.055) ** 2.4)
    to_cones = linear.new_tensor(
        [
            [0.4122214708, 0.5363325363, 0.0514459929],
            [0.2119034982, 0.6806995451, 0.1073969566],
            [0.0883024619, 0.2817188376, 0.6299787005],
        ]
    )
    to_lab = linear.new_tensor(
        [
            [0.2104542553, 0.7936177850, -0.0040720468],
            [1.9779984951, -2.4285922050, 0.4505937099],
            [0.0259040371, 0.7827717662, -0.8086757660],
        ]
    )
    return (linear @ to_cones.T).clamp(min=0) ** (1 / 3) @ to_lab.T


def blur(maps: Tensor, sigma: float) -> Tensor:
    """Gaussian blur of (B, C, H, W) by `sigma` pixels, zeros outside."""
    reach = int(3 * sigma + 0.5)
    weights = torch.exp(-0.5 * (torch.arange(-reach, reach + 1, device=maps.device, dtype=maps.dtype) / sigma) ** 2)
    weights = (weights / weights.sum()).expand(maps.shape[1], 1, 1, -1)
    maps = F.conv2d(maps, weights, padding=(0, reach), groups=maps.shape[1])
    return F.conv2d(maps, weights.transpose(2, 3), padding=(reach, 0), groups=maps.shape[1])


def blur_inside(pictures: Tensor, masks: Tensor, sigma: float) -> Tensor:
    """Blur pictures (B, H, W, 3) by `sigma` pixels without letting in colours from outside the masks (B, H, W)."""
    weights = masks[:, None]
    blurred = blur(pictures.movedim(-1, 1) * weights, sigma) / blur(weights, sigma).clamp(min=1e-4)
    return blurred.movedim(1, -1)


def appearance_points(pictures: Tensor, masks: Tensor) -> list[list[Tensor]]:
    """For each picture the samples of its three distributions: colours (n, 3), pairs side by side and one above the
    other, each in both orders (n, 6). Lightness is scaled by LIGHTNESS."""
    inside = (masks > 0.5).to(pictures)
    colors = oklab(blur_inside(pictures, inside, _BLUR)) * pictures.new_tensor([LIGHTNESS, 1.0, 1.0])
    step = max(1, round(STEP * pictures.shape[2]))
    samples = []
    for image, mask in zip(colors, inside > 0, strict=True):
        sideways = _pairs(image, mask, step)
        downwards = _pairs(image.transpose(0, 1), mask.transpose(0, 1), step)
        samples.append([image[::_STRIDE, ::_STRIDE][mask[::_STRIDE, ::_STRIDE]], sideways, downwards])
    return samples


def _pairs(image: Tensor, mask: Tensor, step: int) -> Tensor:
    """Colours `step` columns apart, both inside the mask: (H, W, 3) -> (n, 6)."""
    first, second = image[::_STRIDE, :-step:_STRIDE], image[::_STRIDE, step::_STRIDE]
    both = mask[::_STRIDE, :-step:_STRIDE] & mask[::_STRIDE, step::_STRIDE]
    first, second = first[both], second[both]
    return torch.cat([torch.cat([first, second], dim=1), torch.cat([second, first], dim=1)])


def _inner(p: Tensor, q: Tensor) -> Tensor:
    """<P, Q>, from samples (n, d) and (m, d) of them."""
    return torch.exp(-0.5 * (torch.cdist(p, q) / BANDWIDTH) ** 2).mean()


def concept_similarity(pictures: Tensor, masks: Tensor, reference_pictures: Tensor, reference_masks: Tensor) -> Tensor:
    """How alike the objects of pictures look to that of the reference pictures: (B,) in [0, 1].

    The geometric mean of the likeness of colours and of pairs of colours, side by side and one above the other. About 1
    for the same thing at another place, turned a little or mirrored; the shape of the object does not matter.
    pictures (B, H, W, 3) and reference_pictures (R, H, W, 3) of one size; 0 where a mask is too small to hold a pair.
    Raises PictureError if the reference masks are.
    """
    if pictures.shape[1:] != reference_pictures.shape[1:]:
        raise ValueError(
            f"pictures are {tuple(pictures.shape[1:])} and reference pictures {tuple(reference_pictures.shape[1:])}: "
            "make them one size first"
        )
    references = [
        torch.cat(samples) for samples in zip(*appearance_points(reference_pictures, reference_masks), strict=True)
    ]
    if not all(len(samples) for samples in references):
        raise PictureError("the reference masks hold no object, or too small a one: paint it white, and larger")
    own = [_inner(samples, samples) for samples in references]
    scores = []
    for appearance in appearance_points(pictures, masks):
        if all(len(samples) for samples in appearance):
            cosines = [
                _inner(p, q) / (_inner(p, p) * qq).sqrt() for p, q, qq in zip(appearance, references, own, strict=True)
            ]
            scores.append(torch.stack(cosines).prod() ** (1 / len(cosines)))
        else:
            scores.append(pictures.new_zeros(()))
    return torch.stack(scores).clamp(0, 1)


def grown(masks: Tensor, pixels: int) -> Tensor:
    """Masks (B, H, W), each larger by `pixels` to every side."""
    return F.max_pool2d(masks[:, None], 2 * pixels + 1, stride=1, padding=pixels)[:, 0]


def background_change(pictures: Tensor, plain_pictures: Tensor, masks: Tensor, margin: int = 4) -> Tensor:
    """Mean absolute difference of two pictures (B, H, W, 3) where neither has its object: (B,) in [0, 1].

    masks (B, H, W): where either has it (`torch.maximum` of both masks), grown by `margin` pixels here, since masks are
    soft and outlines bleed. 0 where nothing is left.
    """
    outside = 1 - grown((masks > 0.5).to(pictures), margin)
    difference = (pictures - plain_pictures).abs().mean(dim=-1)
    return (difference * outside).sum(dim=(1, 2)) / outside.sum(dim=(1, 2)).clamp(min=1)
