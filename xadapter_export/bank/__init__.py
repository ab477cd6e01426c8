"""Static banks of CLIP image features."""

from xadapter_export.bank.feature_bank import FeatureBank

__all__ = ["FeatureBank"]
