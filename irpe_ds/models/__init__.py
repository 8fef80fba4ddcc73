"""Vision transformers with relative position; importing it registers the zoo with timm."""

from irpe_ds.models import zoo
from irpe_ds.models.attention import RPEAttention
from irpe_ds.models.multihead import RPEMultiheadAttention
from irpe_ds.models.vision_transformer import equip

__all__ = ["RPEAttention", "RPEMultiheadAttention", "equip", "zoo"]
