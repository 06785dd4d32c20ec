# SPDX-License-Identifier: Apache-2.0
"""Global retrieval branch: which training images look most like the query?

Every cell of F1 takes its nearest visual word; the word map is cut into blocks x blocks rectangles; each block gives a
histogram of words. Images are compared block by block, and the worst fifth of the blocks, where a defect may be, is
left out. Source: CPR (arXiv 2308.06748), section III-B, with the values of the authors' code.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

EPSILON = 1e-8
SHORTLIST = 2000  # images that the robust distance is computed for, in galleries of more than twice as many
_BLOCK_BYTES = 256_000_000  # of the divergences that are held at a time while a gallery is compared with itself
BEYOND = 2.0**22  # above every distance; together with an index still exact in float32


def assign_words(features: Tensor, codebook: Tensor) -> Tensor:
    """Nearest visual word of every cell.

    Args:
        features (Tensor): F1 of shape ``(batch, channels, height, width)``.
        codebook (Tensor): Visual words of shape ``(words, channels)``.

    Returns:
        Tensor: Indices of shape ``(batch, height, width)``. Of equally near words the first wins.
    """
    # |f - w|^2 without what is the same for all words: a 1x1 convolution, not a (words, ...) difference. What the words
    # have in common cancels as well. Left in, it would be rounded along, and two runtimes would disagree more often.
    centre = codebook.mean(0)
    offset = codebook - centre
    similarity = F.conv2d(features, offset[:, :, None, None], -0.5 * (offset * (codebook + centre)).sum(1))
    return similarity.argmax(1)


def block_histograms(words: Tensor, word_count: int, blocks: int) -> Tensor:
    """Share of each word in each block of the word map.

    Where the number of blocks does not divide a side, blocks are of ceiling size and the padding, before the first
    cell as in the authors' code, counts as no word.

    Args:
        words (Tensor): Word map of shape ``(batch, height, width)``.
        word_count (int): Number of visual words.
        blocks (int): Blocks per side.

    Returns:
        Tensor: Histograms of shape ``(batch, blocks * blocks, word_count)``; each sums to the share of cells in the
            block that are not padding.

    Raises:
        ValueError: If the map has fewer cells than blocks on a side.
    """
    height, width = words.shape[-2:]
    if min(height, width) < blocks:
        raise ValueError(
            f"The feature map of {height}x{width} cells is smaller than the retrieval grid of {blocks}x{blocks} "
            f"blocks. Use images of at least {4 * blocks} pixels a side, or fewer `blocks`."
        )
    block_height, block_width = -(-height // blocks), -(-width // blocks)
    # One-hot by comparison: exports to ONNX with a dynamic batch, unlike torch.nn.functional.one_hot.
    one_hot = (words[:, None] == torch.arange(word_count, device=words.device)[None, :, None, None]).float()
    one_hot = F.pad(one_hot, (block_width * blocks - width, 0, block_height * blocks - height, 0))
    return F.avg_pool2d(one_hot, (block_height, block_width)).flatten(2).transpose(1, 2)


def histogram_distance(query: Tensor, gallery: Tensor, keep: float = 0.8) -> Tensor:
    """Robust distance: block-wise Kullback-Leibler divergence, summed over the best blocks.

    Args:
        query (Tensor): Histograms of shape ``(batch, blocks, words)``.
        gallery (Tensor): Histograms of shape ``(gallery, blocks, words)``.
        keep (float): Share of blocks that count; the rest, with the largest divergence, is left out.

    Returns:
        Tensor: Distances of shape ``(batch, gallery)``, float32.
    """
    # At least epsilon, where the authors add it. It makes no difference to speak of, as a share is 0 or at least one
    # cell of a block; but ONNX optimisers take the addition of 1e-8 for an addition of nothing, and then log(0) is NaN.
    query, gallery = query.float().transpose(1, 2).clamp(min=EPSILON), gallery.float().clamp(min=EPSILON)
    # sum q log(q / r) = sum q log q - sum q log r is one matrix product per block, of (q, sum q log q) and (-log r, 1),
    # so that there is no (batch, gallery, blocks, words) temporary. The gallery, a constant in exported graphs, is its
    # first factor: as the second it would be taken for the weights of a layer, which runtimes like to round.
    query = torch.cat([query, (query * query.log()).sum(1, keepdim=True)], 1).permute(2, 1, 0)
    gallery = torch.cat([-gallery.log(), torch.ones_like(gallery[..., :1])], -1).transpose(0, 1)
    divergence = torch.matmul(gallery, query).permute(2, 1, 0)
    return _robust_sum(divergence, keep)


def _robust_sum(divergence: Tensor, keep: float = 0.8) -> Tensor:
    """Sum over the last dimension, the blocks, without the largest."""
    blocks = divergence.shape[-1]
    return divergence.topk(max(1, int(blocks * keep)), dim=-1, largest=False).values.sum(-1)


def representatives(gallery: Tensor, count: int) -> Tensor:
    """Choose images so that every image has a similar one among the chosen (greedy k-center).

    Begins with the image nearest to the mean histogram, and adds the image that the chosen serve worst as references,
    again and again.

    Args:
        gallery (Tensor): Histograms of shape ``(gallery, blocks, words)``.
        count (int): Number of images to choose, at least 1; the whole gallery if it is smaller.

    Returns:
        Tensor: Indices in ascending order, of shape ``(min(count, gallery),)``. Of equals the first is chosen.
    """
    if count >= len(gallery):
        return torch.arange(len(gallery), device=gallery.device)
    chosen = [int(histogram_distance(gallery, gallery.mean(0, keepdim=True))[:, 0].argmin())]
    worst = torch.full((len(gallery),), float("inf"), device=gallery.device)
    while len(chosen) < count:
        worst = torch.minimum(worst, histogram_distance(gallery, gallery[chosen[-1:]])[:, 0])
        worst[chosen[-1]] = -float("inf")  # rounding must not choose an image twice
        chosen.append(int(worst.argmax()))
    return torch.tensor(sorted(chosen), device=gallery.device)


def smallest(distances: Tensor, k: int) -> Tensor:
    """Indices of the k smallest values; of equal values at the limit, the first in order win.

    ``topk`` alone leaves open which of several equal values it takes, and every runtime takes others.

    Args:
        distances (Tensor): Of shape ``(batch, gallery)``, below 2^20.
        k (int): How many, at most ``gallery``.

    Returns:
        Tensor: Indices of shape ``(batch, k)``, the smallest value first. Which they are, and so all that is computed
            from them in any order, does not depend on the runtime.
    """
    limit = distances.topk(k, dim=1, largest=False).values.amax(1, keepdim=True)
    order = torch.arange(distances.shape[1], device=distances.device, dtype=distances.dtype)
    at_limit = torch.where(distances == limit, BEYOND + order, 2 * BEYOND + order)
    return torch.where(distances < limit, distances, at_limit).topk(k, dim=1, largest=False).indices


def roots_of(histograms: Tensor) -> Tensor:
    """Square roots, whose inner product is the Bhattacharyya coefficient: how much two histograms overlap.

    Args:
        histograms (Tensor): Of shape ``(gallery, blocks, words)``.

    Returns:
        Tensor: Of shape ``(gallery, blocks * words)``.
    """
    return histograms.flatten(1).sqrt()


def nearest_of_many(query: Tensor, gallery: Tensor, roots: Tensor, k: int, shortlist: int = SHORTLIST) -> Tensor:
    """The nearest images of a large gallery: a shortlist by one matrix product, then the robust distance.

    The shortlist takes the images whose histograms overlap most with the query's. The total divergence would be an
    inner product too, with -log of the gallery, but a defect that shows a word which most images lack makes it all
    noise: with 3 of 25 blocks disturbed and 100,000 images, its first 2,000 held 80 % of the true ten nearest, those of
    the overlap all of them.

    Searching 100,000 images takes 17 ms on two cores of an EPYC, and misses none of the true ten nearest of 50 queries
    (``anomalib-cpr galleries``): a product of this size needs no index, so that faiss is not used here.

    Args:
        query (Tensor): Histograms of shape ``(batch, blocks, words)``.
        gallery (Tensor): Histograms of shape ``(gallery, blocks, words)``.
        roots (Tensor): Of :func:`roots_of` the gallery.
        k (int): Number of images.
        shortlist (int): Number of images to compare exactly.

    Returns:
        Tensor: Indices of shape ``(batch, k)``, the most similar first.
    """
    overlap = torch.matmul(roots_of(query), roots.T)
    candidates = overlap.topk(min(shortlist, len(gallery)), dim=1, sorted=False).indices
    # In the order of the gallery, so that of equally near images the same one wins as without a shortlist.
    candidates = candidates.sort(dim=1).values
    own, theirs = query.float().clamp(min=EPSILON), gallery[candidates].float().clamp(min=EPSILON)
    divergence = (own * own.log()).sum(-1)[:, None] - (own[:, None] * theirs.log()).sum(-1)
    chosen = smallest(_robust_sum(divergence), k)
    return candidates.gather(1, chosen)


class GlobalRetriever(nn.Module):
    """Finds the training images that look most like a query.

    Args:
        channels (int): Channels of F1.
        codebook_size (int): Number of visual words.
        blocks (int): Blocks per side.
    """

    codebook: Tensor

    def __init__(self, channels: int, codebook_size: int = 12, blocks: int = 5) -> None:
        super().__init__()
        self.blocks = blocks
        self.register_buffer("codebook", torch.zeros(codebook_size, channels))

    @property
    def is_fitted(self) -> bool:
        """Whether the codebook was learned (an untrained one is all zeros)."""
        return bool(self.codebook.any())

    def forward(self, features: Tensor) -> Tensor:
        """Block histograms of visual words.

        Args:
            features (Tensor): F1 of shape ``(batch, channels, height, width)``.

        Returns:
            Tensor: Histograms of shape ``(batch, blocks * blocks, codebook_size)``.
        """
        words = assign_words(features.float(), self.codebook)
        return block_histograms(words, self.codebook.shape[0], self.blocks)

    @staticmethod
    def nearest(
        histograms: Tensor,
        gallery: Tensor,
        k: int,
        *,
        exclude_self: bool = False,
        copies: int = 1,
        roots: Tensor | None = None,
    ) -> Tensor:
        """Indices of the nearest gallery images, the most similar first.

        Args:
            histograms (Tensor): Query histograms of shape ``(batch, blocks, words)``.
            gallery (Tensor): Gallery histograms of shape ``(gallery, blocks, words)``.
            k (int): Number of references; the whole gallery if it is smaller.
            exclude_self (bool): The queries *are* the gallery, and no image may retrieve itself.
            copies (int): So many consecutive gallery images show one photograph; with ``exclude_self``, none of them
                retrieves another.
            roots (Tensor | None): Of :func:`roots_of` the gallery; with them, a large gallery is searched by shortlist.

        Returns:
            Tensor: Indices of shape ``(batch, min(k, available))``.
        """
        count = gallery.shape[0]
        if exclude_self:
            return _nearest_others(gallery, min(k, count - copies), copies)
        if roots is not None and count > 2 * SHORTLIST and k <= SHORTLIST:
            return nearest_of_many(histograms, gallery, roots, k)
        return smallest(histogram_distance(histograms, gallery), min(k, count))


def _nearest_others(gallery: Tensor, k: int, copies: int) -> Tensor:
    """Nearest other images of each image, some images at a time: all at once, 10,000 images would take 10 GB."""
    count, blocks = gallery.shape[:2]
    step = max(1, _BLOCK_BYTES // (4 * count * blocks))
    found = []
    for start in range(0, count, step):
        distances = histogram_distance(gallery[start : start + step], gallery)
        photograph = torch.arange(count, device=gallery.device) // copies
        distances[photograph[start : start + step, None] == photograph] = float("inf")
        found.append(smallest(distances, k))
    return torch.cat(found)
