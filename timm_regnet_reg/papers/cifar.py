"""The CIFAR images that the recipes train on, as `regnet-reg cifar` writes them."""

CLASSES = {'cifar10': 10, 'cifar100': 100}
SIZE, BORDER = 32, 4  # pixels
# a side of the written images: the recipes' crop is the papers', a window of 32x32 cut anywhere in a black border
SIZES = {'train': SIZE + 2 * BORDER, 'validation': SIZE}
