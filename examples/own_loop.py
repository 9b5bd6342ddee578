"""Training loops of your own: with the `Trainer` of a recipe, or in plain PyTorch with the batches of fastcifar."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from fastcifar import Recipe, Trainer, batches


def main(**options: Any) -> None:
    """Train with the step, the schedule and the validation of a recipe. `options`: fields of `Recipe`."""
    recipe = Recipe.make("quick", **options)
    trainer = Trainer.from_recipe(recipe)  # takes model=, data=, transform= and batch_transform= as `train` does
    trainer.optimize()  # compile the training step, and capture it in a CUDA graph on a GPU
    for epoch in range(recipe.epochs):
        for batch in trainer.batches(epoch):
            trainer.train_step(batch)
        row = trainer.end_epoch()  # validates
        print(f"epoch {epoch + 1}: loss {row['train_loss']:.4f}, validation accuracy {row['val_acc']}")
        trainer.save("own_loop.pt")  # `trainer.load` continues from it, and `load_run` evaluates it
    scores = trainer.test().scores
    print("test accuracy", scores and scores.accuracy)


def plain_pytorch(data: str = "synthetic:1000", epochs: int = 2) -> nn.Module:
    """Train in plain PyTorch; only the augmented batches are those of fastcifar."""
    network = nn.Sequential(nn.Conv2d(3, 32, 4, 4), nn.ReLU(), nn.Flatten(), nn.Linear(32 * 64, 10))
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9)
    # images uint8 [b, 3, 32, 32], labels int64 [b]
    for images, labels in batches(data, batch_size=50, augment="crop:4:reflect,flip", epochs=epochs):
        loss = F.cross_entropy(network(images.float() / 127.5 - 1), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return network


if __name__ == "__main__":
    main()
