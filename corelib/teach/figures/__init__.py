"""The lab's figures, in one style (`corelib.teach.style`).

Every helper draws into ``ax`` or, without it, into a new figure, and returns the figure: give it
to `show` with its alternative text, or return it from the function that `explore` calls.
"""

from __future__ import annotations

from ..style import canvas, paper
from .bars import bars
from .card import KernelCard, kernel_card
from .categories import category_map
from .curves import lines, race_plot
from .gallery import matrix_gallery
from .grid import count_grid
from .heat import attention_map, mask_plot, state_heatmap
from .patches import patch_grid
from .roof import roofline_plot
from .show import show
from .strips import picture_strips
from .timeline import timeline
from .tokens import token_intervals

__all__ = [
    "KernelCard",
    "attention_map",
    "bars",
    "canvas",
    "category_map",
    "count_grid",
    "kernel_card",
    "lines",
    "mask_plot",
    "matrix_gallery",
    "paper",
    "patch_grid",
    "picture_strips",
    "race_plot",
    "roofline_plot",
    "show",
    "state_heatmap",
    "timeline",
    "token_intervals",
]
