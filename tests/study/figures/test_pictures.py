"""Parts of pictures: the frame around the tissue."""

from __future__ import annotations

import numpy as np

from study.figures.pictures import draw_image, panels, tissue


def test_frame_holds_the_tissue_in_mm():
    image = np.zeros((40, 30))
    image[10:20, 5:25] = 1
    figure, axes = panels(1, 1, 2)
    draw_image(axes[0, 0], image, (3.0, 1.0), tissue(image))
    x, y = axes[0, 0].get_xlim(), axes[0, 0].get_ylim()
    assert x[0] < -0.5 and x[1] > 30.5 and np.isclose(sum(x) / 2, 15), "as wide as the 30 mm of the tissue's height"
    assert y[0] > 60 > 30 > y[1] and np.isclose(sum(y) / 2, 45), "rows run down"
