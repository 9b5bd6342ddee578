"""The recipe options of the commands, and the defaults in their help texts that differ from those of `Recipe`."""

from fastcifar.recipe import Recipe, section_fields

DATA_FIELDS = ("data", "dataset", "resize")
MODEL_FIELDS = ("eval_weights", "data", "resize", "normalize", "max_params")
EVALUATION_FIELDS = (*MODEL_FIELDS, "tta", "device", "precision", "compile", "cuda_graph")
BENCH_FIELDS = (
    *section_fields("network"), *DATA_FIELDS, "augment", "batch_size", "freeze", *section_fields("execution"),
)  # fmt: skip
SWEEP_FIELDS = [name for name in Recipe.model_fields if name not in ("seed", "out", "resume")]
# a speedrun starts from random weights, trains for all epochs and writes no checkpoints
NOT_IN_SPEEDRUN = (
    "init", "patience", "time_budget", "max_steps", "resume",
    "save_every_epochs", "save_every_steps", "track", "on_nan",
)  # fmt: skip
SPEEDRUN_FIELDS = [name for name in Recipe.model_fields if name not in NOT_IN_SPEEDRUN]

FIELDS_WITH_VALUES = [name for name, field in Recipe.model_fields.items() if field.default is not None]
OF_THE_RUN: dict[str, str] = dict.fromkeys((*MODEL_FIELDS, "device", "precision"), "that of the run")
EVALUATION_DEFAULTS = OF_THE_RUN | {
    "compile": "for 100,000 images or more, counting each view of --tta",
    "cuda_graph": "on CUDA, for 500 images or more",
}
BENCH_DEFAULTS = {"data": "CIFAR if it is on this machine, otherwise synthetic images"}
SWEEP_DEFAULTS = dict.fromkeys(FIELDS_WITH_VALUES, "")  # those of the sweep file
SPEEDRUN_DEFAULTS = dict.fromkeys(FIELDS_WITH_VALUES, "") | {  # the others are those of the recipe
    "seed": "0",
    "out": "a new one in speedruns",
    "tta": "6view",
    "val_size": "0 with --eval-split test",
}
