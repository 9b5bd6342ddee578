"""`Recipe`: every knob of a run in one flat, frozen, validated model.

It is the command line (options are generated from the fields), the file format (`recipes/*.toml` list only what
differs from the defaults), the checkpoint header, the sweep axis and the column in tables: one knob, one name.
Names of tables (architectures, optimizers, ...) are looked up by the rooms that own them. No torch here.
"""

from __future__ import annotations

import ast
import json
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from fastcifar.errors import UsageError, suggest_name
from fastcifar.files import load_toml
from fastcifar.format import format_toml_value, option_flag
from fastcifar.renamed import renaming_remedy, upgrade_options


def _split_integers(value: Any) -> Any:
    """`"4,4,3"` as the command line spells it, `[4, 4, 3]` as a file does."""
    return [part.strip() for part in value.split(",")] if isinstance(value, str) else value


def _parse_key_values(value: Any) -> Any:
    """`["nesterov=true", "momentum=0.95"]` as the command line spells it, a table as a file does."""
    if isinstance(value, str):
        value = [value]
    if not isinstance(value, list | tuple):
        return value
    arguments = {}
    for item in value:
        key, separator, text = str(item).partition("=")
        if not separator or not key.strip():
            raise ValueError(f"{item!r} is not key=value")
        arguments[key.strip()] = _parse_literal(text)
    return arguments


def _parse_literal(text: str) -> Any:
    """`0.9`, `true`, `[0.9, 0.99]` or `None` as values, anything else as the text itself."""
    for read in (json.loads, ast.literal_eval):
        try:
            return read(text)
        except (ValueError, SyntaxError):
            continue
    return text


def _check_image_sizes(value: str) -> str:
    parse_image_sizes(value)
    return value


PositiveIntegers = Annotated[tuple[Annotated[int, Field(gt=0)], ...], BeforeValidator(_split_integers)]
KeyValues = Annotated[dict[str, Any], BeforeValidator(_parse_key_values)]
ImageSizeSpec = Annotated[str, AfterValidator(_check_image_sizes)]


class Recipe(BaseModel):
    """A run's knobs. The defaults are the published row 3, evaluated honestly (see README).

    Errors: `UsageError` through `make`; pydantic's `ValidationError` when constructed directly.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    # network
    arch: str = Field(default="se68", description="network architecture; `fastcifar models` lists them")
    width: float | None = Field(default=None, gt=0, le=16, description="channel multiplier")
    blocks: PositiveIntegers | None = Field(default=None, description="number of blocks in each stage, such as 4,4,3")
    channels: PositiveIntegers | None = Field(
        default=None, description="number of channels in each stage, such as 64,128,256"
    )
    kernel: int | None = Field(default=None, ge=1, le=11, description="kernel size of the block convolutions, odd")
    shortcut_kernel: int | None = Field(
        default=None, ge=1, le=11, description="kernel size of the projection shortcuts, odd"
    )
    conv: Literal["full", "separable"] | None = Field(default=None, description="type of the block convolutions")
    se: Literal["none", "stem", "block"] | None = Field(default=None, description="location of squeeze-and-excitation")
    se_reduction: int | None = Field(
        default=None, ge=1, le=256, description="reduction ratio of squeeze-and-excitation"
    )
    activation: Literal["relu", "leaky_relu", "silu", "gelu", "mish"] | None = Field(
        default=None, description="activation function"
    )
    dropout: float | None = Field(
        default=None, ge=0, lt=1, description="dropout probability after every block and before the classifier"
    )
    max_params: int = Field(default=5_000_000, gt=0, description="maximum number of trainable parameters")

    # data
    data: str | None = Field(
        default=None, description="path of the data set (folder, .tar.gz, class folders) or synthetic[:N]"
    )
    dataset: Literal["cifar10", "cifar100"] = Field(default="cifar10", description="name of the data set")
    val_size: int = Field(
        default=5000, ge=0, description="size of the validation split in images; 0 trains on all images"
    )
    val_seed: int = Field(default=0, ge=0, lt=2**63, description="random seed of the validation split")
    normalize: str = Field(
        default="auto",
        description="input normalization: cifar10, cifar100, kuangliu, MEAN:STD, or auto (that of the data set; "
        "kuangliu for coconut_*)",
    )
    augment: str = Field(
        default="crop:4:zero,flip,rotate:5,autoaugment:cifar10",
        description="augmentations in order, NAME[:VALUE[:VARIANT]],..., or none",
    )
    drop_last: bool = Field(default=False, description="removal of the last, smaller batch of every epoch")
    image_size: ImageSizeSpec = Field(
        default="32",
        description="training image size in pixels; SIZE:EPOCHS,...,SIZE for progressive resizing, such as 24:3,28:2,32",
    )

    # optimization
    epochs: int = Field(default=200, gt=0, le=100_000, description="number of epochs")
    batch_size: int = Field(default=128, gt=0, description="global batch size in images")
    optimizer: str = Field(
        default="lookahead:sgd", description="optimizer (built in or of pytorch_optimizer), or lookahead:OPTIMIZER"
    )
    optimizer_arg: KeyValues = Field(default_factory=dict, description="optimizer argument; may be repeated")
    lr: float = Field(default=0.1, gt=0, le=100, description="peak learning rate")
    bias_lr_mult: float = Field(
        default=1.0, gt=0, le=1e5, description="learning-rate multiplier of biases and normalization parameters"
    )
    head_lr_mult: float = Field(
        default=1.0, gt=0, le=1e5, description="learning-rate multiplier of the classifier weight"
    )
    weight_decay: float = Field(default=5e-4, ge=0, le=10, description="weight decay coefficient")
    bias_decay: bool = Field(default=True, description="weight decay of biases and normalization parameters")
    schedule: str = Field(default="cosine", description="learning-rate schedule, NAME[:VALUE]")
    schedule_epochs: float | None = Field(
        default=None, gt=0, description="length of the schedule in epochs, by default --epochs"
    )
    warmup_epochs: float = Field(
        default=0.0, ge=0, description="length of the linear warm-up in epochs, part of the schedule"
    )
    min_lr: float = Field(default=0.0, ge=0, description="final learning rate of the schedule")
    clip_grad: str = Field(default="value:0.1", description="gradient clipping: value:LIMIT, norm:LIMIT or none")
    label_smoothing: float = Field(default=0.0, ge=0, lt=1, description="label smoothing factor")
    ema_decay: float = Field(
        default=0.0, ge=0, lt=1, description="decay per step of the moving average of the weights; 0 disables it"
    )
    patience: int = Field(
        default=0, ge=0, description="early-stopping patience in epochs without a better val_acc; 0 disables it"
    )

    # run
    seed: int = Field(default=0, ge=0, lt=2**63, description="random seed of weights, data order and augmentation")
    time_budget: float | None = Field(
        default=None, gt=0, description="time limit of the run in minutes, from which --epochs is computed"
    )
    max_steps: int | None = Field(default=None, gt=0, description="maximum number of training steps")
    eval_weights: Literal["last", "best", "ema"] = Field(
        default="last", description="which weights are evaluated on the test set"
    )
    tta: str = Field(default="none", description="test-time augmentation: none, flip, 6view or 10crop")
    out: str | None = Field(default=None, description="run folder, by default runs/<name>")
    save_every_epochs: int = Field(default=1, ge=0, description="checkpoint interval in epochs; 0 disables it")
    save_every_steps: int | None = Field(
        default=None, gt=0, description="checkpoint interval in steps, in addition to --save-every-epochs"
    )
    resume: str | None = Field(
        default=None,
        description="run to resume: a run folder, a checkpoint, or auto (the newest unfinished run of this recipe); "
        "with a larger --epochs the schedule is recomputed from the current step on",
    )
    track: str = Field(default="none", description="experiment trackers: tensorboard, mlflow, both (a,b) or none")
    on_nan: Literal["stop", "rollback"] = Field(
        default="stop",
        description="action on NaN or Inf: stop, or rollback to the last checkpoint with half the learning rate",
    )
    deterministic: bool = Field(
        default=False, description="deterministic algorithms only; slower, bit-identical results on CUDA"
    )

    # execution
    device: Literal["auto", "cuda", "cpu"] = Field(default="auto", description="training device")
    loader: str = Field(default="auto", description="data loader: auto, dali, tensor or torchvision")
    workers: int = Field(default=2, ge=0, le=256, description="worker processes of --loader torchvision")
    precision: Literal["auto", "bf16", "fp16", "fp32"] = Field(default="auto", description="compute precision")
    compile: bool | None = Field(default=None, description="torch.compile, by default wherever a compiler is found")
    compile_mode: Literal["auto", "default", "max-autotune-no-cudagraphs"] = Field(
        default="auto", description="mode of torch.compile"
    )
    cuda_graph: bool | None = Field(
        default=None, description="training step captured in a CUDA graph, by default on CUDA"
    )
    fused_ops: bool = Field(
        default=False, description="Triton kernels that fuse BatchNorm, SE, shortcut and ReLU (CUDA)"
    )

    @model_validator(mode="after")
    def _check_consistency(self) -> Recipe:
        if self.val_size == 0 and self.eval_weights == "best":
            raise ValueError("--eval-weights best needs a validation split; set --val-size")
        if self.val_size == 0 and self.patience:
            raise ValueError("--patience needs a validation split; set --val-size")
        if self.ema_decay == 0 and self.eval_weights == "ema":
            raise ValueError("--eval-weights ema needs a moving average of the weights; set --ema-decay, such as 0.999")
        if (before := sum(epochs or 0 for _, epochs in parse_image_sizes(self.image_size))) >= self.epochs:
            raise ValueError(
                f"--image-size {self.image_size} needs more than {before} --epochs, which its first stages take"
            )
        return self

    def image_size_at(self, epoch: int) -> int:
        """Pixels a side of the training images of `epoch`, from 0."""
        sizes, left = parse_image_sizes(self.image_size), epoch
        while sizes[0][1] is not None and left >= sizes[0][1]:
            left -= sizes.pop(0)[1] or 0
        return sizes[0][0]

    @classmethod
    def make(cls, source: str | None = None, **overrides: Any) -> Recipe:
        """The recipe called `source` (a shipped name or a TOML file) with `overrides` that are not None.

        Errors: `UsageError` that names the option, and the nearest name for an unknown key.
        """
        values = load_recipe_values(source) if source else {}
        values.update({name: value for name, value in overrides.items() if value is not None})
        return cls.from_dict(values)

    @classmethod
    def from_saved(cls, values: dict[str, Any]) -> Recipe:
        """The recipe of a run that an earlier version may have saved: renamed options are translated, unknown ones ignored.

        Raises `UsageError`.
        """
        values = upgrade_options(values)
        return cls.from_dict({name: value for name, value in values.items() if name in cls.model_fields})

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Recipe:
        """`values` validated; every error one line. Errors: `UsageError`."""
        for key in values:
            if key not in cls.model_fields:
                remedy = renaming_remedy(key) or suggest_name(key, cls.model_fields)
                raise UsageError(f"unknown recipe key {key!r}", remedy)
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise UsageError("; ".join(_format_validation_error(problem) for problem in error.errors())) from None

    def non_default_options(self) -> dict[str, Any]:
        """The knobs that are not at their defaults, as plain values for TOML, JSON and tables."""
        return {name: value for name, value in self.model_dump(mode="json").items() if value != _DEFAULTS[name]}

    def to_toml(self) -> str:
        """The recipe as a file that `make` reads back: every knob that is set, by name."""
        return "".join(f"{name} = {format_toml_value(value)}\n" for name, value in self.model_dump(mode="json").items()
                       if value is not None)  # fmt: skip


def parse_image_sizes(text: str) -> list[tuple[int, int | None]]:
    """`24:3,28:2,32` as [(24, 3), (28, 2), (32, None)]: pixels a side for so many epochs, the last for all the rest.

    Errors: `ValueError`.
    """
    *before, last = text.split(",")
    try:
        stages = [part.split(":") for part in before]
        sizes = [*((int(size), int(epochs)) for size, epochs in stages), (int(last), None)]
    except ValueError:
        sizes = []
    if not sizes or any(not (16 <= size <= 64 and (epochs is None or epochs > 0)) for size, epochs in sizes):
        raise ValueError("should be sizes from 16 to 64, each but the last with its whole epochs, such as 24:3,28:2,32")
    return sizes


# options of where a run is stored and tracked; they do not change what is trained
OUTPUT_OPTIONS = ("out", "resume", "save_every_epochs", "save_every_steps", "track")

# section -> its first field; a section goes on to the next one's first
SECTION_FIRST_FIELDS = {
    "network": "arch",
    "data": "data",
    "optimization": "epochs",
    "run": "seed",
    "execution": "device",
}

_DEFAULTS = Recipe().model_dump(mode="json")


def section_fields(name: str) -> tuple[str, ...]:
    """The fields of a section of the recipe, in order."""
    fields, starts = list(Recipe.model_fields), [*SECTION_FIRST_FIELDS.values()]
    first = starts.index(SECTION_FIRST_FIELDS[name])
    end = fields.index(starts[first + 1]) if first + 1 < len(starts) else len(fields)
    return tuple(fields[fields.index(starts[first]) : end])


def shipped_recipes() -> dict[str, Path]:
    """The recipes that come with the package: name -> TOML file."""
    folder = Path(str(resources.files("fastcifar"))) / "recipes"
    return {path.stem: path for path in sorted(folder.glob("*.toml"))}


def load_recipe_values(source: str) -> dict[str, Any]:
    """The knobs of a shipped recipe, by name, or of a TOML file. Errors: `UsageError`."""
    path = shipped_recipes().get(source) or Path(source)
    if not path.is_file():
        raise UsageError(
            f"no recipe {source!r}", f"{suggest_name(source, list(shipped_recipes()))} or give a TOML file"
        )
    return load_toml(path)


def load_saved_recipe(folder: Path) -> dict[str, Any]:
    """The options in a run folder's recipe.toml, with today's names. Raises `UsageError`."""
    return upgrade_options(load_toml(folder / "recipe.toml"))


def _format_validation_error(problem: Any) -> str:
    """One of pydantic's errors as `--lr: Input should be greater than 0 (got -1)`."""
    message = str(problem["msg"]).removeprefix("Value error, ").removeprefix("Input ")
    if not problem["loc"]:
        return message
    name = option_flag(str(problem["loc"][0]))
    return f"{name} {message} (got {problem['input']!r})"
