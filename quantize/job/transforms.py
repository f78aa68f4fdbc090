"""Which transform a job's images get: checked, or chosen where nobody has said one, by what the net's first
BatchNorms stored in training.
"""

from __future__ import annotations

from dataclasses import replace

from quantize.caffenet import TEST, TRAIN, NetParameter, data_layer
from quantize.caffenet.model import Model
from quantize.engines import engine_opener
from quantize.errors import LabelfreeError
from quantize.job.feeds import calibration_feed, calibration_images, effective_transform
from quantize.job.given import Given
from quantize.job.inputs import image_input, told_shapes
from quantize.job.store import read_record
from quantize.measure.transform_check import (
    COLOR,
    COLOR_CHANNELS,
    HOPELESS,
    SWAPPED,
    Scaling,
    TransformCheck,
    check_transform,
)
from quantize.settings import Config, TransformKeys

ARITHMETIC = frozenset({"mean_value", "mean_file", "scale"})
"""What the statistics tell about; of cropping and resizing they tell next to nothing."""


def transform_check(given: Given, model: Model, choose: bool = False) -> TransformCheck | None:
    """Compare the calibration images, as the configuration transforms them, with the statistics of training.

    Args:
        given: what the job starts from.
        model: the net in full precision.
        choose: try other transforms even where that one fits.

    Returns:
        None where there are no calibration images.

    Raises:
        LabelfreeError: an image cannot be read, or a layer in front of the BatchNorms cannot be run.
    """
    config = given.config
    if config.data.calibration is None:
        return None
    feed = calibration_feed(given, calibration_images(given))
    open_engine = engine_opener(config.engine, config.caffe, config.threads)
    others = values_of_prototxt(given)
    return check_transform(model, feed, open_engine, others, choose)


def says_transform(config: Config, net: NetParameter) -> bool:
    """Whether the configuration or the prototxt says what happens to the values of pixels."""
    return bool(ARITHMETIC & config.data.transform.model_fields_set) or has_data_layer(net)


def has_data_layer(net: NetParameter) -> bool:
    """Whether a net has a layer with a transform of its own."""
    return (data_layer(net, TRAIN) or data_layer(net, TEST)) is not None


def values_of_prototxt(job: Given) -> list[Scaling]:
    """What the prototxt says, where the configuration says something else; without mean images."""
    config, net = job.config, job.net
    given = config.data.transform
    if not has_data_layer(net) or not ARITHMETIC & given.model_fields_set:
        return []
    geometry = TransformKeys.model_validate(given.model_dump(exclude_unset=True, exclude=set(ARITHMETIC)))
    own = effective_transform(job.with_config(with_transform(config, geometry)), TRAIN)
    return [] if own.mean_file else [Scaling(own.mean_value, own.scale, about="as the prototxt says")]


def with_chosen_transform(given: Given) -> tuple[Config, str]:
    """The configuration with the transform that fits the statistics of training, and why that one.

    What the prototxt says stays unless another transform fits clearly better. Where nothing can be checked,
    images of three channels get the mean that most published Caffe networks subtract.
    """
    try:
        check = transform_check(given, given.model, choose=True)
        unchecked = check.unchecked if check is not None else "there are no calibration images"
    except LabelfreeError as error:
        check, unchecked = None, str(error)
    config, net = given.config, given.net
    if has_data_layer(net) and not (check and check.better):
        return config, f"as the prototxt says; {check.finding if check else unchecked}"
    if check is None or check.given is None:
        shape = told_shapes(given).get(image_input(given) or "")
        color = shape is not None and shape[0] == COLOR_CHANNELS
        why = f"that is usual, and cannot be checked: {unchecked}"
        return _with_values(config, COLOR[0] if color else Scaling(), why)
    first, *others = check.best
    assert first.values is not None
    seen = f"{first.figures} those stored in {check.where}"
    equally = f"; equally well fits {' or '.join(fit.transform for fit in others)}" if others else ""
    if first.misfit > HOPELESS:
        return _with_values(config, first.values, f"no usual transform fits, this one least badly: {seen}")
    if first.values.swapped:
        return _with_values(config, first.values, f"fits if channels are swapped: {seen}; {SWAPPED}")
    return _with_values(config, first.values, f"fits best: {seen}{equally}")


def with_reported_transform(config: Config) -> Config:
    """The configuration with the transform that `quantize` chose for what is in the output folder.

    Raises:
        InputError: nothing has been quantized yet.
    """
    record = read_record(config.output)
    given = config.data.transform
    if ARITHMETIC & given.model_fields_set or record.transform is None or record.transform.chosen is None:
        return config
    recorded = record.settings.data.transform
    keys = {"mean_value": recorded.mean_value, "scale": recorded.scale}
    return with_transform(
        config, TransformKeys.model_validate({**given.model_dump(exclude_unset=True), **keys})
    )


def _with_values(config: Config, values: Scaling, why: str) -> tuple[Config, str]:
    """The configuration with these values in its transform."""
    given = config.data.transform.model_dump(exclude_unset=True, exclude=set(ARITHMETIC))
    keys = {**given, "mean_value": list(values.mean), "scale": values.scale}
    transform = TransformKeys.model_validate(keys)
    return with_transform(config, transform), f"{replace(values, swapped=False)}: {why}"


def with_transform(config: Config, transform: TransformKeys) -> Config:
    """The configuration with another data.transform."""
    data = config.data.model_copy(update={"transform": transform})
    return config.model_copy(update={"data": data})
