"""Profiles: the lengths that an engine is planned for, one range for each axis that varies."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from xadapter_export.bundle.manifest import Manifest, TensorSpec
from xadapter_export.errors import ConfigError
from xadapter_export.sessions.session import Array
from xadapter_export.targets import AXES
from xadapter_export.tasks import TASKS

_MOST_MASKS = 4
_LEAST_TOKENS = 2  # start and end; of the PLM and of CLIP
# What an engine is made fastest for: one everyday sentence.
_USUAL = {"batch": 1, "seq": 32, "masks": 1, "clip_seq": 16}


@dataclass(frozen=True)
class AxisRange:
    """Lengths of one axis: the least, the one to be fastest at, and the largest."""

    least: int
    usual: int
    largest: int

    def __str__(self) -> str:
        """Return it as ``8..128``, which is what ``--profile`` takes."""
        return f"{self.least}..{self.largest}"


def parse_profile(texts: Iterable[str]) -> dict[str, tuple[int, int]]:
    """Reads ``batch=1..8 seq=8..128``; a single number stands for a fixed length.

    Raises:
        ConfigError: If an axis or a range is not one.
    """
    profile: dict[str, tuple[int, int]] = {}
    for item in " ".join(texts).replace(",", " ").split():
        axis, _, lengths = item.partition("=")
        least, _, largest = lengths.partition("..")
        numbers = (least, largest or least)
        if not all(number.isdecimal() for number in numbers):
            raise ConfigError(
                "a profile must be a list of ranges", got=repr(item), expected="such as batch=1..8 seq=8..128"
            )
        if axis in profile:
            raise ConfigError("an axis has two ranges in the profile", where=axis)
        profile[axis] = (int(numbers[0]), int(numbers[1]))
    check_axes(profile)
    return profile


def check_axes(profile: Mapping[str, tuple[int, int]]) -> None:
    """Refuses axes that no graph has, and ranges that hold no length.

    Raises:
        ConfigError: If there is one.
    """
    for axis, (least, largest) in profile.items():
        if axis not in AXES:
            raise ConfigError("unknown axis", where=f"profile {axis}", expected=", ".join(AXES))
        if not 1 <= least <= largest:
            raise ConfigError(
                "the range of an axis is empty", where=f"profile {axis}", got=f"{least}..{largest}"
            )


def check_limits(profile: Mapping[str, tuple[int, int]], longest: Mapping[str, int]) -> None:
    """Refuses lengths that the models cannot read.

    Args:
        profile: Ranges by axis.
        longest: The most that the models read, by axis.

    Raises:
        ConfigError: If a range goes further.
    """
    for axis, limit in longest.items():
        if axis in profile and profile[axis][1] > limit:
            raise ConfigError(
                "the profile is longer than the model's longest input",
                where=f"profile {axis}",
                expected=f"at most {limit}",
                got=profile[axis][1],
            )


def check_cases(profile: Mapping[str, tuple[int, int]], cases: Iterable[Mapping[str, Array]]) -> None:
    """Refuses ranges that hold no reference input: what is planned for them could not be proven.

    Args:
        profile: Ranges by axis.
        cases: Arrays of each case, by the names of the inputs.

    Raises:
        ConfigError: If no case fits, or the inputs do not have an axis.
    """
    inputs = {"seq": "input_ids", "masks": "mask_positions", "clip_seq": "clip_input_ids"}
    lengths = [
        {"batch": len(case["input_ids"])}
        | {axis: case[name].shape[1] for axis, name in inputs.items() if name in case}
        for case in cases
    ]
    for axis in profile:
        if axis not in lengths[0]:
            raise ConfigError("none of the exported graphs has this axis", where=f"profile {axis}")
    if not any(
        all(least <= case[axis] <= largest for axis, (least, largest) in profile.items()) for case in lengths
    ):
        raise ConfigError(
            "no reference input fits the profile, so nothing could be checked",
            where=", ".join(f"{axis}={least}..{largest}" for axis, (least, largest) in profile.items()),
            hint="give wider ranges with --profile",
        )


def plan_axes(manifest: Manifest, profile: Mapping[str, tuple[int, int]]) -> dict[str, AxisRange]:
    """The range of every axis: what was asked for, or what suits the task.

    Raises:
        ConfigError: If a range goes beyond what the models read.
    """
    clip = manifest.clip
    context = clip.context_length if clip else None
    shortest = _LEAST_TOKENS if clip is None or clip.exact_at_true_length else clip.context_length
    check_limits(profile, manifest.longest)
    ranges = {
        "batch": (1, TASKS[manifest.task].most_texts),
        "seq": (_LEAST_TOKENS, manifest.plm.max_seq),
        "masks": (1, _MOST_MASKS),
        "clip_seq": (shortest, context or _LEAST_TOKENS),
        **profile,
    }
    return {
        axis: AxisRange(least, min(max(_USUAL[axis], least), largest), largest)
        for axis, (least, largest) in ranges.items()
    }


def profile_shapes(
    inputs: Iterable[TensorSpec], axes: Mapping[str, AxisRange]
) -> dict[str, tuple[list[int], list[int], list[int]]]:
    """Least, usual and largest shape of every input.

    Args:
        inputs: The graph's inputs.
        axes: Ranges by the axis's name.
    """
    return {
        tensor.name: (
            [axes[axis].least if isinstance(axis, str) else axis for axis in tensor.axes],
            [axes[axis].usual if isinstance(axis, str) else axis for axis in tensor.axes],
            [axes[axis].largest if isinstance(axis, str) else axis for axis in tensor.axes],
        )
        for tensor in inputs
    }


def profile_facts(inputs: Iterable[TensorSpec], axes: Mapping[str, AxisRange]) -> dict[str, str]:
    """What a deployment says of the ranges of the axes that its graph has."""
    names = {axis for tensor in inputs for axis in tensor.axes}
    return {f"profile {axis}": str(ranged) for axis, ranged in axes.items() if axis in names}
