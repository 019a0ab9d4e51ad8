"""A model learns from batches that its workers wrote into shared slots."""

import torch
from torch.utils.data import Dataset

import memdesc as md
from memdesc.interop.torch import SharedDataLoader, tensor

SIDE = 32


class Stripes(Dataset):
    """Images with stripes: upright ones (1), or lying ones (0)."""

    def __len__(self):
        return 512

    def __getitem__(self, index):
        upright = index % 2
        wave = torch.sin(torch.arange(SIDE) * 0.7 + index)
        image = wave.expand(SIDE, SIDE) if upright else wave.expand(SIDE, SIDE).T
        return image, float(upright)


def main():
    """In the training process."""
    torch.manual_seed(1)
    # The weights lie in a descriptor: whoever it is shared with sees them learn, read-only.
    memory = md.BufferMemoryDescriptor(2 * 4, name="weights")
    weights = tensor(memory, 2, torch.float32).requires_grad_()
    optimizer = torch.optim.SGD([weights], lr=1.0)
    loader = SharedDataLoader(Stripes(), batch_size=32, shuffle=True, num_workers=2)

    for epoch in range(3):
        right = 0
        for images, upright in loader:
            across = images.diff(dim=2).abs().mean((1, 2))
            down = images.diff(dim=1).abs().mean((1, 2))
            score = torch.stack([across, down], 1) @ weights
            loss = torch.nn.functional.binary_cross_entropy_with_logits(score, upright.float())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            right += int(((score > 0) == (upright > 0)).sum())
        print(f"epoch {epoch + 1}: {'all' if right == 512 else 'not all'} images told apart")

    told = loader.statistics()
    print(f"{told.batches} batches, all but the first ones in {told.slots} shared slots:", end=" ")
    print(told.left_out <= 5)
    seen = memory.map(access=md.Access.READ_ONLY).array(2, "f4")
    print(f"others see the weights learn: {bool(seen[0] > 0 > seen[1])}")


if __name__ == "__main__":
    main()
