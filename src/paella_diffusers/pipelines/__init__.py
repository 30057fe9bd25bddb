from ..registration import register
from .pipeline_paella import PaellaPipeline

register({"text2image": PaellaPipeline})

__all__ = ["PaellaPipeline"]
