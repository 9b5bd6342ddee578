"""The cases that run with the stub CUDA runtime, and the recorded numbers of launches."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from fastcifar.data.mixers import MIXERS
from fastcifar.training.optimizers import OPTIMIZERS

# 69 training images: two full batches and one of 5 images in each epoch; a validation split of one batch.
RECIPE: dict[str, Any] = {
    "arch": "resnet",
    "blocks": (1, 1),
    "channels": (8, 16),
    "se": "block",
    "data": "synthetic:100",
    "val_size": 31,
    "epochs": 2,
    "batch_size": 32,
    "augment": "crop:4:zero,flip",
    "optimizer": "sgd",
    "device": "cuda",
    "loader": "tensor",
    "precision": "bf16",
    "compile": False,
}

# Kernels, copies and memsets that are launched outside a CUDA graph: the largest allowed number each time that this
# part of the training loop runs. The parts of an epoch that are not listed launch nothing.
LAUNCHES = {
    # The upload of an epoch (1), and gathering, cropping and flipping its two chunks (43 each), not compiled
    "first batch": 87,
    "next batch": 0,
    "learning rate": 1,  # one fill of its tensor
    "step": 2,  # copies of images and labels to the inputs of the CUDA graph
    "Lookahead": 0,  # an update of the slow weights
    "metrics": 1,  # copy of the sums to the host, without waiting
    "checkpoint": 5,  # copies of the state: a kernel for each type of numbers, and a copy to the host
    "evaluation": 9,  # a batch of images and labels, padding, and the logits
}
LOOKAHEAD = {"Lookahead": 7}
TWO_EVALUATIONS = {"evaluation": 30}  # each after or before a copy of the averaged weights to the model and back
FLIP_AND_MIXER = {"first batch": 37, "step": 3}  # the parameters of the mixer are one more input


@dataclass(frozen=True)
class Case:
    """Options of a recipe, and what is expected of its run.

    scenario                   a name in SCENARIOS of stub_child.py
    launches                   differences from LAUNCHES
    steps, epochs              number of training steps and of (partial) epochs
    lookahead_updates          number of updates of Lookahead's slow weights
    metrics_reads              number of times that the host reads the metrics within epochs
    evaluations                number of captured evaluations of the validation split
    saves                      number of checkpoints that are saved within epochs
    synchronizations_per_step  1 for an optimizer whose update is not captured and reads on the host whether to skip it
    """

    options: dict[str, Any] = field(default_factory=dict)
    scenario: str = "steps"
    launches: dict[str, int] = field(default_factory=dict)
    steps: int = 6
    epochs: int = 2
    lookahead_updates: int = 0
    metrics_reads: int = 6
    evaluations: int = 1
    saves: int = 0
    synchronizations_per_step: int = 0

    def max_launches(self) -> dict[str, int]:
        """The largest allowed number of launches of each part over the whole run."""
        times = {
            "first batch": self.epochs,
            "next batch": self.steps - self.epochs,
            "learning rate": self.steps,
            "step": self.steps,
            "Lookahead": self.lookahead_updates,
            "metrics": self.metrics_reads,
            "evaluation": self.evaluations,
            "checkpoint": self.saves,
        }
        launches = {**LAUNCHES, **self.launches}
        return {cause: launches[cause] * number for cause, number in times.items()}


def _optimizer_case(name: str) -> Case:
    lookahead = name.startswith("lookahead:") or bool(OPTIMIZERS[name].lookahead)
    return Case({"optimizer": name}, launches=LOOKAHEAD, lookahead_updates=int(lookahead))


CASES: dict[str, Case] = {
    **{name: _optimizer_case(name) for name in ("lookahead:sgd", *OPTIMIZERS)},
    **{name: Case({"augment": f"flip,{name}"}, launches=FLIP_AND_MIXER) for name in MIXERS},
    # The update of an optimizer of pytorch_optimizer is not captured: each of its kernels is launched separately.
    "lion": Case({"optimizer": "lion"}, launches={"step": 15}, synchronizations_per_step=1),
    "lion, average, image sizes": Case(
        {"optimizer": "lookahead:lion", "ema_decay": 0.9, "image_size": "24:1,32"},
        launches={**TWO_EVALUATIONS, **LOOKAHEAD, "step": 25},
        lookahead_updates=1,
        evaluations=2,
        synchronizations_per_step=1,
    ),
    "fp32": Case({"precision": "fp32"}),
    "tf32": Case({"precision": "tf32"}),
    "fp16": Case({"precision": "fp16"}),
    "fp16, adamw, average": Case(
        {"precision": "fp16", "optimizer": "adamw", "ema_decay": 0.9}, launches=TWO_EVALUATIONS, evaluations=2
    ),
    "fp16, rmsprop": Case({"precision": "fp16", "optimizer": "rmsprop"}),
    "fp16, ranger": Case({"precision": "fp16", "optimizer": "ranger"}, launches=LOOKAHEAD, lookahead_updates=1),
    "fp16, muon": Case({"precision": "fp16", "optimizer": "muon"}),
    "average": Case({"ema_decay": 0.9}, launches=TWO_EVALUATIONS, evaluations=2),
    "frozen layers": Case({"freeze": "conv1,bn1", "ema_decay": 0.9}, launches=TWO_EVALUATIONS, evaluations=2),
    "stem not trained in the last epoch": Case({"freeze_stem_epochs": 1}),
    # A replay sets the seed and the offset of the random numbers.
    "dropout": Case({"dropout": 0.3}, launches={"step": 4}),
    "clip by norm": Case({"clip_grad": "norm:1"}),
    "no clipping": Case({"clip_grad": "none"}),
    "label smoothing": Case({"label_smoothing": 0.1}),
    # A learning-rate tensor for each multiplier
    "multipliers": Case({"bias_lr_mult": 2.0, "head_lr_mult": 3.0}, launches={"learning rate": 3}),
    "image sizes": Case({"image_size": "24:1,32"}),
    "hard examples": Case({"hard_example_fraction": 0.5}),
    # Images are augmented on the CPU; a batch is a copy from pinned memory and a change of the memory format.
    "torchvision": Case({"loader": "torchvision", "workers": 0}, launches={"first batch": 3, "next batch": 2}),
    # Random numbers, and their exclusive or with the images; the seed of the generator is that of each batch.
    "transform of batches": Case(
        {"augment": "flip,batch_transform:add_noise"}, "noise", launches={"first batch": 39, "next batch": 2}
    ),
    # One compiled kernel gathers and augments a chunk; its result is copied.
    "compiled": Case({"compile": True, "se": "none"}, launches={"first batch": 5}),
    # torch fills new memory first, so that a read of it would be noticed.
    "deterministic": Case({"deterministic": True}, launches={"first batch": 149, "evaluation": 13}),
    "resume": Case(
        {"optimizer": "lookahead:sgd", "ema_decay": 0.9, "tta": "6view"},
        "resume",
        launches=LOOKAHEAD,
        epochs=3,
        lookahead_updates=1,
        metrics_reads=0,
        evaluations=0,
    ),
    "checkpoints": Case(
        {"precision": "fp16", "ema_decay": 0.9, "save_every_steps": 1},
        "checkpoints",
        metrics_reads=0,
        evaluations=0,
        saves=6,
    ),
    # The options of recipe speed94, which has another kind of network and a learning rate of its own for the last layer
    "two seeds": Case(
        {
            "arch": "speed94",
            "se": "none",
            "optimizer": "muon",
            "optimizer_arg": {"momentum": 0.6, "ns_steps": 3, "weight_norm": True, "rest_lr": 312.0},
            "head_lr_mult": 12.64,
            "augment": "crop:2:reflect,flip:0.5:alternating",
            "image_size": "24:1,32",
            "clip_grad": "none",
            "tta": "6view",
        },
        "speedrun",
        launches={"first batch": 99, "learning rate": 2},
        steps=12,
        epochs=4,
        metrics_reads=0,
        evaluations=0,
    ),
}


def fault_case(options: dict[str, Any]) -> Case:
    """The case of a planted fault: a whole run if it saves checkpoints within epochs; no fallback, by default."""
    options = {"cuda_graph": True, **options}
    return Case(options, "checkpoints", evaluations=0, saves=6) if options.get("save_every_steps") else Case(options)


def find_problems(result: dict[str, Any], case: Case) -> list[str]:
    """What contradicts `case` in the result of its run; empty if everything is as expected."""
    if result["error"]:
        return [f"error: {result['error']}", *_describe_events(result, ("violation",))]
    problems = _describe_events(result, ("violation", "pageable copy"))
    expected = "tf32" if case.options.get("precision") == "tf32" else "ieee"
    problems += [f"{name} is {value}" for name, value in result["float32_precision"].items() if value != expected]
    for memory in result["graph_memory"]:
        if memory["pools"] > 1:
            problems.append(f"{memory['pools']} memory pools of CUDA graphs instead of one")
        if memory["live_bytes"]:
            problems.append(f"{memory['live_bytes']} bytes of tensors that other graphs may overwrite")
    if (result["steps"], result["epochs"]) != (case.steps, case.epochs):
        problems.append(f"{result['steps']} steps in {result['epochs']} epochs")
    if _total(result, "step", "replay") != case.steps:
        problems.append(f"{_total(result, 'step', 'replay')} replays in {case.steps} steps")
    num_evaluation_replays = _total(result, "evaluation", "replay")
    if num_evaluation_replays < case.evaluations:
        problems.append(f"{num_evaluation_replays} replays in the evaluation")
    if (reads := _total(result, "evaluation", "synchronization")) > case.evaluations:
        problems.append(f"{reads} synchronizations in the evaluation, more than one for each result")
    synchronizations = _describe_events(result, ("synchronization",))
    if len(synchronizations) > case.steps * case.synchronizations_per_step:
        problems += synchronizations
    limits = case.max_launches()
    for cause in result["counts"].keys() - {"outside"}:
        launches = _total(result, cause, "launch")
        if launches > limits.get(cause, 0):
            problems.append(f"{launches} launches in {cause!r}, more than {limits.get(cause, 0)}")
    return problems


def _total(result: dict[str, Any], cause: str, kind: str) -> int:
    return sum(result["counts"].get(cause, {}).get(kind, {}).values())


def _describe_events(result: dict[str, Any], kinds: tuple[str, ...]) -> list[str]:
    """The events of `kinds` with their places; reading the results of an evaluation is allowed."""
    return [
        f"{event['kind']}: {event['name']} ({event['cause']}) at {event['place']}"
        for event in result["events"]
        if event["kind"] in kinds and (event["kind"] == "violation" or event["cause"] != "evaluation")
    ]
