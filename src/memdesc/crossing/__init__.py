"""How a block of N bytes crosses between two tasks: the one place that decides it.

* `ways`         `Way`, and the pure rules `way_for` and `way_to_copy`: sizes in, a way and its
                 reason out
* `sizes`        `Thresholds`: the sizes themselves
* `settings`     the thresholds that hold now: set by hand, measured, or the defaults
* `measurement`  measures them on this machine, in about a second, when it is called

Below `copyio` and all that hands memory over, as they ask here; so it knows nothing of
descriptors, only what kind of memory a block lies in. Nothing is ever measured unasked.
"""

from typing import TYPE_CHECKING

from memdesc.crossing.settings import (
    Calibration as Calibration,
    Origin as Origin,
    calibration as calibration,
    calibration_file as calibration_file,
    save_calibration as save_calibration,
    set_thresholds as set_thresholds,
    thresholds as thresholds,
)
from memdesc.crossing.sizes import Thresholds as Thresholds
from memdesc.crossing.ways import (
    Choice as Choice,
    Way as Way,
    way_for as way_for,
    way_to_copy as way_to_copy,
)
from memdesc.vm.later import later

if TYPE_CHECKING:
    from memdesc.crossing.measurement import calibrate as calibrate

if not TYPE_CHECKING:  # hardly any program measures
    __getattr__, __dir__ = later(__name__, {"calibrate": "memdesc.crossing.measurement"})

__all__ = [
    "Way",
    "Choice",
    "Thresholds",
    "way_for",
    "way_to_copy",
    "Calibration",
    "Origin",
    "calibrate",
    "calibration",
    "calibration_file",
    "save_calibration",
    "set_thresholds",
    "thresholds",
]
