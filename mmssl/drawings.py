"""What a sample looks like to people: the few forms that a page or a figure knows how to show.

A modality says in which of them its samples are shown (``Modality.drawings``); what is NaN in them is left blank, so
that the same drawing shows a sample, what the encoder saw of it, and its reconstruction.
"""

from dataclasses import dataclass

import numpy as np


@dataclass
class Frames:
    """Pictures that follow each other; a single one is a still picture.

    Attributes:
        pixels: (frames, height, width, 3) between 0 and 1.
        rate: frames in a second.
    """

    pixels: np.ndarray
    rate: float = 1.0


@dataclass
class Spectrogram:
    """Energies over time and frequency.

    Attributes:
        values: (frequencies, frames), low frequencies first.
        hop: seconds from one frame to the next.
        frequencies: (frequencies,) Hz, the middle of each band. None: not known.
    """

    values: np.ndarray
    hop: float
    frequencies: np.ndarray | None = None


@dataclass
class Points:
    """Points in space, z upwards.

    Attributes:
        places: (points, 3).
        groups: (points,) int, the token that each point belongs to.
    """

    places: np.ndarray
    groups: np.ndarray


@dataclass
class Network:
    """Nodes and the edges between them.

    Attributes:
        edges: (2, edges) positions of the nodes that each one joins, the lower one first; no two nodes twice.
        values: (nodes, features) what the nodes hold.
    """

    edges: np.ndarray
    values: np.ndarray


@dataclass
class Cells:
    """A row of a table.

    Attributes:
        names: of the columns.
        values: in each of them, as text; "" is blank.
    """

    names: list[str]
    values: list[str]


@dataclass
class Lines:
    """Series over the same time.

    Attributes:
        values: (channels, steps).
        names: of the channels.
    """

    values: np.ndarray
    names: list[str]


Drawing = Frames | Spectrogram | Points | Network | Cells | Lines
