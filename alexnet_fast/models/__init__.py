"""AlexNet in its variants, and where their weights come from."""

from alexnet_fast.models.alexnet import AlexNet, alexnet
from alexnet_fast.models.features import FeatureExtractor, features
from alexnet_fast.models.lpips import LPIPS
from alexnet_fast.models.variants import VARIANTS, Variant
from alexnet_fast.models.weights import AlexNet_Weights

__all__ = ["LPIPS", "VARIANTS", "AlexNet", "AlexNet_Weights", "FeatureExtractor", "Variant", "alexnet", "features"]
