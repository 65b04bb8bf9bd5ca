"""Labels by a metric's own attribute heads: a look of the network, and no measuring."""

from __future__ import annotations

from PIL import Image

from pyiqa_clipkd.files import SHORT_HASH
from pyiqa_clipkd.names import DEFAULT_METRIC
from pyiqa_clipkd.runtime import Runtime


class MetricLabeller:
    """The attributes that `score --attributes` gives, as labels.

    Args:
        metric: one with attribute heads.

    Attributes:
        identity: the metric, and the first digits of the SHA-256 of weights and heads.

    Raises:
        FileNotFoundError: if the metric has no such heads.
    """

    def __init__(self, metric: str = DEFAULT_METRIC) -> None:
        self.runtime = Runtime(metric, threads=1, attributes=True)
        digests = (self.runtime.sha256, self.runtime.heads_sha256)
        weights, heads = (digest[:SHORT_HASH] for digest in digests)
        self.identity = f'{metric} weights {weights} heads {heads}'

    def __call__(self, image: Image.Image) -> dict[str, float]:
        """RGB -> the five attributes in [0, 1], 1 the good side."""
        return self.runtime.score(image).attributes
