"""`Recipe`: all options of a training run in one flat, immutable, validated model.

Names of architectures, optimizers and so on are validated by `training.resolve`; this module does not import torch.
"""

import ast
import contextlib
import json
import math
from collections.abc import Callable
from fractions import Fraction
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, Field, TypeAdapter, ValidationError, model_validator

from fastcifar.errors import UsageError, suggest_name
from fastcifar.format import format_option_value, format_toml_value, option_flag
from fastcifar.recipes import load_recipe_values
from fastcifar.renamed import renaming_remedy

OUTPUT_OPTIONS = ("out", "resume", "save_every_epochs", "save_every_steps", "track")  # these do not affect the weights
DEFAULT_VAL_SIZE = 5000
MAX_EPOCHS = 100_000
MAX_BLOCKS = 1000  # building more takes minutes
# section -> its first field; a section ends before the first field of the next one
SECTION_STARTS = {"network": "arch", "data": "data", "optimization": "epochs", "run": "seed", "execution": "device"}


def parse_clip_grad(text: str) -> tuple[str, float] | None:
    """Return the kind, "value" or "norm", and the limit in `KIND:LIMIT`; None for `none`. Raises `ValueError`."""
    if text == "none":
        return None
    kind, _, limit_text = text.partition(":")
    try:
        limit = float(limit_text)
    except ValueError:
        limit = math.nan
    if kind not in ("value", "norm") or not 0 < limit < math.inf:
        raise ValueError("should be value:LIMIT, norm:LIMIT or none, such as value:0.1")
    return kind, limit


def parse_image_sizes(text: str) -> list[tuple[int, int | None]]:
    """Return the stages of progressive resizing: `24:3,28:2,32` -> [(24, 3), (28, 2), (32, None)].

    A stage is the image size in pixels and its number of epochs; the last one has no limit. Raises `ValueError`.
    """
    *early, last = text.split(",")
    try:
        pairs = [stage.split(":") for stage in early]
        stages = [*((int(size), int(epochs)) for size, epochs in pairs), (int(last), None)]
    except ValueError:
        stages = []
    if not stages or any(not (16 <= size <= 64 and (epochs is None or epochs > 0)) for size, epochs in stages):
        raise ValueError(
            "should be sizes from 16 to 64, each but the last with a whole number of epochs, such as 24:3,28:2,32"
        )
    return stages


def _parse_key_values(value: Any) -> Any:
    """Parse `["nesterov=true", "momentum=0.95"]`, the syntax of the command line; a table is returned unchanged."""
    items = [value] if isinstance(value, str) else value
    if not isinstance(items, list | tuple):
        return value
    arguments: dict[str, Any] = {}
    for item in items:
        key, separator, text = str(item).partition("=")
        if not separator or not key.strip():
            raise ValueError(f"{item!r} is not key=value")
        arguments[key.strip()] = text
        for parse in (ast.literal_eval, json.loads):  # such as None or (1, 2), and true; any other text is kept
            with contextlib.suppress(ValueError, SyntaxError):
                arguments[key.strip()] = parse(text)
    return arguments


def _check_key_values(arguments: dict[str, Any]) -> None:
    """Raise `ValueError` for a value that a recipe file or the document of a run cannot contain."""
    for key, value in arguments.items():
        values = value if isinstance(value, list | tuple) else [value]
        if not all(isinstance(item, str | int) or (isinstance(item, float) and math.isfinite(item)) for item in values):
            raise ValueError(
                f"should have numbers, text, true or false, or lists of these as values, not {key}={value}"
            )


def _validate_by(parse: Callable[[Any], object]) -> AfterValidator:
    """Return a validator that keeps the value and raises the `ValueError` of `parse`."""

    def validate(value: Any) -> Any:
        parse(value)
        return value

    return AfterValidator(validate)


def _check_num_blocks(blocks: tuple[int, ...]) -> None:
    if sum(blocks) > MAX_BLOCKS:
        raise ValueError(f"should be at most {MAX_BLOCKS} blocks in all stages together")


def _check_spelling(text: str, grammar: str, max_parts: int) -> None:
    """Raise `ValueError` if `text` is not a name with at most `max_parts` further parts separated by colons."""
    name, *parts = text.split(":")
    if not name.strip() or len(parts) > max_parts or not all(part.strip() for part in parts):
        raise ValueError(f"should be {grammar}")


def _check_resize(size: int | None) -> None:
    if size not in (None, 32):
        raise ValueError("should be 32, because the networks take images of 32x32 pixels")


def default_val_size(num_images: int) -> int:
    """Return the size of the validation split of `num_images` training images if `--val-size` is not given."""
    return min(DEFAULT_VAL_SIZE, max(num_images // 10, 1))


SplitText = BeforeValidator(lambda value: value.split(",") if isinstance(value, str) else value)  # "4,4,3"
PositiveIntegers = Annotated[tuple[Annotated[int, Field(gt=0, le=2**20)], ...], SplitText]
KeyValues = Annotated[dict[str, Any], BeforeValidator(_parse_key_values), _validate_by(_check_key_values)]
Blocks = Annotated[PositiveIntegers, _validate_by(_check_num_blocks)]
ImageSizeText = Annotated[str, _validate_by(parse_image_sizes)]
ResizeSize = Annotated[int | None, _validate_by(_check_resize)]
ClipGradText = Annotated[str, _validate_by(parse_clip_grad)]
ScheduleText = Annotated[str, _validate_by(lambda text: _check_spelling(text, "NAME or NAME:VALUE", 1))]
AugmentText = Annotated[
    str, _validate_by(lambda text: [_check_spelling(item, "NAME[:VALUE[:VARIANT]],...", 2) for item in text.split(",")])
]
FreezeText = Annotated[
    str, _validate_by(lambda text: [_check_spelling(item, "NAME,... or none", 0) for item in text.split(",")])
]


def _option(default: Any, description: str, shown_default: str | None = None, **bounds: Any) -> Any:
    """Return a field; `shown_default` stands for a default of None in the help texts."""
    extra: dict[str, Any] = {"shown_default": shown_default}
    return Field(default, description=description, json_schema_extra=extra, **bounds)


class Recipe(BaseModel, extra="forbid", frozen=True, allow_inf_nan=False):
    """The options of a training run. Raises `UsageError` for unknown options and invalid values.

    The defaults are row 3 of the results published by SEResNet68, with a validation split (see README).
    """

    # network
    arch: str = _option("se68", "network architecture; `fastcifar models` lists them")
    width: float | None = _option(None, "channel multiplier", gt=0, le=16)
    blocks: Blocks | None = _option(None, "number of blocks in each stage, such as 4,4,3")
    channels: PositiveIntegers | None = _option(None, "number of channels in each stage, such as 64,128,256")
    kernel: int | None = _option(None, "kernel size of the block convolutions, an odd number", ge=1, le=11)
    shortcut_kernel: int | None = _option(None, "kernel size of the projection shortcuts, an odd number", ge=1, le=11)
    conv: Literal["full", "separable"] | None = _option(None, "type of the block convolutions")
    se: Literal["none", "stem", "block"] | None = _option(None, "location of squeeze-and-excitation")
    se_reduction: int | None = _option(None, "reduction ratio of squeeze-and-excitation", ge=1, le=256)
    activation: Literal["relu", "leaky_relu", "silu", "gelu", "mish"] | None = _option(None, "activation function")
    dropout: float | None = _option(None, "dropout probability after every block and before the classifier", ge=0, lt=1)
    max_params: int = _option(5_000_000, "maximum number of trainable parameters", gt=0)

    # data
    data: str | None = _option(
        None,
        "data set: a folder, a .tar.gz file, class folders of images, an .npz file, or "
        "synthetic[:N] (N generated images)",
        "CIFAR, downloaded on first use",
    )
    dataset: Literal["cifar10", "cifar100", "cifar100-coarse"] = _option(
        "cifar10", "official data set: cifar10, cifar100 or cifar100-coarse (its 20 superclasses as labels)"
    )
    resize: ResizeSize = _option(
        None, "size to which the largest centered square of each of your own images is resized: 32"
    )
    val_size: int | None = _option(
        None, "size of the validation split; 0: none", "10 % of the training images, at most 5000", ge=0
    )
    val_seed: int = _option(0, "random seed of the validation split", ge=0, lt=2**63)
    normalize: str = _option(
        "auto",
        "input normalization: cifar10, cifar100, kuangliu (that of pytorch-cifar), MEAN:STD, or auto (for your own "
        "images, computed from them; for CIFAR, that of --dataset, or kuangliu for coconut_*)",
    )
    augment: AugmentText = _option(
        "crop:4:zero,flip,rotate:5,autoaugment:cifar10",
        "augmentations in order, NAME[:VALUE[:VARIANT]],... without spaces, or none",
    )
    drop_last: bool = _option(False, "drop the last batch of every epoch if it is smaller")
    image_size: ImageSizeText = _option("32", "training image size, or stages SIZE:EPOCHS,...,SIZE as in 24:3,28:2,32")
    hard_example_fraction: float = _option(
        1.0, "fraction of the images of each batch to train on, those with the largest losses; 1: all", gt=0, le=1
    )
    hard_example_size: int = _option(
        16, "image size of the forward pass that computes the losses for --hard-example-fraction", ge=16, le=64
    )

    # optimization
    epochs: int = _option(200, "number of epochs", gt=0, le=MAX_EPOCHS)
    batch_size: int = _option(128, "global batch size in images", gt=0)
    optimizer: str = _option(
        "lookahead:sgd",
        "optimizer: sgd, adam, adamw, rmsprop, ranger, muon, one of pytorch_optimizer, or lookahead:NAME",
    )
    optimizer_arg: KeyValues = _option({}, "argument of the optimizer, such as momentum=0.95; may be repeated")
    lr: float = _option(0.1, "peak learning rate", gt=0, le=100)
    bias_lr_mult: float = _option(1.0, "learning-rate multiplier of biases and normalization parameters", gt=0, le=1e5)
    head_lr_mult: float = _option(1.0, "learning-rate multiplier of the weight of the last linear layer", gt=0, le=1e5)
    weight_decay: float = _option(5e-4, "weight decay coefficient", ge=0, le=10)
    bias_decay: bool = _option(True, "apply weight decay to biases and normalization parameters")
    schedule: ScheduleText = _option(
        "cosine",
        "learning-rate schedule, NAME[:VALUE]: constant, cosine, linear, cosine_restarts, triangular, one_cycle, "
        "multi_step, exponential or plateau",
    )
    schedule_epochs: float | None = _option(None, "length of the schedule in epochs", "--epochs", gt=0)
    warmup_epochs: float = _option(0.0, "length in epochs of the linear warm-up at the beginning of the schedule", ge=0)
    min_lr: float = _option(0.0, "final learning rate of the schedule", ge=0)
    clip_grad: ClipGradText = _option("value:0.1", "gradient clipping: value:LIMIT, norm:LIMIT or none")
    label_smoothing: float = _option(0.0, "label smoothing factor", ge=0, lt=1)
    ema_decay: float = _option(0.0, "decay per step of the moving average (EMA) of the weights; 0: none", ge=0, lt=1)
    init: str = _option(
        "none",
        "initial weights: a run folder, a checkpoint, a .safetensors file, pretrained:NAME, or none (random weights)",
    )
    freeze: FreezeText = _option(
        "none", "layers and parameters that are not trained, NAME,... as in `fastcifar models`, with wildcards, or none"
    )
    whiten_bias_epochs: int | None = _option(
        None, "number of epochs in which the bias of a whitening layer is trained", "all", ge=0
    )
    freeze_stem_epochs: int = _option(
        0, "number of epochs at the end of the run in which the first layers of the network are not trained", ge=0
    )
    patience: int = _option(0, "epochs without a better validation accuracy before training stops; 0: no limit", ge=0)

    # run
    seed: int = _option(0, "random seed of the initial weights, the data order and the augmentation", ge=0, lt=2**63)
    time_budget: float | None = _option(None, "time limit of the run in minutes; --epochs is chosen to fit it", gt=0)
    max_steps: int | None = _option(None, "maximum number of training steps", gt=0)
    eval_weights: Literal["last", "best", "ema"] = _option(
        "last", "weights to evaluate: last (epoch), best (epoch by validation accuracy) or ema (moving average)"
    )
    tta: str = _option("none", "test-time augmentation: none, flip, 6view or 10crop")
    out: str | None = _option(None, "folder to create", "a new one in runs")
    save_every_epochs: int = _option(1, "checkpoint interval in epochs; 0 disables it", ge=0)
    save_every_steps: int | None = _option(None, "additional checkpoint interval in steps", gt=0)
    resume: str | None = _option(
        None,
        "run to resume: a run folder, a checkpoint file or auto (newest unfinished run of this recipe); "
        "with another --epochs the schedule is recomputed from the current step on",
    )
    track: str = _option("none", "experiment trackers, comma-separated: tensorboard, mlflow, wandb; or none")
    on_nan: Literal["stop", "rollback"] = _option(
        "stop", "action on a NaN or Inf loss: stop, or rollback to the last checkpoint with half the learning rate"
    )
    deterministic: bool = _option(False, "use only deterministic algorithms, for bit-identical results on CUDA; slower")

    # execution
    device: Literal["auto", "cuda", "cpu"] = _option("auto", "device to run on")
    loader: str = _option("auto", "data loader: auto, dali, tensor or torchvision")
    workers: int = _option(2, "number of worker processes of --loader torchvision", ge=0, le=256)
    precision: Literal["auto", "bf16", "fp16", "tf32", "fp32"] = _option(
        "auto", "precision: auto, bf16, fp16, fp32, or tf32 (float32 with TF32 matrix products and convolutions)"
    )
    compile: bool | None = _option(None, "compile with torch.compile", "if a compiler is installed")
    compile_mode: Literal["auto", "default", "max-autotune-no-cudagraphs"] = _option("auto", "mode of torch.compile")
    cuda_graph: bool | None = _option(None, "capture the step in a CUDA graph", "on CUDA")
    winograd: bool | None = _option(
        None, "use Winograd's algorithm for 3x3 convolutions", "in compiled float32 networks on a CPU"
    )
    fused_ops: bool = _option(False, "use fused Triton kernels for BatchNorm, SE, shortcut and ReLU (CUDA only)")

    def __init__(self, **options: Any) -> None:
        for name in options:
            if name not in type(self).model_fields:
                remedy = renaming_remedy(name, format_name=str) or suggest_name(name, type(self).model_fields)
                raise UsageError(f"unknown recipe key {name!r}", remedy)
            if isinstance(options[name], str) and not options[name].isascii():
                try:
                    options[name].encode()
                except UnicodeEncodeError:  # TOML and JSON cannot contain it
                    problem = f"{option_flag(name)} {options[name]} is not UTF-8"
                    raise UsageError(problem, "use a name in UTF-8") from None
        try:
            super().__init__(**options)
        except ValidationError as error:
            raise _usage_error(error) from None

    @model_validator(mode="after")
    def _check_consistency(self) -> Self:
        if self.val_size == 0 and self.eval_weights == "best":
            raise ValueError("--eval-weights best needs a validation split; set --val-size")
        if self.val_size == 0 and self.patience:
            raise ValueError("--patience needs a validation split; set --val-size")
        if self.ema_decay == 0 and self.eval_weights == "ema":
            raise ValueError("--eval-weights ema needs a moving average of the weights; set --ema-decay, such as 0.999")
        if self.epochs <= (early := sum(epochs or 0 for _, epochs in parse_image_sizes(self.image_size))):
            problem = f"--image-size {self.image_size}: the stages before the last take {early} epochs"
            raise ValueError(f"{problem}; set --epochs to more than {early}")
        if self.freeze_stem_epochs >= self.epochs:
            problem = f"--freeze-stem-epochs {self.freeze_stem_epochs} is not less than --epochs {self.epochs}"
            raise ValueError(f"{problem}; use --freeze for layers that are never trained")
        return self

    @classmethod
    def make(cls, source: str | None = None, **overrides: Any) -> Self:
        """Return the recipe `source` (a shipped recipe or a TOML file) with the `overrides` that are not None.

        If they change the number of epochs of `source`, `scale_to_epochs` is applied before the other overrides.
        """
        overrides = {name: value for name, value in overrides.items() if value is not None}
        values = load_recipe_values(source) if source else {}
        return cls(**{**values, **cls._scaled_options(values, overrides), **overrides})

    @classmethod
    def describe_scaling(cls, source: str | None, **overrides: Any) -> str:
        """Return a sentence about the options that `make` scales to another number of epochs; "" if there are none."""
        values = load_recipe_values(source) if source else {}
        original = {**cls().model_dump(), **values}
        changes = [
            f"{option_flag(name)} {format_option_value(value)} instead of {format_option_value(original[name])}"
            for name, value in cls._scaled_options(values, overrides).items()
        ]
        prefix = f"recipe {source}, scaled from {original['epochs']} epochs to {overrides.get('epochs')}: "
        return prefix + ", ".join(changes) if changes else ""

    @classmethod
    def _scaled_options(cls, values: dict[str, Any], overrides: dict[str, Any]) -> dict[str, Any]:
        """Return the options of a recipe file with `values` that change with the number of epochs in `overrides`.

        No option is scaled if the `schedule_epochs` of the file differs from its `epochs`: then the length of the run
        is deliberately not that of its schedule.
        """
        if not values or overrides.get("epochs") is None or overrides.get("resume") not in (None, "auto"):
            return {}
        original = cls(**values)
        if original.schedule_epochs not in (None, original.epochs):
            return {}
        options = original.scale_to_epochs(cls(epochs=overrides["epochs"]).epochs).model_dump().items()
        return {
            name: value for name, value in options if overrides.get(name) is None and value != getattr(original, name)
        }

    def scale_to_epochs(self, epochs: int) -> Self:
        """Return the recipe for another number of epochs, with the same proportions of all options in epochs.

        The epochs of each image size are rounded down, so that no epoch of the last size is lost, and so are those
        without training of the stem. Those in which the bias of a whitening layer is trained are rounded up.
        """
        factor = Fraction(epochs, self.epochs)
        stages = [(size, count and math.floor(count * factor)) for size, count in parse_image_sizes(self.image_size)]
        changes = {
            "epochs": epochs,
            "warmup_epochs": round(self.warmup_epochs * float(factor), 6),
            "schedule_epochs": self.schedule_epochs and self.schedule_epochs * float(factor),
            "image_size": ",".join(f"{size}:{count}" if count else f"{size}" for size, count in stages if count != 0),
            "whiten_bias_epochs": self.whiten_bias_epochs and math.ceil(self.whiten_bias_epochs * factor),
            "freeze_stem_epochs": math.floor(self.freeze_stem_epochs * factor),
        }
        return self.model_copy(update=changes)

    @classmethod
    def check_options(cls, options: dict[str, Any]) -> None:
        """Raise `UsageError` if a value is invalid by itself; whether values fit together is not checked."""
        for name, value in options.items():
            field = cls.model_fields[name]
            try:
                TypeAdapter(Annotated[field.annotation, field]).validate_python(value)  # pyright: ignore[reportArgumentType, reportInvalidTypeForm]
            except ValidationError as error:
                raise _usage_error(error, name) from None

    def non_default_options(self) -> dict[str, Any]:
        """Return the options that differ from their defaults, as plain values for TOML, JSON and tables."""
        return self.model_dump(mode="json", exclude_defaults=True)

    def to_toml(self) -> str:
        """Return the recipe as a TOML document that `make` reads: every option that is not None."""
        options = self.model_dump(mode="json").items()
        return "".join(f"{name} = {format_toml_value(value)}\n" for name, value in options if value is not None)


def section_fields(name: str) -> tuple[str, ...]:
    """Return the names of the fields of a section of the recipe, in order."""
    fields = list(Recipe.model_fields)
    starts = [*map(fields.index, SECTION_STARTS.values()), len(fields)]
    section = list(SECTION_STARTS).index(name)
    return tuple(fields[starts[section] : starts[section + 1]])


def _usage_error(error: ValidationError, option: str = "") -> UsageError:
    """Return the error for the user: `--lr should be greater than 0 (got -1)`, naming `option` if it is given."""
    messages = []
    for problem in error.errors():
        message = problem["msg"].removeprefix("Value error, ").removeprefix("Input ")
        name = option or next(map(str, problem["loc"]), "")
        messages.append(f"{option_flag(name)} {message} (got {problem['input']!r})" if name else message)
    return UsageError("; ".join(messages))
