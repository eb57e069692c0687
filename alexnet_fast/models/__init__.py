"""AlexNet in its variants, and where their weights come from."""

from typing import TYPE_CHECKING

from alexnet_fast.models.alexnet import AlexNet
from alexnet_fast.models.lpips import LPIPS
from alexnet_fast.models.variants import VARIANTS, Variant
from alexnet_fast.models.weights import AlexNet_Weights

if TYPE_CHECKING:
    from alexnet_fast.models.alexnet import alexnet
else:
    from alexnet_fast.models import alexnet  # the module, which can be called as the function that it holds

__all__ = ["LPIPS", "VARIANTS", "AlexNet", "AlexNet_Weights", "Variant", "alexnet"]
