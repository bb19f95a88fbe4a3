"""Every error the compression side raises. A message says what, what was got, what was expected and what to do.

CompressError
|- UnitError                   a width, a head count or a block that a network does not have or cannot have
|- TrainingError               a checkpoint, a data set or a recipe with which a training cannot begin or go on
|- AdapterError                a LoRA file cannot be read, or does not fit the pipeline it is to be merged into
|- UnsupportedSchedulerError   the scheduler, or one named setting of it, has no linear two-step table
|- PrecisionError              a precision, a kernel set or a layer that a recipe cannot name
|- PlanError                   a Plan on disk or in memory does not follow the schema
|- TrajectoryError             recorded runs cannot be made, cannot be read, or belong to another model or schedule
|- CompensationError           a compensation does not fit the model, the sampler or the schedule it is asked for
|- PredictionError             a mask, a ladder or a prediction of steps contradicts itself or the schedule
|- ScheduleError               a mask, an error matrix or an adjusted grid is asked for that there cannot be
"""

from __future__ import annotations

from typing import ClassVar


class CompressError(Exception):
    """Root of the tree; `exit_status` is what the command returns: 1 failed, 2 misused, 3 refused."""

    exit_status: ClassVar[int] = 1

    def __init__(self, what: str, *, got: object = None, expected: object = None, do: str | None = None) -> None:
        parts = [what]
        parts += [f"got {got}"] if got is not None else []
        parts += [f"expected {expected}"] if expected is not None else []
        super().__init__(", ".join(parts) + (f". {do}" if do else ""))


class UnitError(CompressError):
    """A width, a head count or a block that the network does not have or cannot have."""

    exit_status = 3


class TrainingError(CompressError):
    """A training cannot begin or go on: a checkpoint that does not load, another recipe's folder, no data."""


class UnsupportedSchedulerError(CompressError):
    """The scheduler's step is not `x' = a x + b e + c x0_prev`; `.part` names the class or the setting at fault."""

    exit_status = 3

    def __init__(self, part: str, *, got: object, expected: object) -> None:
        super().__init__(
            f"no solver table for this scheduler: {part} is {got!r}, expected {expected!r}. "
            "Build with sampler 'dpmsolver++' or 'ddim', whose settings override the source's."
        )
        self.part, self.got, self.expected = part, got, expected


class PrecisionError(CompressError):
    """A recipe names a precision, a kernel set or a layer that does not exist, or is malformed."""

    exit_status = 2


class PlanError(CompressError):
    """plan.json or plan.safetensors is missing, malformed, of another version, or contradicts itself."""

    exit_status = 3


class AdapterError(CompressError):
    """A file of adapters cannot be merged; `.file` names it."""

    exit_status = 3

    def __init__(self, file: str, what: str, *, got: object = None, expected: object = None) -> None:
        super().__init__(
            f"the adapters in {file} cannot be merged: {what}",
            got=got,
            expected=expected,
            do="Give a LoRA of this model in diffusers' or kohya's layout, as .safetensors.",
        )
        self.file = file


class TrajectoryError(CompressError):
    """Recorded runs cannot be made or read, or belong to something else; `.field` names what differs, if that is it."""

    exit_status = 3

    def __init__(
        self,
        what: str,
        *,
        got: object = None,
        expected: object = None,
        do: str | None = None,
        field: str | None = None,
    ) -> None:
        super().__init__(what, got=got, expected=expected, do=do)
        self.field = field


class CompensationError(TrajectoryError):
    """A compensation cannot be fitted, or was fitted for another model, sampler or schedule."""


class PredictionError(CompressError):
    """A mask, a ladder or a prediction of steps contradicts itself, the schedule or the network."""

    exit_status = 3


class ScheduleError(CompressError):
    """No such schedule: a budget that the segment or the cap rules out, an error matrix without these steps, a grid
    that does not fall."""

    exit_status = 2
