"""AlexNet in its variants, and where their weights come from."""

from alexnet_fast.models import alexnet  # the module, which can be called as the function that it holds
from alexnet_fast.models.alexnet import AlexNet
from alexnet_fast.models.variants import VARIANTS, Variant
from alexnet_fast.models.weights import AlexNet_Weights

__all__ = ["VARIANTS", "AlexNet", "AlexNet_Weights", "Variant", "alexnet"]
