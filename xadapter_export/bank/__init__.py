"""Static banks of CLIP image features."""

from xadapter_export.bank.feature_bank import FeatureBank
from xadapter_export.bank.record import BankClip, BankRecord

__all__ = ["BankClip", "BankRecord", "FeatureBank"]
